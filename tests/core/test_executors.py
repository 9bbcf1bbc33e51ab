"""Jobs that run elsewhere leave the same records; what dies there becomes a row; mistakes are told of at once."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pandas as pd
import psutil
import pytest
import torch

import harness
from harness.comparison import plan
from harness.executor import Died, Executor, Handle, Submit
from harness.options import UserError
from harness.record import TIMING_COLUMNS
from harness.stopping import Stopped
from harness.store import Store
from harness_plugins import slurm

SMALL: dict[str, Any] = {"problems": "four-points", "budget": "steps=30", "evaluators": "exact,reconstruction"}

PATIENCE = 200.0
"""Seconds that what takes seconds may take on a busy machine."""

PLUGIN = """
import multiprocessing, os
from dataclasses import dataclass
from harness import hookimpl
from harness_plugins.vae import VAE

@dataclass(frozen=True, kw_only=True)
class Deadly(VAE):
    '''Ends the process of its fit.'''
    name: str = "deadly"

    def schedule(self, modules, fraction):
        if multiprocessing.parent_process() is not None:
            print("last words", flush=True)
            os._exit(7)

@hookimpl
def harness_methods():
    return [Deadly()]
"""

CLUSTER = """
import sys
from distributed import LocalCluster

if __name__ == "__main__":
    settings = {"threads_per_worker": 1, "host": "127.0.0.1", "dashboard_address": None, "resources": {"GPU": 1}}
    with LocalCluster(n_workers=2, **settings) as cluster:
        print(cluster.scheduler_address, flush=True)
        sys.stdin.read()
"""


def results(records: pd.DataFrame) -> pd.DataFrame:
    """Without what differs from machine to machine."""
    same = records.drop(columns=[*TIMING_COLUMNS, "run_id", "timing_valid", "threads"])
    return same.sort_values(["job_id", "evaluator", "metric"]).reset_index(drop=True)


@pytest.fixture(scope="module")
def scheduler() -> Iterator[str]:
    """The address of a dask scheduler with two workers, which lets a job die once."""
    surroundings = {**os.environ, "DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES": "0"}
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen([sys.executable, "-c", CLUSTER], env=surroundings, text=True, **pipes)
    assert process.stdout
    assert process.stdin
    with process:
        yield process.stdout.readline().strip()
        process.stdin.close()
        process.wait(60)


@pytest.fixture
def deadly(tmp_path: Path) -> Path:
    path = tmp_path / "deadly.py"
    path.write_text(PLUGIN)
    return path


# The same records


@dataclass(frozen=True, kw_only=True)
class Threads(Executor):
    """What a third party would write: tasks in threads of this process, one of which fails by itself at first."""

    name: str = "threads"
    dies: int = 0
    given: ClassVar[list[Any]] = []

    @contextmanager
    def connected(self, folder: Path) -> Iterator[Submit]:
        with ThreadPoolExecutor(2) as pool:

            def submit(work: Callable[[Any], Any], tasks: Sequence[Any]) -> list[Handle]:
                self.given.extend(tasks)
                return [_Thread(pool.submit(work, task), len(self.given) <= self.dies) for task in tasks]

            yield submit


@dataclass(eq=False)
class _Thread:
    future: Future[Any]
    dies: bool

    def done(self) -> bool:
        return self.future.done()

    def result(self) -> Any:
        if self.dies:
            raise Died("its thread has got lost")
        return self.future.result()

    def cancel(self) -> None:
        self.future.cancel()


def test_records_are_those_of_this_process(scheduler: str, tmp_path: Path) -> None:
    given = {**SMALL, "seeds": 1}
    here = harness.compare("vae,avb", out=tmp_path / "here", **given)
    for executor in (f"dask[address={scheduler},gpus=1]", "slurm[cluster=local]", Threads()):
        out = tmp_path / (executor.name if isinstance(executor, Executor) else executor.partition("[")[0])
        there = harness.compare("vae,avb", out=out, executor=executor, **given)
        pd.testing.assert_frame_equal(results(there), results(here))
        assert not there["timing_valid"].any()
        assert not harness.compare("vae,avb", out=out, executor=executor, **given).empty  # and is done


def test_paths_are_those_of_the_folder_where_the_run_was_started(
    scheduler: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    records = harness.compare("vae", seeds=1, out="results", executor=f"dask[address={scheduler}]", **SMALL)
    assert set(records["status"]) == {"ok"}
    assert (tmp_path / "results" / "records.csv").exists()


def test_seeds_are_fitted_together_there_too(scheduler: str, tmp_path: Path) -> None:
    given = {**SMALL, "seeds": 3, "vectorize_seeds": True}
    here = harness.compare("vae", out=tmp_path / "here", **given)
    there = harness.compare("vae", out=tmp_path / "there", executor=f"dask[address={scheduler}]", **given)
    pd.testing.assert_frame_equal(results(there), results(here))


def test_budgets_of_seconds_run_one_at_a_time(tmp_path: Path) -> None:
    given = {**SMALL, "budget": "seconds=0.3", "seeds": 2}
    records = harness.compare("vae", out=tmp_path, executor=Threads(), **given)
    assert records["timing_valid"].all()


def test_the_guides_executor_runs(tmp_path: Path) -> None:
    guide = (Path(__file__).parents[2] / "plugins/README.md").read_text()
    [code] = [block for block in re.findall(r"```python\n(.*?)```", guide, re.DOTALL) if "class Pool" in block]
    (tmp_path / "pool.py").write_text(code)
    words = ["compare", "--methods", "vae", "--problems", "four-points", "--seeds", "1", "--budget", "steps=30"]
    words += ["--evaluators", "exact", "--plugin", str(tmp_path / "pool.py"), "--executor", "pool", "--out", "results"]
    command = "import sys; from harness.cli import main; sys.exit(main())"  # in a process without threads: it forks
    subprocess.run([sys.executable, "-c", command, *words], check=True, cwd=tmp_path, capture_output=True)
    assert set(Store(tmp_path / "results").records()["status"]) == {"ok"}


# What goes wrong


def test_a_dask_worker_that_dies_costs_only_its_job(scheduler: str, deadly: Path, tmp_path: Path) -> None:
    records = harness.compare(
        "deadly,vae", seeds=1, out=tmp_path / "out", plugins=[deadly], executor=f"dask[address={scheduler}]", **SMALL
    )
    assert dict(zip(records["method"], records["status"], strict=True)) == {"deadly": "killed", "vae": "ok"}
    [reason] = records["reason"][records["method"] == "deadly"]
    assert reason.startswith("every dask worker that was at it has died (1)")


def test_a_process_that_dies_in_a_slurm_job_costs_only_its_job(deadly: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    records = harness.compare(
        "deadly,vae", seeds=1, out=out, plugins=[deadly], executor="slurm[cluster=local]", **SMALL
    )
    assert dict(zip(records["method"], records["status"], strict=True)) == {"deadly": "killed", "vae": "ok"}
    [row] = records[records["method"] == "deadly"].itertuples()
    assert row.reason == "its worker process ended with exit code 7"
    assert "last words" in (out / "jobs" / f"{row.job_id}.output.txt").read_text()


@pytest.mark.parametrize(
    ("state", "told", "status"),
    [("FAILED", "Job not requeued because: timed-out too many times.", "timeout"), ("TIMEOUT", "", "timeout"),
     ("FAILED", "no luck", "killed")],
)  # fmt: skip
def test_an_element_that_is_out_of_requeues_has_run_out_of_time(state: str, told: str, status: str) -> None:
    """It ends by an exception in its own process, so that its state does not say why."""
    from submitit.core.utils import FailedJobError

    def result() -> None:
        raise FailedJobError(told)

    job = SimpleNamespace(state=state, job_id="7", result=result, stderr=lambda: "last words")
    with pytest.raises(Died) as died:
        slurm._Handle(job).result()
    assert (died.value.status, died.value.output) == (status, "last words")


def test_a_task_that_gets_lost_is_handed_in_again(tmp_path: Path) -> None:
    Threads.given.clear()
    records = harness.compare("vae", seeds=1, out=tmp_path, executor=Threads(dies=1), **SMALL)
    assert set(records["status"]) == {"ok"}
    assert len(Threads.given) == 2


def test_one_that_gets_lost_again_and_again_becomes_a_row(tmp_path: Path) -> None:
    Threads.given.clear()
    records = harness.compare("vae", seeds=1, out=tmp_path, executor=Threads(dies=99), **SMALL)
    assert set(records["status"]) <= {"ok", "killed"}
    assert len(Threads.given) == 3


def test_mistakes_are_told_of_before_anything_is_run(tmp_path: Path) -> None:
    mistakes = {
        "dask": "expected the address of a scheduler",
        "dask[address=tcp://127.0.0.1:9,patience=0.5]": "no scheduler answers at 'tcp://127.0.0.1:9'",
        "dusk": "did you mean 'dask'?",
        "slurm,dask": "expected one, got 2",
        "slurm[minutes=0]": "greater than or equal to 1|greater than 0",
    }
    for executor, words in mistakes.items():
        with pytest.raises(UserError, match=words):
            harness.compare("vae", seeds=1, out=tmp_path / "out", executor=executor, **SMALL)
    with pytest.raises(UserError, match="how many run at once is up to the executor"):
        harness.compare("vae", seeds=1, out=tmp_path / "out", executor="slurm", jobs=2, **SMALL)
    assert not (tmp_path / "out" / "jobs").exists()


def test_a_device_that_is_not_here_may_be_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The jobs are handed in; that it is not there either is told by where they run, which is here."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    Threads.given.clear()
    with pytest.raises(UserError, match="device 'cuda' is not available"):
        harness.compare("vae", seeds=1, out=tmp_path, executor=Threads(), device="cuda", **SMALL)
    assert len(Threads.given) == 1


def test_limits_need_processes_of_dask_workers(scheduler: str, tmp_path: Path) -> None:
    executor = f"dask[address={scheduler}]"
    with pytest.raises(UserError, match="may not start processes"):
        harness.compare("vae", seeds=1, out=tmp_path, executor=executor, time_limit=100, **SMALL)


def test_slurm_kills_what_goes_over_a_limit(deadly: Path, tmp_path: Path) -> None:
    text = deadly.read_text().replace("os._exit(7)", "__import__('time').sleep(1000)")
    deadly.write_text(text)
    records = harness.compare(
        "deadly", seeds=1, out=tmp_path, plugins=[deadly], executor="slurm[cluster=local]", time_limit=3, **SMALL
    )
    assert set(records["status"]) == {"timeout"}


# An end before the work is done


def elements(command: psutil.Popen) -> list[psutil.Process]:
    """The processes that do the work of a job array's elements."""
    found: list[psutil.Process] = []
    for child in command.children(recursive=True):
        with suppress(psutil.Error):  # it has just ended
            if "submitit.core._submit" in child.cmdline():
                found.append(child)
    return found


def test_a_fit_that_is_put_back_into_the_queue_goes_on_from_where_it_was(deadly: Path, tmp_path: Path) -> None:
    """As Slurm does: a signal, upon which submitit asks what is to be called again, and ends the process."""
    notes = tmp_path / "notes"
    slow = f"time.sleep(0.02), open({str(notes)!r}, 'a').write('.')"
    deadly.write_text(deadly.read_text().replace("os._exit(7)", slow).replace("import multi", "import time, multi"))
    given = ["deadly", "--problems", "four-points", "--seeds", "1", "--budget", "steps=300", "--evaluators", "exact"]
    words = ["compare", "--methods", *given, "--plugin", str(deadly), "--executor", "slurm[cluster=local]"]
    command = f"import sys; from harness.cli import main; sys.exit(main({[*words, '--out', str(tmp_path / 'out')]!r}))"
    process = psutil.Popen([sys.executable, "-c", command], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    end = time.monotonic() + PATIENCE
    while not notes.exists() or len(notes.read_text()) < 50:
        assert time.monotonic() < end
        time.sleep(0.1)
    [element] = elements(process)
    element.send_signal(signal.SIGUSR2)
    assert process.wait(PATIENCE) == 0
    records = Store(tmp_path / "out").records()
    assert set(records["status"]) == {"ok"}
    assert set(records["fit_parts"]) == {2}
    assert len(notes.read_text()) < 320  # it has not begun anew


def test_a_run_whose_time_is_up_stops_and_goes_on(tmp_path: Path) -> None:
    given = {**SMALL, "budget": "steps=100000", "seeds": 1}
    with pytest.raises(Stopped):
        harness.compare("vae", out=tmp_path, executor=Threads(), stop_after=4, **given)
    [planned] = plan("vae", out=tmp_path, **given)
    assert planned.step > 0
    assert not planned.status


def test_an_interrupt_ends_what_was_handed_in(tmp_path: Path) -> None:
    code = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # it may be ignored where tests run
        "import harness; harness.compare('vae', 'four-points', 1, budget='steps=1000000', "
        f"executor='slurm[cluster=local]', out={str(tmp_path)!r})"
    )
    process = psutil.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    store, end = Store(tmp_path), time.monotonic() + PATIENCE
    while not elements(process):
        assert time.monotonic() < end
        time.sleep(0.1)
    children = process.children(recursive=True)
    process.send_signal(2)
    process.wait(PATIENCE)
    _, alive = psutil.wait_procs(children, PATIENCE)
    assert not alive
    assert store.job_ids() == []

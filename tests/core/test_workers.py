"""Several jobs at once, in worker processes: the same results, and what becomes of those that die or are stopped."""

from __future__ import annotations

import errno
import logging
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
import types
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import psutil
import pytest
import torch

import harness
from harness.audience import Progress
from harness.cli.progress import PlainProgress
from harness.comparison import plan, planned
from harness.executors import End, WorkerProcesses
from harness.options import UserError
from harness.planning import PlannedJob
from harness.record import TIMING_COLUMNS
from harness.stopping import Stop, Stopped
from harness.store import Store
from harness.working import Bundle, Deaths, Whereabouts
from harness_plugins.vae import VAE

SMALL: dict[str, Any] = {
    "problems": "four-points", "seeds": 2, "budget": "steps=30", "evaluators": "exact,reconstruction"
}  # fmt: skip
METHODS = "avb[noise_dim=4],vae"
HARNESS = [sys.executable, "-c", "import sys; from harness.cli import main; sys.exit(main())"]

BAD = """
import multiprocessing, os, signal, time, warnings
from dataclasses import dataclass
from harness import hookimpl
from harness.evaluator import Evaluator
from harness_plugins.vae import VAE

@dataclass(frozen=True, kw_only=True)
class Dying(VAE):
    '''Dies in its fit, by the signal of that number, or leaves with the exit code -by.'''
    name: str = "dying"
    by: int = 9
    def fit(self, view, run):
        os.kill(os.getpid(), self.by) if self.by > 0 else os._exit(-self.by)

@dataclass(frozen=True, kw_only=True)
class Forking(VAE):
    '''Dies in its fit, and leaves a process behind, whose id it notes.'''
    name: str = "forking"
    def fit(self, view, run):
        child = os.fork()
        if child == 0:
            time.sleep(300)
        with open("child", "a") as file:
            print(child, file=file)
        os.kill(os.getpid(), 9)

@dataclass(frozen=True, kw_only=True)
class Raising(VAE):
    '''Raises in its fit, after a warning.'''
    name: str = "raising"
    def fit(self, view, run):
        warnings.warn("said in a worker")
        raise ValueError("no such luck")

@dataclass(frozen=True, kw_only=True)
class Deadly(Evaluator):
    '''Dies while it measures.'''
    name: str = "deadly"
    def measure(self, fit, problem, run):
        os._exit(3)

@dataclass(frozen=True, kw_only=True)
class Fatal(VAE):
    '''Dies in its losses.'''
    name: str = "fatal"
    def losses(self, m, x, noise):
        os._exit(5)

once = os.environ.get("DIE_ONCE")
if once and multiprocessing.parent_process() and not os.path.exists(once):
    try:
        open(once, "x").close()
    except OSError:
        pass
    os._exit(4)

@hookimpl
def harness_methods():
    return [Dying(), Forking(), Raising(), Fatal()]

@hookimpl
def harness_evaluators():
    return [Deadly()]

@hookimpl
def harness_job_finished(job, outcome):
    if path := os.environ.get("NOTES"):
        with open(path, "a") as file:
            print(os.getpid(), job.method.name, outcome.status, file=file)
"""


@pytest.fixture
def bad(tmp_path: Path) -> Path:
    path = tmp_path / "bad.py"
    path.write_text(BAD)
    return path


def results(records: pd.DataFrame) -> pd.DataFrame:
    """What must be the same wherever the jobs are done."""
    same = records.drop(columns=[*TIMING_COLUMNS, "run_id", "timing_valid", "threads"])
    return same.sort_values(["job_id", "evaluator", "metric"]).reset_index(drop=True)


def test_the_results_are_those_of_one_after_another(tmp_path: Path) -> None:
    serial = harness.compare(METHODS, out=tmp_path / "serial", **SMALL)
    beside = harness.compare(METHODS, out=tmp_path / "beside", jobs=2, **SMALL)
    pd.testing.assert_frame_equal(results(serial), results(beside))
    assert serial["timing_valid"].all()
    assert not beside["timing_valid"].any()
    assert (beside["threads"] == max(1, (os.cpu_count() or 1) // 2)).all()
    assert all(job.done for job in plan(METHODS, out=tmp_path / "beside", jobs=2, **SMALL))
    for job_id in beside["job_id"].unique():
        first, second = (Store(tmp_path / name).state(job_id) for name in ("serial", "beside"))
        assert all((first[name] == second[name]).all() for name in first)


def test_seeds_at_once_are_one_task_of_a_worker(tmp_path: Path) -> None:
    alone = harness.compare(METHODS, out=tmp_path / "alone", vectorize_seeds=True, **SMALL)
    beside = harness.compare(METHODS, out=tmp_path / "beside", vectorize_seeds=True, jobs=2, **SMALL)
    pd.testing.assert_frame_equal(results(alone), results(beside))
    assert beside["shared_clock"].all()


def test_budgets_of_seconds_have_the_clock_to_themselves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which they need for their fits only: what these are measured by later is measured beside others."""
    threads = torch.get_num_threads()
    records = harness.compare("vae", out=tmp_path, jobs=2, **{**SMALL, "budget": "seconds=0.05"})
    assert records["timing_valid"].all()
    assert (records["threads"] == max(1, (os.cpu_count() or 1) // 2)).all()
    assert torch.get_num_threads() == threads
    monkeypatch.delattr("harness.executing.LocalExecutor")
    more = {**SMALL, "budget": "seconds=0.05", "evaluators": "reconstruction[samples=2]"}
    assert set(harness.compare("vae", out=tmp_path, jobs=2, **more)["status"]) == {"ok"}


@pytest.mark.parametrize(
    ("by", "end"),
    [(signal.SIGKILL, "killed by SIGKILL"), (signal.SIGSEGV, "SIGSEGV"), (0, "exit code 0"), (-7, "exit code 7")],
)
def test_a_worker_that_dies_costs_only_its_job(tmp_path: Path, bad: Path, by: int, end: str) -> None:
    given = {**SMALL, "jobs": 2, "plugins": [bad]}
    records = harness.compare(f"dying[by={int(by)}],vae", out=tmp_path, **given)
    dead, well = records[records["method"] == "dying"], records[records["method"] == "vae"]
    assert list(dead["status"]) == ["killed"] * 2
    assert dead["reason"].str.contains(end).all()
    assert set(well["status"]) == {"ok"}
    alone = harness.compare("vae", out=tmp_path / "alone", **SMALL)
    pd.testing.assert_frame_equal(results(alone), results(well), check_dtype=False)  # dead jobs have no numbers
    again = harness.compare(f"dying[by={int(by)}],vae", out=tmp_path, **given)
    assert list(again["started_at"]) == list(records["started_at"]), "what has ended is not tried again unasked"
    retried = plan(f"dying[by={int(by)}]", out=tmp_path, retry=["killed"], **given)
    assert not any(job.done for job in retried)


def test_a_process_that_a_dead_worker_has_forked_holds_nobody_up(
    tmp_path: Path, bad: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has all that the worker had open, and goes on for five minutes."""
    monkeypatch.chdir(tmp_path)
    start = time.monotonic()
    try:
        records = harness.compare("forking", out=tmp_path, jobs=2, plugins=[bad], **{**SMALL, "seeds": 1})
    finally:
        for child in (tmp_path / "child").read_text().split():
            os.kill(int(child), signal.SIGKILL)
    assert list(records["status"]) == ["killed"]
    assert time.monotonic() - start < 200


@pytest.mark.parametrize("at", [None, Whereabouts()])
def test_a_fit_that_is_gone_and_kills_its_worker_is_not_made_again_and_again(
    at: Whereabouts | None, tmp_path: Path
) -> None:
    given = {**SMALL, "seeds": 1, "out": tmp_path}
    [job_id] = set(harness.compare("vae", **given)["job_id"])
    store = Store(tmp_path)
    store.state_path(job_id).unlink()
    ended: list[str] = []
    deaths = Deaths(planned("vae", **given), store, {}, lambda job_id, outcome: ended.append(outcome.status))
    bundle, end = Bundle((job_id,)), End("timeout", "its time was up", "")
    assert deaths.of(bundle, [job_id], at, end) == []
    assert (ended, (store.job(job_id) or {})["status"]) == (["timeout"], "timeout")
    assert list(store.records()["status"]) == ["timeout"]  # what was measured of the fit that is gone is no record


@pytest.mark.parametrize("together", [False, True])
def test_a_worker_that_dies_while_it_measures_loses_that_measurement_only(
    tmp_path: Path, bad: Path, together: bool
) -> None:
    given = {**SMALL, "evaluators": "exact,deadly,reconstruction", "plugins": [bad], "vectorize_seeds": together}
    records = harness.compare("vae", out=tmp_path, jobs=2, **given)
    by = records.groupby("evaluator")["status"].unique().map(list).to_dict()
    assert by == {"exact": ["ok"], "deadly": ["killed"], "reconstruction": ["ok"]}
    assert (records.groupby("seed").size() == 4).all()  # log p(x) and the KL, what died, and what came after
    assert {facts["status"] for facts in map(Store(tmp_path).job, records["job_id"]) if facts} == {"ok"}
    again = harness.compare("vae", out=tmp_path, jobs=2, retry=["killed"], **given)
    assert list(again["status"]) == list(records["status"])
    assert list(again["started_at"]) == list(records["started_at"]), "fitted again"


def test_a_bundle_that_dies_in_its_fit_is_told_of_job_by_job(
    tmp_path: Path, bad: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Seeds at once: the second step kills."""
    given = {**SMALL, "seeds": 3, "plugins": [bad], "vectorize_seeds": True, "progress": PlainProgress()}
    records = harness.compare("fatal,vae", out=tmp_path, jobs=2, **given)
    assert records[records["method"] == "fatal"]["status"].tolist() == ["killed"] * 3
    assert set(records[records["method"] == "vae"]["status"]) == {"ok"}
    lines = [line for line in capsys.readouterr().err.splitlines() if "killed after" in line]
    assert [line.split("] ")[1].split(":")[0] for line in lines] == [
        f"fatal on four-points, seed {n}" for n in range(3)
    ]


def test_a_worker_that_dies_before_it_begins_is_replaced(tmp_path: Path, bad: Path, monkeypatch: Any) -> None:
    """The first one to import the plugin dies of it; and where every one does, there is an end to it."""
    monkeypatch.setenv("DIE_ONCE", str(tmp_path / "died"))
    given = {**SMALL, "plugins": [bad], "jobs": 2}
    records = harness.compare("vae", out=tmp_path / "once", **given)
    assert (tmp_path / "died").exists()
    assert set(records["status"]) == {"ok"}
    monkeypatch.setenv("DIE_ONCE", str(tmp_path / "no/such/folder"))
    records = harness.compare("vae", out=tmp_path / "always", **given)
    assert list(records["status"]) == ["killed"] * 2


def test_what_a_method_raises_and_says_arrives(tmp_path: Path, bad: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "harness"):
        records = harness.compare("raising,vae", out=tmp_path, jobs=2, plugins=[bad], **SMALL)
    failed = records[records["method"] == "raising"]
    assert list(failed["reason"]) == ["ValueError: no such luck"] * 2
    assert "said in a worker" in caplog.text
    assert list(tmp_path.glob("jobs/*.traceback.txt"))


def test_plugins_and_progress_are_told_in_this_process(
    tmp_path: Path, bad: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NOTES", str(tmp_path / "notes"))
    said: list[tuple[str, ...]] = []

    class Told(Progress):
        def job_started(self, job: PlannedJob, together: int = 1) -> None:
            said.append(("started", job.method, str(job.seed)))

        def measuring(self, evaluator: str) -> None:
            said.append(("measuring", evaluator))

        def job_finished(self, job: PlannedJob, status: str, reason: str) -> None:
            said.append(("finished", job.method, str(job.seed), status))

    harness.compare("dying,vae", out=tmp_path / "out", jobs=2, plugins=[bad], progress=Told(), **SMALL)
    notes = sorted((tmp_path / "notes").read_text().splitlines())
    assert notes == sorted(f"{os.getpid()} {line}" for line in ["dying killed"] * 2 + ["vae ok"] * 2)
    assert sorted(said) == sorted(
        [("started", method, seed) for method in ("dying", "vae") for seed in "01"]
        + [("measuring", evaluator) for evaluator in ("exact", "reconstruction") for _ in "01"]
        + [("finished", "dying", seed, "killed") for seed in "01"]
        + [("finished", "vae", seed, "ok") for seed in "01"]
    )


def test_the_line_that_tells_of_a_death_names_the_job_that_died(
    tmp_path: Path, bad: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    harness.compare("dying,vae", out=tmp_path, jobs=2, plugins=[bad], progress=PlainProgress(), **SMALL)
    told = [line for line in capsys.readouterr().err.splitlines() if "killed after" in line]
    assert len(told) == 2
    assert all("] dying on four-points, seed" in line for line in told)


def test_a_run_that_is_out_of_time_goes_on_where_it_was(tmp_path: Path) -> None:
    given = {**SMALL, "budget": "steps=300"}
    with pytest.raises(Stopped, match=r"stopped after 0\.5 seconds"):
        harness.compare(METHODS, out=tmp_path / "parts", jobs=2, stop_after=0.5, **given)
    assert not any(job.done for job in plan(METHODS, out=tmp_path / "parts", **given))
    whole = harness.compare(METHODS, out=tmp_path / "whole", **given)
    parts = harness.compare(METHODS, out=tmp_path / "parts", jobs=2, **given)
    pd.testing.assert_frame_equal(results(whole), results(parts))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_nothing_is_left_running_when_the_command_ends(tmp_path: Path, number: int) -> None:
    """An interrupt keeps what the fits have come to; so do the workers of a command that was killed."""
    words = ["compare", "--methods", METHODS, "--problems", "four-points", "--seeds", "1", "--jobs", "2"]
    words += ["--budget", "steps=1000000", "--evaluators", "exact", "--out", str(tmp_path)]
    # Tests that run in the background may have been started with SIGINT ignored, which is inherited.
    heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen([*HARNESS, *words], stderr=subprocess.PIPE, text=True, preexec_fn=heard)
    assert process.stderr is not None
    workers: list[psutil.Process] = []
    try:
        for line in process.stderr:
            if ": step " in line:
                break
        workers = psutil.Process(process.pid).children(recursive=True)
        assert len(workers) >= 2
        process.send_signal(number)
        said = process.stderr.read() if number != signal.SIGKILL else ""
        code = process.wait(60)
        _, alive = psutil.wait_procs(workers, timeout=60)
        assert not alive
    finally:
        process.kill()
        process.wait()
        process.stderr.close()
        for worker in workers:
            if worker.is_running():
                worker.kill()
    assert code == (-signal.SIGKILL if number == signal.SIGKILL else 130)
    assert "Traceback" not in said
    steps = [job.step for job in plan(METHODS, out=tmp_path, seeds=1, budget="steps=1000000",
                                      problems="four-points", evaluators="exact")]  # fmt: skip
    assert all(step > 0 for step in steps), steps


def test_objects_that_cannot_be_sent_are_refused(tmp_path: Path) -> None:
    class Mine(VAE):
        """Known in this function only."""

    with pytest.raises(UserError, match="jobs=1"):
        harness.compare(Mine(), out=tmp_path, jobs=2, **SMALL)
    assert len(harness.compare(VAE(lr=0.01), out=tmp_path, jobs=2, **SMALL)) == 2 * 3


def test_experiments_that_need_undisturbed_seconds_say_so(tmp_path: Path) -> None:
    example = Path(__file__).parents[1] / "distributions/harness-experiment/tiny_toy.py"
    with pytest.raises(UserError, match=r"equal-seconds: the seconds of fits are needed .* use jobs=1"):
        harness.reproduce("tiny-toy", plugins=[example], scale="smoke", jobs=2, out=tmp_path)
    assert not list(tmp_path.iterdir())


def test_objects_that_workers_cannot_import_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As those of a notebook: there is no file that a worker could read."""
    monkeypatch.setitem(sys.modules, "cells", types.ModuleType("cells"))
    exec("from harness_plugins.vae import VAE\nclass Mine(VAE): ...", vars(sys.modules["cells"]))
    with pytest.raises(UserError, match="use jobs=1"):
        WorkerProcesses(2).run(sys.modules["cells"].Mine, [1], lambda *said: None, _nobody_dies, Stop())


@pytest.mark.parametrize("jobs", [0, -1, "two", "", 1.5, None, True])
def test_numbers_of_jobs_that_make_no_sense(tmp_path: Path, jobs: Any) -> None:
    with pytest.raises(UserError, match="positive whole number"):
        harness.compare("vae", out=tmp_path, jobs=jobs, **SMALL)


def _nobody_dies(worker: int, task: Any, end: End) -> Any:
    pytest.fail(f"worker {worker} {end}")


def _unready(boss: Any) -> Any:
    raise LookupError("not today")


def _full(boss: Any) -> Any:
    raise OSError(errno.ENOSPC, "No space left on device", "results")


@pytest.mark.parametrize(
    ("prepare", "error", "text"), [(_unready, LookupError, "not today"), (_full, OSError, "No space")]
)
def test_an_error_of_the_harness_ends_the_run(prepare: Any, error: type[Exception], text: str) -> None:
    """A full disk looks like no broken connection."""
    heard: list[Any] = []
    with pytest.raises(error, match=text):
        WorkerProcesses(2).run(prepare, range(5), heard.append, _nobody_dies, Stop())
    assert not heard


def _talkative(boss: Any) -> Any:
    return lambda task: boss.tell("step", task)


def test_an_error_of_those_who_are_told_ends_the_run() -> None:
    def heard(worker: int, event: str, *facts: Any) -> None:
        raise BrokenPipeError("nobody reads")

    with pytest.raises(BrokenPipeError, match="nobody reads"):
        WorkerProcesses(2).run(_talkative, range(5), heard, _nobody_dies, Stop())


def _deaf(boss: Any) -> Any:
    def work(task: int) -> None:
        if task == 0:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            socket.socket(fileno=os.dup(boss._connection.fileno())).shutdown(socket.SHUT_RDWR)
            time.sleep(1000)

    return work


def test_a_worker_that_nobody_can_reach_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("harness.executors.process.PATIENCE", 0.5)
    dead: list[tuple[int, End]] = []

    def died(worker: int, task: int, end: End) -> list[int]:
        dead.append((task, end))
        return []

    WorkerProcesses(2).run(_deaf, range(3), lambda *said: None, died, Stop())
    assert dead == [(0, End("killed", "its worker process was killed by SIGKILL"))]


SCRIPT = """
import harness
records = harness.compare("vae", "four-points", 2, budget="steps=20", evaluators="exact", jobs=2, out={out!r})
print(len(records))
"""


@pytest.mark.parametrize("guarded", [True, False])
def test_a_script_of_the_user(tmp_path: Path, guarded: bool) -> None:
    """Worker processes import the script; without the usual guard that is an endless regress, and Python says so."""
    body = SCRIPT.format(out=str(tmp_path / "out"))
    path = tmp_path / "script.py"
    path.write_text(f"if __name__ == '__main__':\n{textwrap.indent(body, '    ')}" if guarded else body)
    ran = subprocess.run([sys.executable, str(path)], capture_output=True, text=True, timeout=60)
    if guarded:
        assert (ran.returncode, ran.stdout.strip()) == (0, "4")
    else:
        assert ran.returncode
        assert "guard it by `if __name__ == '__main__':`" in ran.stderr


BARS = """
from harness.executors.workers import WorkerProcesses
from harness.stopping import Stop
from tqdm import tqdm

def prepared(boss):
    return lambda task: boss.tell("shown", tqdm(total=task, disable=False).total)

if __name__ == "__main__":
    WorkerProcesses(2).run(prepared, range(3), lambda *said: print(*said[1:]), print, Stop())
"""


def test_progress_bars_of_others_leave_nothing_behind(tmp_path: Path) -> None:
    """As those of torch's compiler: Python told of leaked semaphores when it ended."""
    path = tmp_path / "bars.py"
    path.write_text(BARS)
    ran = subprocess.run([sys.executable, str(path)], capture_output=True, text=True, timeout=60)
    assert (ran.returncode, ran.stderr) == (0, "")
    assert sorted(ran.stdout.splitlines()) == ["shown 0", "shown 1", "shown 2"]

"""Jobs, keys, streams and the store, through the Python interface."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor

import harness
from harness import running
from harness.comparison import evaluate, plan
from harness.evaluator import EvaluationRun, Evaluator, Measurement
from harness.method import Fit
from harness.options import UserError
from harness.planning import resolve
from harness.posterior import Posterior
from harness.problem import DataError, Problem, loaded, placed
from harness.record import COLUMNS, TIMING_COLUMNS
from harness.store import Store
from harness.training import Modules, Noise
from harness_plugins.vae import VAE, GaussianPosterior

METHODS = "avb[noise_dim=4],vae"
SMALL = {"problems": "four-points", "seeds": 2, "budget": "steps=30", "evaluators": "exact,reconstruction"}


def results(records: pd.DataFrame) -> pd.DataFrame:
    """What must be the same in two runs of the same jobs, whatever was run beside them."""
    same = records.drop(columns=[*TIMING_COLUMNS, "run_id"])
    return same.sort_values(["job_id", "evaluator", "metric"]).reset_index(drop=True)


def test_records_follow_the_contract(tmp_path: Path) -> None:
    records = harness.compare(METHODS, out=tmp_path, **SMALL)
    assert list(records.columns) == COLUMNS
    counts = records.groupby(["method", "seed", "metric"]).size()
    assert (counts == 1).all()
    assert {("avb", 1, "log_likelihood"), ("vae", 0, "reconstruction")} <= set(counts.index)
    assert set(records["status"]) == {"ok"}
    assert (records["fit_steps"] == 30).all()
    pd.testing.assert_frame_equal(
        pd.read_parquet(tmp_path / "records.parquet")[COLUMNS].convert_dtypes(),
        Store(tmp_path).records().convert_dtypes(),
    )
    assert list(pd.read_csv(tmp_path / "records.csv").columns) == COLUMNS
    examples = pd.read_parquet(tmp_path / "examples.parquet")
    means = examples.groupby(["job_id", "metric"])["value"].mean()
    for _, record in records.iterrows():
        assert means[record["job_id"], record["metric"]] == pytest.approx(record["value"], abs=1e-12)


def test_every_method_has_the_same_spec_and_decoder(tmp_path: Path) -> None:
    records = harness.compare(METHODS, out=tmp_path, **SMALL)
    assert records["spec_hash"].nunique() == 1
    assert records["decoder_parameters"].nunique() == 1


def test_same_command_in_two_folders_gives_the_same_results(tmp_path: Path) -> None:
    first = harness.compare(METHODS, out=tmp_path / "a", **SMALL)
    second = harness.compare(METHODS, out=tmp_path / "b", **SMALL)
    columns = [column for column in COLUMNS if column not in TIMING_COLUMNS]
    pd.testing.assert_frame_equal(first[columns], second[columns])


def test_adding_a_method_changes_no_other_result_by_a_bit(tmp_path: Path) -> None:
    alone = harness.compare("vae", out=tmp_path / "a", **SMALL)
    beside = harness.compare("avb[noise_dim=4],vae,vae[lr=1e-2]", out=tmp_path / "b", **SMALL)
    pd.testing.assert_frame_equal(results(alone), results(beside[beside["job_id"].isin(alone["job_id"])]))


def test_what_is_done_is_not_done_again_whatever_the_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = harness.compare(METHODS, out=tmp_path, **SMALL)
    for step in ("fit_jobs", "measure_job"):
        monkeypatch.setattr(f"harness.working.{step}", lambda *a, **k: pytest.fail("a finished job was run again"))
    again = harness.compare("vae,avb[noise_dim=4]", out=tmp_path, **SMALL)
    pd.testing.assert_frame_equal(results(first), results(again))
    assert all(job.done for job in plan(METHODS, out=tmp_path, **SMALL))


def test_a_new_evaluator_trains_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = harness.compare(METHODS, out=tmp_path, **SMALL)
    monkeypatch.setattr("harness.running._fitted", lambda *a, **k: pytest.fail("trained again"))
    measured = evaluate(tmp_path, "importance[samples=50]")
    assert set(measured["job_id"]) == set(first["job_id"])
    assert set(measured["evaluator"]) == {"importance[samples=50]"}
    assert len(Store(tmp_path).records()) == len(first) + len(measured)


def test_measuring_later_gives_what_measuring_at_once_gives(tmp_path: Path) -> None:
    at_once = harness.compare(METHODS, out=tmp_path / "a", **SMALL)
    harness.compare(METHODS, out=tmp_path / "b", **{**SMALL, "evaluators": "exact"})
    later = evaluate(tmp_path / "b", "reconstruction")
    expected = at_once[at_once["evaluator"] == "reconstruction"].set_index("job_id")["value"]
    assert later.set_index("job_id")["value"].to_dict() == expected.to_dict()


def test_fit_in_memory_and_loaded_fit_are_the_compared_fit(tmp_path: Path) -> None:
    records = harness.compare("avb[noise_dim=4]", out=tmp_path, **SMALL)
    loaded = harness.load(tmp_path, records["job_id"][0])
    fitted = harness.fit("avb[noise_dim=4]", "four-points", seed=int(records["seed"][0]), budget="steps=30")
    assert fitted.steps == 30
    assert len(fitted.curve) >= 2
    for name, tensor in fitted.state.items():
        assert torch.equal(tensor, loaded.state[name]), name
    x = harness.data("four-points").test
    draws = [fit.posterior.sample(x, 3, torch.Generator().manual_seed(0)) for fit in (fitted, loaded)]
    assert draws[0].shape == (3, 4, 2)
    assert torch.equal(*draws)


def test_figures_that_cannot_be_made_cost_no_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    x = np.random.default_rng(0).random((40, 3, 3)).astype(np.float32)
    np.savez(tmp_path / "x.npz", train=x[:20], validation=x[20:30], test=x[30:])

    def broken(*_: object) -> None:
        raise RuntimeError("no picture")

    monkeypatch.setattr(running, "gallery", broken)
    words = {**SMALL, "problems": f"file:{tmp_path / 'x.npz'}", "evaluators": "reconstruction", "seeds": 1}
    records = harness.compare("vae", out=tmp_path / "out", **words)
    assert set(records["status"]) == {"ok"}
    assert "no arrays for figures: RuntimeError: no picture" in caplog.text


def test_data_that_change_under_a_run_are_no_data_of_its_jobs(tmp_path: Path) -> None:
    x = np.random.default_rng(0).random((40, 3, 3)).astype(np.float32)
    path = tmp_path / "x.npz"
    np.savez(path, train=x[:20], validation=x[20:30], test=x[30:])
    [job] = resolve("vae", f"file:{path}", [0], "steps=3", None, "cpu", "float32", "auto", (), ()).jobs
    assert job.job_id
    np.savez(path, train=1 - x[:20], validation=x[20:30], test=x[30:])
    loaded.cache_clear()  # as other problems do that come in between
    placed.cache_clear()
    with pytest.raises(DataError, match="its data have changed since the run began"):
        job.training_view()


def test_the_clock_of_a_fit_runs_while_nothing_is_imported(tmp_path: Path) -> None:
    """In a process of its own, where each kind of method is the first that needs what it needs."""
    script = """
        import sys
        from contextlib import contextmanager
        import harness
        from harness.clock import Clock

        phase = Clock.phase
        @contextmanager
        def watched(self, name):
            with phase(self, name):
                before = set(sys.modules)
                yield
            new = sorted({each.partition(".")[0] for each in set(sys.modules) - before})
            if name == "fit" and new:
                print(method, new)

        Clock.phase = watched
        for method in ("vae", "avb", "iaf"):
            harness.fit(method, "four-points", budget="steps=20")
        for method in ("mean-field", "nuts[warmup=5,draws=10,chains=2]"):
            harness.fit(method, "eight-schools", budget="steps=5")
        print("end")
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=True)
    assert done.stdout == "end\n"


def test_seeds_differ(tmp_path: Path) -> None:
    records = harness.compare("vae", out=tmp_path, **{**SMALL, "evaluators": "exact"})
    assert records[records["metric"] == "log_likelihood"]["value"].nunique() == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": [VAE]}, "methods: expected names, or objects of class Method, got <class"),
        ({"methods": 3}, "methods: expected names, or objects of class Method, got 3"),
        ({"evaluators": [VAE()]}, "evaluators: expected names, or objects of class Evaluator, got VAE"),
        ({"seeds": 2.0}, "seeds 2.0: how many must be between"),
        ({"budget": 5}, "budget 5: expected steps=N"),
        ({"device": torch.device("cuda:1")}, "unknown device 'cuda:1'"),
        ({"precision": 32}, "unknown precision '32'"),
        ({"retry": "faild"}, "unknown status to retry 'faild'"),
        ({"plugins": "mine.py"}, "plugin file 'mine.py' does not exist"),
    ],
)
def test_arguments_of_another_type_are_a_clear_mistake(changes: dict, message: str, tmp_path: Path) -> None:
    arguments = {"methods": "vae", **SMALL, "out": tmp_path / "out", **changes}
    with pytest.raises(UserError, match=re.escape(message)):
        harness.compare(**arguments)
    assert not (tmp_path / "out").exists()


def test_one_text_stands_for_a_list_of_one(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(PLUGIN.format(name="mine"))
    words = {"plugins": tmp_path / "mine.py", "retry": "failed,diverged", "device": torch.device("cpu")}
    assert len(plan(iter(["mine"]), **SMALL, out=tmp_path, **words)) == 2


def test_options_and_budget_make_other_jobs(tmp_path: Path) -> None:
    jobs = [
        plan(methods, out=tmp_path, **{**SMALL, "seeds": [0], **changes})[0].job_id
        for methods, changes in [
            ("vae", {}),
            ("vae[lr=2e-3]", {}),
            ("vae", {"budget": "steps=31"}),
            ("vae", {"seeds": [1]}),
            ("vae", {"precision": "float64"}),
            ("vae", {"problems": "four-points[width=32]"}),
        ]
    ]
    assert len(set(jobs)) == len(jobs)
    assert not list(tmp_path.iterdir()), "plan must write nothing"


PLUGIN = """
from dataclasses import dataclass
import harness
from harness_plugins.vae import VAE, GaussianPosterior


@dataclass(frozen=True, kw_only=True)
class Mine(VAE):
    name: str = "{name}"


@harness.hookimpl
def harness_methods():
    return [Mine()]
"""


def test_editing_a_plugin_makes_its_own_fits_stale_and_no_others(tmp_path: Path) -> None:
    (tmp_path / "one.py").write_text(PLUGIN.format(name="one"))
    (tmp_path / "two.py").write_text(PLUGIN.format(name="two"))
    script = textwrap.dedent(
        """
        import json, sys
        from harness.comparison import plan, compare
        arguments = dict(problems="four-points", seeds=1, budget="steps=5", evaluators="exact", out="out")
        action = compare if sys.argv[1] == "compare" else plan
        done = action("one,two,vae", plugins=["one.py", "two.py"], **arguments)
        if action is plan:
            print(json.dumps({job.method: job.done for job in done}))
        """
    )

    def run(action: str) -> str:
        command = [sys.executable, "-c", script, action]
        return subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True).stdout

    run("compare")
    assert json.loads(run("plan")) == {"one": True, "two": True, "vae": True}
    with (tmp_path / "one.py").open("a") as file:
        file.write("# an edit\n")
    assert json.loads(run("plan")) == {"one": False, "two": True, "vae": True}


# Jobs that do not end well


@dataclass(frozen=True, kw_only=True)
class Raising(VAE):
    name: str = "raising"

    def losses(self, modules: Modules, x: Tensor, noise: Noise) -> dict[str, Tensor]:
        raise RuntimeError("out of ideas")


@dataclass(frozen=True, kw_only=True)
class NotANumber(VAE):
    name: str = "nan"

    def losses(self, modules: Modules, x: Tensor, noise: Noise) -> dict[str, Tensor]:
        return {name: loss * torch.nan for name, loss in super().losses(modules, x, noise).items()}


def test_bad_methods_become_rows_and_the_others_go_on(tmp_path: Path) -> None:
    methods = [Raising(), "vae", NotANumber()]
    records = harness.compare(methods, out=tmp_path, **{**SMALL, "seeds": 1, "evaluators": "exact"})
    status = records.set_index("method")["status"].to_dict()
    assert status == {"raising": "failed", "vae": "ok", "nan": "diverged"}
    reasons = records.set_index("method")["reason"]
    assert "out of ideas" in reasons["raising"]
    assert re.search(r"nan .*step", reasons["nan"])
    job_id = records.set_index("method")["job_id"]["raising"]
    assert "out of ideas" in (tmp_path / "jobs" / f"{job_id}.traceback.txt").read_text()


def test_failed_jobs_are_tried_again_only_when_asked(tmp_path: Path) -> None:
    arguments = {**SMALL, "seeds": 1, "evaluators": "exact", "out": tmp_path}
    method = Raising()
    harness.compare([method], **arguments)
    assert plan([method], **arguments)[0].done
    assert not plan([method], **arguments, retry=["failed"])[0].done


@dataclass(frozen=True, kw_only=True)
class Fragile(VAE):
    name: str = "fragile"

    def fit(self, view, run):
        if os.environ.get("FRAGILE"):
            raise RuntimeError("no luck this time")
        return super().fit(view, run)


def test_a_fit_that_is_gone_and_cannot_be_made_anew_is_told_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = {**SMALL, "seeds": 1, "evaluators": "exact", "out": tmp_path}
    harness.compare([Fragile()], **arguments)
    [job_id] = Store(tmp_path).job_ids()
    Store(tmp_path).state_path(job_id).unlink()
    monkeypatch.setenv("FRAGILE", "yes")
    records = harness.compare([Fragile()], **{**arguments, "evaluators": "exact,reconstruction"})
    assert list(records["status"]) == ["failed"]
    monkeypatch.delenv("FRAGILE")
    records = harness.compare([Fragile()], **{**arguments, "evaluators": "exact,reconstruction"}, retry="failed")
    assert set(records["status"]) == {"ok"}
    assert set(records["evaluator"]) == {"exact", "reconstruction"}


def test_only_what_has_failed_is_tried_again(tmp_path: Path) -> None:
    arguments = {**SMALL, "seeds": 1, "evaluators": "exact", "out": tmp_path}
    [first] = harness.compare([Raising()], **arguments)["started_at"]
    harness.compare("vae", **arguments)
    wanted = [Raising(), "vae", NotANumber()]
    planned = plan(wanted, **arguments, only_failed=True)
    assert [(job.method, job.done) for job in planned] == [("raising", False), ("vae", True)]
    time.sleep(1.1)  # times of start are told to the second
    again = harness.compare(wanted, **arguments, only_failed=True).set_index("method")
    assert again["status"].to_dict() == {"raising": "failed", "vae": "ok"}
    assert again["started_at"]["raising"] > first
    assert not plan([NotANumber()], **arguments)[0].done


def test_a_method_unfit_for_a_problem_is_skipped_with_its_reason(tmp_path: Path) -> None:
    @dataclass(frozen=True, kw_only=True)
    class Choosy(VAE):
        name: str = "choosy"

        def unfit(self, view: object) -> str:
            return "only likes five points"

    records = harness.compare([Choosy()], out=tmp_path, **SMALL)
    assert set(records["status"]) == {"skipped"}
    assert set(records["reason"]) == {"only likes five points"}


def test_an_undefined_evaluator_gives_a_skipped_row(tmp_path: Path) -> None:
    records = harness.compare("avb", out=tmp_path, **{**SMALL, "seeds": 1, "evaluators": "elbo,exact"})
    assert records.set_index("evaluator")["status"].to_dict() == {"elbo": "skipped", "exact": "ok"}
    assert "density" in records.set_index("evaluator")["reason"]["elbo"]


def test_a_number_that_is_not_finite_is_a_failure_and_never_a_value(tmp_path: Path) -> None:
    @dataclass(frozen=True, kw_only=True)
    class Broken(Evaluator):
        name: str = "broken"

        def measure(self, fit: Fit, problem: Problem, run: EvaluationRun) -> list[Measurement]:
            x, indices = run.data.scored(4)
            values = torch.full((len(x),), torch.nan)
            return [run.measurement("log_likelihood", values, torch.zeros(len(x)), "exact", indices)]

    records = harness.compare("vae", out=tmp_path, **{**SMALL, "seeds": 1, "evaluators": [Broken(), "exact"]})
    status = records.set_index("evaluator")["status"]
    assert status["broken"] == "failed"
    assert set(status["exact"]) == {"ok"}
    assert "not finite" in records.set_index("evaluator")["reason"]["broken"]


@pytest.mark.parametrize("delay", [0.5, 2.0, 4.0])
def test_kill_at_any_instant_leaves_a_store_that_goes_on(tmp_path: Path, delay: float) -> None:
    script = (
        "import harness; harness.compare('vae', 'four-points', 40, budget='steps=100', evaluators='exact', out='out')"
    )
    process = subprocess.Popen([sys.executable, "-c", script], cwd=tmp_path)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(1.5 + delay)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    store = Store(tmp_path / "out")
    done = set(store.job_ids()) if store.exists() else set()
    records = harness.compare("vae", "four-points", 2, budget="steps=100", evaluators="exact", out=tmp_path / "out")
    assert set(records["status"]) == {"ok"}
    assert done <= set(store.job_ids())
    assert not np.isnan(records["value"].astype(float)).any()


def test_tables_that_were_lost_are_written_again(tmp_path: Path) -> None:
    harness.compare("vae", out=tmp_path, **SMALL)
    content = (tmp_path / "records.csv").read_bytes()
    (tmp_path / "records.csv").unlink()
    harness.compare("vae", out=tmp_path, **SMALL)
    assert (tmp_path / "records.csv").read_bytes() == content


def test_a_method_that_exits_is_a_failed_row(tmp_path: Path) -> None:
    @dataclass(frozen=True, kw_only=True)
    class Exiting(VAE):
        name: str = "exiting"

        def build(self, view: object) -> Modules:
            raise SystemExit(3)

    records = harness.compare([Exiting(), "vae"], out=tmp_path, **{**SMALL, "seeds": 1, "evaluators": "exact"})
    assert records.groupby("method")["status"].first().to_dict() == {"exiting": "failed", "vae": "ok"}


class Misdrawn(GaussianPosterior):
    """Draws of another form."""

    def __init__(self, encoder: Any, form: str) -> None:
        super().__init__(encoder)
        self.form = form

    def sample(self, x: Tensor, n: int, generator: torch.Generator) -> Tensor:
        z = super().sample(x, n, generator)
        forms: dict[str, Any] = {"swapped": z.transpose(0, 1), "first": z[0], "double": z.double(), "none": None}
        return forms[self.form]


@dataclass(frozen=True, kw_only=True)
class Misdrawing(VAE):
    name: str = "misdrawing"
    form: str = ""

    def posterior(self, modules: Modules) -> Posterior:
        return Misdrawn(modules["encoder"], self.form)


def test_draws_of_another_shape_or_precision_are_told_before_a_fit_is_stored(tmp_path: Path) -> None:
    got = {
        "swapped": "torch.float32 of shape (2, 3, 2)",
        "first": "torch.float32 of shape (2, 2)",
        "double": "torch.float64 of shape (3, 2, 2)",
        "none": "a NoneType",
    }
    methods = [*(Misdrawing(form=form) for form in got), "vae"]
    records = harness.compare(methods, out=tmp_path, **{**SMALL, "seeds": 1, "evaluators": "reconstruction"})
    told = (
        "ValueError: misdrawing: its posterior's sample(x, n=3, generator) must return (n, N, D), for x of 2 "
        "observations torch.float32 of shape (3, 2, 2); got "
    )
    wrong = records[records["method"] == "misdrawing"]
    assert set(wrong["status"]) == {"failed"}
    assert set(wrong["reason"]) == {told + each for each in got.values()}
    assert not any(Store(tmp_path).has_fit(job_id) for job_id in wrong["job_id"])
    assert records[records["method"] == "vae"]["status"].tolist() == ["ok"]


def test_draws_for_one_observation_are_looked_at_too(tmp_path: Path) -> None:
    options = {"problems": "banana", "seeds": 1, "budget": "steps=5", "evaluators": "elbo"}
    records = harness.compare("nuts[chains=2,warmup=5,draws=5],vae", out=tmp_path, **options)
    assert all(Store(tmp_path).has_fit(job_id) for job_id in records["job_id"])


def test_editing_what_a_plugin_derives_from_makes_its_fits_stale() -> None:
    """The key holds the sources of all base classes."""
    from harness.sources import class_sources, source_hash
    from harness_plugins.avb import AVB

    assert source_hash(VAE) in class_sources(Raising)
    assert source_hash(AVB) not in class_sources(Raising)

"""What evaluators are handed and what becomes of what they say: splits, traces, shared results, progress, keys."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar, get_args

import numpy as np
import pandas as pd
import pytest
import torch

import harness
from harness.audience import Progress
from harness.evaluator import EvaluationRun, Evaluator, Kind, Measurement
from harness.files import checksum
from harness.job import Job
from harness.method import Fit
from harness.planning import PlannedJob, resolve
from harness.problem import Problem, placed
from harness.sources import source_hash
from harness.store import Store
from harness_plugins.four_points import FourPoints
from harness_plugins.vae import VAE

SMALL: dict[str, Any] = {"methods": "vae", "problems": "four-points", "seeds": 2, "budget": "steps=5"}
CPU = torch.device("cpu")

COMPUTED: list[int] = []
"""Seeds of the fits that something shared was computed for."""
CURVE = np.array([[1.0, np.nan, 3.0]])


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    COMPUTED.clear()
    yield
    COMPUTED.clear()


@dataclass(frozen=True, kw_only=True)
class Sharing(Evaluator):
    """Two metrics: one with traces, one of simulated observations; its value is shared by all of its kind."""

    name: str = "sharing"
    offset: int = 0
    key: str = "shared"

    def measure(self, fit: Fit, problem: Problem, run: EvaluationRun) -> list[Measurement]:
        def compute() -> float:
            COMPUTED.append(run.seed)
            return 100.0 + run.seed

        run.progress(0.5, f"half-way with {self.offset}")
        values = torch.full((3,), run.once(self.key, compute) + self.offset)
        zeros, indices = torch.zeros(3), torch.arange(3)
        traces = {"curve": CURVE + self.offset, "counts": np.arange(2)}
        return [
            run.measurement("log_likelihood", values, zeros, "exact", indices, traces=traces),
            run.measurement("bdmc_gap", values, zeros, "exact", indices, split="simulated"),
        ]


@dataclass(frozen=True, kw_only=True)
class Faulty(Evaluator):
    """Returns what a beginner might."""

    name: str = "faulty"
    fault: str = ""

    def measure(self, fit: Fit, problem: Problem, run: EvaluationRun) -> list[Measurement]:
        _, indices = run.data.scored(3)
        numbers = torch.linspace(0, 1, 3)

        def measured(values: torch.Tensor = numbers, **extra: Any) -> Measurement:
            return run.measurement(
                "mine", values, torch.zeros_like(values), extra.pop("kind", "exact"), indices, **extra
            )

        returned: Any = {
            "": lambda: [measured()],
            "nothing": lambda: None,
            "none": list,
            "single": measured,
            "numbers": lambda: [0.5, 1],
            "mixed": lambda: [measured(), None],
            "twice": lambda: [measured(), measured()],
            "two splits": lambda: [measured(), measured(split="simulated")],
            "kind": lambda: [measured(kind="approx")],
            "settings": lambda: [measured(settings={"samples": np.float32(3), "grid": numbers, "on": np.True_})],
            "a function": lambda: [measured(settings={"of": len})],
            "matrix": lambda: [measured(numbers.expand(2, 3))],
            "scalar": lambda: [measured(numbers.mean())],
        }[self.fault]()
        return returned


def values(records: pd.DataFrame) -> dict[tuple[str, int], float]:
    mine = records[records["metric"] == "log_likelihood"]
    return {(row["evaluator"], row["seed"]): row["value"] for _, row in mine.iterrows()}


def test_a_record_names_the_split_that_was_measured(tmp_path: Path) -> None:
    harness.compare(**SMALL, evaluators=[Sharing()], out=tmp_path)
    records = pd.read_parquet(tmp_path / "records.parquet")
    found = records.groupby("metric")["split"].unique()
    assert found["log_likelihood"].tolist() == ["test"]
    assert found["bdmc_gap"].tolist() == ["simulated"]


def test_observations_that_are_not_the_test_split_are_never_all_there_are() -> None:
    """The four points are all of their population; four simulated observations are not."""
    problem = FourPoints()
    run = EvaluationRun(placed(problem, CPU, torch.float32), problem, CPU, torch.float32, seed=0)
    numbers, indices = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.arange(4)
    test, simulated = (
        run.measurement("log_likelihood", numbers, torch.zeros(4), "exact", indices, split=split)
        for split in ("test", "simulated")
    )
    assert test.stderr_test == 0
    assert simulated.stderr_test == pytest.approx(numbers.std().item() / 2)


def test_traces_are_stored_and_read_back(tmp_path: Path) -> None:
    records = harness.compare(**SMALL, evaluators=[Sharing(), Sharing(offset=1)], out=tmp_path)
    store = Store.open(tmp_path)
    for job_id in records["job_id"].unique():
        for label, offset in (("sharing", 0), ("sharing[offset=1]", 1)):
            traces = store.traces(job_id, label, "log_likelihood")
            assert sorted(traces) == ["counts", "curve"]
            np.testing.assert_array_equal(traces["curve"], CURVE + offset)
            np.testing.assert_array_equal(traces["counts"], [0, 1])
            assert traces["counts"].dtype == np.arange(2).dtype
            assert store.traces(job_id, label, "bdmc_gap") == {}
        assert store.traces(job_id, "exact", "log_likelihood") == {}
    # They are no values per observation.
    examples = store.examples()
    assert set(examples["metric"]) == {"log_likelihood", "bdmc_gap"}
    assert len(examples) == 2 * 2 * 2 * 3


def test_what_evaluators_share_is_computed_once_for_each_fit(tmp_path: Path) -> None:
    records = harness.compare(**SMALL, evaluators=[Sharing(), Sharing(offset=1)], out=tmp_path)
    assert COMPUTED == [0, 1]
    assert values(records) == {
        ("sharing", 0): 100, ("sharing", 1): 101, ("sharing[offset=1]", 0): 101, ("sharing[offset=1]", 1): 102,
    }  # fmt: skip


def test_another_key_is_computed_for_itself(tmp_path: Path) -> None:
    harness.compare(**{**SMALL, "seeds": 1}, evaluators=[Sharing(), Sharing(key="other")], out=tmp_path)
    assert COMPUTED == [0, 0]


def test_it_does_not_matter_who_asked_first_or_alone(tmp_path: Path) -> None:
    both, reverse = [Sharing(), Sharing(offset=1)], [Sharing(offset=1), Sharing()]
    at_once = values(harness.compare(**SMALL, evaluators=both, out=tmp_path / "a"))
    assert values(harness.compare(**SMALL, evaluators=reverse, out=tmp_path / "b")) == at_once
    harness.compare(**SMALL, evaluators=[Sharing()], out=tmp_path / "c")
    assert values(harness.compare(**SMALL, evaluators=both, out=tmp_path / "c")) == at_once


def test_a_computation_that_failed_is_not_remembered() -> None:
    problem = FourPoints()
    run = EvaluationRun(placed(problem, CPU, torch.float32), problem, CPU, torch.float32, seed=0)

    def fail() -> int:
        raise ArithmeticError("no")

    with pytest.raises(ArithmeticError):
        run.once("key", fail)
    assert run.once("key", lambda: 1) == 1
    assert run.once("key", fail) == 1


class Listening(Progress):
    def __init__(self) -> None:
        self.heard: list[tuple[Any, ...]] = []

    def measuring(self, evaluator: str) -> None:
        self.heard.append(("measuring", evaluator))

    def measured(self, fraction: float, facts: str) -> None:
        self.heard.append(("measured", fraction, facts))

    def job_finished(self, job: PlannedJob, status: str, reason: str) -> None:
        self.heard.append(("finished", status))


def test_progress_of_an_evaluator_is_told_while_it_measures(tmp_path: Path) -> None:
    progress = Listening()
    evaluators = [Sharing(), Sharing(offset=1)]
    harness.compare(**{**SMALL, "seeds": 1}, evaluators=evaluators, out=tmp_path, progress=progress)
    assert progress.heard == [
        ("measuring", "sharing"),
        ("measured", 0.5, "half-way with 0"),
        ("measuring", "sharing"),
        ("measured", 0.5, "half-way with 1"),
        ("finished", "ok"),
    ]


# What they may return, and may not change


@pytest.mark.parametrize(
    ("shapes", "told"),
    [
        (((2, 3), (2, 3), (3,)), r"got \(2, 3\), \(2, 3\), \(3,\)"),
        (((), (), ()), r"got \(\), \(\), \(\)"),
        (((0,), (0,), (0,)), r"got \(0,\), \(0,\), \(0,\)"),
        (((3,), (1,), (3,)), r"got \(3,\), \(1,\), \(3,\)"),
        (((2,), (2,), (3,)), r"got \(2,\), \(2,\), \(3,\)"),
    ],
)
def test_values_errors_and_indices_are_of_one_observation_each(shapes: tuple[tuple[int, ...], ...], told: str) -> None:
    values, stderrs, indices = map(np.zeros, shapes)
    with pytest.raises(ValueError, match="mine: values, stderrs and indices must be of one shape .* " + told):
        Measurement("mine", values, stderrs, "exact", indices)


@pytest.mark.parametrize(
    ("metric", "stderr", "indices", "told"),
    [
        ("", 0.0, (0, 1, 2), "needs the name of its metric"),
        ("mine", -0.1, (0, 1, 2), "mine: stderrs has negative elements"),
        ("mine", 0.0, (0, 1, 1), "mine: indices must be those of as many different observations"),
        ("mine", 0.0, (-1, 0, 1), "mine: indices must be those of as many different observations"),
    ],
)
def test_numbers_without_a_meaning_are_refused(metric: str, stderr: float, indices: tuple[int, ...], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        Measurement(metric, np.zeros(3), np.full(3, stderr), "exact", np.array(indices))


def test_values_that_are_all_the_same_say_nothing_of_the_test_sets_error() -> None:
    """Of a population it is zero, and tables then say that these are all there are; of a sample it is not known."""
    of_sample, whole = (
        Measurement("mine", np.ones(3), np.zeros(3), "exact", np.arange(3), exhaustive=exhaustive)
        for exhaustive in (False, True)
    )
    assert np.isnan(of_sample.stderr_test)
    assert whole.stderr_test == 0.0


def test_a_kind_is_one_of_those_that_reports_know() -> None:
    kind: Any = "approx"
    with pytest.raises(ValueError, match="mine: unknown kind 'approx'; expected one of exact, unbiased, lower bound, "):
        Measurement("mine", np.zeros(3), np.zeros(3), kind, np.arange(3))
    for each in get_args(Kind):
        assert Measurement("mine", np.zeros(3), np.zeros(3), each, np.arange(3)).kind == each


def test_what_is_no_measurement_fails_alone_in_one_line_and_the_results_stay_readable(tmp_path: Path) -> None:
    no_list = "TypeError: faulty: measure must return a list of measurements, at least one; got "
    no_column = "ValueError: mine: values, stderrs and indices must be of one shape (N,) with at least one "
    no_column += "observation; got "
    twice = "ValueError: faulty: measure returned mine twice; give each a metric of its own"
    told = {
        "nothing": no_list + "NoneType",
        "none": no_list + "[]",
        "single": no_list + "Measurement",
        "numbers": no_list + "[float, int]",
        "mixed": no_list + "[Measurement, NoneType]",
        "twice": twice,
        "two splits": twice,
        "kind": "ValueError: mine: unknown kind 'approx'; expected one of " + ", ".join(get_args(Kind)),
        "matrix": no_column + "(2, 3), (2, 3), (3,)",
        "scalar": no_column + "(), (), (3,)",
        "a function": "TypeError: settings of a measurement must be JSON-compatible; got <built-in function len>",
    }
    evaluators = [Faulty(fault=fault) for fault in told]
    right = [Faulty(), Faulty(fault="settings")]
    records = harness.compare(**{**SMALL, "seeds": 1}, evaluators=[*evaluators, *right], out=tmp_path)
    by = records.set_index("evaluator")
    numbers = json.loads(str(by["settings"]["faulty[fault=settings]"]))
    assert numbers == {"samples": 3.0, "grid": [0.0, 0.5, 1.0], "on": True}
    by = by.drop("faulty[fault=settings]")
    assert {fault: by["reason"][f"faulty[fault={fault}]"] for fault in told} == told
    assert by["status"].to_dict() == {by.label: "failed" for by in evaluators} | {"faulty": "ok"}
    assert by["value"]["faulty"] == 0.5
    examples = Store.open(tmp_path).examples().query("evaluator != 'faulty[fault=settings]'")
    assert examples["value"].tolist() == [0, 0.5, 1]
    assert set(examples["evaluator"]) == {"faulty"}


@dataclass(frozen=True, kw_only=True)
class Careless(Sharing):
    """Changes what it measures, then maybe fails."""

    name: str = "careless"
    how: str = "weights"

    def undefined(self, fit: Fit, problem: Problem) -> str | None:
        if self.how == "asked":
            fit.state["encoder.head.bias"].add_(1)
        return "not for this one" if self.how == "asked" else None

    def measure(self, fit: Fit, problem: Problem, run: EvaluationRun) -> list[Measurement]:
        if self.how in ("weights", "fails"):
            for parameter in fit.model.parameters():
                parameter.mul_(0)
        if self.how == "new data":
            for parameter in fit.model.parameters():
                parameter.data = parameter.data + 1
        if self.how == "encoder":
            fit.state["encoder.head.bias"].view(-1)[0] += 1
        if self.how == "fails":
            raise ArithmeticError("too bad")
        return super().measure(fit, problem, run)


@dataclass(frozen=True, kw_only=True)
class Weighing(Evaluator):
    """What the fit's tensors add up to."""

    name: str = "weighing"

    def measure(self, fit: Fit, problem: Problem, run: EvaluationRun) -> list[Measurement]:
        x, indices = run.data.scored(1)
        z = fit.posterior.sample(x, 1, run.generator(self.name, "posterior"))
        total = sum(parameter.double().square().sum() for parameter in fit.model.parameters())
        return [run.measurement("weight", (total + z.sum()).reshape(1), torch.zeros(1), "exact", indices)]


CHANGES = {
    "weights": ("failed", r"RuntimeError: careless changes the fit \(model\..*, \.\.\.\), which other evaluators "),
    "new data": ("failed", r"RuntimeError: careless changes the fit \(model\..*, \.\.\.\), which other evaluators "),
    "encoder": ("failed", r"RuntimeError: careless changes the fit \(encoder\.head\.bias\), which other evaluators "),
    "fails": ("failed", "ArithmeticError: too bad"),
    "asked": ("skipped", "not for this one"),
}


@pytest.mark.parametrize("how", CHANGES)
@pytest.mark.parametrize("stored", [False, True])
def test_who_changes_the_fit_fails_and_the_others_measure_it_as_it_was(how: str, stored: bool, tmp_path: Path) -> None:
    arguments: dict[str, Any] = {**SMALL, "seeds": 1, "out": tmp_path}
    if stored:
        harness.compare(**arguments, evaluators="exact")
    expected = harness.compare(**{**arguments, "out": tmp_path / "alone"}, evaluators=[Weighing(), Sharing()])
    COMPUTED.clear()
    evaluators = [Careless(how=how), Weighing(), Sharing(), "exact"]
    found = harness.compare(**arguments, evaluators=evaluators)
    careless = found[found["evaluator"].str.startswith("careless")]
    status, told = CHANGES[how]
    assert careless["status"].tolist() == [status]
    assert re.match(told, careless["reason"].item())
    others = found[~found["evaluator"].str.startswith(("careless", "exact"))]
    assert others["value"].tolist() == expected["value"].tolist()
    assert (found["evaluator"] == "exact").sum() == 2
    times = 1 if how in ("fails", "asked") else 2  # what the careless one has computed and shared is of another fit
    assert len(COMPUTED) == times


def test_the_checksum_of_a_fit_is_made_once_for_all_evaluators(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []

    def counted(arrays: Any) -> str:
        made.append(checksum(arrays))
        return made[-1]

    monkeypatch.setattr("harness.running.checksum", counted)
    harness.compare(**{**SMALL, "seeds": 1}, evaluators=[Sharing(), Weighing(), "exact"], out=tmp_path)
    stored = [json.loads(file.read_text())["fit_sha256"] for file in tmp_path.glob("measurements/*/*.json")]
    assert stored == made * 3


# Keys


def imported(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def job() -> Job:
    return resolve("vae", "four-points", [0], "steps=5", None, "cpu", "float32", "auto", (), ()).jobs[0]


def test_an_edit_of_a_module_that_an_evaluator_names_makes_its_numbers_stale_and_no_others(tmp_path: Path) -> None:
    path = tmp_path / "annealing_of_mine.py"
    path.write_text("STEPS = 3\n")
    module = imported(path)

    class Depending(Sharing):
        modules: ClassVar[tuple[ModuleType, ...]] = (module,)

    def keys() -> tuple[str, str]:
        source_hash.cache_clear()  # as in a new process
        return job().measurement_key(Depending()), job().measurement_key(Sharing())

    depending, plain = keys()
    assert depending != plain
    assert keys() == (depending, plain)
    path.write_text("STEPS = 4\n")
    edited, same = keys()
    assert edited != depending
    assert same == plain


def test_an_edit_of_a_module_that_a_method_names_makes_its_fits_stale_and_no_others(tmp_path: Path) -> None:
    path = tmp_path / "networks_of_mine.py"
    path.write_text("WIDTH = 3\n")
    module = imported(path)

    class Depending(VAE):
        modules: ClassVar[tuple[ModuleType, ...]] = (module,)

    class Plain(VAE):
        """In the same file."""

    def keys() -> tuple[str, str]:
        source_hash.cache_clear()  # as in a new process
        return replace(job(), method=Depending()).job_id, replace(job(), method=Plain()).job_id

    depending, plain = keys()
    path.write_text("WIDTH = 4\n")
    edited, same = keys()
    assert edited != depending
    assert same == plain


def test_numbers_are_measured_again_after_such_an_edit(tmp_path: Path) -> None:
    path = tmp_path / "constants_of_mine.py"
    path.write_text("")
    module = imported(path)

    class Depending(Sharing):
        modules: ClassVar[tuple[ModuleType, ...]] = (module,)

    arguments: dict[str, Any] = {**SMALL, "seeds": 1, "evaluators": [Depending()], "out": tmp_path / "out"}
    harness.compare(**arguments)
    harness.compare(**arguments)
    assert COMPUTED == [0]
    path.write_text("# an edit\n")
    source_hash.cache_clear()
    harness.compare(**arguments)
    assert COMPUTED == [0, 0]
    stored = [json.loads(file.read_text())["key"] for file in (tmp_path / "out").glob("measurements/*/*.json")]
    assert stored == [job().measurement_key(Depending())]

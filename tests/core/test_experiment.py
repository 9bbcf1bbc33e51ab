"""What experiments may ask of earlier suites, their rehearsal, and the checks that find faulty ones."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from harness.equal_budgets import EqualBudgets, Speed
from harness.experiment import (
    Column,
    Contents,
    Contrast,
    Differences,
    Done,
    Experiment,
    LatentPlanes,
    Line,
    Reported,
    Scale,
    Suite,
    Tabulated,
    seconds_budget,
)
from harness.options import UserError
from harness.rehearsal import rehearse
from harness.testing import ConformanceError, check_experiment
from harness.trials import Trials, at_rates

EXAMPLE = Path(__file__).parents[1] / "distributions/harness-experiment/tiny_toy.py"


def example() -> type[Experiment]:
    spec = spec_from_file_location("tiny_toy", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    sys.modules["tiny_toy"] = module
    spec.loader.exec_module(module)
    return module.TinyToy


TinyToy: Any = example()


def records(*rows: tuple[str, int, str, float, float]) -> pd.DataFrame:
    """Run, seed, status, seconds and log p(x) of jobs with two measurements each."""
    return pd.DataFrame(
        [
            {
                "run": run, "seed": seed, "job_id": f"{run}-{seed}", "status": status, "fit_seconds": seconds,
                "timing_valid": True, "metric": metric, "value": value,
            }
            for run, seed, status, seconds, value in rows
            for metric in ("log_likelihood", "elbo")
        ]
    )  # fmt: skip


# What a suite may need of an earlier one


def test_the_budget_in_seconds_shares_the_time_equally() -> None:
    found = records(("avb", 0, "ok", 10.0, 0), ("avb", 1, "ok", 12.349, 0), ("vae", 0, "ok", 4.0, 0))
    assert seconds_budget(found) == "seconds=7.59"  # the mean of 11.1745 and 4
    assert seconds_budget(records(("avb", 0, "ok", 1234.5, 0))) == "seconds=1230"
    assert seconds_budget(records(("avb", 0, "ok", 0.01234, 0))) == "seconds=0.0123"


def test_failed_fits_and_disturbed_clocks_give_no_seconds() -> None:
    found = records(("avb", 0, "failed", 99.0, 0), ("vae", 0, "ok", 4.0, 0))
    assert seconds_budget(found) == "seconds=4"
    assert seconds_budget(found.assign(timing_valid=False)) == ""
    both = records(("avb", 0, "ok", 9.0, 0), ("vae", 0, "ok", 4.0, 0))
    assert seconds_budget(both) == "seconds=6.5"
    assert seconds_budget(both.assign(timing_valid=both["run"].eq("vae"))) == ""
    assert seconds_budget(found[found["status"] == "failed"]) == ""


def test_fits_count_that_no_evaluator_was_for() -> None:
    """AVB has no `elbo`; a method that is not for the problem was never fitted."""
    found = records(("avb", 0, "skipped", 12.0, 0), ("nuts", 0, "skipped", float("nan"), 0), ("vae", 0, "ok", 4.0, 0))
    assert seconds_budget(found) == "seconds=8"
    assert seconds_budget(found.assign(timing_valid=found["run"].ne("avb"))) == ""


def test_the_budget_in_seconds_of_so_many_steps_is_by_the_speed_of_others() -> None:
    found = records(("avb", 0, "ok", 10.0, 0), ("avb", 1, "ok", 10.0, 0), ("vae", 0, "ok", 4.0, 0))
    steps = {("avb", 0): 500, ("avb", 1): 250, ("vae", 0): 800}
    found["fit_steps"] = [steps[run, seed] for run, seed in zip(found["run"], found["seed"], strict=True)]
    # 1000 steps take 20, 40 and 5 seconds
    assert seconds_budget(found, 1000) == "seconds=17.5"
    assert seconds_budget(found) == "seconds=7"


# Equal budgets


def budgets(**changed: Any) -> EqualBudgets:
    given: dict[str, Any] = {
        "name": "toy", "title": "Toy", "labels": {"avb": "AVB", "vae": "VAE"}, "problem": "four-points",
        "settings": {"avb": "avb", "vae": "vae"}, "evaluators": "exact", "steps": 100,
        "columns": [Column(heading="log p(x)", metrics=("log_likelihood",))],
        "speed": Speed(seconds=2, seed=7, evaluators="elbo"),
    }  # fmt: skip
    return EqualBudgets(**given | changed)


def run_of(suite: Suite, seconds: dict[str, float], steps: dict[str, int], valid: bool = True) -> pd.DataFrame:
    found = records(*((run, 0, "ok", seconds[run], 0.0) for run in suite.methods))
    return found.assign(fit_steps=[steps[run] for run in found["run"]], timing_valid=valid)


def test_seconds_are_known_from_short_fits_while_others_run_beside_each_other() -> None:
    asked = budgets()
    [steps, short] = asked.suites({})
    assert steps.budget == "steps=100"
    assert (short.budget, short.seeds, short.evaluators) == ("seconds=2", (7,), "elbo")
    done = {steps.name: run_of(steps, {"avb": 99, "vae": 99}, {"avb": 100, "vae": 100}, valid=False)}
    assert asked.suites(done) == [steps, short]
    done[short.name] = run_of(short, {"avb": 2, "vae": 2}, {"avb": 10, "vae": 40})
    [*_, seconds] = asked.suites(done)
    assert (seconds.name, seconds.budget) == ("toy-equal-seconds", "seconds=12.5")  # the mean of 20 and 5
    assert "fits of 2 seconds" in asked.speed.remark
    done[short.name] = run_of(short, {"avb": 2, "vae": 2}, {"avb": 10, "vae": 40}, valid=False)
    assert asked.suites(done) == [steps, short]


# Trials


def trials(**changed: Any) -> Trials:
    given: dict[str, Any] = {
        "problem": "four-points", "settings": {"avb": ["a", "b"], "vae": ["c", "d"]}, "evaluators": "exact",
        "budget": "steps=5", "seeds": (0, 1),
    }  # fmt: skip
    return Trials(**given | changed)


FOUND = records(
    ("a", 0, "ok", 1, -2.0), ("a", 1, "ok", 1, -2.2), ("b", 0, "ok", 1, -1.0), ("b", 1, "diverged", 1, -1.0),
    ("c", 0, "ok", 1, -2.4), ("c", 1, "ok", 1, -2.4), ("d", 0, "ok", 1, -2.1), ("d", 1, "ok", 1, -2.6),
)  # fmt: skip


def test_the_best_trial_has_the_largest_mean_and_has_lost_no_seed() -> None:
    assert trials().best({"trials": FOUND}) == {"avb": "a", "vae": "d"}
    assert trials(lowest=True).best({"trials": FOUND}) == {"avb": "a", "vae": "c"}
    assert trials(settings={"avb": ["b"], "vae": ["c"]}).best({"trials": FOUND}) == {"vae": "c"}
    assert trials(settings={"avb": ["b"], "vae": ["e"]}).best({"trials": FOUND}) == {}
    assert trials(metric="kl_to_posterior").best({"trials": FOUND}) == {}
    assert trials().best({}) == {}


def test_a_method_has_as_many_trials_as_any_other() -> None:
    with pytest.raises(ValueError, match="must have as many trials"):
        trials(settings={"avb": ["a"], "vae": ["c", "d"]})


def test_learning_rates_of_adversaries_are_multiples() -> None:
    assert at_rates("vae", ["1e-3", "0.1"]) == ["vae[lr=1e-3]", "vae[lr=0.1]"]
    [run] = at_rates("avb", ["3e-4"], "noise_dim=2", adversary=2.0)
    assert run == "avb[lr=3e-4,adversary_lr=0.0006,noise_dim=2]"


# Rehearsal


def test_a_rehearsal_names_the_suites_one_after_another() -> None:
    asked = [[suite.name for suite in suites] for suites in rehearse(TinyToy(), "smoke")]
    assert asked == [["equal-steps"], ["equal-steps", "equal-seconds"], ["equal-steps", "equal-seconds"]]
    failed = [[suite.name for suite in suites] for suites in rehearse(TinyToy(), "smoke", status="failed")]
    assert failed == [["equal-steps"], ["equal-steps"]]


# Checks


def test_the_example_passes() -> None:
    check_experiment(TinyToy())


AVB = Line(label="AVB", suite="equal-steps", run="avb")


def altered(**changes: Any) -> Callable[[Suite], Suite]:
    return lambda suite: dataclasses.replace(suite, **changes)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Altered(TinyToy):
    """The example with one thing changed, by the name of the fault."""

    fault: str = ""

    def seeds(self, scale: Scale) -> int:
        return 0 if self.fault == "no seeds" else super().seeds(scale)

    def suites(self, scale: Scale, done: Done) -> list[Suite]:
        suites = super().suites(scale, done)
        if self.fault == "no suites":
            return []
        if self.fault == "changing suite" and done:
            return [dataclasses.replace(suites[0], budget="steps=7"), *suites[1:]]
        if self.fault == "same name":
            return [suites[0], suites[0]]
        if self.fault == "endless":
            return [dataclasses.replace(suites[0], name=f"suite-{i}") for i in range(len(done) + 1)]
        if self.fault == "needs results":
            return suites if not done else [suites[0], dataclasses.replace(suites[1], name="equal-seconds")]
        change = SUITE_FAULTS.get(self.fault, (lambda suite: suite, ""))[0]
        return [change(suite) for suite in suites]

    def contents(self, scale: Scale) -> Contents:
        contents = super().contents(scale)
        return dataclasses.replace(contents, **CONTENT_FAULTS.get(self.fault, ({}, ""))[0])


SUITE_FAULTS: dict[str, tuple[Callable[[Suite], Suite], str]] = {
    "odd name": (lambda suite: altered(name=f"{suite.name}/x")(suite), "lower-case words joined by hyphens"),
    "no methods": (altered(methods={}), "no methods"),
    "one run twice": (altered(methods={"vae": "vae", "avb": "vae[batch_size=128]"}), "the same run under two labels"),
    "two runs": (altered(methods={"vae": "vae", "avb": "avb[lr=1|2]"}), "each label must stand for one run"),
    "two problems": (altered(problem="digits,four-points"), "expected one problem"),
}
MISTAKES: dict[str, tuple[Callable[[Suite], Suite], str]] = {
    "unknown method": (altered(methods={"vae": "vae", "avb": "abv"}), "unknown method 'abv'"),
    "unknown evaluator": (altered(evaluators="exakt"), "unknown evaluator 'exakt'"),
    "unknown problem": (altered(problem="five-points"), "unknown problem"),
    "budget": (altered(budget="epochs=3"), "budget 'epochs=3'"),
    "precision": (altered(precision="float16"), "unknown precision"),
}
SUITE_FAULTS |= MISTAKES
COLUMNS = [Column(heading="log p(x)", metrics=("log_likelihood",))]
PICTURE = LatentPlanes(name="latent", caption="", lines=[AVB])
UNKNOWN = dataclasses.replace(AVB, run="iaf")


def table(*lines: Any) -> dict[str, Any]:
    return {"tables": [Tabulated(title="T", columns=COLUMNS, lines=lines)]}


CONTENT_FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "unknown run": (table(UNKNOWN), "speaks of 'iaf' in 'equal-steps', which is never run"),
    "unknown run in a contrast": (
        {"contrasts": [Contrast(statement="", first=AVB, second=UNKNOWN)]},
        "speaks of 'iaf'",
    ),
    "unknown run in a picture": ({"pictures": [dataclasses.replace(PICTURE, lines=[UNKNOWN])]}, "speaks of 'iaf'"),
    "label twice": (table(AVB, AVB), "a label twice"),
    "no column": (table(Reported(label="x", figures={"FID": "3"}, source="a paper")), r"reports \['FID'\]"),
    "no source": (table(Reported(label="x", figures={"log p(x)": "3"}, source=" ")), "without a source"),
    "pictures of one name": ({"pictures": [PICTURE, PICTURE]}, "two pictures of one name"),
    "odd picture": ({"pictures": [dataclasses.replace(PICTURE, name="../x")]}, "names of pictures"),
    "empty group": (
        {"pictures": [Differences(name="d", caption="", groups=["nowhere"])]},
        r"groups without contrasts: \['nowhere'\]",
    ),
}
OTHER_FAULTS = {
    "no seeds": "0 seeds",
    "no suites": "no suite",
    "same name": "two suites of one name",
    "changing suite": "a suite changes",
    "endless": "more than 100 suites",
}
FAULTS = {
    **OTHER_FAULTS,
    **{name: message for faults in (SUITE_FAULTS, CONTENT_FAULTS) for name, (_, message) in faults.items()},
}


@pytest.mark.parametrize(("fault", "message"), FAULTS.items(), ids=list(FAULTS))
def test_a_faulty_experiment_is_found(fault: str, message: str) -> None:
    with pytest.raises(UserError if fault in ("endless", *MISTAKES) else ConformanceError, match=message):
        check_experiment(Altered(fault=fault))


def test_an_experiment_that_cannot_bear_failures_is_found() -> None:
    """Where all fits have failed its suites raise; a user would meet that after hours."""
    with pytest.raises(IndexError):
        check_experiment(Altered(fault="needs results"))

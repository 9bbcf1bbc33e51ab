"""The experiments of the AVB paper: equal effort, equal budgets, the right kind of log p(x); no fit is made."""

from __future__ import annotations

import itertools
from collections import Counter

import pandas as pd
import pytest

from harness.experiment import Experiment, Line, Reported, Scale, Suite
from harness.options import parse_selection
from harness.record import COLUMNS
from harness.rehearsal import rehearse
from harness_plugins.avb_decoders import AVBDecoders
from harness_plugins.avb_eight_schools import AVBEightSchools
from harness_plugins.avb_mnist import AVBMnist
from harness_plugins.avb_toy import AVBToy

SCALES: list[Scale] = ["smoke", "laptop", "paper"]


def all_suites(experiment: Experiment, scale: Scale) -> dict[str, Suite]:
    *_, suites = rehearse(experiment, scale)
    return {suite.name: suite for suite in suites}


def trial_records(suite: Suite, best: dict[str, str], lost: str = "") -> pd.DataFrame:
    """Trials of two seeds: the named runs have the highest log p(x); one run may have lost a seed."""
    rows = [
        {
            "run": run, "job_id": f"{run}-{seed}", "seed": seed,
            "status": "diverged" if run == lost and seed == suite.seeds[0] else "ok", "metric": "log_likelihood",
            "value": -1.4 if run in best.values() else -1.6, "timing_valid": True, "fit_seconds": 1.0,
        }
        for run in suite.methods
        for seed in suite.seeds
    ]  # fmt: skip
    return pd.DataFrame(rows, columns=[*COLUMNS, "suite", "run"])


@pytest.mark.parametrize("experiment", [AVBToy(), AVBDecoders(), AVBEightSchools(), AVBMnist()])
@pytest.mark.parametrize("scale", ["smoke", "laptop"])
def test_methods_are_tuned_by_equal_effort_on_other_seeds(experiment: Experiment, scale: Scale) -> None:
    trials = [suite for name, suite in all_suites(experiment, scale).items() if name.endswith("trials")]
    assert trials
    for suite in trials:
        tried = Counter(text.partition("[")[0] for text in suite.methods.values())
        assert len(set(tried.values())) == 1
        assert set(tried) >= {"avb"}
        assert not set(suite.seeds) & set(range(experiment.seeds(scale)))


def test_every_method_is_tried_on_mnist_with_and_without_the_same_warm_up() -> None:
    tried: dict[str, set[str]] = {}
    for text in all_suites(AVBMnist(), "laptop")["32-trials"].methods.values():
        [(method, options)] = parse_selection(text)
        tried.setdefault(method, set()).add(options["kl_warmup"])
    assert set(tried) == {"vae", "iaf", "avb", "avb-ac"}
    assert len(set(map(frozenset, tried.values()))) == 1
    assert len(tried["vae"]) == 2


@pytest.mark.parametrize(("experiment", "latent_dims"), [(AVBDecoders(), (2, 8)), (AVBMnist(), (32,))])
def test_settings_are_chosen_by_validation_images(experiment: Experiment, latent_dims: tuple[int, ...]) -> None:
    for latent_dim in latent_dims:
        trials = all_suites(experiment, "laptop")[f"{latent_dim}-trials"]
        [(_, options)] = parse_selection(trials.evaluators)
        assert options["split"] == "validation"


def test_the_toy_is_run_with_the_best_trials() -> None:
    [trials] = AVBToy().suites("laptop", {})
    best = {"avb": "avb[lr=4e-3,adversary_lr=0.008,lr_decay=1,clip_norm=0]", "vae": "vae[lr=3e-3,lr_decay=0.1]"}
    [_, toy] = AVBToy().suites("laptop", {"trials": trial_records(trials, best)})
    assert toy.methods == best
    assert (toy.problem, toy.budget) == (trials.problem, trials.budget)
    [_, toy] = AVBToy().suites("laptop", {"trials": trial_records(trials, best, lost=best["avb"])})
    assert toy.methods["avb"] != best["avb"]
    assert toy.methods["vae"] == best["vae"]


@pytest.mark.parametrize("experiment", [AVBDecoders(), AVBDecoders(problem="mnist", model="conv1"), AVBMnist()])
@pytest.mark.parametrize("scale", SCALES)
def test_at_equal_seconds_everything_but_the_budget_is_the_same(experiment: Experiment, scale: Scale) -> None:
    suites = all_suites(experiment, scale)
    by_steps = [suite for name, suite in suites.items() if name.endswith("equal-steps")]
    by_seconds = [suite for name, suite in suites.items() if name.endswith("equal-seconds")]
    assert len(by_steps) == len(by_seconds) > 0
    for steps in by_steps:
        seconds = suites[steps.name.replace("steps", "seconds")]
        assert seconds.budget.startswith("seconds=")
        assert steps.budget.startswith("steps=")
        same = ("problem", "methods", "evaluators", "precision", "seeds")
        assert all(getattr(seconds, name) == getattr(steps, name) for name in same)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("experiment", [AVBDecoders(), AVBMnist()])
def test_seconds_are_of_the_same_fits_from_another_seed(experiment: Experiment, scale: Scale) -> None:
    suites = all_suites(experiment, scale)
    timed = [name for name in suites if name.endswith("-speed")]
    assert timed
    for name in timed:
        speed, steps = suites[name], suites[name.replace("speed", "equal-steps")]
        assert (speed.problem, speed.methods, speed.precision) == (steps.problem, steps.methods, steps.precision)
        assert speed.budget.startswith("seconds=")
        assert not set(speed.seeds) & set(range(experiment.seeds(scale)))
        lines = [line for table in experiment.contents(scale).tables for line in table.lines]
        assert speed.name not in {line.suite for line in lines if isinstance(line, Line)}


@pytest.mark.parametrize("experiment", [AVBDecoders(), AVBDecoders(problem="mnist"), AVBMnist()])
@pytest.mark.parametrize("scale", SCALES)
def test_log_p_is_exact_or_certified_with_the_same_settings(experiment: Experiment, scale: Scale) -> None:
    for name, suite in all_suites(experiment, scale).items():
        if name.endswith(("trials", "speed")):  # of the latter only the time is read
            continue
        evaluators = dict(parse_selection(suite.evaluators))
        dimensions = int(parse_selection(suite.problem)[0][1]["latent_dim"])
        if dimensions <= 2:
            assert "exact" in evaluators
        else:
            ais, bdmc = evaluators["ais"], evaluators["bdmc"]
            assert {**ais, "observations": ""} == {**bdmc, "observations": ""}


@pytest.mark.parametrize("scale", SCALES)
def test_eight_schools_doubles_its_budgets(scale: Scale) -> None:
    suites = [suite for name, suite in all_suites(AVBEightSchools(), scale).items() if name.startswith("steps-")]
    steps = [int(suite.budget.removeprefix("steps=")) for suite in suites]
    assert all(later == 2 * earlier for earlier, later in itertools.pairwise(steps))
    assert all(suite.methods == suites[0].methods for suite in suites)


@pytest.mark.parametrize("scale", SCALES)
def test_static_binarisation_stands_nowhere_beside_dynamic(scale: Scale) -> None:
    """Every suite is on `mnist`, which is dynamic, and so says the source of every figure of others."""
    assert {parse_selection(suite.problem)[0][0] for suite in all_suites(AVBMnist(), scale).values()} == {"mnist"}
    lines = [line for table in AVBMnist().contents(scale).tables for line in table.lines]
    reported = [line for line in lines if isinstance(line, Reported)]
    assert reported
    assert all("dynamic binarisation" in line.source for line in reported)


@pytest.mark.parametrize("experiment", [AVBToy(), AVBMnist()])
def test_figures_of_others_say_that_they_are_recalled(experiment: Experiment) -> None:
    lines = [line for table in experiment.contents("laptop").tables for line in table.lines]
    reported = [line for line in lines if isinstance(line, Reported)]
    assert reported
    assert all("recalled" in line.source for line in reported)

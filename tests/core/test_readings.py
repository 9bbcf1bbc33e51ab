"""Estimates from records: errors over seeds, the newest fits, and which estimator stands for a log-likelihood."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import pandas as pd
import pytest

from harness import readings
from harness.record import COLUMNS
from harness.statistics import Estimate


def record(**columns: object) -> dict[str, object]:
    base: dict[str, object] = {
        **dict.fromkeys(COLUMNS),
        "job_id": "a", "problem": "p", "method": "m", "config": "{}", "seed": 0, "budget": "steps=1", "status": "ok",
        "precision": "float32", "step_mode": "eager", "device": "cpu", "evaluator": "exact", "kind": "exact",
        "metric": "log_likelihood", "value": -1.0, "stderr": 0.0, "stderr_test": 0.5, "n_observations": 100,
        "settings": "{}", "started_at": "2025-01-01T00:00:00+00:00",
    }  # fmt: skip
    return base | columns


def estimate(**columns: object) -> Estimate:
    return readings.over_seeds([record(**columns)])


def test_errors_over_seeds() -> None:
    """The estimator's error shrinks with seeds; that of the test set, which they share, does not."""
    values = [-1.0, -2.0, -3.0, -4.0]
    found = readings.over_seeds([record(seed=i, value=value, stderr=0.2) for i, value in enumerate(values)])
    assert found.value == -2.5
    assert found.spread == pytest.approx(np.std(values, ddof=1))
    assert found.stderr == pytest.approx(0.1)
    assert found.stderr_test == pytest.approx(0.5)
    assert math.isnan(estimate().spread)
    simulated = readings.over_seeds([record(seed=i, value=-1.0, split="simulated") for i in range(4)])
    assert simulated.stderr_test == pytest.approx(0.25)  # every seed has observations of its own


def test_missing_values_are_none_whatever_pandas_calls_them() -> None:
    table = pd.DataFrame(
        [{"a": 1.5, "b": "x", "c": None, "d": True}, {"a": math.nan, "b": None, "c": pd.NA, "d": None}]
    )
    assert readings.rows(table) == [
        {"a": 1.5, "b": "x", "c": None, "d": True},
        {"a": None, "b": None, "c": None, "d": None},
    ]


def test_newest_of_several_fits_of_one_run_is_kept() -> None:
    old = record(job_id="z", value=-9.0)
    new = record(job_id="b", started_at="2025-01-02T00:00:00+00:00")
    elsewhere = [record(job_id=f"c{i}", **{column: "other"}) for i, column in enumerate(("method", "config", "budget"))]
    kept, older = readings.latest([old, new, record(job_id="z", metric="elbo"), *elsewhere])
    assert [row["job_id"] for row in kept] == ["b", "c0", "c1", "c2"]
    assert older == {readings.identity(new): 1}


@pytest.mark.parametrize(
    ("methods", "chosen"),
    [
        ([["exact", "importance"], ["exact", "importance"]], "exact"),
        ([["importance"], ["exact", "importance"]], "importance"),
        ([["exact"], ["exact", "importance"]], "exact"),
        ([["exact"], ["importance"], ["importance"]], "importance"),
        ([["exact"], []], "exact"),
        ([[], []], None),
    ],
)
def test_one_estimator_for_all_methods(methods: list[list[str]], chosen: str | None) -> None:
    kinds = {"exact": "exact", "importance": "stochastic lower bound"}
    found = [[estimate(evaluator=name, kind=kinds[name]) for name in names] for names in methods]
    assert readings.log_likelihood_estimator(found) == chosen
    assert readings.log_likelihood_estimator(found[::-1]) == chosen


@pytest.mark.parametrize(
    ("gaps", "looser", "chosen"),
    [
        ({}, [], "importance"),  # neither is certified: the one with more observations
        ({"ais": 0.1}, [], "ais"),
        ({"ais": 7.0}, [], "ais"),  # untrusted, and marked so; the other one is not better for having no certificate
        ({"ais": 0.1}, ["ais"], "ais"),
        ({}, ["importance"], "ais"),
        ({"ais": 0.2, "ais[temperatures=9]": 0.1}, [], "ais[temperatures=9]"),
    ],
)
def test_tightest_estimator_that_can_be_trusted(gaps: dict[str, float], looser: list[str], chosen: str) -> None:
    bound = {"kind": "stochastic lower bound", "stderr": 0.01}
    annealed = [estimate(evaluator=name, n_observations=100, **bound) for name in ("ais", "ais[temperatures=9]")]
    methods = [[*annealed, estimate(evaluator="importance", n_observations=1000, **bound)]] * 2
    assert readings.log_likelihood_estimator(methods, gaps, looser) == chosen
    with_exact = [[*method, estimate(evaluator="exact")] for method in methods]
    assert readings.log_likelihood_estimator(with_exact, gaps, looser) == "exact"
    assert readings.log_likelihood_estimator([with_exact[0], methods[1]], gaps, looser) == chosen
    simulated = [[*method, estimate(evaluator="other", split="simulated")] for method in methods]
    assert readings.log_likelihood_estimator(simulated, gaps, looser) == chosen


def test_certificate_does_not_outweigh_a_missing_seed() -> None:
    bound = {"kind": "stochastic lower bound", "stderr": 0.01}
    three = readings.over_seeds([record(evaluator="importance", seed=seed, **bound) for seed in range(3)])
    assert (
        readings.log_likelihood_estimator([[estimate(evaluator="ais", **bound), three]], {"ais": 0.1}) == "importance"
    )


def test_upper_bound_on_an_elbo_is_never_shown() -> None:
    upper = estimate(metric="elbo", evaluator="implicit", kind="stochastic upper bound")
    ratio = estimate(metric="adversarial_elbo", evaluator="implicit", kind="density ratio")
    simulated = estimate(metric="elbo", evaluator="other", kind="unbiased", split="simulated")
    names = ("elbo", "adversarial_elbo")
    assert readings.choose([upper, simulated], names) is None
    assert readings.choose([upper, ratio], names) is ratio
    own = estimate(metric="adversarial_elbo", evaluator="adversary", kind="density ratio")
    assert readings.choose([upper, ratio, own], names) is own


def test_second_opinion_is_shown_only_where_there_is_no_first() -> None:
    """Whatever its kind, its seeds and its name: a method's row does not change when somebody checks it."""
    first = estimate(metric="kl_to_prior", evaluator="zebra", kind="density ratio")
    seeds = [
        record(metric="kl_to_prior", evaluator="implicit[steps=9]", kind="stochastic lower bound", seed=s)
        for s in range(3)
    ]
    second = readings.over_seeds(seeds)
    assert readings.choose([second, first], ("kl_to_prior",)) is first
    assert readings.choose([second], ("kl_to_prior",)) is second


def test_density_ratio_is_shown_only_where_there_is_nothing_else() -> None:
    ratio = estimate(metric="adversarial_elbo", evaluator="adversary", kind="density ratio")
    bound = estimate(metric="elbo", evaluator="elbo", kind="unbiased")
    names = ("elbo", "adversarial_elbo")
    assert readings.choose([ratio, bound], names) is bound
    assert readings.choose([ratio], names) is ratio
    seeds = [record(metric="kl_to_prior", kind="density ratio", seed=seed) for seed in range(3)]
    exact = estimate(metric="kl_to_prior")
    assert readings.choose([readings.over_seeds(seeds), exact], ("kl_to_prior",)) is exact
    assert readings.choose([], names) is None


def test_only_finite_numbers_count() -> None:
    rows: list[Mapping[str, object]] = [
        record(seed=0), record(seed=1, value=math.nan), record(seed=2, value=math.inf), record(seed=3, value=None),
        record(seed=4, status="failed"),
    ]  # fmt: skip
    [found] = readings.estimates(rows)
    assert found.seeds == 1


def test_ambiguous_values_are_not_paired() -> None:
    """A file merged from two stores may hold an observation twice: no pairing of its values would be right."""
    once = pd.DataFrame({"job_id": "a", "evaluator": "exact", "metric": "elbo", "index": [2, 0], "value": [3.0, 1.0]})
    once["stderr"] = 0.1
    found = readings.values_per_observation(once)["a", "exact", "elbo"]
    assert (found.index.tolist(), found.value.tolist()) == ([0, 2], [1.0, 3.0])
    assert readings.values_per_observation(pd.concat([once, once])) == {}

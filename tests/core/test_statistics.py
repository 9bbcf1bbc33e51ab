"""Laws of the statistics: coverage, antisymmetry, pairing, and what may be compared with what."""

from __future__ import annotations

import math

import numpy as np
import pytest

from harness import statistics
from harness.statistics import Difference, Values, paired_difference

NOMINAL = math.erf(math.sqrt(2))  # two standard errors of a normal distribution: 95.45 %


def of_seeds(table: np.ndarray, stderr: float = 0.0) -> dict[int, Values]:
    """Values of seeds 0..S-1 from an array of shape (S, N)."""
    index = np.arange(table.shape[1])
    return {seed: Values(index, value, np.full(len(value), stderr)) for seed, value in enumerate(table)}


def simulated(
    random: np.random.Generator, *, seeds: int, n: int, effect: float, sd_seeds: float, sd_test: float, sd_rest: float
) -> tuple[dict[int, Values], dict[int, Values]]:
    """Two methods on the same observations, whose difficulty (30 nats) dwarfs their differences."""
    difficulty = 30 * random.standard_normal(n)
    second = difficulty + random.standard_normal((seeds, 1))
    difference = effect + sd_seeds * random.standard_normal((seeds, 1)) + sd_test * random.standard_normal(n)
    return of_seeds(second + difference + sd_rest * random.standard_normal((seeds, n))), of_seeds(second)


@pytest.mark.parametrize("seeds", [2, 3, 5])
@pytest.mark.parametrize(("sd_seeds", "sd_test", "sd_rest"), [(0.3, 0.1, 0.3), (0.05, 2.0, 0.3), (0.1, 0.7, 0.3)])
def test_difference_covers_the_true_effect(seeds: int, sd_seeds: float, sd_test: float, sd_rest: float) -> None:
    """At the stated level or above, whether seeds, observations or both dominate, and with little waste in the error.

    Tolerance: three standard errors of a proportion over 500 tables.
    """
    random = np.random.default_rng(seeds)
    sizes = {"sd_seeds": sd_seeds, "sd_test": sd_test, "sd_rest": sd_rest}
    found = [paired_difference(*simulated(random, seeds=seeds, n=50, effect=0.15, **sizes)) for _ in range(500)]
    covered = np.mean([abs(d.value - 0.15) <= d.margin for d in found if d])
    assert covered >= NOMINAL - 3 * math.sqrt(NOMINAL * (1 - NOMINAL) / 500)
    spread = np.std([d.value for d in found if d])
    stated = math.sqrt(np.mean([d.stderr**2 for d in found if d]))
    assert 0.9 < stated / spread < 1.2  # the interaction that is counted twice is at most 0.3 / sqrt(50) / sqrt(seeds)


def test_difference_is_antisymmetric() -> None:
    first, second = simulated(
        np.random.default_rng(0), seeds=4, n=30, effect=0.1, sd_seeds=0.2, sd_test=0.5, sd_rest=0.1
    )
    one, other = paired_difference(first, second), paired_difference(second, first)
    assert one is not None
    assert other is not None
    assert one.value == pytest.approx(-other.value, rel=1e-12)
    assert one.stderr == pytest.approx(other.stderr, rel=1e-12)
    assert one.per_seed == pytest.approx({seed: -value for seed, value in other.per_seed.items()})


def test_errors_of_a_difference_by_hand() -> None:
    """d = [[1, 2, 6], [3, 4, 2]]: means 3 and 3 over observations, 2, 3 and 4 over seeds."""
    found = paired_difference(of_seeds(np.array([[1.0, 2, 6], [3, 4, 2]])), of_seeds(np.zeros((2, 3))))
    assert found is not None
    assert (found.value, found.stderr_seeds) == (3.0, 0.0)
    assert found.stderr_test == pytest.approx(1 / math.sqrt(3))
    assert found.stderr == pytest.approx(1 / math.sqrt(3))


def test_difference_to_itself_is_zero_without_error() -> None:
    first, _ = simulated(np.random.default_rng(0), seeds=3, n=20, effect=0, sd_seeds=1, sd_test=1, sd_rest=1)
    same = paired_difference(first, first)
    assert same is not None
    assert (same.value, same.stderr, same.beyond_noise) == (0.0, 0.0, False)


def test_difference_uses_only_what_both_have() -> None:
    first, second = simulated(
        np.random.default_rng(1), seeds=4, n=30, effect=0.1, sd_seeds=0.2, sd_test=0.5, sd_rest=0.1
    )
    common = np.arange(5, 25)
    expected = paired_difference(
        {seed: first[seed].at(common) for seed in (1, 2)}, {seed: second[seed].at(common) for seed in (1, 2)}
    )
    assert expected is not None
    fewer_seeds = {seed: second[seed] for seed in (1, 2)} | {9: second[3]}
    fewer = {seed: values.at(np.arange(5, 30)) for seed, values in first.items()}
    assert paired_difference(fewer, {seed: v.at(np.arange(25)) for seed, v in fewer_seeds.items()}) == expected
    assert (sorted(expected.per_seed), expected.n_observations) == ([1, 2], 20)
    assert paired_difference(first, {9: second[3]}) is None
    assert paired_difference({0: first[0].at(np.arange(3))}, {0: second[0].at(np.arange(4, 9))}) is None


def test_pairing_takes_the_difficulty_of_observations_out() -> None:
    """Unpaired, 100 observations with a spread of 30 nats would leave an error above 3 nats."""
    first, second = simulated(
        np.random.default_rng(2), seeds=5, n=100, effect=0.5, sd_seeds=0.1, sd_test=0.5, sd_rest=0.1
    )
    found = paired_difference(first, second)
    assert found is not None
    assert found.stderr < 0.2
    assert found.beyond_noise


def test_one_seed_is_never_beyond_the_noise() -> None:
    first, second = simulated(np.random.default_rng(3), seeds=1, n=50, effect=99, sd_seeds=0, sd_test=0.1, sd_rest=0.1)
    found = paired_difference(first, second)
    assert found is not None
    assert found.one_seed
    assert math.isnan(found.stderr_seeds)
    assert math.isfinite(found.stderr)
    assert found.margin == math.inf
    assert not found.beyond_noise


def test_whole_population_has_no_test_error_but_keeps_the_estimators() -> None:
    table = np.array([[1.0, 2.0, 3.0, 4.0], [1.1, 2.1, 3.1, 4.1]])
    first, second = of_seeds(table, stderr=0.3), of_seeds(np.zeros((2, 4)), stderr=0.4)
    found = paired_difference(first, second, exhaustive=True)
    assert found is not None
    assert found.stderr_test == 0
    assert found.stderr_seeds == pytest.approx(0.05)  # sd of two values that differ by 0.1, over the root of 2
    assert found.stderr_estimator == pytest.approx(0.5 / 2)  # root of 0.3^2 + 0.4^2, over the root of 4 observations
    assert found.stderr == pytest.approx(math.hypot(0.05, 0.25))


@pytest.mark.parametrize(
    ("stderr_seeds", "stderr_test", "seeds", "factor"),
    [(1.0, 0.0, 3, 4.53), (1.0, 0.0, 2, 13.97), (1.0, 0.0, 5, 2.87), (0.001, 1.0, 3, 2.0), (1.0, 0.0, 10_000, 2.0)],
)
def test_few_seeds_widen_the_margin(stderr_seeds: float, stderr_test: float, seeds: int, factor: float) -> None:
    """Student's quantiles at 97.72 %, as in any table of them; the test set's noise has many degrees of freedom."""
    found = Difference(
        value=1.0,
        stderr_seeds=stderr_seeds,
        stderr_test=stderr_test,
        stderr_estimator=0.0,
        per_seed=dict.fromkeys(range(seeds), 1.0),
        n_observations=10_000,
    )
    assert found.margin / found.stderr == pytest.approx(factor, abs=0.01)


def test_excess_over_log_likelihood_needs_more_than_two_errors() -> None:
    index = np.arange(100)
    zeros = np.zeros(100)
    truth = Values(index, np.linspace(-90, -60, 100), zeros)

    def above(by: float, stderr: float) -> bool:
        return statistics.excess(Values(index, truth.value + by, zeros + stderr), truth)

    assert above(0.3, 1.0)  # the mean's error is 0.1: three errors
    assert not above(0.15, 1.0)
    assert not above(-5, 1.0)
    assert not above(1e-6, 0.0)  # rounding in float32
    assert above(0.1, 0.0)
    assert not statistics.excess(Values(index + 1000, truth.value + 9, zeros), truth)  # nothing in common


# Estimators of one quantity


def test_agreement_by_hand() -> None:
    """d = [[1, 2], [3, 6]] with errors 0.3 and 0.4: its mean is 3, its error 0.5 over the root of four values."""
    found = statistics.agreement(
        of_seeds(np.array([[1.0, 2], [3, 6]]), stderr=0.3), of_seeds(np.zeros((2, 2)), stderr=0.4)
    )
    assert found is not None
    assert (found.value, found.seeds, found.n_observations) == (3.0, 2, 2)
    assert found.stderr == pytest.approx(0.25)
    assert found.above


def test_agreement_is_over_what_both_scored() -> None:
    """The first estimator scored the hard observations only: the means differ by 20 nats, the values by 0.1."""
    truth = np.linspace(0, -40, 100)
    easy_and_hard = Values(np.arange(100), truth, np.zeros(100))
    hard = Values(np.arange(50, 100), truth[50:] + 0.1, np.full(50, 0.01))
    found = statistics.agreement({0: hard, 1: hard}, {0: easy_and_hard, 2: easy_and_hard})
    assert found is not None
    assert (found.seeds, found.n_observations) == (1, 50)
    assert found.value == pytest.approx(0.1)
    assert statistics.agreement({0: hard}, {0: easy_and_hard.at(np.arange(50))}) is None
    assert statistics.agreement({0: hard}, {1: hard}) is None


def test_disagreement_needs_more_than_three_errors_and_rounding() -> None:
    index = np.arange(100)

    def disagree(by: float, stderr: float) -> bool:
        first = Values(index, np.full(100, by - 90), np.full(100, stderr))
        found = statistics.agreement({0: first}, {0: Values(index, np.full(100, -90.0), np.zeros(100))})
        assert found is not None
        assert found.above == (found.disagree and by > 0)
        return found.disagree

    assert disagree(0.35, 1.0)  # the mean's error is 0.1
    assert disagree(-0.35, 1.0)
    assert not disagree(0.25, 1.0)
    assert not disagree(1e-4, 0.0)  # sums in float32
    assert disagree(0.01, 0.0)


def test_estimators_that_are_right_rarely_disagree() -> None:
    """Three errors of a normal distribution: 0.27 % of 2,000 pairs; tolerance: four errors of that proportion."""
    random = np.random.default_rng(0)
    found = 0
    for _ in range(2000):
        noise = random.standard_normal((2, 3, 10))
        agreement = statistics.agreement(of_seeds(noise[0], 1.0), of_seeds(2 * noise[1], 2.0))
        assert agreement is not None
        found += agreement.disagree
    expected = math.erfc(3 / math.sqrt(2))
    assert abs(found / 2000 - expected) < 4 * math.sqrt(expected / 2000)


# Records

"""Distances to an exact posterior against closed forms: Gaussians that are shifted and widened, a mode that is missed.

Each evaluator against what it estimates, its errors against the spread over repetitions, and its floor.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributions import MultivariateNormal, Normal, kl_divergence

from harness import statistics
from harness.distances import FLOOR, DrawsEvaluator, Target, over_blocks
from harness.evaluator import EvaluationRun, Measurement
from harness.method import Diverged, Fit
from harness.model import HasExactDraws, HasModes, HasQuantities, LatentModel
from harness.options import UserError
from harness.posterior import Posterior
from harness.problem import placed
from harness.testing.small import SmallPosteriorProblem, SmallProblem, known_fit, view_of
from harness_plugins import mmd
from harness_plugins.aggregate import Aggregate
from harness_plugins.c2st import C2ST
from harness_plugins.exact import Exact
from harness_plugins.knn import NearestNeighbours, divergence
from harness_plugins.linear_gaussian import LinearGaussianModel
from harness_plugins.mmd import MMD, mmd_squared
from harness_plugins.modes import Modes
from harness_plugins.moments import Moments
from harness_plugins.sliced_wasserstein import SlicedWasserstein, squared_distances

CPU = torch.device("cpu")
FOUR = [
    NearestNeighbours(samples=1000),
    MMD(samples=500),
    SlicedWasserstein(samples=500, projections=20),
    C2ST(samples=800, epochs=100, folds=3),
]
SIX = [*FOUR, Moments(samples=1000), Modes(samples=1000)]


def named(value: object) -> str:
    return value.name if isinstance(value, DrawsEvaluator) else ""


Change = Callable[[Tensor], Tensor]


class Drawn(Posterior):
    """Exact draws (n, N, D) of its model with a change, the first n of ``more`` times as many."""

    def __init__(self, model: HasExactDraws, change: Change = lambda z: z, more: int = 1) -> None:
        self.model, self.change, self.more = model, change, more

    def sample(self, x: Tensor, n: int, generator: torch.Generator) -> Tensor:
        return self.change(self.model.sample_exact_posterior(x, self.more * n, generator))[:n]


def measured(
    evaluator: DrawsEvaluator, change: Change = lambda z: z, more: int = 1, seed: int = 0
) -> dict[str, Measurement]:
    """By metric, on two modes with the weights 0.7 and 0.3 that are eight standard deviations apart."""
    problem = SmallPosteriorProblem()
    model = view_of(problem).model
    assert isinstance(model, HasExactDraws)
    run = EvaluationRun(placed(problem, CPU, torch.float64), problem, CPU, torch.float64, seed)
    fit = Fit(model, Drawn(model, change, more), {})
    assert evaluator.undefined(fit, problem) is None
    return {each.metric: each for each in evaluator.measure(fit, problem, run)}


def upper_mode(z: Tensor) -> Tensor:
    return z[(z @ torch.tensor([2.0, 1.0], dtype=z.dtype) > 0)[:, 0]]


class WithExactDraws(LinearGaussianModel):
    """A Gaussian posterior that can be sampled."""

    def sample_exact_posterior(self, x: Tensor, n: int, generator: torch.Generator) -> Tensor:
        mean, covariance = self.exact_posterior(x)
        noise = torch.randn((n, *mean.shape), generator=generator, dtype=mean.dtype)
        return (mean + noise @ torch.linalg.cholesky(covariance).T).to(x.dtype)


@pytest.fixture
def gaussian(oracle):
    oracle.model.__class__ = WithExactDraws
    return oracle


def of_gaussian(oracle, evaluator: DrawsEvaluator, posterior: Posterior) -> dict[str, Measurement]:
    return {each.metric: each for each in evaluator.measure(oracle.fit(posterior), oracle.problem, oracle.run)}


# What all of them have in common


@pytest.mark.parametrize("evaluator", SIX, ids=named)
def test_the_exact_posterior_is_at_its_floor(evaluator: DrawsEvaluator) -> None:
    found = measured(evaluator)
    values = {metric: each for metric, each in found.items() if not metric.endswith(FLOOR)}
    assert found.keys() == {*values, *(metric + FLOOR for metric in values)}
    for metric, value in values.items():
        floor = found[metric + FLOOR]
        assert abs(value.value - floor.value) < 4 * math.hypot(value.stderr, floor.stderr)
        assert (value.settings["floor"], value.settings["floor_stderr"]) == (floor.value, floor.stderr)
        assert (floor.kind, floor.unit, floor.bounds) == (value.kind, value.unit, value.bounds)
        assert value.exhaustive
        assert "floor" not in floor.settings
        assert value.settings["samples"] == floor.settings["samples"] == evaluator.samples


@pytest.mark.parametrize("evaluator", SIX, ids=named)
def test_a_posterior_that_is_far_off_is_above_the_floor_of_all(evaluator: DrawsEvaluator) -> None:
    """The floor is the same for all methods, bit for bit, as the exact draws and all that is drawn besides are."""
    good, bad = measured(evaluator), measured(evaluator, upper_mode, more=2)
    for metric, value in bad.items():
        if metric.endswith(FLOOR):
            np.testing.assert_array_equal(value.values, good[metric].values)
        else:
            floor = bad[metric + FLOOR]
            assert value.value - floor.value > 5 * math.hypot(value.stderr, floor.stderr)


@pytest.mark.parametrize("evaluator", SIX, ids=named)
def test_equal_draws_give_equal_numbers_whoever_made_them(evaluator: DrawsEvaluator) -> None:
    mine, theirs = measured(evaluator, lambda z: z + 0.3), measured(evaluator, lambda z: 0.3 + z)
    for metric, value in mine.items():
        np.testing.assert_array_equal(value.values, theirs[metric].values)
        np.testing.assert_array_equal(value.stderrs, theirs[metric].stderrs)


@pytest.mark.parametrize("evaluator", SIX, ids=named)
def test_a_model_that_knows_nothing_has_no_distances(evaluator: DrawsEvaluator) -> None:
    """A decoder that is learnt has neither exact draws, quantities nor modes."""
    reasons = {"moments": "model names no quantities with exact moments", "modes": "model has no separate modes"}
    reason = evaluator.undefined(known_fit(view_of(SmallProblem())), SmallProblem())
    assert reason == reasons.get(evaluator.name, "model has no exact draws of its posterior")


@pytest.mark.parametrize("evaluator", SIX, ids=named)
def test_draws_that_are_not_finite_are_no_number(evaluator: DrawsEvaluator) -> None:
    with pytest.raises(Diverged, match=r"3 of [\d,]+ draws are not finite"):
        measured(evaluator, lambda z: torch.cat([z[:3] / 0, z[3:]]))


def test_only_what_is_cheap_is_used_by_default() -> None:
    assert {evaluator.name for evaluator in SIX if evaluator.by_default} == {"moments", "modes"}


def test_records_and_reports_agree_on_the_name_of_the_floor() -> None:
    assert statistics.FLOOR == FLOOR


def test_several_observations_have_their_own_draws(gaussian) -> None:
    found = of_gaussian(gaussian, MMD(samples=200, observations=3), Drawn(gaussian.model))
    value, floor = found["mmd_squared"], found["mmd_squared_floor"]
    assert len(set(value.values)) == len(set(floor.values)) == 3
    np.testing.assert_array_equal(value.indices, gaussian.run.data.scored(3)[1].numpy())
    assert value.stderr == pytest.approx(np.sqrt(np.square(value.stderrs).sum()) / 3)


def test_units_of_the_latents_do_not_matter() -> None:
    """Draws are standardised by further exact ones, neither by themselves nor by those that they are compared with."""
    draws = torch.randn(3, 4000, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    scale = torch.tensor([1000.0, 0.001], dtype=torch.float64)
    z, exact, further = draws * scale + 7
    target = Target(SmallPosteriorProblem().model_spec().new_model((2,)), torch.zeros(1, 2), exact, further)
    assert target.units.mean(0).abs().max() < 1e-10
    np.testing.assert_allclose(target.units.std(0), 1)
    # A mean and a standard deviation of 4000 draws less those of others: errors of 0.022 and 0.016; four of each.
    np.testing.assert_allclose(target.standardised(z).mean(0), 0, atol=0.09)
    np.testing.assert_allclose(target.reference.std(0), 1, atol=0.065)


class Repeated:
    """Values and standard errors of one metric over repetitions with other draws."""

    def __init__(self, found: list[tuple[float, float]]) -> None:
        self.values, self.stderrs = np.array(found).T
        self.mean, self.sd = float(self.values.mean()), float(self.values.std(ddof=1))
        self.stderr_of_mean = self.sd / math.sqrt(len(found))
        self.stated = float(np.sqrt(np.square(self.stderrs).mean()))


def gaussians(shift: float, widening: float, repetitions: int, n: int) -> list[tuple[Target, Tensor]]:
    """N((shift, shift), widening^2 I) against N(0, I) in the plane: targets, and draws that are held against them."""
    random = torch.Generator().manual_seed(0)
    model = SmallPosteriorProblem().model_spec().new_model((2,))
    made: list[tuple[Target, Tensor]] = []
    for _ in range(repetitions):
        z, exact, scale = torch.randn(3, n, 2, dtype=torch.float64, generator=random)
        made.append((Target(model, torch.zeros(1, 2), exact, scale), shift + widening * z))
    return made


def repeated(evaluator: DrawsEvaluator, shift: float, widening: float, repetitions: int) -> dict[str, Repeated]:
    found: dict[str, list[tuple[float, float]]] = {}
    for i, (target, z) in enumerate(gaussians(shift, widening, repetitions, evaluator.samples)):
        for distance in evaluator.compare(z, target, torch.Generator().manual_seed(i)):
            found.setdefault(distance.metric, []).append((distance.value, distance.stderr))
    return {metric: Repeated(values) for metric, values in found.items()}


@pytest.mark.parametrize(
    ("evaluator", "repetitions", "least"),
    [
        # The spread of 60 repetitions is known to within a tenth: stated errors are off by less than the rest.
        (NearestNeighbours(samples=600), 60, 0.75),
        (MMD(samples=200), 60, 0.75),
        (SlicedWasserstein(samples=400, projections=20), 60, 0.75),
        (C2ST(samples=100, epochs=300, folds=2), 30, 0.65),  # to within an eighth
    ],
    ids=named,
)
@pytest.mark.parametrize(("shift", "widening"), [(0.0, 1.0), (0.5, 0.8)])
def test_stated_errors_are_those_of_repetitions(
    evaluator: DrawsEvaluator, repetitions: int, least: float, shift: float, widening: float
) -> None:
    for found in repeated(evaluator, shift, widening, repetitions).values():
        assert least < found.stated / found.sd < 1.7


# Nearest neighbours


def closed_form(shift: float, widening: float) -> tuple[float, float]:
    """KL of either from the other, of the Gaussians of `gaussians`."""
    ones = torch.ones(2, dtype=torch.float64)
    q, p = MultivariateNormal(shift * ones, (widening**2 * ones).diag()), MultivariateNormal(0 * ones, ones.diag())
    return float(kl_divergence(q, p)), float(kl_divergence(p, q))


@pytest.mark.parametrize(("shift", "widening"), [(0.0, 1.0), (0.3, 1.0), (0.2, 0.9), (0.2, 1.1)])
def test_neighbours_estimate_the_divergence(shift: float, widening: float) -> None:
    """Within three errors of the mean over repetitions, and a bias of 0.03 nats (the most in longer simulations)."""
    found = repeated(NearestNeighbours(samples=4000), shift, widening, 8)
    for metric, exact in zip(("kl_to_posterior", "kl_from_posterior"), closed_form(shift, widening), strict=True):
        assert abs(found[metric].mean - exact) < 0.03 + 3 * found[metric].stderr_of_mean
        assert found[metric].stderr_of_mean < 0.012


def test_neighbours_find_the_divergence_of_a_gaussian_posterior(gaussian) -> None:
    """With correlations, in the units of the problem: the best mean-field posterior is 0.13 nats off."""
    found = of_gaussian(gaussian, NearestNeighbours(samples=2000), gaussian.mean_field())["kl_to_posterior"]
    exact = float(gaussian.model.mean_field_gap())
    assert abs(found.value - exact) < 4 * found.stderr
    assert 4 * found.stderr < exact


def test_a_mode_that_is_missed_costs_the_logarithm_of_what_is_left() -> None:
    """q is p where the one mode is, over its weight of 0.7; p has draws where q has none, infinitely far off."""
    found = measured(NearestNeighbours(samples=4000), upper_mode, more=2)
    value = found["kl_to_posterior"]
    assert abs(value.value - math.log(1 / 0.7)) < 4 * value.stderr
    assert value.stderr < 0.03
    reverse = found["kl_from_posterior"]
    assert reverse.settings["at_fewer_draws"] < reverse.value - 3 * reverse.stderr  # there is no limit


def test_half_of_two_equal_modes_costs_log_two() -> None:
    draws = torch.randn(3, 4000, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    sign = torch.where(torch.arange(4000) % 2 == 0, 4.0, -4.0)[:, None]
    target = Target(
        SmallPosteriorProblem().model_spec().new_model((2,)), torch.zeros(1, 2), draws[1] + sign, draws[2] + sign
    )
    distance, _ = NearestNeighbours(samples=4000).compare(draws[0] + 4, target, torch.Generator())
    assert abs(distance.value - math.log(2)) < 4 * distance.stderr
    assert distance.stderr < 0.03


def test_repetitions_of_draws_count_once() -> None:
    """As in a chain that stayed where it was: what is estimated is the divergence of the distinct draws."""
    twice = measured(NearestNeighbours(samples=2000), lambda z: z.repeat_interleave(2, dim=0))["kl_to_posterior"]
    once = measured(NearestNeighbours(samples=2000))["kl_to_posterior"]
    assert (twice.settings["distinct_draws"], once.settings["distinct_draws"]) == (1000, 2000)
    assert abs(twice.value - once.value) < 4 * math.hypot(twice.stderr, once.stderr)


def test_sets_of_different_sizes(generator) -> None:
    """The last term matters where there are four times as many of one as of the other: log 4 = 1.4 nats."""
    first, second = (torch.randn(n, 2, dtype=torch.float64, generator=generator) for n in (1000, 4000))
    assert abs(divergence(first, second, k=3)) < 0.15  # four times the spread of 0.03, in simulations
    assert abs(divergence(second, first, k=3)) < 0.15


def test_draws_in_single_precision_may_coincide(generator) -> None:
    """Ten thousand on a line do, and their nearest neighbours are then at no distance at all."""
    first, second = torch.randn(2, 10_000, 1, generator=generator).double()
    assert len(np.unique(torch.cat([first, second]))) < 20_000
    distinct = torch.from_numpy(np.unique(first))[:, None]
    assert abs(divergence(distinct, second, k=1)) < 0.1  # four times its spread of 0.02, and a bias


def test_a_collapsed_posterior_has_no_density() -> None:
    with pytest.raises(Diverged, match="only 1 of 1,000 draws differ: too few for a density at k=3"):
        measured(NearestNeighbours(samples=1000), lambda z: 0 * z)


def test_neighbours_are_those_of_all_distances(generator) -> None:
    first, second = torch.randn(2, 300, 3, dtype=torch.float64, generator=generator)
    own = torch.cdist(first, first).sort(dim=1).values[:, 4]
    other = torch.cdist(first, second).sort(dim=1).values[:, 3]
    expected = 3 * float((other / own).log().mean()) + math.log(300 / 299)
    assert divergence(first, second, k=4) == pytest.approx(expected, rel=1e-9)


# Kernels


def exact_mmd_squared(shift: float, widening: float, bandwidth: float) -> float:
    """Of the Gaussians of `gaussians`: a kernel's mean between N(a, A) and N(b, B) is that of a Gaussian of a - b."""

    def mean(distance: float, variance: float) -> float:
        wide = bandwidth**2 + variance
        return bandwidth**2 / wide * math.exp(-(distance**2) / wide)  # in two dimensions, each with that distance

    return mean(0, 2 * widening**2) + mean(0, 2) - 2 * mean(shift, 1 + widening**2)


@pytest.mark.parametrize(("shift", "widening"), [(0.0, 1.0), (0.3, 1.0), (0.0, 0.6), (-0.5, 1.4)])
def test_the_squared_discrepancy_has_no_bias(shift: float, widening: float) -> None:
    """Few draws, where the biased form would be 0.02 too large; four standard errors over repetitions."""
    made = gaussians(shift, widening, 300, 60)
    found = Repeated([mmd_squared(z, _known(target.draws), 1.5) for target, z in made])
    assert abs(found.mean - exact_mmd_squared(shift, widening, 1.5)) < 4 * found.stderr_of_mean
    assert found.stderr_of_mean < 0.002


def _known(draws: Tensor | None) -> Tensor:
    assert draws is not None
    return draws


def test_the_bandwidth_is_the_median_distance_between_exact_draws() -> None:
    """Of two standard normal vectors in the plane: the median of sqrt(2) times a Rayleigh variable, 1.665."""
    [(target, z)] = gaussians(3.0, 0.1, 1, 2000)
    [distance] = MMD(samples=2000).compare(z, target, torch.Generator())
    assert distance.facts["bandwidth"] == pytest.approx(math.sqrt(4 * math.log(2)), rel=0.05)


def test_discrepancies_do_not_depend_on_the_blocks(generator, monkeypatch: pytest.MonkeyPatch) -> None:
    z, y = torch.randn(2, 333, 3, dtype=torch.float64, generator=generator)
    whole = mmd_squared(z, y, 2.0)
    for elements in (333, 50 * 333, 332 * 333):
        monkeypatch.setattr(mmd, "BLOCK_ELEMENTS", elements)
        assert mmd_squared(z, y, 2.0) == pytest.approx(whole, rel=1e-9)


def test_discrepancy_and_error_are_those_of_the_whole_matrix(generator) -> None:
    z, y = torch.randn(2, 40, 2, dtype=torch.float64, generator=generator) + torch.tensor([[[0.0]], [[0.4]]])
    h = sum(sign * torch.exp(-torch.cdist(a, b).square() / 8) for sign, a, b in
            ((1, z, z), (1, y, y), (-1, z, y), (-1, y, z)))  # fmt: skip
    assert isinstance(h, Tensor)
    pairs = h[~torch.eye(40, dtype=torch.bool)].reshape(40, 39)
    value, stderr = mmd_squared(z, y, 2.0)
    assert value == pytest.approx(float(pairs.mean()), rel=1e-9)
    zeta_2 = float(pairs.square().mean() - pairs.mean().square())
    zeta_1 = (float(pairs.mean(1).var()) - zeta_2 / 39) * 39 / 38
    assert zeta_1 > 0
    assert stderr == pytest.approx(math.sqrt(2 / (40 * 39) * (2 * 38 * zeta_1 + zeta_2)), rel=1e-9)


# Projections


def test_squared_distances_along_lines_are_those_of_sorted_draws(generator) -> None:
    first, second = torch.randn(2, 200, 3, dtype=torch.float64, generator=generator)
    theta = torch.nn.functional.normalize(torch.randn(3, 7, dtype=torch.float64, generator=generator), dim=0)
    expected = ((first @ theta).sort(dim=0).values - (second @ theta).sort(dim=0).values).square().mean(0)
    np.testing.assert_allclose(squared_distances(first, second, theta), expected)


def test_a_shift_is_its_own_distance() -> None:
    """Along a line the shift's part; the mean of that squared over all lines is |shift|^2 / D."""
    [(target, z)] = gaussians(0.5, 1.0, 1, 4000)
    [distance] = SlicedWasserstein(samples=4000, projections=200).compare(z, target, torch.Generator().manual_seed(0))
    assert abs(distance.value - 0.5) < 4 * distance.stderr
    assert distance.stderr < 0.03


# Classifiers


def test_accuracy_is_at_most_that_of_the_best_classifier() -> None:
    """Of N(1, 1) and N(0, 1) in both dimensions, sqrt(2) apart: Phi(sqrt(2) / 2) = 0.76 of the draws are told."""
    found = repeated(C2ST(samples=500, epochs=60, folds=3), 1.0, 1.0, 4)["c2st_accuracy"]
    best = float(Normal(0.0, 1.0).cdf(torch.tensor(math.sqrt(0.5))))
    error = found.stated / math.sqrt(4)
    assert best - 0.03 - 4 * error < found.mean < best + 4 * error
    assert error < 0.01


def test_what_does_not_overlap_is_told_apart() -> None:
    [(target, z)] = gaussians(20.0, 1.0, 1, 200)
    [distance] = C2ST(samples=200, epochs=100).compare(z, target, torch.Generator())
    assert distance.value == 1
    assert 0 < distance.stderr < 0.01  # 400 right answers are no certainty


# Moments


def test_errors_of_moments_are_in_exact_standard_deviations() -> None:
    """A shift of 0.3 in one of two quantities, in units of its exact standard deviation, which is 1.53."""
    problem = SmallPosteriorProblem()
    model = view_of(problem).model
    assert isinstance(model, HasQuantities)
    mean, sd = model.exact_moments(placed(problem, CPU, torch.float64).test)["z1"]
    assert sd == pytest.approx(math.sqrt(0.2 + 4 * 0.21 * 1.6**2))
    found = measured(Moments(samples=20_000), lambda z: z + torch.tensor([0.3 * sd, 0.0], dtype=z.dtype))
    value = found["mean_error"]
    assert abs(value.value - 0.3) < 4 * value.stderr
    assert value.stderr == pytest.approx(1 / math.sqrt(20_000), rel=0.02)
    assert value.value == value.settings["errors"]["z1"]
    assert value.settings["errors_in_mcse"]["z1"] == pytest.approx(value.value / value.stderr)
    assert abs(value.settings["errors"]["z2"]) < 4 * value.settings["mcse"]["z2"]
    wide = measured(Moments(samples=20_000), lambda z: mean + 1.4 * (z - mean))["sd_error"]
    assert abs(wide.settings["errors"]["z1"] - 0.4) < 4 * wide.settings["mcse"]["z1"]
    assert wide.value == max(abs(error) for error in wide.settings["errors"].values())


def test_errors_of_moments_are_those_of_repetitions() -> None:
    """60 repetitions: z-scores of mean square 1 +- 0.18; four of that."""
    found = [measured(Moments(samples=400), seed=seed) for seed in range(60)]
    for metric in ("mean_error", "sd_error"):
        scores = [each[metric].settings["errors_in_mcse"]["z1"] for each in found]
        assert np.mean(np.square(scores)) == pytest.approx(1, abs=0.73)


def test_moments_of_a_collapsed_posterior() -> None:
    found = measured(Moments(samples=100), lambda z: 0 * z)
    assert found["sd_error"].value == 1
    assert found["mean_error"].settings["errors_in_mcse"] == {}


class Without(LatentModel):
    """A model with quantities and modes, and no exact draws."""

    def __init__(self, model: LatentModel) -> None:
        super().__init__()
        assert isinstance(model, HasQuantities)
        assert isinstance(model, HasModes)
        self.latent_dim, self.mode_weights = model.latent_dim, model.mode_weights
        self.quantities, self.exact_moments, self.mode_of = model.quantities, model.exact_moments, model.mode_of

    def sample_prior(self, n: int, generator: torch.Generator) -> Tensor:
        raise NotImplementedError

    def log_prior(self, z: Tensor) -> Tensor:
        raise NotImplementedError

    def log_likelihood(self, x: Tensor, z: Tensor) -> Tensor:
        raise NotImplementedError


@pytest.mark.parametrize("evaluator", SIX[4:], ids=named)
def test_moments_and_modes_need_no_exact_draws(evaluator: DrawsEvaluator) -> None:
    """There is no floor then, and the rest is the same."""
    problem = SmallPosteriorProblem()
    model = view_of(problem).model
    assert isinstance(model, HasExactDraws)
    run = EvaluationRun(placed(problem, CPU, torch.float64), problem, CPU, torch.float64, 0)
    found = evaluator.measure(Fit(Without(model), Drawn(model), {}), problem, run)
    expected = {metric: each for metric, each in measured(evaluator).items() if not metric.endswith(FLOOR)}
    assert {each.metric: each.value for each in found} == {metric: each.value for metric, each in expected.items()}
    assert all("floor" not in each.settings for each in found)


# Modes


def test_shares_of_modes_are_in_the_record() -> None:
    value = measured(Modes(samples=20_000))["mode_error"]
    shares, stderrs, exact = (value.settings[name] for name in ("shares", "share_stderrs", "exact_shares"))
    assert exact["upper"] == pytest.approx(0.7, abs=1e-4)
    assert abs(shares["upper"] - exact["upper"]) < 4 * stderrs["upper"]
    assert stderrs["upper"] == pytest.approx(math.sqrt(0.21 / 20_000), rel=0.02)
    assert value.stderr == pytest.approx(stderrs["upper"])
    assert value.value == pytest.approx(abs(shares["upper"] - exact["upper"]))


def test_a_mode_that_is_missed_is_its_weight_in_error() -> None:
    value = measured(Modes(samples=1000), upper_mode, more=2)["mode_error"]
    assert value.settings["shares"] == {"lower": 0.0, "upper": 1.0}
    assert value.value == pytest.approx(0.3, abs=1e-4)
    assert 0 < value.stderr < 0.002  # no draw out of 1000 is no proof that there is none


# The density's own answer


def test_exact_divergence_covers_a_posterior_of_one_observation() -> None:
    """log p(x) less the ELBO, against a numerical integral of q log q/p over the plane."""
    problem = SmallPosteriorProblem()
    model = view_of(problem).model
    run = EvaluationRun(placed(problem, CPU, torch.float64), problem, CPU, torch.float64, 0)
    from harness.testing.small import KnownPosterior

    posterior, x = KnownPosterior(2), run.data.test
    found = {each.metric: each for each in Exact(samples=4000).measure(Fit(model, posterior, {}), problem, run)}
    axis = torch.arange(-6, 8, 0.02, dtype=torch.float64)
    z = torch.cartesian_prod(axis, axis)[:, None]
    log_q, log_p = posterior.log_prob(x, z), model.log_joint(x, z)
    log_z = math.log(float(log_p.exp().sum()) * 0.02**2)
    assert found["log_likelihood"].value == pytest.approx(log_z, abs=1e-9)
    exact = float((log_q.exp() * (log_q - log_p + log_z)).sum()) * 0.02**2
    value = found["kl_to_posterior"]
    assert abs(value.value - exact) < 4 * value.stderr


# Subsampling


def test_error_of_a_mean_by_subsampling(generator) -> None:
    """sd / sqrt(n) = 0.02 from 20 blocks, hence known to within a sixth; four of that."""
    first, second = torch.randn(2, 5000, 1, dtype=torch.float64, generator=generator)
    stderr, mean = over_blocks(lambda a, b: float(a.mean() - b.mean()), first, second, 20)
    assert stderr == pytest.approx(0.02, rel=4 / 6)
    assert mean == pytest.approx(float((first - second).mean()))


def test_samples_have_a_least_number() -> None:
    options: dict[str, Any] = {"samples": 19}
    with pytest.raises(Exception, match="samples=19"):
        replace(NearestNeighbours(), **options)


def test_one_direction_has_no_error() -> None:
    with pytest.raises(UserError, match="option projections=1: input should be greater than or equal to 2"):
        SlicedWasserstein(projections=1)


def test_what_neighbours_and_folds_need_is_said_at_once() -> None:
    with pytest.raises(UserError, match="option k=5 needs samples=24 at least, got 23"):
        NearestNeighbours(samples=23, k=5)
    NearestNeighbours(samples=24, k=5)
    with pytest.raises(UserError, match="option k=2500 needs draws=10004 at least, got 10000"):
        Aggregate(k=2500)
    Aggregate(k=2499)
    with pytest.raises(UserError, match="option folds=21 needs as many samples, got 20"):
        C2ST(samples=20, folds=21)

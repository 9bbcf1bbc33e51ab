"""Draws of Markov chains among the distances: when they are too close in their chains, and what they are worth."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from harness.distances import DrawsEvaluator
from harness.evaluator import EvaluationRun, Evaluator, Measurement
from harness.method import Fit
from harness.mixing import effective_draws
from harness.model import HasExactDraws, HasModes
from harness.posterior import NO_FRESH_DRAWS, ChainPosterior
from harness.problem import placed
from harness.testing.small import SmallPosteriorProblem, view_of
from harness_plugins.aggregate import Aggregate
from harness_plugins.c2st import C2ST
from harness_plugins.gaps import Gaps
from harness_plugins.implicit import Implicit
from harness_plugins.knn import NearestNeighbours
from harness_plugins.mmd import MMD
from harness_plugins.modes import Modes
from harness_plugins.moments import Moments
from harness_plugins.sliced_wasserstein import SlicedWasserstein

CPU = torch.device("cpu")
HELD = 8


def measured(evaluator: DrawsEvaluator, kept: int, held: int) -> dict[str, Measurement]:
    """Of four chains, together so many draws, that stay at each exact draw of theirs for ``held`` transitions."""
    problem = SmallPosteriorProblem()
    view = view_of(problem)
    assert isinstance(view.model, HasExactDraws)
    stream = torch.Generator().manual_seed(7)
    visited = view.model.sample_exact_posterior(view.validation[:1], kept // held, stream)
    chains = visited.repeat_interleave(held, dim=0).unflatten(0, (4, -1))
    fit = Fit(view.model, ChainPosterior(chains, torch.zeros(4, dtype=torch.int64)), {})
    run = EvaluationRun(placed(problem, CPU, torch.float64), problem, CPU, torch.float64, 0)
    return {each.metric: each for each in evaluator.measure(fit, problem, run)}


@pytest.mark.parametrize(
    "evaluator",
    [
        NearestNeighbours(samples=400),
        MMD(samples=400),
        SlicedWasserstein(samples=400, projections=10),
        C2ST(samples=400, epochs=20, folds=2),
    ],
    ids=lambda evaluator: evaluator.name,
)
def test_neighbours_in_a_chain_are_no_independent_draws(evaluator: DrawsEvaluator) -> None:
    for kept, warned in ((400, True), (1596, True), (1600, False)):
        for metric, found in measured(evaluator, kept, held=1).items():
            assert bool(found.warning) == (warned and not metric.endswith("_floor")), (metric, kept)
            assert not found.warning or "keep 1,600 or compare fewer (samples=" in found.warning


def test_moments_count_what_the_draws_are_worth() -> None:
    """An error is the root of 8 larger where each draw is held 8 times; the effective size is known to a tenth."""
    independent, sticky = (measured(Moments(samples=4000), 4000, held) for held in (1, HELD))
    for metric in ("mean_error", "sd_error"):
        assert independent[metric].warning == sticky[metric].warning == ""
        assert sticky[metric].settings["mcse"].keys() == independent[metric].settings["mcse"].keys()
        for name, mcse in sticky[metric].settings["mcse"].items():
            ratio = mcse / independent[metric].settings["mcse"][name]
            assert ratio == pytest.approx(HELD**0.5, rel=0.25), (metric, name)
        floor = f"{metric}_floor"
        assert sticky[floor].settings["mcse"] == independent[floor].settings["mcse"]


def test_shares_of_modes_count_what_the_draws_are_worth() -> None:
    independent, sticky = (measured(Modes(samples=4000), 4000, held)["mode_error"] for held in (1, HELD))
    assert independent.warning == sticky.warning == ""
    for name, stderr in sticky.settings["share_stderrs"].items():
        ratio = stderr / independent.settings["share_stderrs"][name]
        assert ratio == pytest.approx(HELD**0.5, rel=0.25)


def test_chains_that_never_change_their_mode_say_one_thing_each() -> None:
    problem = SmallPosteriorProblem()
    view = view_of(problem)
    assert isinstance(view.model, HasExactDraws)
    assert isinstance(view.model, HasModes)
    inside = view.model.sample_exact_posterior(view.validation[:1], 4000, torch.Generator().manual_seed(7))[:, 0]
    chains = inside[view.model.mode_of(inside) == 1][:1600].reshape(4, 400, 1, 2)
    fit = Fit(view.model, ChainPosterior(chains, torch.zeros(4, dtype=torch.int64)), {})
    run = EvaluationRun(placed(problem, CPU, torch.float64), problem, CPU, torch.float64, 0)
    found = next(each for each in Modes(samples=400).measure(fit, problem, run) if each.metric == "mode_error")
    assert found.settings["shares"] == {"lower": 0.0, "upper": 1.0}
    for stderr in found.settings["share_stderrs"].values():  # of four draws, none of which is lower
        assert stderr == pytest.approx((1 / 402 * 401 / 402 / 4) ** 0.5)


@pytest.mark.parametrize("evaluator", [Aggregate(), Implicit(), Gaps()], ids=lambda evaluator: evaluator.name)
def test_what_needs_fresh_draws_says_nothing_of_chains(evaluator: Evaluator) -> None:
    problem = SmallPosteriorProblem()
    posterior = ChainPosterior(torch.zeros(4, 5, 1, 2), torch.zeros(4, dtype=torch.int64))
    assert evaluator.undefined(Fit(view_of(problem).model, posterior, {}), problem) == NO_FRESH_DRAWS


def test_draws_are_worth_no_more_than_they_are() -> None:
    generator = np.random.default_rng(3)
    values = generator.normal(size=(4, 1000))
    assert effective_draws(values) == pytest.approx(4000, rel=0.15)
    assert effective_draws(values.repeat(HELD, axis=1)) == pytest.approx(4000, rel=0.15)
    assert effective_draws(values.repeat(HELD, axis=1), "sd") == pytest.approx(4000, rel=0.25)
    alternating = values.copy()
    alternating[:, 1::2] = -alternating[:, ::2]
    assert effective_draws(alternating) == 4000
    assert effective_draws(np.ones((4, 10))) == 40
    assert effective_draws(values[:2, :3]) == 1  # too short
    stuck = np.repeat([[0.0], [0.0], [1.0], [1.0]], 200, axis=1)
    assert effective_draws(stuck) < 8
    assert effective_draws(values + 5 * np.arange(4)[:, None]) < 40


def test_fewer_draws_than_the_chains_are_worth_count_as_they_are() -> None:
    independent, thinned = (measured(Moments(samples=400), kept, held) for kept, held in ((400, 1), (4000, HELD)))
    for name, mcse in thinned["mean_error"].settings["mcse"].items():
        assert mcse == pytest.approx(independent["mean_error"].settings["mcse"][name], rel=0.25), name

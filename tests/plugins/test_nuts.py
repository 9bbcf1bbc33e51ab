"""NUTS: moments of exact posteriors, what it costs, when it stops, and modes that chains do not leave."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import pyro
import pytest
import torch
from torch import Tensor

from harness.clock import Clock
from harness.evaluator import EvaluationRun
from harness.method import Budget, Checkpoint, Diverged, Fit, Run, State
from harness.mixing import diagnostics
from harness.model import LatentModel, StandardNormalPrior
from harness.posterior import ChainPosterior
from harness.problem import Problem, placed
from harness.seeding import Streams, seeded
from harness.stopping import Stopped
from harness.target import PosteriorProblem
from harness.testing import SmallGaussianProblem, SmallProblem
from harness.testing.small import view_of
from harness_plugins.chains import Chains
from harness_plugins.nuts import NUTS, Drawn, Potential

CPU = torch.device("cpu")


def fit(
    method: NUTS,
    problem: Problem,
    budget: str = "steps=1",
    clock: Clock | None = None,
    checkpoint: Checkpoint | None = None,
) -> Fit:
    view, streams = view_of(problem), Streams(0, problem.label, method.name, CPU)
    run = Run(CPU, torch.float64, Budget.parse(budget), streams, clock or Clock(CPU))
    run.checkpoint = checkpoint or run.checkpoint
    with seeded(0):
        return method.fit(view, run)


def chains_of(found: Fit) -> Tensor:
    """Shape (C, n, D)."""
    assert isinstance(found.posterior, ChainPosterior)
    return found.posterior.chains()[:, :, 0]


@pytest.fixture(scope="module")
def gaussian() -> Fit:
    return fit(NUTS(warmup=60, draws=120), SmallGaussianProblem())


def test_moments_are_those_of_the_exact_posterior(gaussian: Fit) -> None:
    """Means, variances and the covariance within four Monte Carlo errors, from the effective number of draws of each:
    of five quantities that many errors are exceeded once in three thousand runs."""
    view = view_of(SmallGaussianProblem())
    mean, covariance = view.model.exact_posterior(view.validation)  # type: ignore[operator]
    deviation = chains_of(gaussian) - mean[0]
    found = {f"mean {i}": deviation[..., i] for i in range(2)}
    found |= {f"{i} {j}": deviation[..., i] * deviation[..., j] - covariance[i, j] for i, j in ((0, 0), (0, 1), (1, 1))}
    worth = diagnostics({name: values.numpy() for name, values in found.items()})["ess_bulk"]
    for name, values in found.items():
        assert abs(float(values.mean())) < 4 * float(values.std()) / math.sqrt(worth[name]), name


def test_a_fit_keeps_chains_and_counts_its_gradients(gaussian: Fit) -> None:
    assert gaussian.state["draws"].shape == (4, 120, 1, 2)
    assert gaussian.state["divergences"].tolist() == [0, 0, 0, 0]
    assert gaussian.steps == gaussian.parameters == 0
    assert 4 * 180 < gaussian.gradient_evaluations < 4 * 180 * 50  # at least one leapfrog step for each transition


def test_every_gradient_is_counted() -> None:
    Counted.calls.clear()
    found = fit(NUTS(chains=2, warmup=10, draws=10), OneModel(model="Counted"))
    assert found.gradient_evaluations == len(Counted.calls)


class PosteriorModel(StandardNormalPrior):
    """N(0, 1) in one dimension, and x says nothing."""

    latent_dim = 1
    reference: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("reference", torch.zeros(1))

    def log_likelihood(self, x: Tensor, z: Tensor) -> Tensor:
        return self.log_ratio(z[..., 0]).expand(*z.shape[:-2], len(x))

    def log_ratio(self, z: Tensor) -> Tensor:
        return 0.0 * z


@dataclass(frozen=True, kw_only=True)
class OneModel(PosteriorProblem):
    name: str = "one-model"
    model: Literal["PosteriorModel", "Counted", "TwoModes", "Wall", "Nowhere"] = "PosteriorModel"

    def target(self) -> LatentModel:
        return globals()[self.model]()


class Counted(PosteriorModel):
    """Keeps each gradient that flows back through it."""

    calls: ClassVar[list[Tensor]] = []

    def log_likelihood(self, x: Tensor, z: Tensor) -> Tensor:
        value = super().log_likelihood(x, z)
        if value.requires_grad:
            value.register_hook(self.calls.append)
        return value


class TwoModes(PosteriorModel):
    """Half N(-8, 1), half N(8, 1): no chain of local moves gets from one to the other."""

    def log_ratio(self, z: Tensor) -> Tensor:
        modes = torch.stack([-0.5 * (z - 8).square(), -0.5 * (z + 8).square()])
        return modes.logsumexp(0) + 0.5 * z.square()


def test_chains_in_different_modes_are_found_out_by_r_hat() -> None:
    """Twelve chains that start on either side with equal odds are all on one side once in two thousand seeds."""
    problem = OneModel(model="TwoModes")
    found = fit(NUTS(chains=12, warmup=15, draws=15, max_tree_depth=4), problem)
    chains = chains_of(found)[..., 0]
    assert bool((chains.sign() == chains[:, :1].sign()).all()), "a chain has changed sides"
    assert set(chains[:, 0].sign().tolist()) == {-1.0, 1.0}
    run = EvaluationRun(placed(problem, CPU, torch.float64), problem, CPU, torch.float64, 0)
    r_hat = Chains().measure(found, problem, run)[0]
    assert r_hat.value > 1.5
    assert "chains disagree" in r_hat.warning


class Wall(PosteriorModel):
    """A half-normal posterior without a transform: trajectories run into a wall."""

    def log_ratio(self, z: Tensor) -> Tensor:
        return torch.where(z > 0, 0.0, -math.inf)


def test_trajectories_that_break_down_are_counted() -> None:
    found = fit(NUTS(chains=2, warmup=10, draws=30, max_tree_depth=4), OneModel(model="Wall"))
    assert bool((chains_of(found) > 0).all())
    assert int(found.state["divergences"].sum()) > 0


class Nowhere(PosteriorModel):
    def log_ratio(self, z: Tensor) -> Tensor:
        return z * math.nan


def test_a_chain_that_finds_no_start_has_diverged() -> None:
    with pytest.raises(Diverged, match="not finite for any of 100 draws of z from the prior"):
        fit(NUTS(), OneModel(model="Nowhere"))


def test_more_chains_leave_the_first_ones_as_they_are() -> None:
    method = NUTS(chains=2, warmup=8, draws=6, max_tree_depth=3)
    two, three = (fit(replace(method, chains=n), SmallGaussianProblem()) for n in (2, 3))
    assert torch.equal(chains_of(two), chains_of(three)[:2])
    assert not torch.equal(chains_of(three)[1], chains_of(three)[2])


class Ticking(Clock):
    """A second at every look."""

    def __init__(self) -> None:
        super().__init__(CPU)
        self.looks = 0

    def elapsed(self) -> float:
        self.looks += 1
        return float(self.looks)


def test_a_budget_in_seconds_is_shared_by_the_chains() -> None:
    """Each of two chains may look at the clock thirty times, once before each transition; ten of these are warm-up."""
    found = fit(NUTS(chains=2, warmup=10, draws=500, max_tree_depth=2), SmallGaussianProblem(), "seconds=60", Ticking())
    assert 15 <= chains_of(found).shape[1] <= 20
    with pytest.raises(RuntimeError, match="the time of chain 0 was over after 9 transitions, of which 10 are warm-up"):
        fit(NUTS(chains=2, warmup=10, draws=500, max_tree_depth=2), SmallGaussianProblem(), "seconds=20", Ticking())
    with pytest.raises(RuntimeError, match="over after 10 transitions, of which 10 are warm-up: give it more seconds"):
        fit(NUTS(chains=2, warmup=10, draws=500, max_tree_depth=2), SmallGaussianProblem(), "seconds=22", Ticking())


@dataclass(frozen=True, kw_only=True)
class Unequal(NUTS):
    """Chains of other lengths, as a clock may make them: draws of zero."""

    last: int = 250

    def _chain(self, i: int, potential: Potential, run: Run) -> Drawn:
        return torch.zeros(self.last if i == self.chains - 1 else 1000, 2), []


@pytest.mark.parametrize(("last", "told"), [(250, True), (990, False)])
def test_draws_are_not_cut_without_a_word(last: int, told: bool, caplog: pytest.LogCaptureFixture) -> None:
    found = fit(Unequal(last=last), SmallGaussianProblem())
    assert chains_of(found).shape[:2] == (4, last)
    text = "chains of 1000, 1000, 1000, 250 draws are cut to the shortest"
    assert any(text in message for message in caplog.messages) == told


class AfterEveryChain(Checkpoint):
    """Kept in memory; a run ends with each state."""

    state: State | None = None

    def load(self) -> State | None:
        return self.state

    def due(self) -> bool:
        return True

    def save(self, state: State, step: int, fraction: float) -> None:
        assert fraction == pytest.approx(step / 240)
        self.state = State({name: tensor.clone() for name, tensor in state.tensors.items()}, copy.deepcopy(state.facts))
        raise Stopped


def test_an_interrupted_fit_keeps_its_chains() -> None:
    method, checkpoint = NUTS(warmup=30, draws=30), AfterEveryChain()
    for _ in range(method.chains - 1):
        with pytest.raises(Stopped):
            fit(method, SmallGaussianProblem(), checkpoint=checkpoint)
    parts, whole = fit(method, SmallGaussianProblem(), checkpoint=checkpoint), fit(method, SmallGaussianProblem())
    assert torch.equal(chains_of(parts), chains_of(whole))
    assert parts.gradient_evaluations == whole.gradient_evaluations


def test_pyro_is_left_as_it_was() -> None:
    pyro.clear_param_store()
    pyro.param("kept", torch.tensor(1.0))
    settings = pyro.settings.get()
    fit(NUTS(chains=2, warmup=5, draws=5, max_tree_depth=2), SmallGaussianProblem())
    assert pyro.settings.get() == settings
    assert list(pyro.get_param_store().keys()) == ["kept"]
    pyro.clear_param_store()


def test_where_it_is_unfit() -> None:
    assert NUTS().unfit(view_of(SmallGaussianProblem())) is None
    reason = NUTS().unfit(view_of(SmallProblem()))
    assert reason == "approximates a single posterior, and this problem has 24 observations"

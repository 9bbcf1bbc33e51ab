"""Pyro's automatic guides against the posteriors that their families can reach, known in closed form."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pyro
import pytest
import torch
from torch import Tensor
from torch.distributions import MultivariateNormal, kl_divergence

import harness
from harness.clock import Clock
from harness.method import Budget, Diverged, Fit, Run
from harness.model import LatentModel, StandardNormalPrior
from harness.options import UserError
from harness.posterior import HasDensity, HasLocalFamily, HasPointDensity
from harness.seeding import Streams, seeded
from harness.target import PosteriorProblem
from harness.testing import SmallProblem, check_method
from harness.testing.small import view_of
from harness_plugins.linear_gaussian import LinearGaussian, LinearGaussianModel, true_parameters
from harness_plugins.planar import Banana, Torus
from harness_plugins.pyro_guides import AutoGuide, AutoGuideMethod, FullRank, Laplace, MeanField

CPU = torch.device("cpu")
D, E = 2, 4


@dataclass(frozen=True, kw_only=True)
class OneObservation(PosteriorProblem):
    """A single observation of the linear-Gaussian oracle: the best mean-field posterior is 0.13 nats off."""

    name: str = "one-observation"

    def observation(self) -> np.ndarray:
        return np.array([1.5, -0.7, 0.2, 0.9])

    def target(self) -> LatentModel:
        weight, bias = true_parameters(D, E, 0.6, 1.0)
        return LinearGaussianModel.fixed(weight, bias, 0.5)


PROBLEM = OneObservation()


def oracle() -> tuple[LinearGaussianModel, Tensor]:
    view = view_of(PROBLEM)
    assert isinstance(view.model, LinearGaussianModel)
    return view.model, view.validation


def divergence(fit: Fit) -> float:
    """KL(q || p(z|x)) of a Gaussian q, in closed form; nats."""
    model, x = oracle()
    q = fit.posterior.distribution  # type: ignore[attr-defined]
    covariance = q.covariance_matrix if hasattr(q, "covariance_matrix") else torch.diag(q.variance)
    mean, exact = model.exact_posterior(x)
    return float(kl_divergence(MultivariateNormal(q.mean, covariance), MultivariateNormal(mean[0], exact)))


def fitted(method: AutoGuideMethod, steps: int = 400) -> Fit:
    return harness.fit(method, PROBLEM, budget=f"steps={steps}", precision="float64")


def test_mean_field_reaches_the_best_diagonal_gaussian() -> None:
    """Within 0.01 nats, a thirteenth of what the family lacks: noise of the gradients leaves some 0.001 at this lr."""
    model, _ = oracle()
    gap = float(model.mean_field_gap())
    assert gap == pytest.approx(0.13, abs=0.01)
    assert gap - 1e-9 <= divergence(fitted(MeanField())) < gap + 0.01


def test_full_rank_reaches_the_exact_posterior() -> None:
    """Within 0.01 nats, as above."""
    assert divergence(fitted(FullRank())) < 0.01


def test_laplace_is_the_exact_posterior() -> None:
    """A Gaussian is its own second-order expansion, and Newton's method is at its mode after one step."""
    fit = fitted(Laplace(), steps=1)
    model, x = oracle()
    _, covariance = model.exact_posterior(x)
    torch.testing.assert_close(fit.posterior.distribution.covariance_matrix, covariance, rtol=1e-8, atol=1e-8)  # type: ignore[attr-defined]
    assert divergence(fit) < 1e-12


def test_the_curve_is_the_negative_elbo() -> None:
    """-ELBO = KL(q || p(z|x)) - log p(x).

    Validation averages a thousand copies of the observation with 10 draws each, whose log p(x, z) - log q(z) has a
    standard deviation below 1: within five standard errors.
    """
    fit = fitted(MeanField(), steps=120)
    model, x = oracle()
    last = fit.curve[-1]
    assert {100, 120} <= {point.step for point in fit.curve}
    assert last.validation == pytest.approx(divergence(fit) - float(model.log_evidence(x)), abs=5 * 0.01)
    assert (fit.steps, fit.gradient_evaluations, fit.parameters) == (120, 120, 2 * D)


@pytest.mark.parametrize("guide", ["AutoLowRankMultivariateNormal", "AutoLaplaceApproximation", "AutoIAFNormal"])
def test_every_guide_is_a_method(guide: str) -> None:
    check_method(AutoGuide(guide=guide))  # type: ignore[arg-type]


def test_other_guides_are_no_options() -> None:
    with pytest.raises(UserError, match="pyro: option guide='AutoDelta'"):
        AutoGuide(guide="AutoDelta")  # type: ignore[arg-type]


@pytest.mark.parametrize(("method", "local"), [(MeanField(), True), (FullRank(), False), (Laplace(), False)])
def test_what_posteriors_can_do(method: AutoGuideMethod, local: bool) -> None:
    posterior = fitted(method, steps=1).posterior
    assert isinstance(posterior, HasDensity)
    assert isinstance(posterior, HasPointDensity)
    assert isinstance(posterior, HasLocalFamily) == local


@pytest.mark.parametrize("budget", ["examples=30", "steps=30"])
def test_a_step_reads_one_observation(budget: str) -> None:
    assert harness.fit(Laplace(), PROBLEM, budget=budget).steps == 30


def test_starts_depend_on_the_seed() -> None:
    first, second = (harness.fit(Laplace(), PROBLEM, seed=seed, budget="steps=1") for seed in (0, 1))
    assert not torch.equal(first.state["guide.guide.loc"], second.state["guide.guide.loc"])


class Target(StandardNormalPrior):
    """log f(z) = ``function(z)``, known up to a factor."""

    latent_dim = 1
    reference: Tensor

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.register_buffer("reference", torch.zeros(1))
        self.function = function

    def log_likelihood(self, x: Tensor, z: Tensor) -> Tensor:
        return (self.function(z[..., 0]) - self.log_prior(z)).expand(*z.shape[:-2], len(x))

    def log_joint(self, x: Tensor, z: Tensor) -> Tensor:
        """Without the rounding of a prior that is taken off and put on again."""
        return self.function(z[..., 0]).expand(*z.shape[:-2], len(x))


@dataclass(frozen=True, kw_only=True)
class Saddle(PosteriorProblem):
    """No maximum anywhere."""

    name: str = "saddle"

    def target(self) -> LatentModel:
        return Target(lambda z: z.square())


@dataclass(frozen=True, kw_only=True)
class Endless(PosteriorProblem):
    """Ever higher, ever more slowly."""

    name: str = "endless"

    def target(self) -> LatentModel:
        return Target(lambda z: z.abs().log())


@dataclass(frozen=True, kw_only=True)
class Hyperbola(PosteriorProblem):
    """A mode at 5 with curvature 1; from further than 1 Newton's full steps, u to -u^3, go ever further away."""

    name: str = "hyperbola"

    def target(self) -> LatentModel:
        return Target(lambda z: -(1 + (z - 5).square()).sqrt())


@dataclass(frozen=True, kw_only=True)
class Low(PosteriorProblem):
    """The same, far below zero."""

    name: str = "low"

    def target(self) -> LatentModel:
        return Target(lambda z: -1e6 - (1 + (z - 5).square()).sqrt())


@dataclass(frozen=True, kw_only=True)
class Flat(PosteriorProblem):
    """A minimum, from which nothing rises by an amount that matters."""

    name: str = "flat"

    def target(self) -> LatentModel:
        return Target(lambda z: 1e-10 * z.square())


@dataclass(frozen=True, kw_only=True)
class Cauchy(PosteriorProblem):
    """A mode at 5 with curvature 2; no concave function beyond a distance of 1."""

    name: str = "cauchy"

    def target(self) -> LatentModel:
        return Target(lambda z: -(1 + (z - 5).square()).log())


@dataclass(frozen=True, kw_only=True)
class Hole(PosteriorProblem):
    """Not a number beyond 0.05."""

    name: str = "hole"

    def target(self) -> LatentModel:
        return Target(lambda z: torch.where(z.abs() < 0.05, -z.square(), math.nan))


def run(problem: PosteriorProblem, method: AutoGuideMethod) -> Fit:
    streams = Streams(0, problem.label, method.name, CPU)
    with seeded(0):
        return method.fit(view_of(problem), Run(CPU, torch.float64, Budget("steps", 5), streams, Clock(CPU)))


@pytest.mark.parametrize(
    ("problem", "message"),
    [
        (Flat(), "log p\\(x, z\\) rises or is flat in some direction where the search ended: no mode, or .* over 100:"),
        (Saddle(), "the search for a mode of log p\\(x, z\\) has not ended: there may be none"),
        (Endless(), "the search for a mode of log p\\(x, z\\) has not ended: there may be none"),
        (Hole(), "is not finite|has not ended|objective is nan"),
    ],
)
@pytest.mark.filterwarnings("ignore:Encountered NaN")
def test_laplace_without_a_mode_has_diverged(problem: PosteriorProblem, message: str) -> None:
    with pytest.raises(Diverged, match=message):
        run(problem, Laplace())


@pytest.mark.parametrize(("problem", "curvature"), [(Hyperbola(), 1.0), (Cauchy(), 2.0)])
def test_laplace_is_at_the_mode_wherever_the_optimiser_ends(problem: PosteriorProblem, curvature: float) -> None:
    """Where it ends, after five steps of 0.03, is 5 away from the mode, from where full steps do not come to it.

    A last step from where less than 1e-8 nats are left, at most 1.5e-4 away, ends within its cube, times 2.
    """
    q = run(problem, Laplace()).posterior.distribution  # type: ignore[attr-defined]
    torch.testing.assert_close(q.mean, torch.full((1,), 5.0, dtype=torch.float64), rtol=0, atol=1e-10)
    torch.testing.assert_close(q.variance, torch.full((1,), 1 / curvature, dtype=torch.float64), rtol=0, atol=1e-8)


def test_laplace_finds_the_mode_where_single_precision_would_not() -> None:
    """In single precision log p, some -1e6, is rounded to 0.06, more than what the last steps rise by."""
    q = harness.fit(Laplace(), Low(), budget="steps=5").posterior.distribution  # type: ignore[attr-defined]
    torch.testing.assert_close(q.mean, torch.full((1,), 5.0), rtol=0, atol=1e-5)


@pytest.mark.filterwarnings("ignore:Encountered NaN")  # Pyro says so as well
def test_an_objective_that_is_not_finite_has_diverged() -> None:
    with pytest.raises(Diverged, match="objective is nan"):
        run(Hole(), MeanField())


def test_where_they_are_unfit() -> None:
    assert MeanField().unfit(view_of(PROBLEM)) is None
    many = MeanField().unfit(view_of(SmallProblem()))
    assert many == "approximates a single posterior, and this problem has 24 observations"
    learnt = Laplace().unfit(view_of(LinearGaussian(n_train=1, n_validation=1, n_test=1, learn=True)))
    assert learnt is not None
    assert learnt.startswith("takes the model as given, and this one has parameters to learn: decoder.")
    flow = AutoGuide(guide="AutoIAFNormal").unfit(view_of(Saddle()))
    assert flow == "an autoregressive flow needs at least two dimensions"
    for method in (Laplace(), AutoGuide(guide="AutoLaplaceApproximation")):
        ring = method.unfit(view_of(Torus()))
        assert ring == "expands log p(x, z) at a mode, and there is none: its maxima are a circle"
    assert MeanField().unfit(view_of(Torus())) is None
    assert Laplace().unfit(view_of(Banana())) is None


def test_pyro_is_left_as_it_was() -> None:
    pyro.clear_param_store()
    pyro.param("kept", torch.tensor(1.0))
    settings = pyro.settings.get()
    for method in (FullRank(), Laplace()):
        fit = run(PROBLEM, method)
        fit.posterior.sample(oracle()[1], 2, torch.Generator())
    assert pyro.settings.get() == settings
    assert list(pyro.get_param_store().keys()) == ["kept"]
    pyro.clear_param_store()

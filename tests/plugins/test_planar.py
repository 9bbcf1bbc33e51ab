"""Targets in the plane, and the funnel, against closed forms and sums over grids that know nothing of them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal

from harness.model import CanSimulate, HasEvidence, HasModes, HasNoMode, HasQuantities, LatentModel
from harness.target import PosteriorProblem
from harness.testing import ConformanceError, check_problem
from harness_plugins.exact import quadrature
from harness_plugins.funnel import Funnel, FunnelModel
from harness_plugins.planar import Banana, Torus, TorusModel, TwoMoons, TwoMoonsModel

ORIGIN = torch.zeros(1, 2, dtype=torch.float64)
X = torch.ones(1, 1, dtype=torch.float64)


def evidence(model: LatentModel, x: Tensor) -> float:
    assert isinstance(model, HasEvidence)
    return float(model.log_evidence(x))


def test_the_torus_has_a_closed_form() -> None:
    """With s = r^2 the area element is pi ds, and what is left is half a Gaussian integral."""
    closed = math.log(0.5 * math.pi**1.5 * (1 + math.erf(2)))
    assert evidence(Torus().target(), X) == pytest.approx(closed, abs=1e-12)
    assert closed == pytest.approx(1.714753, abs=5e-7)


@pytest.mark.parametrize(("problem", "log_z"), [(Torus(), 1.714753), (Banana(), 1.152687)])
def test_evidence_and_moments_are_sums_over_the_plane(problem: PosteriorProblem, log_z: float) -> None:
    model = problem.target().double()
    log_p, _ = quadrature(model, X, tolerance=1e-8)
    assert evidence(model, X) == pytest.approx(float(log_p), abs=1e-8)
    assert evidence(model, X) == pytest.approx(log_z, abs=5e-7)
    axis = torch.arange(-8, 8, 0.02, dtype=torch.float64)
    z = torch.cartesian_prod(axis, axis)
    weight = torch.exp(model.log_joint(X, z[:, None])[:, 0] - log_p + 2 * math.log(0.02))
    assert isinstance(model, HasQuantities)
    moments = model.exact_moments(X)
    for name, value in model.quantities(z).items():
        mean = float((weight * value).sum())
        sd = math.sqrt(float((weight * (value - mean).square()).sum()))
        assert moments[name] == pytest.approx((mean, sd), abs=1e-6), name
    assert not isinstance(model, HasModes | CanSimulate)


def test_the_maxima_of_the_torus_are_a_circle() -> None:
    model = Torus().target()
    assert isinstance(model, TorusModel)
    turn = torch.linspace(0, 2 * math.pi, 50, dtype=torch.float64)
    circle = math.sqrt(2) * torch.stack([turn.cos(), turn.sin()], dim=-1)
    assert isinstance(model, HasNoMode)
    torch.testing.assert_close(model.log_target(circle), torch.zeros(50, dtype=torch.float64), rtol=0, atol=1e-12)
    assert bool((model.log_target(circle * 1.01) < 0).all())
    assert bool((model.log_target(circle * 0.99) < 0).all())


# Two moons


def moons() -> TwoMoonsModel:
    model = TwoMoons().target().double()
    assert isinstance(model, TwoMoonsModel)
    return model


def test_a_crescent_is_highest_where_it_breaks_off() -> None:
    """Along it the prior of z grows towards the tips, across it the maximum is inside, beyond the tips is nothing."""
    model = moons()
    angle = torch.linspace(-0.999, 0.999, 401, dtype=torch.float64) * math.pi / 2
    radius = torch.linspace(0.05, 0.15, 201, dtype=torch.float64)[:, None]

    def log_joint(a: Tensor, b: Tensor) -> Tensor:
        theta = torch.stack([a - b, a + b], dim=-1) / math.sqrt(2)
        z = math.sqrt(2) * torch.erfinv(theta)
        return model.log_joint(torch.zeros(1, 2, dtype=torch.float64), z[..., None, :])[..., 0]

    height, across = log_joint(0.25 + radius * angle.cos(), -radius * angle.sin()).max(0)
    assert bool(((across > 0) & (across < len(radius) - 1)).all())
    middle = len(angle) // 2
    assert bool((height[middle:].diff() > 0).all())
    assert bool((height[: middle + 1].diff() < 0).all())
    tip = torch.tensor([1.0, -1.0], dtype=torch.float64)
    assert bool((log_joint(torch.full((2,), 0.2499, dtype=torch.float64), 0.1 * tip) < height[[0, -1]] - 100).all())
    assert isinstance(model, HasNoMode)


def latent(a: Tensor, b: Tensor) -> Tensor:
    """z at the rotated coordinates a and b."""
    theta = torch.stack([a - b, a + b], dim=-1) / math.sqrt(2)
    return math.sqrt(2) * torch.erfinv(theta)


@pytest.mark.parametrize("x", [(0.0, 0.0), (-0.3, 0.4)])
def test_the_evidence_of_two_moons_is_a_sum_over_theta(x: tuple[float, float]) -> None:
    observed, h = torch.tensor([x], dtype=torch.float64), 4e-4
    ahead, aside = torch.arange(0, 0.2, h).double() + h / 2, torch.arange(-0.2, 0.2, h).double() + h / 2
    a, b = torch.meshgrid(0.25 - x[0] + ahead, x[1] + aside, indexing="ij")
    log_p = moons().log_likelihood(observed, latent(a, b).reshape(-1, 1, 2)).logsumexp(0) + math.log(2 * h**2 / 4)
    # The density jumps at no more than exp(-50) of its height; the sum's own error is that of cells of 0.04 widths.
    assert evidence(moons(), observed) == pytest.approx(float(log_p), abs=1e-4)


@pytest.mark.parametrize("x", [(0.3, 0.0), (0.0, 1.0), (-1.0, 0.0)])
def test_crescents_that_the_prior_cuts_off_are_refused(x: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="these are cut off"):
        moons().log_evidence(torch.tensor([x], dtype=torch.float64))


@pytest.mark.parametrize("theta", [(0.3, 0.2), (-0.5, 0.1)])
def test_two_moons_is_the_density_of_its_simulator(theta: tuple[float, float]) -> None:
    """Over a grid of x it integrates to one, and its moments are those of observations made by the recipe."""
    centre = torch.tensor([-abs(theta[0] + theta[1]), theta[1] - theta[0]], dtype=torch.float64) / math.sqrt(2)
    h = 5e-4
    axis = torch.arange(-0.2, 0.2, h, dtype=torch.float64) + h / 2
    p = torch.cartesian_prod(axis, axis)
    x = p + centre + torch.tensor([0.25, 0.0]).double()
    z = math.sqrt(2) * torch.erfinv(torch.tensor([theta], dtype=torch.float64))
    weight = torch.exp(moons().log_likelihood(x, z)) * h**2
    assert float(weight.sum()) == pytest.approx(1, abs=1e-4)
    radius = p.norm(dim=-1)
    # A density without the division by r would have a mean radius of 0.101.
    assert float((weight * radius).sum()) == pytest.approx(0.1, abs=1e-5)
    assert float((weight * radius.square()).sum()) == pytest.approx(0.1**2 + 0.01**2, abs=1e-6)
    assert float((weight * p[:, 0]).sum()) == pytest.approx(0.1 * 2 / math.pi, abs=1e-4)  # E cos a = 2 / pi
    assert float((weight * p[:, 1]).sum()) == pytest.approx(0, abs=1e-6)


def test_two_moons_is_finite_behind_the_crescents_too() -> None:
    z = 3 * torch.randn(5000, 1, 2, generator=torch.Generator().manual_seed(0))
    z.requires_grad_()
    log_likelihood = TwoMoons().target().log_likelihood(ORIGIN.float(), z)
    (gradient,) = torch.autograd.grad(log_likelihood.sum(), z)
    assert bool(log_likelihood.isfinite().all())
    assert bool(gradient.isfinite().all())


class WithoutDivision(TwoMoonsModel):
    """sbibm's likelihood, a density in r alone."""

    def log_likelihood(self, x: Tensor, z: Tensor) -> Tensor:
        a, b = self._rotated(z)
        distance = torch.hypot(x[:, 0] + a.abs() - self.CENTRE, x[:, 1] - b)
        return super().log_likelihood(x, z) + distance.log()


class OtherRadius(TwoMoonsModel):
    """Draws whose radii are half a standard deviation off."""

    def sample_exact_posterior(self, x: Tensor, n: int, generator: torch.Generator) -> Tensor:
        wide = TwoMoonsModel()
        wide.RADIUS = self.RADIUS + 0.5 * self.WIDTH
        return wide.sample_exact_posterior(x, n, generator)


@dataclass(frozen=True, kw_only=True)
class Mutant(TwoMoons):
    name: str = "mutant"
    of: str = ""

    def target(self) -> LatentModel:
        return globals()[self.of]()


@pytest.mark.parametrize(
    ("of", "law"), [("WithoutDivision", "do not fit together"), ("OtherRadius", "invariant change")]
)
def test_mutants_are_found(of: str, law: str) -> None:
    with pytest.raises(ConformanceError, match=law):
        check_problem(Mutant(of=of))


# The funnel


@pytest.mark.parametrize("latent_dim", [2, 10])
def test_the_funnel_is_the_textbook_density(latent_dim: int) -> None:
    model = Funnel(latent_dim=latent_dim).target().double()
    z = torch.randn(20, 1, latent_dim, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    v, rest = z[..., 0], z[..., 1:]
    textbook = Normal(0.0, 3.0).log_prob(v) + Normal(0.0, torch.exp(v / 2)[..., None]).log_prob(rest).sum(-1)
    torch.testing.assert_close(model.log_joint(X, z), textbook)


def test_the_funnels_draws_are_standard_normal_once_straightened() -> None:
    model = Funnel().target()
    assert isinstance(model, FunnelModel)
    z = model.sample_exact_posterior(X, 20_000, torch.Generator().manual_seed(0))[:, 0]
    straight = torch.cat([z[:, :1] / 3, z[:, 1:] * torch.exp(-z[:, :1] / 2)], dim=1)
    # Ten means and 55 covariances; four standard errors are 0.03, of variances 0.04.
    torch.testing.assert_close(straight.mean(0), torch.zeros(10).double(), rtol=0, atol=0.03)
    torch.testing.assert_close(torch.cov(straight.T), torch.eye(10).double(), rtol=0, atol=0.04)
    assert model.exact_moments(X)["x[9]"] == pytest.approx((0, math.exp(2.25)))

"""Both Eight Schools against textbook densities, an integration by others, published figures; and mutants of them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from torch import Tensor
from torch.distributions import HalfCauchy, MultivariateNormal, Normal

from harness.model import CanSimulate, HasClosedForm, HasModes, LatentModel, has_standard_normal_prior
from harness.problem import placed
from harness.target import PosteriorProblem
from harness.testing import ConformanceError, check_problem
from harness_plugins.eight_schools import (
    EightSchools,
    EightSchoolsAVB,
    EightSchoolsModel,
    HalfCauchyScale,
    TwoSignedScale,
)

PROBLEMS = [EightSchoolsAVB(), EightSchools()]
BOTH = pytest.mark.parametrize("problem", PROBLEMS, ids=lambda problem: problem.name)

# Means and standard deviations, to the decimals that they are known to. posteriordb's are from 10,000 reference draws,
# whose error is about a hundredth of a standard deviation; the others are from another quadrature.
AVB = {
    "mu": (0.7764, 0.3238), "tau": (0.0, 0.7892), "|tau|": (0.7024, 0.3597),
    "theta[1]": (1.6023, None), "theta[2]": (0.8001, None), "theta[3]": (0.3519, None), "theta[4]": (0.7469, None),
    "theta[5]": (0.2716, None), "theta[6]": (0.4367, None), "theta[7]": (1.3873, None), "theta[8]": (1.0680, None),
    "eta[1]": (0.0, 1.3752), "eta[2]": (0.0, 0.6966), "eta[3]": (0.0, 0.9901), "eta[4]": (0.0, 0.7361),
    "eta[5]": (0.0, 1.0331), "eta[6]": (0.0, 0.8881), "eta[7]": (0.0, 1.1230), "eta[8]": (0.0, 0.7791),
}  # fmt: skip
POSTERIORDB = {"mu": (4.4105, 3.3093), "tau": (3.6021, 3.1985), "theta[1]": (6.1505, 5.6159)}


def model_and_observation(problem: PosteriorProblem) -> tuple[EightSchoolsModel, Tensor]:
    model = problem.target()
    assert isinstance(model, EightSchoolsModel)
    return model, torch.from_numpy(problem.observation())[None]


def several(model: LatentModel, n: int = 3) -> Tensor:
    """Observations that the model makes up."""
    assert isinstance(model, CanSimulate)
    stream = torch.Generator().manual_seed(0)
    return model.sample_observation(model.sample_prior(n, stream), stream)


@pytest.mark.parametrize(("problem", "log_p"), [(PROBLEMS[0], -12.7108), (PROBLEMS[1], -31.3113)])
def test_evidence_is_the_figure_that_is_known(problem: PosteriorProblem, log_p: float) -> None:
    model, x = model_and_observation(problem)
    assert float(model.log_evidence(x)) == pytest.approx(log_p, abs=5e-5)
    # In single precision, sigma is rounded and nothing else.
    assert float(model.float().log_evidence(x.float())) == pytest.approx(log_p, abs=6e-5)


@BOTH
def test_evidence_is_that_of_an_adaptive_integration(problem: PosteriorProblem) -> None:
    model, _ = model_and_observation(problem)
    x, variance = several(model), model.sigma.square()
    one = torch.ones((), dtype=torch.float64)
    prior = HalfCauchy(5 * one) if isinstance(model, HalfCauchyScale) else Normal(0 * one, one)

    def density(tau: float, y: Tensor) -> float:
        covariance = torch.diag(tau**2 + variance) + model.mu_sd**2  # of y given tau, mu integrated out
        log_y = MultivariateNormal(torch.zeros(8).double(), covariance).log_prob(y)
        return float(torch.exp(log_y + prior.log_prob(tau * one) + 30))

    sides = 1 if isinstance(model, HalfCauchyScale) else 2
    for y, log_p in zip(x, model.log_evidence(x), strict=True):
        total = sides * quad(density, 0, math.inf, args=(y,), epsabs=0, epsrel=1e-8, limit=200)[0]
        assert float(log_p) == pytest.approx(math.log(total) - 30, abs=1e-7)


def test_moments_are_the_figures_that_are_known() -> None:
    model, x = model_and_observation(EightSchoolsAVB())
    found = model.exact_moments(x)
    assert list(found) == list(AVB)
    for name, (mean, sd) in AVB.items():
        assert found[name][0] == pytest.approx(mean, abs=6e-5), name
        assert sd is None or found[name][1] == pytest.approx(sd, abs=6e-5), name
    model, x = model_and_observation(EightSchools())
    found = model.exact_moments(x)
    assert found["mu"] == pytest.approx((4.3968, 3.3177), abs=6e-5)
    assert found["tau"] == pytest.approx((3.5977, 3.2200), abs=6e-5)
    for name, (mean, sd) in POSTERIORDB.items():
        # Ten thousand draws, thinned until they hardly depend on each other; four standard errors, of the standard
        # deviation with a kurtosis of up to ten.
        assert abs(found[name][0] - mean) < 4 * sd / 100, name
        assert abs(found[name][1] - sd) < 4 * sd * 1.5 / 100, name


@BOTH
def test_the_joint_density_is_the_textbooks(problem: PosteriorProblem) -> None:
    model, x = model_and_observation(problem)
    z = model.sample_prior(50, torch.Generator().manual_seed(0))
    mu, u, eta = z[:, 0], z[:, 1], z[:, 2:]
    if isinstance(model, HalfCauchyScale):
        tau = u.exp()
        log_prior = Normal(0.0, 5.0).log_prob(mu) + HalfCauchy(torch.tensor(5.0).double()).log_prob(tau) + u
    else:
        tau = u
        log_prior = Normal(0.0, 1.0).log_prob(mu) + Normal(0.0, 1.0).log_prob(tau)
    log_prior = log_prior + Normal(0.0, 1.0).log_prob(eta).sum(-1)
    theta = mu[:, None] + tau[:, None] * eta
    log_likelihood = Normal(theta, model.sigma).log_prob(x).sum(-1)
    torch.testing.assert_close(model.log_prior(z), log_prior)
    torch.testing.assert_close(model.log_likelihood(x, z[:, None]), log_likelihood[:, None])
    torch.testing.assert_close(model.log_joint(x, z[:, None]), (log_prior + log_likelihood)[:, None])


def test_tau_is_half_cauchy_a_priori() -> None:
    model, _ = model_and_observation(EightSchools())
    tau = model.tau(model.float().sample_prior(20_000, torch.Generator().manual_seed(0))[:, 1])
    assert bool(tau.isfinite().all())
    levels = HalfCauchy(torch.tensor(5.0).double()).cdf(tau.double()).sort().values
    distance = (levels - torch.arange(20_000) / 20_000).abs().max()
    assert distance * 20_000**0.5 < 2  # Kolmogorov's statistic is above 2 once in 1500 times


def test_the_two_modes_mirror_each_other_and_the_prior_is_normal() -> None:
    model, x = model_and_observation(EightSchoolsAVB())
    assert has_standard_normal_prior(model)
    z = model.sample_prior(20, torch.Generator().manual_seed(0))
    mirrored = torch.cat([z[:, :1], -z[:, 1:]], dim=1)
    torch.testing.assert_close(model.log_joint(x, z[:, None]), model.log_joint(x, mirrored[:, None]))
    assert isinstance(model, HasModes)
    assert torch.equal(model.mode_of(z), 1 - model.mode_of(mirrored))
    names = list(model.mode_weights)
    assert all(
        ("tau > 0" if tau > 0 else "tau < 0") == names[int(i)] for tau, i in zip(z[:, 1], model.mode_of(z), strict=True)
    )
    assert not isinstance(EightSchools().target(), HasModes)
    assert not isinstance(model, HasClosedForm)


@BOTH
def test_simulated_observations_are_those_of_the_model(problem: PosteriorProblem) -> None:
    model, _ = model_and_observation(problem)
    stream = torch.Generator().manual_seed(0)
    z = model.sample_prior(4, stream)
    draws = model.sample_observation(z.expand(20_000, 4, 10), stream)
    error = (draws.mean(0) - model.mean(z)) / model.sigma * 20_000**0.5
    assert error.abs().max() < 4.5  # of 32 means; once in 4000 times
    torch.testing.assert_close(draws.std(0), model.sigma.expand(4, 8), rtol=0.03, atol=0)  # six standard errors
    assert bool(model.log_evidence(several(model, 200)).isfinite().all())


def test_observations_beyond_the_reach_of_the_grid_are_refused() -> None:
    model, x = model_and_observation(EightSchoolsAVB())
    with pytest.raises(ArithmeticError, match="not negligible at the ends of its grid, which goes from -40 to 40"):
        model.log_evidence(1e6 * x)


@BOTH
def test_single_precision_sees_the_same_density(problem: PosteriorProblem) -> None:
    data = placed(problem, torch.device("cpu"), torch.float32)
    model, x = model_and_observation(problem)
    z = model.sample_exact_posterior(x, 100, torch.Generator().manual_seed(0))
    single = model.log_joint(x, z)
    torch.testing.assert_close(model.float().log_joint(data.test, z.float()).double(), single, rtol=1e-5, atol=1e-4)
    assert data.test.dtype == torch.float32
    assert data.train.read(torch.tensor([0, 0]), torch.Generator()).shape == (2, 8)


# Mutants


class WithoutJacobian(HalfCauchyScale):
    def log_prior(self, z: Tensor) -> Tensor:
        return super().log_prior(z) - z[..., 1]


class WithoutJacobianAtAll(HalfCauchyScale):
    """The same slip in the density and in the exact answers."""

    def log_prior_u(self, u: Tensor) -> Tensor:
        return super().log_prior_u(u) - u


class Alone(TwoSignedScale):
    """One of the two modes."""

    def sample_exact_posterior(self, x: Tensor, n: int, generator: torch.Generator) -> Tensor:
        z = super().sample_exact_posterior(x, n, generator)
        return torch.cat([z[..., :1], z[..., 1:] * z[..., 1:2].sign()], dim=-1)


class Shuffled(HalfCauchyScale):
    """Every coordinate has its own distribution, but eta_1 belongs to another draw."""

    def sample_exact_posterior(self, x: Tensor, n: int, generator: torch.Generator) -> Tensor:
        z = super().sample_exact_posterior(x, n, generator)
        return torch.cat([z[..., :2], z[..., 2:3].roll(1, 0), z[..., 3:]], dim=-1)


class Sorted(TwoSignedScale):
    def sample_exact_posterior(self, x: Tensor, n: int, generator: torch.Generator) -> Tensor:
        z = super().sample_exact_posterior(x, n, generator)
        return z[self.log_joint(x, z)[:, 0].argsort()]


class WidePrior(HalfCauchyScale):
    def log_evidence(self, x: Tensor) -> Tensor:
        return super().log_evidence(x) - 0.3


class OtherMoments(TwoSignedScale):
    def exact_moments(self, x: Tensor) -> dict[str, tuple[float, float]]:
        found = super().exact_moments(x)
        return {**found, "tau": (found["tau"][0], 1.1 * found["tau"][1])}


class OtherWeights(TwoSignedScale):
    mode_weights = {"tau > 0": 0.45, "tau < 0": 0.55}  # noqa: RUF012


class OtherPlane(TwoSignedScale):
    """eta_2 in the place of eta_1."""

    def log_density_in_plane(self, x: Tensor, plane: tuple[str, str], points: Tensor) -> Tensor:
        other = ("tau", "eta[2]") if plane[1] == "eta[1]" else plane
        return super().log_density_in_plane(x, other, points)


class Double(TwoSignedScale):
    def sample_exact_posterior(self, x: Tensor, n: int, generator: torch.Generator) -> Tensor:
        return super().sample_exact_posterior(x.double(), n, generator)


@dataclass(frozen=True, kw_only=True)
class Mutant(EightSchools):
    name: str = "mutant"
    of: str = ""

    def observation(self) -> np.ndarray:
        return EightSchoolsAVB().observation() if self._like_avb else super().observation()

    @property
    def _like_avb(self) -> bool:
        return issubclass(globals()[self.of], TwoSignedScale)

    def target(self) -> LatentModel:
        problem = EightSchoolsAVB() if self._like_avb else EightSchools()
        model: Any = problem.target()
        model.__class__ = globals()[self.of]
        return model


def test_what_mutants_are_made_from_passes() -> None:
    check_problem(Mutant(of="TwoSignedScale"))


@pytest.mark.parametrize(
    ("of", "law"),
    [
        ("WithoutJacobian", "log_prior does not integrate to 1"),
        ("WithoutJacobianAtAll", "log_prior does not integrate to 1"),
        ("Alone", "do not fit together"),
        ("Shuffled", "transitions that leave p\\(z\\|x\\) invariant change the second moments of z"),
        ("Sorted", "draws depend on the ones before"),
        ("WidePrior", "do not fit together"),
        ("OtherMoments", "the variance of 'tau' over sample_exact_posterior and exact_moments"),
        ("OtherWeights", "the share of mode 'tau > 0' in sample_exact_posterior and mode_weights"),
        ("OtherPlane", "the share of sample_exact_posterior in a part of \\('tau', 'eta\\[1\\]'\\) and its density"),
        ("Double", "expected float32 as x has, got torch.float64"),
    ],
)
def test_mutants_are_found(of: str, law: str) -> None:
    with pytest.raises(ConformanceError, match=law):
        check_problem(Mutant(of=of))

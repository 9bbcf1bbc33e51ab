r"""Eight Schools, twice: coaching effects theta_j around a common mean, measured with known standard errors.

.. math:: y_j \sim N(\theta_j, \sigma_j^2), \quad \theta_j = \mu + \tau \eta_j, \quad \eta_j \sim N(0, 1)

``eight-schools-avb`` is the model of the AVB paper's released code (Mescheder, Nowozin, Geiger 2017,
https://arxiv.org/abs/1701.04722): mu, tau ~ N(0, 1) with tau of either sign, so that (tau, eta) and -(tau, eta) are
equally likely, and its own data, which are Rubin's (1981, https://doi.org/10.3102/10769986006004377) divided by ten for
y and by about twenty for sigma. ``eight-schools`` is eight_schools_noncentered of posteriordb (Magnusson et al. 2025,
https://arxiv.org/abs/2407.04967): Rubin's data, mu ~ N(0, 5^2), tau half-Cauchy with scale 5; z contains log tau.

Given tau everything is Gaussian,

.. math:: y_j | \mu, \tau \sim N(\mu, \tau^2 + \sigma_j^2), \quad
          \eta_j | \mu, \tau, y \sim N\Bigl(\frac{\tau (y_j - \mu)}{\tau^2 + \sigma_j^2},
          \frac{\sigma_j^2}{\tau^2 + \sigma_j^2}\Bigr)

so that evidence, moments and independent draws follow from sums over a grid in one dimension.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import softplus

from harness import hookimpl
from harness.model import LOG_2PI, LatentModel, StandardNormalPrior, log_normal
from harness.target import GridDensity, PosteriorProblem

SCHOOLS = 8
HALF_WIDTH, SPACING = 40.0, 0.01  # of the grid over tau or log tau


class EightSchoolsModel(LatentModel):
    """p(y|z) for z = (mu, u, eta_1 ... eta_8), where u is tau or its logarithm, and what follows from p(u) exactly.

    Exact answers are computed in float64, whatever the model's own precision.

    Args:
        sigma: Standard errors of the observations, shape (8,).
        mu_sd: Standard deviation of mu a priori.
    """

    reported: tuple[str, ...]
    """Which of mu, tau, |tau|, theta and eta are the model's quantities."""

    sigma: Tensor

    def __init__(self, sigma: np.ndarray, mu_sd: float) -> None:
        super().__init__()
        self.latent_dim = 2 + SCHOOLS
        self.mu_sd = mu_sd
        self.register_buffer("sigma", torch.from_numpy(sigma))

    @abstractmethod
    def tau(self, u: Tensor) -> Tensor:
        """tau at u, elementwise."""

    @abstractmethod
    def log_prior_u(self, u: Tensor) -> Tensor:
        """Log density of u a priori, elementwise, nats."""

    def log_likelihood(self, x: Tensor, z: Tensor) -> Tensor:
        return log_normal(x, self.mean(z), self.sigma.log())

    def mean(self, z: Tensor) -> Tensor:
        """theta: (..., D) -> (..., 8)."""
        return z[..., :1] + self.tau(z[..., 1:2]) * z[..., 2:]

    def sample_observation(self, z: Tensor, generator: torch.Generator) -> Tensor:
        theta = self.mean(z)
        return theta + self.sigma * torch.randn(theta.shape, generator=generator, device=z.device, dtype=z.dtype)

    def log_evidence(self, x: Tensor) -> Tensor:
        """log p(y): (N, 8) -> (N,), nats, float64."""
        return self._marginal(x).log_normaliser()

    def sample_exact_posterior(self, x: Tensor, n: int, generator: torch.Generator) -> Tensor:
        """Independent draws, u first, then mu given u, then eta given both: (N, 8) -> (n, N, D)."""
        u = self._marginal(x).sample(n, generator)
        noise = torch.randn((*u.shape, 1 + SCHOOLS), generator=generator, device=u.device, dtype=u.dtype)
        tau, variance = self.tau(u)[..., None], self._variance(u)
        mean, precision = self._mu(variance, x.double())
        mu = (mean + precision.rsqrt() * noise[..., 0])[..., None]
        eta = tau / variance * (x.double() - mu) + self.sigma.double() * variance.rsqrt() * noise[..., 1:]
        return torch.cat([mu, u[..., None], eta], dim=-1).to(x.dtype)

    def _variance(self, u: Tensor) -> Tensor:
        """tau^2 + sigma_j^2: (...) -> (..., 8)."""
        return self.tau(u)[..., None].square() + self.sigma.double().square()

    def _mu(self, variance: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and precision of the Gaussian p(mu | tau, y): two of (...), from (..., 8)."""
        precision = self.mu_sd**-2 + variance.reciprocal().sum(-1)
        return (x / variance).sum(-1) / precision, precision

    def _marginal(self, x: Tensor) -> GridDensity:
        """p(y, u) on the grid."""
        x = x.double()
        points = round(2 * HALF_WIDTH / SPACING) + 1
        u = torch.linspace(-HALF_WIDTH, HALF_WIDTH, points, dtype=x.dtype, device=x.device)
        return GridDensity(u, self._log_joint_of_u(u, x))

    def _log_joint_of_u(self, u: Tensor, x: Tensor) -> Tensor:
        """log p(y, u), with mu and eta integrated out: (G,) and (N, 8), both float64, -> (G, N), nats."""
        weight = self._variance(u).reciprocal()
        precision = self.mu_sd**-2 + weight.sum(1)
        squared = weight @ x.square().T - (weight @ x.T).square() / precision[:, None]
        log_determinant = math.log(self.mu_sd**2) + precision.log() - weight.log().sum(1)
        constant = self.log_prior_u(u) - 0.5 * (SCHOOLS * LOG_2PI + log_determinant)
        return constant[:, None] - 0.5 * squared

    def quantities(self, z: Tensor) -> dict[str, Tensor]:
        tau = self.tau(z[..., 1])
        known = {"mu": z[..., 0], "tau": tau, "|tau|": tau.abs()}
        return self._reported({**known, **_by_school("theta", self.mean(z)), **_by_school("eta", z[..., 2:])})

    def exact_moments(self, x: Tensor) -> dict[str, tuple[float, float]]:
        """Posterior mean and standard deviation of each of the `quantities`, for the one y (1, 8)."""
        marginal = self._marginal(x)
        means, variances = self._given_u(marginal.points, x.double())
        found: dict[str, tuple[float, float]] = {}
        for name, mean in self._reported(means).items():
            first, second = marginal.mean(mean), marginal.mean(variances[name] + mean.square())
            found[name] = float(first), math.sqrt(float(second - first.square()))
        return found

    def _given_u(self, u: Tensor, x: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Means and variances of mu, tau, |tau|, theta and eta given u and y: (G,) and (1, 8) -> each (G,) by name."""
        tau, variance = self.tau(u), self._variance(u)
        mean, precision = self._mu(variance, x)
        kept = self.sigma.double().square() / variance  # of mu in theta, and of the prior's variance in eta's
        pull = tau[:, None] / variance  # of y - mu on eta
        zero = torch.zeros_like(tau)
        means = {"mu": mean, "tau": tau, "|tau|": tau.abs()}
        means |= _by_school("theta", x + kept * (mean[:, None] - x)) | _by_school("eta", pull * (x - mean[:, None]))
        variances = {"mu": precision.reciprocal(), "tau": zero, "|tau|": zero}
        variances |= _by_school("theta", tau[:, None].square() * kept + kept.square() / precision[:, None])
        variances |= _by_school("eta", kept + pull.square() / precision[:, None])
        return means, variances

    def _reported(self, known: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: value for name, value in known.items() if name.partition("[")[0] in self.reported}


def _by_school(name: str, values: Tensor) -> dict[str, Tensor]:
    """(..., 8) -> each (...), called ``name[1]`` to ``name[8]``."""
    return {f"{name}[{j + 1}]": values[..., j] for j in range(SCHOOLS)}


class TwoSignedScale(EightSchoolsModel, StandardNormalPrior):
    """u = tau, of either sign, and z ~ N(0, I): two modes that mirror each other."""

    reported = ("mu", "tau", "|tau|", "theta", "eta")
    mode_weights: ClassVar[dict[str, float]] = {"tau > 0": 0.5, "tau < 0": 0.5}
    planes: ClassVar[tuple[tuple[str, str], ...]] = (("mu", "tau"), ("tau", "eta[1]"))

    def __init__(self, sigma: np.ndarray) -> None:
        super().__init__(sigma, mu_sd=1.0)

    def tau(self, u: Tensor) -> Tensor:
        return u

    def log_prior_u(self, u: Tensor) -> Tensor:
        return log_normal(u[..., None])

    def mode_of(self, z: Tensor) -> Tensor:
        return (z[..., 1] < 0).long()

    def log_density_in_plane(self, x: Tensor, plane: tuple[str, str], points: Tensor) -> Tensor:
        """p(tau | y), times the Gaussian density of the other quantity given tau."""
        x, at = x.double(), dict(zip(plane, points.double().unbind(-1), strict=True))
        tau = at.pop("tau")
        [(name, value)] = at.items()
        means, variances = (each[name] for each in self._given_u(tau.flatten(), x))
        given = log_normal(value.flatten()[:, None], means[:, None], 0.5 * variances.log()[:, None])
        of_tau = self._log_joint_of_u(tau.flatten(), x)[:, 0] - self.log_evidence(x)
        return (of_tau + given).reshape(tau.shape)


class HalfCauchyScale(EightSchoolsModel):
    """u = log tau with tau half-Cauchy, and mu ~ N(0, 5^2), eta ~ N(0, I)."""

    reported = ("mu", "tau", "theta")
    SCALE = 5.0

    def __init__(self, sigma: np.ndarray) -> None:
        super().__init__(sigma, mu_sd=5.0)

    def tau(self, u: Tensor) -> Tensor:
        return u.exp()

    def log_prior_u(self, u: Tensor) -> Tensor:
        """That of tau at exp(u), and the log-Jacobian u."""
        standardised = u - math.log(self.SCALE)
        return math.log(2 / math.pi) + standardised - softplus(2 * standardised)

    def sample_prior(self, n: int, generator: torch.Generator) -> Tensor:
        kwargs = {"generator": generator, "device": generator.device}
        level = torch.rand(n, dtype=torch.float64, **kwargs)  # single precision would draw a tau of zero now and then
        u = math.log(self.SCALE) + torch.tan(0.5 * math.pi * level).log()
        z = torch.randn((n, self.latent_dim), dtype=self.sigma.dtype, **kwargs)
        return torch.cat([self.mu_sd * z[:, :1], u.to(z.dtype)[:, None], z[:, 2:]], dim=1)

    def log_prior(self, z: Tensor) -> Tensor:
        log_mu = log_normal(z[..., :1], log_sd=math.log(self.mu_sd))
        return log_mu + self.log_prior_u(z[..., 1]) + log_normal(z[..., 2:])


@dataclass(frozen=True, kw_only=True)
class EightSchoolsAVB(PosteriorProblem):
    """The AVB paper's: ten dimensions, z ~ N(0, I), tau of either sign; log p(y) = -12.7108 nats.

    That figure is with the prior and the likelihood normalised; the released code leaves out the ten normalisers of the
    prior, 5 log 2 pi = 9.189 nats.
    """

    name: str = "eight-schools-avb"

    def observation(self) -> np.ndarray:
        return np.array([2.8, 0.8, -0.3, 0.7, -0.1, 0.1, 1.8, 1.2])

    def target(self) -> LatentModel:
        return TwoSignedScale(np.array([0.8, 0.5, 0.8, 0.6, 0.5, 0.6, 0.5, 0.4]))


@dataclass(frozen=True, kw_only=True)
class EightSchools(PosteriorProblem):
    """posteriordb's, non-centred: ten dimensions, z = (mu, log tau, eta); log p(y) = -31.3113 nats."""

    name: str = "eight-schools"

    def observation(self) -> np.ndarray:
        return np.array([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])

    def target(self) -> LatentModel:
        return HalfCauchyScale(np.array([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0]))


@hookimpl
def harness_problems() -> list[PosteriorProblem]:
    return [EightSchoolsAVB(), EightSchools()]

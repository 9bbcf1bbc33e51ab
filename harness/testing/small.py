"""Problems that are small enough for checks, and a fit of them whose posterior has every capability.

`SmallProblem` has many observations and a model to learn; `SmallPosteriorProblem` has one observation and a model that
is known, and of which everything is known exactly; the posterior of `SmallGaussianProblem` is Gaussian.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from pydantic import PositiveInt
from torch import Tensor
from torch.distributions import MultivariateNormal

from harness.method import Fit, Method
from harness.model import LatentModel, StandardNormalPrior, log_normal
from harness.posterior import ChainPosterior, LocalFamily, LocalGaussian, Posterior
from harness.problem import DatasetSpec, MLPSpec, ModelSpec, Problem, TrainingView, placed
from harness.seeding import Streams
from harness.target import PosteriorProblem


@dataclass(frozen=True, kw_only=True)
class SmallProblem(Problem):
    """Binary 2x3 images, a latent space of two dimensions, a decoder of one hidden layer."""

    name: str = "small"
    latent_dim: PositiveInt = 2
    width: PositiveInt = 8

    @property
    def default_budget(self) -> str:
        return "steps=20"

    def dataset(self) -> DatasetSpec:
        # Distinct images, so that a posterior has something to tell apart.
        codes = np.random.default_rng(0).permutation(64)[:40]
        images = ((codes[:, None] >> np.arange(6)) & 1).astype(np.float32).reshape(-1, 2, 3)
        return DatasetSpec(self.name, images[:24], images[24:32], images[32:], binarisation="static")

    def model_spec(self) -> ModelSpec:
        return MLPSpec(
            latent_dim=self.latent_dim, width=self.width, depth=1, pair_width=self.width, pair_depth=1, pair_rank=4
        )


@dataclass(frozen=True, kw_only=True)
class SmallGreyProblem(SmallProblem):
    """The same networks for grey images, which are binarised afresh at every read."""

    name: str = "small-grey"

    def dataset(self) -> DatasetSpec:
        pixels = np.random.default_rng(0).integers(0, 256, size=(40, 2, 3), dtype=np.uint8)
        return DatasetSpec(self.name, pixels[:24], pixels[24:32], pixels[32:], levels=255, binarisation="dynamic")


class TwoModes(StandardNormalPrior):
    r"""A fixed model whose posterior is a mixture of two Gaussians: all that can be known of a model is known of it.

    .. math:: p(x|z) = w N(x; z, \sigma^2 I) + (1 - w) N(x; -z, \sigma^2 I), \quad w = 0.7, \; \sigma = 0.5

    hence p(x) = N(x; 0, (1 + sigma^2) I), and p(z|x) is the mixture, with the same weights, of the Gaussians around
    x / (1 + sigma^2) and around its negative, with the variance sigma^2 / (1 + sigma^2).

    Args:
        observed: The one observation whose modes are told, D numbers.
    """

    WEIGHT, SD = 0.7, 0.5
    TOTAL = 1 + SD**2  # variance of x
    SHRUNK = SD / math.sqrt(TOTAL)  # standard deviation of either part of the posterior

    observed: Tensor

    def __init__(self, observed: Sequence[float]) -> None:
        super().__init__()
        self.latent_dim = len(observed)
        self.register_buffer("observed", torch.tensor(observed))
        beyond = 0.5 * math.erfc(math.hypot(*observed) / self.TOTAL / self.SHRUNK / math.sqrt(2))
        upper = self.WEIGHT + (1 - 2 * self.WEIGHT) * beyond
        self.mode_weights = {"lower": 1 - upper, "upper": upper}

    def log_likelihood(self, x: Tensor, z: Tensor) -> Tensor:
        upper, lower = (log_normal(x, sign * z, math.log(self.SD)) for sign in (1, -1))
        return torch.logaddexp(upper + math.log(self.WEIGHT), lower + math.log(1 - self.WEIGHT))

    def sample_observation(self, z: Tensor, generator: torch.Generator) -> Tensor:
        return self._sign(z[..., :1], generator) * z + self.SD * _like(z, generator)

    def mean(self, z: Tensor) -> Tensor:
        return (2 * self.WEIGHT - 1) * z

    def log_evidence(self, x: Tensor) -> Tensor:
        return log_normal(x, 0.0, 0.5 * math.log(self.TOTAL))

    def sample_exact_posterior(self, x: Tensor, n: int, generator: torch.Generator) -> Tensor:
        mean = (x / self.TOTAL).expand(n, *x.shape)
        return self._sign(mean[..., :1], generator) * mean + self.SHRUNK * _like(mean, generator)

    def quantities(self, z: Tensor) -> dict[str, Tensor]:
        return {f"z{i + 1}": z[..., i] for i in range(self.latent_dim)}

    def exact_moments(self, x: Tensor) -> dict[str, tuple[float, float]]:
        either = (x[0] / self.TOTAL).tolist()
        variances = [self.SHRUNK**2 + 4 * self.WEIGHT * (1 - self.WEIGHT) * mean**2 for mean in either]
        return {
            f"z{i + 1}": ((2 * self.WEIGHT - 1) * mean, math.sqrt(variance))
            for i, (mean, variance) in enumerate(zip(either, variances, strict=True))
        }

    def mode_of(self, z: Tensor) -> Tensor:
        return (z @ self.observed > 0).long()

    def _sign(self, like: Tensor, generator: torch.Generator) -> Tensor:
        """1 with the probability w, else -1."""
        uniform = torch.rand(like.shape, generator=generator, device=like.device, dtype=like.dtype)
        return torch.where(uniform < self.WEIGHT, 1.0, -1.0).to(like.dtype)


def _like(z: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(z.shape, generator=generator, device=z.device, dtype=z.dtype)


@dataclass(frozen=True, kw_only=True)
class SmallPosteriorProblem(PosteriorProblem):
    """One observation of a known model, whose posterior has a mode with seven tenths and one with three."""

    name: str = "small-posterior"
    observed: tuple[float, ...] = (2.0, 1.0)
    width: PositiveInt = 8
    depth: PositiveInt = 1
    pair_width: PositiveInt = 8
    pair_depth: PositiveInt = 1

    def observation(self) -> np.ndarray:
        return np.array(self.observed)

    def target(self) -> LatentModel:
        return TwoModes(self.observed)


class SmallGaussianModel(LatentModel):
    """z = m + L eps and x = W z + noise, both standard normal: a prior that is none of the usual ones, all known."""

    latent_dim = 2
    prior_mean: Tensor
    prior_factor: Tensor
    weight: Tensor

    def __init__(self) -> None:
        super().__init__()
        constants = {"prior_mean": [1.0, -0.5], "prior_factor": [[1.5, 0.0], [0.4, 0.8]]}
        constants |= {"weight": [[1.0, 0.5], [0.0, 1.0], [0.5, -1.0]]}
        for name, values in constants.items():
            self.register_buffer(name, torch.tensor(values, dtype=torch.float64))

    def sample_prior(self, n: int, generator: torch.Generator) -> Tensor:
        like = {"device": self.prior_mean.device, "dtype": self.prior_mean.dtype}
        return self.prior_mean + torch.randn(n, self.latent_dim, generator=generator, **like) @ self.prior_factor.T

    def log_prior(self, z: Tensor) -> Tensor:
        whitened = (z - self.prior_mean) @ torch.linalg.inv(self.prior_factor).T
        return log_normal(whitened) - self.prior_factor.diagonal().log().sum()

    def log_likelihood(self, x: Tensor, z: Tensor) -> Tensor:
        return log_normal(x, z @ self.weight.T)

    def log_evidence(self, x: Tensor) -> Tensor:
        factor = self.weight @ self.prior_factor
        covariance = factor @ factor.T + torch.eye(len(factor), dtype=factor.dtype, device=factor.device)
        return MultivariateNormal(self.weight @ self.prior_mean, covariance).log_prob(x)

    def exact_posterior(self, x: Tensor) -> tuple[Tensor, Tensor]:
        prior_precision = torch.cholesky_inverse(self.prior_factor)
        covariance = torch.linalg.inv(prior_precision + self.weight.T @ self.weight)
        return (prior_precision @ self.prior_mean + x @ self.weight) @ covariance, covariance


@dataclass(frozen=True, kw_only=True)
class SmallGaussianProblem(PosteriorProblem):
    """One observation of three numbers and a Gaussian posterior in two dimensions."""

    name: str = "small-gaussian"
    width: PositiveInt = 8
    depth: PositiveInt = 1
    pair_width: PositiveInt = 8
    pair_depth: PositiveInt = 1

    def observation(self) -> np.ndarray:
        return np.array([2.0, -0.3, 1.1])

    def target(self) -> LatentModel:
        return SmallGaussianModel()


def problem_for(method: Method) -> Problem:
    """Where a method is tried: `SmallProblem`, or a single posterior where it is made for one only."""
    many = SmallProblem()
    return many if method.unfit(view_of(many)) is None else SmallPosteriorProblem()


class KnownPosterior(Posterior):
    """q(z|x) = N(mean of x, 0.8^2 I) against a standard normal prior: every capability in closed form."""

    SD = 0.8

    def __init__(self, latent_dim: int) -> None:
        self.latent_dim = latent_dim

    def _mean(self, x: Tensor) -> Tensor:
        return x.flatten(1).mean(1, keepdim=True).expand(-1, self.latent_dim)

    def sample(self, x: Tensor, n: int, generator: torch.Generator) -> Tensor:
        mean = self._mean(x)
        eps = torch.randn((n, *mean.shape), generator=generator, device=mean.device, dtype=mean.dtype)
        return mean + self.SD * eps

    def sample_and_log_prob(self, x: Tensor, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        z = self.sample(x, n, generator)
        return z, self.log_prob(x, z)

    def log_prob(self, x: Tensor, z: Tensor) -> Tensor:
        return log_normal(z, self._mean(x), float(np.log(self.SD)))

    def kl_to_prior(self, x: Tensor) -> Tensor:
        constant = self.latent_dim * (0.5 * (self.SD**2 - 1) - float(np.log(self.SD)))
        return 0.5 * self._mean(x).square().sum(-1) + constant

    def log_ratio(self, x: Tensor, z: Tensor) -> Tensor:
        return self.log_prob(x, z) - log_normal(z)

    def local(self, x: Tensor) -> LocalFamily:
        mean = self._mean(x)
        return LocalGaussian(mean, torch.full_like(mean, float(np.log(self.SD))))


def known_fit(view: TrainingView) -> Fit:
    """The untrained model of a view with `KnownPosterior`."""
    model = view.model.eval().requires_grad_(False)
    return Fit(model, KnownPosterior(view.latent_dim), dict(model.state_dict()))


def known_chains(view: TrainingView) -> Fit:
    """The same, with draws of `KnownPosterior` for the first observation as if chains had made them."""
    fit = known_fit(view)
    draws = fit.posterior.sample(view.validation[:1], 400, torch.Generator().manual_seed(0))
    chains = draws.reshape(4, 100, 1, view.latent_dim)
    return Fit(fit.model, ChainPosterior(chains, torch.zeros(4, dtype=torch.long)), {})


def view_of(problem: Problem) -> TrainingView:
    """What a method sees of a problem, in float64 on the CPU."""
    device = torch.device("cpu")
    return problem.training_view(placed(problem, device, torch.float64), Streams(0, problem.label, "known", device))

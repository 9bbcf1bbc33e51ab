"""Problems that are small enough for checks, and a fit of them whose posterior has every capability.

`SmallProblem` has many observations and a model to learn; `SmallPosteriorProblem` has one observation and a model that
is known, and of which everything is known exactly.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from pydantic import PositiveInt
from torch import Tensor

from harness.method import Fit, Method
from harness.model import LatentModel, log_normal
from harness.posterior import LocalFamily, LocalGaussian, Posterior
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


class TwoModes(LatentModel):
    r"""A fixed model whose posterior is a mixture of two Gaussians: all that can be known of a model is known of it.

    .. math:: p(z) = \tfrac12 \sum_{s = \pm 1} N(z; s c, I), \quad p(x|z) = N(x; z, I), \quad c = (2, 2, ...),

    hence p(z|x) = sum_s w_s N(z; (x + s c)/2, I/2), with weights in the ratio of N(x; s c, 2 I).

    Args:
        observed: The one observation whose modes are told, D numbers.
    """

    centres: Tensor

    def __init__(self, observed: Sequence[float]) -> None:
        super().__init__()
        self.latent_dim = len(observed)
        self.register_buffer("centres", torch.tensor([[-2.0], [2.0]]).expand(2, self.latent_dim).clone())
        weights, means = self._components(torch.tensor([observed]))
        along = means.sum(-1) / math.sqrt(0.5 * self.latent_dim)  # in standard deviations of that sum
        upper = float((weights * torch.special.ndtr(along)).sum())
        self.mode_weights = {"lower": 1 - upper, "upper": upper}

    def sample_prior(self, n: int, generator: torch.Generator) -> Tensor:
        which = torch.randint(2, (n,), generator=generator, device=generator.device)
        return self.centres[which] + self._noise((n, self.latent_dim), generator)

    def log_prior(self, z: Tensor) -> Tensor:
        return log_normal(z[..., None, :], self.centres).logsumexp(-1) - math.log(2)

    def log_likelihood(self, x: Tensor, z: Tensor) -> Tensor:
        return log_normal(x, z)

    def sample_observation(self, z: Tensor, generator: torch.Generator) -> Tensor:
        return z + self._noise(z.shape, generator)

    def mean(self, z: Tensor) -> Tensor:
        return z

    def log_evidence(self, x: Tensor) -> Tensor:
        return self._log_evidences(x).logsumexp(-1) - math.log(2)

    def sample_exact_posterior(self, x: Tensor, n: int, generator: torch.Generator) -> Tensor:
        weights, means = self._components(x)
        which = torch.rand((n, len(x), 1), generator=generator, device=x.device, dtype=x.dtype) < weights[:, 1:]
        centres = torch.where(which, means[:, 1], means[:, 0])
        return centres + math.sqrt(0.5) * self._noise(centres.shape, generator).to(x)

    def quantities(self, z: Tensor) -> dict[str, Tensor]:
        return {f"z{i + 1}": z[..., i] for i in range(self.latent_dim)}

    def exact_moments(self, x: Tensor) -> dict[str, tuple[float, float]]:
        weights, means = (part[0].double() for part in self._components(x))
        mean = weights @ means
        sd = (0.5 + weights @ means.square() - mean.square()).sqrt()
        return {f"z{i + 1}": (float(mean[i]), float(sd[i])) for i in range(self.latent_dim)}

    def mode_of(self, z: Tensor) -> Tensor:
        return (z.sum(-1) > 0).long()

    def _log_evidences(self, x: Tensor) -> Tensor:
        """log p(x|s), shape (N, 2)."""
        return log_normal(x[:, None], self.centres.to(x), 0.5 * math.log(2))

    def _components(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Weights (N, 2) and means (N, 2, D) of the posterior."""
        return self._log_evidences(x).softmax(-1), (x[:, None] + self.centres.to(x)) / 2

    def _noise(self, shape: Sequence[int], generator: torch.Generator) -> Tensor:
        return torch.randn(shape, generator=generator, device=generator.device, dtype=self.centres.dtype)


@dataclass(frozen=True, kw_only=True)
class SmallPosteriorProblem(PosteriorProblem):
    """One observation of a known model, whose posterior has a mode with seven tenths and one with three."""

    name: str = "small-posterior"
    observed: tuple[float, ...] = (0.5, -0.08)
    width: PositiveInt = 8
    depth: PositiveInt = 1
    pair_width: PositiveInt = 8
    pair_depth: PositiveInt = 1

    def observation(self) -> np.ndarray:
        return np.array(self.observed)

    def target(self) -> LatentModel:
        return TwoModes(self.observed)


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


def view_of(problem: Problem) -> TrainingView:
    """What a method sees of a problem, in float64 on the CPU."""
    device = torch.device("cpu")
    return problem.training_view(placed(problem, device, torch.float64), Streams(0, problem.label, "known", device))

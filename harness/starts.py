"""Where a path towards the posterior starts: distributions q0(z|x) that can be sampled and whose density is known.

Shapes: n or S samples, N observations (B in one block), D latent dimensions, E event shape of one observation.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from harness.hmc import Density, FunctionDensity, GaussianDensity, prior_density
from harness.model import LatentModel
from harness.posterior import HasPointDensity, Posterior

NO_DENSITY = "start=q needs a posterior whose density is known at every point; use start=moments"


@dataclass(frozen=True, eq=False)
class Start(ABC):
    """q0(z|x) for N observations.

    Args:
        scale: The scale of each dimension, by which steps are preconditioned, shape (N, D).
    """

    scale: Tensor

    @abstractmethod
    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """Draws from q0, shape (n, N, D)."""

    @abstractmethod
    def density(self, block: slice) -> Density:
        """log q0 for some of the observations."""


@dataclass(frozen=True, eq=False)
class GaussianStart(Start):
    """A diagonal Gaussian with a mean (N, D) and the scale as its standard deviations."""

    mean: Tensor

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        shape = (n, *self.mean.shape)
        noise = torch.randn(shape, generator=generator, device=self.mean.device, dtype=self.mean.dtype)
        return self.mean + self.scale * noise

    def density(self, block: slice) -> Density:
        return GaussianDensity(self.mean[block], self.scale[block])


@dataclass(frozen=True, eq=False)
class PriorStart(Start):
    """The model's prior, the same for every observation."""

    model: LatentModel

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        observations, dimensions = self.scale.shape
        return self.model.sample_prior(n * observations, generator).reshape(n, observations, dimensions)

    def density(self, block: slice) -> Density:
        return prior_density(self.model)


@dataclass(frozen=True, eq=False)
class PosteriorStart(Start):
    """A fitted posterior whose density is known at every point."""

    posterior: Posterior
    x: Tensor

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        return self.posterior.sample(self.x, n, generator)

    def density(self, block: slice) -> Density:
        posterior, x = self.posterior, self.x[block]
        if not isinstance(posterior, HasPointDensity):
            raise TypeError(NO_DENSITY)
        return FunctionDensity(lambda z: posterior.log_prob(x, z))

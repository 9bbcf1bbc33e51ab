"""Approximate posteriors q(z|x): sampling is required, everything else is an optional capability.

Shapes: n or S samples, N observations, D latent dimensions, E event shape of one observation.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn


class Posterior(ABC):
    """q(z|x), known at least through its samples: all that an implicit posterior can offer."""

    @abstractmethod
    def sample(self, x: Tensor, n: int, generator: torch.Generator) -> Tensor:
        """Draws from q(z|x): x (N, *E) -> (n, N, D)."""


@runtime_checkable
class HasDensity(Protocol):
    """The density of a posterior's own draws is known (Gaussians, flows)."""

    def sample_and_log_prob(self, x: Tensor, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draws (n, N, D) from q(z|x) and their log density (n, N), nats."""
        ...


@runtime_checkable
class HasPointDensity(Protocol):
    """The density is known at any point (Gaussians; flows with an inverse)."""

    def log_prob(self, x: Tensor, z: Tensor) -> Tensor:
        """log q(z|x): x (N, *E), z (S, N, D) -> (S, N), nats."""
        ...


@runtime_checkable
class HasAnalyticKL(Protocol):
    """KL(q(z|x) || p(z)) is known in closed form."""

    def kl_to_prior(self, x: Tensor) -> Tensor:
        """KL(q(z|x) || p(z)): x (N, *E) -> (N,), nats."""
        ...


@runtime_checkable
class HasLogRatio(Protocol):
    """An estimate of log q(z|x) - log p(z) is known (the adversary of AVB)."""

    def log_ratio(self, x: Tensor, z: Tensor) -> Tensor:
        """Estimate of log q(z|x) - log p(z): x (N, *E), z (S, N, D) -> (S, N), nats."""
        ...


class LocalFamily(nn.Module, ABC):
    """q_phi(z|x_n) with free parameters phi_n for each of N observations, of the family of an amortised posterior."""

    @abstractmethod
    def sample_and_log_prob(self, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draws (n, N, D) and their log density (n, N), nats; differentiable in the parameters."""


@runtime_checkable
class HasLocalFamily(Protocol):
    """The family's members have parameters that can be optimised for each observation by itself."""

    def local(self, x: Tensor) -> LocalFamily:
        """Start of the optimisation: the amortised posterior of x (N, *E)."""
        ...

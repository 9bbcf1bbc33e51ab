"""Approximate posteriors q(z|x): sampling is required, everything else is an optional capability.

Shapes: n or S samples, N observations, D latent dimensions, E event shape of one observation.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from harness.model import log_normal


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
    """q_n(z), the member of a family of posteriors that belongs to observation n, with free parameters, for N of them.

    Every parameter has the shape (N, ...); its row n is that of q_n and matters to no other observation.
    """

    @abstractmethod
    def sample_and_log_prob(self, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draws (n, N, D) and their log density (n, N), nats; differentiable in the parameters.

        What is read from the generator does not depend on the parameters: two members compared with the same noise
        differ by much less than their errors.
        """


@runtime_checkable
class HasLocalFamily(Protocol):
    """The posterior of each observation can leave the amortised one, within the family that both belong to."""

    def local(self, x: Tensor) -> LocalFamily:
        """Members that equal q(z|x) for x (N, *E), with parameters of their own: nothing is shared with q."""
        ...


class LocalGaussian(LocalFamily):
    """q_n = N(mean_n, diag(sd_n^2)).

    Args:
        mean, log_sd: Where the parameters start, shape (N, D).
    """

    def __init__(self, mean: Tensor, log_sd: Tensor) -> None:
        super().__init__()
        self.mean = nn.Parameter(mean.detach().clone())
        self.log_sd = nn.Parameter(log_sd.detach().clone())

    def sample_and_log_prob(self, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        shape = (n, *self.mean.shape)
        eps = torch.randn(shape, generator=generator, device=self.mean.device, dtype=self.mean.dtype)
        z = self.mean + torch.exp(self.log_sd) * eps
        return z, log_normal(eps) - self.log_sd.sum(-1)


@runtime_checkable
class HasChains(Protocol):
    """The draws of Markov chains, in the order in which they were made."""

    def chains(self) -> Tensor:
        """Draws of C chains after their warm-up, shape (C, n, N, D)."""
        ...

    def divergences(self) -> Tensor:
        """How many of these transitions an integrator broke down in, for each chain: shape (C,), int64."""
        ...


NO_FRESH_DRAWS = "the posterior's draws are those of chains: they come again, and depend on each other"
"""Why estimators that ask for independent draws again and again say nothing of chains."""


class ChainPosterior(Posterior):
    """Stored draws of Markov chains for one observation; x says nothing that they have not been told.

    Fewer draws than there are come without replacement, evenly spaced along the chains and in random order: neighbours
    resemble each other most. Of more draws than there are, all are given once (or as often as goes), then some again.

    Args:
        draws: Shape (C, n, 1, D).
        divergences: Shape (C,), int64.
    """

    def __init__(self, draws: Tensor, divergences: Tensor) -> None:
        self.draws, self.diverged = draws, divergences

    def chains(self) -> Tensor:
        return self.draws

    def divergences(self) -> Tensor:
        return self.diverged

    def sample(self, x: Tensor, n: int, generator: torch.Generator) -> Tensor:
        columns = [self.draws.flatten(0, 2)[self._chosen(n, generator)] for _ in range(len(x))]
        return torch.stack(columns, dim=1).to(x.dtype)

    def _chosen(self, n: int, generator: torch.Generator) -> Tensor:
        """Indices of n of all M draws: n // M times all, and the rest evenly spaced from a random one on."""
        total = self.draws.shape[:2].numel()
        kwargs = {"generator": generator, "device": generator.device}
        passes = [torch.randperm(total, **kwargs) for _ in range(n // total)]
        rest = n % total
        spaced = torch.arange(rest, device=generator.device) * total // max(1, rest)
        spaced = (spaced + torch.randint(total, (), **kwargs)) % total
        return torch.cat([*passes, spaced[torch.randperm(rest, **kwargs)]])

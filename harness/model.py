"""Latent-variable models p(z), p(x|z): what every method and every evaluator is written against.

Shapes: S samples, N observations, D latent dimensions, E event shape of one observation, P outputs of a decoder.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

LOG_2PI = math.log(2 * math.pi)

LikelihoodName = Literal["bernoulli", "gaussian"]


def log_normal(value: Tensor, mean: Tensor | float = 0.0, log_sd: Tensor | float = 0.0) -> Tensor:
    """Log density of a diagonal Gaussian, summed over the last axis: (..., D) -> (...), nats."""
    # a number is filled in on the device: a copy of it from the host would wait
    log_sd = log_sd.to(value) if isinstance(log_sd, Tensor) else value.new_full((), log_sd)
    standardised = (value - mean) * torch.exp(-log_sd)
    return (-0.5 * (standardised.square() + LOG_2PI) - log_sd).sum(-1)


class LatentModel(nn.Module, ABC):
    """A joint density p(x, z) = p(z) p(x|z) with z in R^D. One without parameters is a fixed model."""

    latent_dim: int

    @abstractmethod
    def sample_prior(self, n: int, generator: torch.Generator) -> Tensor:
        """Draws from p(z), shape (n, D)."""

    @abstractmethod
    def log_prior(self, z: Tensor) -> Tensor:
        """log p(z): (..., D) -> (...), nats."""

    @abstractmethod
    def log_likelihood(self, x: Tensor, z: Tensor) -> Tensor:
        """log p(x|z), nats.

        Args:
            x: Observations, shape (N, *E).
            z: Latents, shape (..., N, D), or (..., 1, D) to pair every latent with every observation.

        Returns:
            Shape (..., N).
        """

    def log_joint(self, x: Tensor, z: Tensor) -> Tensor:
        """log p(x, z), shapes as in `log_likelihood`."""
        return self.log_likelihood(x, z) + self.log_prior(z)


class StandardNormalPrior(LatentModel):
    """A model with p(z) = N(0, I)."""

    def sample_prior(self, n: int, generator: torch.Generator) -> Tensor:
        like = next((tensor for tensor in (*self.parameters(), *self.buffers())), torch.empty(0))
        return torch.randn(n, self.latent_dim, generator=generator, device=generator.device, dtype=like.dtype)

    def log_prior(self, z: Tensor) -> Tensor:
        return -0.5 * (z.square().sum(-1) + self.latent_dim * LOG_2PI)


def has_standard_normal_prior(model: LatentModel) -> bool:
    """Whether p(z) = N(0, I), and what is known in closed form of that prior holds."""
    return type(model).log_prior is StandardNormalPrior.log_prior


@runtime_checkable
class CanSimulate(Protocol):
    """A model that observations can be drawn from and that has a mean for each latent."""

    def sample_observation(self, z: Tensor, generator: torch.Generator) -> Tensor:
        """Draws from p(x|z): (..., D) -> (..., *E)."""
        ...

    def mean(self, z: Tensor) -> Tensor:
        """E[x|z]: (..., D) -> (..., *E)."""
        ...


@runtime_checkable
class HasEvidence(Protocol):
    """A model whose evidence is known: in closed form, or by a quadrature of its own that is exact to rounding."""

    def log_evidence(self, x: Tensor) -> Tensor:
        """log p(x): (N, *E) -> (N,), nats."""
        ...


@runtime_checkable
class HasClosedForm(HasEvidence, Protocol):
    """A model whose posterior is a Gaussian that is known too."""

    def exact_posterior(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean (N, D) and covariance (D, D) of the Gaussian p(z|x)."""
        ...


@runtime_checkable
class HasExactDraws(Protocol):
    """A model whose exact posterior can be sampled without a Markov chain."""

    def sample_exact_posterior(self, x: Tensor, n: int, generator: torch.Generator) -> Tensor:
        """Independent draws from p(z|x): x (N, *E) -> (n, N, D), of the dtype of x."""
        ...


@runtime_checkable
class NamesQuantities(Protocol):
    """A model whose latents have names, or functions that are worth reporting (a scale on its natural scale ...)."""

    def quantities(self, z: Tensor) -> dict[str, Tensor]:
        """Scalar functions of a latent by name: (..., D) -> each (...)."""
        ...


@runtime_checkable
class HasQuantities(NamesQuantities, Protocol):
    """A model whose named quantities have known posterior moments."""

    def exact_moments(self, x: Tensor) -> dict[str, tuple[float, float]]:
        """Posterior mean and standard deviation of each quantity, for the one observation x (1, *E)."""
        ...


@runtime_checkable
class HasPlanes(NamesQuantities, Protocol):
    """A model of whose named quantities some pairs have a known joint posterior density, which figures show.

    Args:
        planes: Names of the pairs.
    """

    planes: tuple[tuple[str, str], ...]

    def log_density_in_plane(self, x: Tensor, plane: tuple[str, str], points: Tensor) -> Tensor:
        """log p(a, b | x) at pairs of values (..., 2), for the one observation x (1, *E): (...), float64, nats."""
        ...


@runtime_checkable
class HasModes(Protocol):
    """A model whose posterior, given its one observation, has separate modes.

    Args:
        mode_weights: The exact posterior probability of each mode; they add up to 1.
    """

    mode_weights: dict[str, float]

    def mode_of(self, z: Tensor) -> Tensor:
        """Which mode a latent belongs to, as an index into ``mode_weights``: (..., D) -> (...), int64."""
        ...


@runtime_checkable
class HasNoMode(Protocol):
    """A model whose log p(x, z), given its one observation, has no isolated maximum with a Hessian of full rank.

    Args:
        no_mode: Why, as a clause: methods that expand the density at a mode are skipped with that reason.
    """

    no_mode: str


class Likelihood(nn.Module, ABC):
    """p(x|outputs of a decoder) for flattened observations of E elements."""

    @abstractmethod
    def log_prob(self, x: Tensor, outputs: Tensor) -> Tensor:
        """x (N, E) and outputs (..., N, E) or (..., 1, E) -> (..., N), nats."""

    @abstractmethod
    def score(self, x: Tensor, outputs: Tensor) -> Tensor:
        """Gradient of `log_prob` in the outputs: x (N, E) and outputs (..., N, E) -> (..., N, E)."""

    @abstractmethod
    def mean(self, outputs: Tensor) -> Tensor: ...

    @abstractmethod
    def sample(self, outputs: Tensor, generator: torch.Generator) -> Tensor: ...


class BernoulliLikelihood(Likelihood):
    """Independent binary elements; outputs are logits."""

    def log_prob(self, x: Tensor, outputs: Tensor) -> Tensor:
        return _inner(outputs, x) - softplus(outputs).sum(-1)

    def score(self, x: Tensor, outputs: Tensor) -> Tensor:
        mean = outputs.sigmoid()
        return torch.sub(x, mean, out=mean)  # in place: it is as large as all logits

    def mean(self, outputs: Tensor) -> Tensor:
        return outputs.sigmoid()

    def sample(self, outputs: Tensor, generator: torch.Generator) -> Tensor:
        uniform = torch.rand(outputs.shape, generator=generator, device=outputs.device, dtype=outputs.dtype)
        return (uniform < outputs.sigmoid()).to(outputs.dtype)


class GaussianLikelihood(Likelihood):
    """Independent Gaussian elements around the outputs, with one learnt scale for all of them.

    The shared scale keeps the likelihood bounded where single elements are constant in the data
    (Rybkin et al. 2021, https://arxiv.org/abs/2006.13202).
    """

    def __init__(self) -> None:
        super().__init__()
        self.log_sd = nn.Parameter(torch.zeros(()))

    def log_prob(self, x: Tensor, outputs: Tensor) -> Tensor:
        if outputs.shape[-2] == 1 and x.shape[0] != 1:  # all pairs: one matrix product instead of an (S, N, E) array
            centre = x.mean(0)  # far from zero the squares would cancel each other in single precision
            x, outputs = x - centre, outputs - centre
            squared = x.square().sum(-1) - 2 * _inner(outputs, x) + outputs.square().sum(-1)
        else:
            squared = (x - outputs).square().sum(-1)
        elements = x.shape[-1]
        return -0.5 * (squared * torch.exp(-2 * self.log_sd) + elements * LOG_2PI) - elements * self.log_sd

    def score(self, x: Tensor, outputs: Tensor) -> Tensor:
        return (x - outputs) * torch.exp(-2 * self.log_sd)

    def mean(self, outputs: Tensor) -> Tensor:
        return outputs

    def sample(self, outputs: Tensor, generator: torch.Generator) -> Tensor:
        noise = torch.randn(outputs.shape, generator=generator, device=outputs.device, dtype=outputs.dtype)
        return outputs + torch.exp(self.log_sd) * noise


def likelihood_named(name: LikelihoodName) -> Likelihood:
    return BernoulliLikelihood() if name == "bernoulli" else GaussianLikelihood()


def _inner(outputs: Tensor, x: Tensor) -> Tensor:
    """<outputs, x> over the last axis; one matrix product when every output meets every x."""
    if outputs.shape[-2] == 1 and x.shape[0] != 1:
        return outputs[..., 0, :] @ x.T
    return (outputs * x).sum(-1)


class DecoderModel(StandardNormalPrior):
    """p(z) = N(0, I), p(x|z) given by a decoder network and a likelihood.

    Args:
        decoder: Maps (..., D) to (..., E), E the number of elements of one observation.
        event_shape: Shape of one observation.
    """

    def __init__(
        self, latent_dim: int, event_shape: tuple[int, ...], decoder: nn.Module, likelihood: Likelihood
    ) -> None:
        super().__init__()
        self.latent_dim = latent_dim
        self.event_shape = event_shape
        self.decoder = decoder
        self.likelihood = likelihood

    def log_likelihood(self, x: Tensor, z: Tensor) -> Tensor:
        return self.likelihood.log_prob(x.flatten(1), self.decoder(z))

    def mean(self, z: Tensor) -> Tensor:
        return self.likelihood.mean(self.decoder(z)).unflatten(-1, self.event_shape)

    def sample_observation(self, z: Tensor, generator: torch.Generator) -> Tensor:
        return self.likelihood.sample(self.decoder(z), generator).unflatten(-1, self.event_shape)

r"""Adaptive contrast: encoders of implicit posteriors, and the auxiliary Gaussians that have their moments.

.. math:: r(z|x) = N(z; m(x), L(x) L(x)^T), \quad \tilde z = L(x)^{-1} (z - m(x))

Mescheder, Nowozin, Geiger 2017, section 3.3, https://arxiv.org/abs/1701.04722
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from harness.adversarial import NoiseInjectedEncoder
from harness.estimators import BLOCK_ELEMENTS
from harness.model import log_normal
from harness.nn import Trunk, linear
from harness.players import Noise
from harness.seeding import generator

BASIS_DRAWS, INJECTED_DRAWS = 4096, 512  # of fixed noise, for the moments that evaluation uses


Covariance = Literal["diagonal", "full"]


class Auxiliary(ABC):
    """r(z|x), a Gaussian with the moments of q(z|x), through which no gradient goes."""

    mean: Tensor

    @abstractmethod
    def normalised(self, z: Tensor) -> Tensor:
        """z with its mean and scale taken off: (..., N, D) -> (..., N, D)."""

    @abstractmethod
    def log_prob(self, z: Tensor) -> Tensor:
        """log r(z|x): (..., N, D) -> (..., N), nats."""


@dataclass(frozen=True, eq=False)
class DiagonalAuxiliary(Auxiliary):
    """N(mean, exp(log_sd)^2): two of (N, D)."""

    mean: Tensor
    log_sd: Tensor

    def normalised(self, z: Tensor) -> Tensor:
        return (z - self.mean) * torch.exp(-self.log_sd)

    def log_prob(self, z: Tensor) -> Tensor:
        return log_normal(z, self.mean, self.log_sd)


@dataclass(frozen=True, eq=False)
class FullAuxiliary(Auxiliary):
    """N(mean, root root^T): mean (N, D) and a lower triangular root (N, D, D)."""

    mean: Tensor
    root: Tensor

    def normalised(self, z: Tensor) -> Tensor:
        off = (z - self.mean).reshape(-1, *self.mean.shape).permute(1, 2, 0)  # all draws of an x in one solve
        return torch.linalg.solve_triangular(self.root, off, upper=False).permute(2, 0, 1).reshape(z.shape)

    def log_prob(self, z: Tensor) -> Tensor:
        return log_normal(self.normalised(z)) - self.root.diagonal(dim1=-2, dim2=-1).log().sum(-1)


@dataclass(frozen=True, eq=False)
class Moments(ABC):
    """Mean and spread of random vectors, as far as an auxiliary Gaussian knows them, without a gradient.

    Args:
        mean: Shape (..., D).
        spread: Population variances (..., D), or covariances (..., D, D).
    """

    mean: Tensor
    spread: Tensor

    @staticmethod
    @abstractmethod
    def of(draws: Tensor) -> Moments:
        """Of draws (M, ..., D)."""

    @abstractmethod
    def combined(self, amplitude: Tensor) -> Moments:
        """Of the sum of independent vectors v_i, of which these are the moments, (B, D), each times a_i (N, B, D)."""

    @abstractmethod
    def plus(self, centre: Tensor, variance: Tensor | None) -> Moments:
        """After a constant, (N, D), and independent noise of variances (N, D), if there is any, are added."""

    @abstractmethod
    def auxiliary(self, floor: float) -> Auxiliary:
        """The Gaussian with these moments (N, D), floor^2 added to every variance.

        It is not a number where the spread is none, or is no covariance for the precision of a float64.
        """


class Variances(Moments):
    """Mean and variances."""

    @staticmethod
    def of(draws: Tensor) -> Variances:
        variance, mean = torch.var_mean(draws.detach(), dim=0, correction=0)
        return Variances(mean, variance)

    def combined(self, amplitude: Tensor) -> Variances:
        amplitude = amplitude.detach()
        return Variances((amplitude * self.mean).sum(-2), (amplitude.square() * self.spread).sum(-2))

    def plus(self, centre: Tensor, variance: Tensor | None) -> Variances:
        spread = self.spread if variance is None else self.spread + variance.detach()
        return Variances(self.mean + centre.detach(), spread)

    def auxiliary(self, floor: float) -> DiagonalAuxiliary:
        return DiagonalAuxiliary(self.mean, 0.5 * torch.log(self.spread + floor**2))


class Covariances(Moments):
    """Mean and covariances."""

    @staticmethod
    def of(draws: Tensor) -> Covariances:
        draws = draws.detach()
        mean = draws.mean(0)
        off = draws - mean
        return Covariances(mean, torch.einsum("m...d,m...e->...de", off, off) / len(draws))

    def combined(self, amplitude: Tensor) -> Covariances:
        a = amplitude.detach()
        spread = (a[..., :, None] * a[..., None, :] * self.spread).sum(-3)  # einsum takes 20 times as long for this
        return Covariances((a * self.mean).sum(-2), spread)

    def plus(self, centre: Tensor, variance: Tensor | None) -> Covariances:
        spread = self.spread if variance is None else self.spread + variance.detach().diag_embed()
        return Covariances(self.mean + centre.detach(), spread)

    def auxiliary(self, floor: float) -> FullAuxiliary:
        floors = torch.full_like(self.mean, floor**2, dtype=torch.float64).diag_embed()
        root, failure = torch.linalg.cholesky_ex(self.spread.double() + floors)
        return FullAuxiliary(self.mean, root.masked_fill(failure[:, None, None] > 0, math.nan).to(self.mean.dtype))


MOMENTS: dict[Covariance, type[Moments]] = {"diagonal": Variances, "full": Covariances}


class ContrastEncoder(nn.Module, ABC):
    """z = z_phi(x, eps) with estimates of its moments given x.

    Args:
        eps_shape: Shape of the noise of one latent.
    """

    eps_shape: tuple[int, ...]

    @abstractmethod
    def forward(self, x: Tensor, eps: Tensor) -> Tensor:
        """x (N, *E) and eps (..., N, *eps_shape) -> (..., N, D)."""

    @abstractmethod
    def contrasted(self, x: Tensor, noise: Noise) -> tuple[Tensor, Auxiliary]:
        """A latent for each observation, (N, D), and r(z|x), estimated from the noise that is handed in."""

    @abstractmethod
    def reference(self) -> Callable[[Tensor], Auxiliary]:
        """r(z|x) as a function of x (N, *E), from noise that is always the same: no x has a part in another's."""


def fixed_noise(draws: int, shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Standard normal draws (draws, *shape), the same in every process and, drawn on the CPU, on every device."""
    stream = generator(torch.device("cpu"), "adaptive contrast")
    return torch.randn((draws, *shape), generator=stream, dtype=torch.float32).to(like)


class BasisNetworks(nn.Module):
    """v_i(eps_i), an MLP (ELU) of its own noise for each i: (..., B, noise_dim) -> (..., B, D).

    One batched matrix product a layer for all B networks together.
    """

    def __init__(self, count: int, noise_dim: int, outputs: int, width: int, depth: int) -> None:
        super().__init__()
        self.eps_shape = (count, noise_dim)
        sizes = [noise_dim, *[width] * depth, outputs]
        self.weights = nn.ParameterList(
            torch.stack([linear(a, b).weight.detach().T for _ in range(count)]) for a, b in pairwise(sizes)
        )
        self.biases = nn.ParameterList(torch.zeros(count, 1, size) for size in sizes[1:])

    def forward(self, eps: Tensor) -> Tensor:
        h = eps.flatten(0, -3).transpose(0, 1)
        for i, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            h = torch.baddbmm(bias, F.elu(h) if i else h, weight)
        return h.transpose(0, 1).unflatten(0, eps.shape[:-2])


@dataclass(frozen=True, eq=False)
class BasisHeads:
    """What a `BasisEncoder` makes of x: z_0 (N, D), a (N, B, D) and, with a Gaussian part, log s_0 (N, D)."""

    centre: Tensor
    amplitude: Tensor
    log_sd: Tensor | None

    def latents(self, v: Tensor, eta: Tensor) -> Tensor:
        """From basis functions (..., N, B, D) and the Gaussian part's noise (..., N, D) -> (..., N, D)."""
        z = self.centre + (self.amplitude * v).sum(-2)
        return z if self.log_sd is None else z + torch.exp(self.log_sd) * eta

    def moments(self, of_basis: Moments) -> Moments:
        """Of z given x (N, D), from those of the basis functions (B, D)."""
        variance = None if self.log_sd is None else torch.exp(2 * self.log_sd)
        return of_basis.combined(self.amplitude).plus(self.centre, variance)


class BasisEncoder(ContrastEncoder):
    r"""z = z_0(x) + \sum_i a_i(x) v_i(eps_i), elementwise, whose moments follow from those of the v_i in closed form.

    .. math:: E[z|x] = z_0(x) + \sum_i a_i(x) E[v_i], \quad
              Cov[z|x] = \sum_i \operatorname{diag} a_i(x) Cov[v_i] \operatorname{diag} a_i(x)

    with a_i = ELU(linear + offset) + 1 > 0 and z_0 linear. The v_i do not depend on x: a minibatch has as many draws of
    each as it has observations. The released code starts z_0 at almost zero (standard deviation 1e-5), the same for all
    x, from where short runs lose their latents; here its weights are like all others.

    With a Gaussian part, which is not in the paper, one more basis function is the identity: s_0(x) eta with eta of
    N(0, I) is added to z, and s_0(x)^2 to the variance. The posterior of the Gaussian VAE is then a member of the
    family, and every q(z|x) has a density: a sum of few basis functions may lie near a surface, where it has none and
    no adversary can know its KL.
    """

    def __init__(
        self,
        trunk: Trunk,
        basis: BasisNetworks,
        latent_dim: int,
        offset: float,
        *,
        gaussian: bool,
        floor: float,
        covariance: Covariance,
    ) -> None:
        super().__init__()
        self.trunk, self.basis = trunk, basis
        self.offset, self.floor, self.moments = offset, floor, MOMENTS[covariance]
        count, noise_dim = basis.eps_shape
        self.sizes = [count * noise_dim, latent_dim if gaussian else 0]
        self.eps_shape = (sum(self.sizes),)
        self.centre = linear(trunk.features, latent_dim)
        self.amplitude = linear(trunk.features, count * latent_dim)
        self.log_sd = linear(trunk.features, latent_dim) if gaussian else None

    def forward(self, x: Tensor, eps: Tensor) -> Tensor:
        return self._heads(x).latents(*self._noises(eps))

    def contrasted(self, x: Tensor, noise: Noise) -> tuple[Tensor, Auxiliary]:
        heads = self._heads(x)
        v, eta = self._noises(noise["eps"])
        return heads.latents(v, eta), heads.moments(self.moments.of(v)).auxiliary(self.floor)

    def reference(self) -> Callable[[Tensor], Auxiliary]:
        v = self.basis(fixed_noise(BASIS_DRAWS, self.basis.eps_shape, self.basis.biases[0]))
        of_basis = self.moments.of(v)
        return lambda x: self._heads(x).moments(of_basis).auxiliary(self.floor)

    def _heads(self, x: Tensor) -> BasisHeads:
        h = self.trunk(x)
        amplitude = 1 + F.elu(self.amplitude(h).unflatten(-1, (self.basis.eps_shape[0], -1)) + self.offset)
        return BasisHeads(self.centre(h), amplitude, self.log_sd(h) if self.log_sd is not None else None)

    def _noises(self, eps: Tensor) -> tuple[Tensor, Tensor]:
        """The v_i (..., N, B, D) and eta (..., N, D), of which nothing is used without a Gaussian part."""
        eps, eta = eps.split(self.sizes, dim=-1)
        return self.basis(eps.unflatten(-1, self.basis.eps_shape)), eta


class InjectedEncoder(ContrastEncoder):
    """The encoder of AVB without contrast, whose moments are those of several draws for each x."""

    def __init__(self, encoder: NoiseInjectedEncoder, *, floor: float, covariance: Covariance) -> None:
        super().__init__()
        self.encoder, self.floor, self.moments = encoder, floor, MOMENTS[covariance]
        self.eps_shape = (encoder.injection.in_features,)

    def forward(self, x: Tensor, eps: Tensor) -> Tensor:
        return self.encoder(x, eps)

    def contrasted(self, x: Tensor, noise: Noise) -> tuple[Tensor, Auxiliary]:
        return self.encoder(x, noise["eps"]), self._auxiliary(x, noise["moment_eps"].transpose(0, 1))

    def reference(self) -> Callable[[Tensor], Auxiliary]:
        eps = fixed_noise(INJECTED_DRAWS, (1, *self.eps_shape), self.encoder.head.weight)
        return lambda x: self._auxiliary(x, eps)

    @torch.no_grad()
    def _auxiliary(self, x: Tensor, eps: Tensor) -> Auxiliary:
        """From eps (M, N, noise_dim), or (M, 1, noise_dim) for the same noise at every x."""
        block = max(1, BLOCK_ELEMENTS // (len(eps) * self.encoder.trunk.features))
        blocks = zip(x.split(block), eps.expand(-1, len(x), -1).split(block, dim=1), strict=True)
        parts = [self.moments.of(self.encoder(x, eps)) for x, eps in blocks]
        means, spreads = [part.mean for part in parts], [part.spread for part in parts]
        return self.moments(torch.cat(means), torch.cat(spreads)).auxiliary(self.floor)

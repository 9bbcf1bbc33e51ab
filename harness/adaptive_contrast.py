"""Adaptive contrast: encoders of implicit posteriors that know estimates of their moments.

Mescheder, Nowozin, Geiger 2017, section 3.3, https://arxiv.org/abs/1701.04722
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

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


@dataclass(frozen=True, eq=False)
class Contrast:
    """r(z|x) = N(mean, exp(log_sd)^2), without a gradient: two of (N, D)."""

    mean: Tensor
    log_sd: Tensor

    @staticmethod
    def of(mean: Tensor, variance: Tensor, floor: float) -> Contrast:
        return Contrast(mean.detach(), 0.5 * torch.log(variance.detach() + floor**2))

    def normalised(self, z: Tensor) -> Tensor:
        """(..., N, D) -> (..., N, D)."""
        return (z - self.mean) * torch.exp(-self.log_sd)

    def log_prob(self, z: Tensor) -> Tensor:
        """log r(z|x): (..., N, D) -> (..., N), nats."""
        return log_normal(z, self.mean, self.log_sd)


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
    def contrasted(self, x: Tensor, noise: Noise) -> tuple[Tensor, Contrast]:
        """A latent for each observation, (N, D), and r(z|x), estimated from the noise that is handed in."""

    @abstractmethod
    def reference(self) -> Callable[[Tensor], Contrast]:
        """r(z|x) as a function of x (N, *E), from noise that is always the same: no x has a part in another's."""


def fixed_noise(draws: int, shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Standard normal draws (draws, *shape), the same in every process and, drawn on the CPU, on every device."""
    stream = generator(torch.device("cpu"), "adaptive contrast")
    return torch.randn((draws, *shape), generator=stream, dtype=torch.float32).to(like)


def _moments(draws: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and population variance over the first axis."""
    variance, mean = torch.var_mean(draws.detach(), dim=0, correction=0)
    return mean, variance


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

    def contrast(self, mean: Tensor, variance: Tensor, floor: float) -> Contrast:
        """From mean and variance (B, D) of the basis functions."""
        mean = self.centre + (self.amplitude * mean).sum(-2)
        variance = (self.amplitude.square() * variance).sum(-2)
        variance = variance if self.log_sd is None else variance + torch.exp(2 * self.log_sd)
        return Contrast.of(mean, variance, floor)


class BasisEncoder(ContrastEncoder):
    r"""z = z_0(x) + \sum_i a_i(x) v_i(eps_i), elementwise, whose moments follow from those of the v_i in closed form.

    .. math:: E[z|x] = z_0(x) + \sum_i a_i(x) E[v_i], \quad Var[z|x] = \sum_i a_i(x)^2 Var[v_i]

    with a_i = ELU(linear + offset) + 1 > 0 and z_0 linear. The v_i do not depend on x: a minibatch has as many draws of
    each as it has observations. The released code starts z_0 at almost zero (standard deviation 1e-5), the same for all
    x, from where short runs lose their latents; here its weights are like all others.

    With a Gaussian part, which is not in the paper, one more basis function is the identity: s_0(x) eta with eta of
    N(0, I) is added to z, and s_0(x)^2 to the variance. The posterior of the Gaussian VAE is then a member of the
    family, and every q(z|x) has a density: a sum of few basis functions may lie near a surface, where it has none and
    no adversary can know its KL.
    """

    def __init__(
        self, trunk: Trunk, basis: BasisNetworks, latent_dim: int, offset: float, floor: float, *, gaussian: bool
    ) -> None:
        super().__init__()
        self.trunk, self.basis = trunk, basis
        self.offset, self.floor = offset, floor
        count, noise_dim = basis.eps_shape
        self.sizes = [count * noise_dim, latent_dim if gaussian else 0]
        self.eps_shape = (sum(self.sizes),)
        self.centre = linear(trunk.features, latent_dim)
        self.amplitude = linear(trunk.features, count * latent_dim)
        self.log_sd = linear(trunk.features, latent_dim) if gaussian else None

    def forward(self, x: Tensor, eps: Tensor) -> Tensor:
        return self._heads(x).latents(*self._noises(eps))

    def contrasted(self, x: Tensor, noise: Noise) -> tuple[Tensor, Contrast]:
        heads = self._heads(x)
        v, eta = self._noises(noise["eps"])
        return heads.latents(v, eta), heads.contrast(*_moments(v), self.floor)

    def reference(self) -> Callable[[Tensor], Contrast]:
        mean, variance = _moments(self.basis(fixed_noise(BASIS_DRAWS, self.basis.eps_shape, self.basis.biases[0])))
        return lambda x: self._heads(x).contrast(mean, variance, self.floor)

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

    def __init__(self, encoder: NoiseInjectedEncoder, floor: float) -> None:
        super().__init__()
        self.encoder, self.floor = encoder, floor
        self.eps_shape = (encoder.injection.in_features,)

    def forward(self, x: Tensor, eps: Tensor) -> Tensor:
        return self.encoder(x, eps)

    def contrasted(self, x: Tensor, noise: Noise) -> tuple[Tensor, Contrast]:
        return self.encoder(x, noise["eps"]), self._contrast(x, noise["moment_eps"].transpose(0, 1))

    def reference(self) -> Callable[[Tensor], Contrast]:
        eps = fixed_noise(INJECTED_DRAWS, (1, *self.eps_shape), self.encoder.head.weight)
        block = max(1, BLOCK_ELEMENTS // (INJECTED_DRAWS * self.encoder.trunk.features))

        def of(x: Tensor) -> Contrast:
            parts = [self._contrast(part, eps) for part in x.split(block)]
            return Contrast(torch.cat([part.mean for part in parts]), torch.cat([part.log_sd for part in parts]))

        return of

    @torch.no_grad()
    def _contrast(self, x: Tensor, eps: Tensor) -> Contrast:
        """From eps (M, N, noise_dim), or (M, 1, noise_dim) for the same noise at every x."""
        return Contrast.of(*_moments(self.encoder(x, eps)), self.floor)

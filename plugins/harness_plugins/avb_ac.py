r"""AVB with adaptive contrast: the adversary compares q(z|x) with a Gaussian that has its moments, not with the prior.

.. math:: KL(q_\phi(z|x) \| p(z)) = E_{q_\phi(z|x)} [T^*(x, \tilde z) + \log r(z|x) - \log p(z)], \quad
          r(z|x) = N(z; m(x), \operatorname{diag} s(x)^2), \quad \tilde z = (z - m(x)) / s(x)

where T* tells normalised draws of q from N(0, I): it has to learn q's shape only, and p(z) may be any density. m and s
are estimates of q's mean and standard deviation, through which no gradient goes. The released code divides by the root
of the variance plus 1e-4 and takes the variance alone into log r; here s is one scale for both, so that
T + log r estimates log q(z|x) whatever the floor.
Mescheder, Nowozin, Geiger 2017, section 3.3, https://arxiv.org/abs/1701.04722
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from types import ModuleType
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor, nn
from torch.nn import functional as F

from harness import adversarial, hookimpl
from harness.adversarial import LogRatio, NoiseInjectedEncoder
from harness.estimators import BLOCK_ELEMENTS
from harness.model import LatentModel, log_normal
from harness.nn import Trunk, linear
from harness.posterior import Posterior
from harness.problem import TrainingView
from harness.seeding import generator
from harness.training import GradientMethod, Modules, Noise, Player

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


class BasisEncoder(ContrastEncoder):
    r"""z = z_0(x) + \sum_i a_i(x) v_i(eps_i), elementwise, whose moments follow from those of the v_i in closed form.

    .. math:: E[z|x] = z_0(x) + \sum_i a_i(x) E[v_i], \quad Var[z|x] = \sum_i a_i(x)^2 Var[v_i]

    with a_i = ELU(linear + offset) + 1 > 0 and z_0 linear. The v_i do not depend on x: a minibatch has as many draws of
    each as it has observations. The released code starts z_0 at almost zero (standard deviation 1e-5), the same for all
    x, from where short runs lose their latents; here its weights are like all others.
    """

    def __init__(self, trunk: Trunk, basis: BasisNetworks, latent_dim: int, offset: float, floor: float) -> None:
        super().__init__()
        self.trunk, self.basis, self.eps_shape = trunk, basis, basis.eps_shape
        self.offset, self.floor = offset, floor
        self.centre = linear(trunk.features, latent_dim)
        self.amplitude = linear(trunk.features, self.eps_shape[0] * latent_dim)

    def forward(self, x: Tensor, eps: Tensor) -> Tensor:
        centre, amplitude = self._heads(x)
        return centre + (amplitude * self.basis(eps)).sum(-2)

    def contrasted(self, x: Tensor, noise: Noise) -> tuple[Tensor, Contrast]:
        centre, amplitude = self._heads(x)
        v = self.basis(noise["eps"])
        return centre + (amplitude * v).sum(-2), self._contrast(centre, amplitude, *_moments(v))

    def reference(self) -> Callable[[Tensor], Contrast]:
        mean, variance = _moments(self.basis(fixed_noise(BASIS_DRAWS, self.eps_shape, self.basis.biases[0])))
        return lambda x: self._contrast(*self._heads(x), mean, variance)

    def _heads(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """z_0 (N, D) and a (N, B, D)."""
        h = self.trunk(x)
        return self.centre(h), 1 + F.elu(self.amplitude(h).unflatten(-1, (self.eps_shape[0], -1)) + self.offset)

    def _contrast(self, centre: Tensor, amplitude: Tensor, mean: Tensor, variance: Tensor) -> Contrast:
        """From z_0 (N, D), a (N, B, D), and mean and variance (B, D) of the v_i."""
        mean = centre + (amplitude * mean).sum(-2)
        return Contrast.of(mean, (amplitude.square() * variance).sum(-2), self.floor)


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


class KLWeight(nn.Module):
    """The weight of the KL term in training; it is 1 in evaluation."""

    value: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("value", torch.ones(()), persistent=False)

    def forward(self, kl: Tensor) -> Tensor:
        return self.value * kl if self.training else kl


class AdaptiveContrastPosterior(Posterior):
    """The implicit q(z|x), with the estimate T + log r - log p of log q(z|x) - log p(z)."""

    def __init__(self, encoder: ContrastEncoder, adversary: nn.Module, model: LatentModel) -> None:
        self.encoder, self.adversary, self.model = encoder, adversary, model
        self.contrast = encoder.reference()

    def sample(self, x: Tensor, n: int, generator: torch.Generator) -> Tensor:
        shape = (n, len(x), *self.encoder.eps_shape)
        return self.encoder(x, torch.randn(shape, generator=generator, device=x.device, dtype=x.dtype))

    def log_ratio(self, x: Tensor, z: Tensor) -> Tensor:
        contrast = self.contrast(x)
        return self.adversary(x, contrast.normalised(z)) + contrast.log_prob(z) - self.model.log_prior(z)


@dataclass(frozen=True, kw_only=True)
class AVBAC(GradientMethod):
    """AVB with adaptive contrast, both players updated simultaneously from one shared forward pass.

    In training r(z|x) is estimated from the step's own noise, as in the released code; in validation and by evaluators
    from noise that is always the same, so that it does not matter which x are scored together.

    Args:
        encoder: ``basis`` (a sum of basis functions of noise, with moments in closed form) or ``injected`` (the
            encoder of AVB, with moments from ``moment_draws`` draws for each x).
        nbasis, basis_width, basis_depth: Number of basis networks, and size of each.
        noise_dim: Dimensions of the noise of one basis function, or of the injected noise.
        offset: Before the ELU of the amplitudes a_i, which start near exp(offset); the released code has -5, which
            starts too narrow for short runs.
        moment_draws: Draws for the moments of an injected encoder, at every step.
        scale_floor: Standard deviation whose square is added to every variance of r(z|x).
        quadratic: The adversary is a network plus |zn|^2/2, as in the released code, so that the network learns the log
            density of q's shape; else the network alone, which learns log q - log r: a constant where q is Gaussian.
        lr, adversary_lr: Learning rates of Adam for encoder with decoder, and for the adversary.
        adversary_steps: Adversary updates per primal update; those after the first see fresh batches.
        beta1: Adam's decay rate of the first moment, of both players.
        kl_warmup: The KL term's weight grows from 0 to 1 over this part of the budget, and the training curve's
            objective with it; validation has the whole term. Without effect where convergence decides.
    """

    modules: ClassVar[tuple[ModuleType, ...]] = (adversarial,)

    name: str = "avb-ac"
    encoder: Literal["basis", "injected"] = "basis"
    nbasis: PositiveInt = 8
    noise_dim: PositiveInt = 16
    basis_width: PositiveInt = 64
    basis_depth: NonNegativeInt = 2
    offset: float = -2.0
    moment_draws: Annotated[int, Field(ge=2)] = 16
    scale_floor: PositiveFloat = 1e-2
    quadratic: bool = True
    batch_size: Annotated[int, Field(ge=2)] = 128
    lr: PositiveFloat = 2e-3
    adversary_lr: PositiveFloat = 4e-3
    adversary_steps: PositiveInt = 1
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.5
    kl_warmup: Annotated[float, Field(ge=0, le=1)] = 0.0

    def build(self, view: TrainingView) -> Modules:
        return Modules(
            {
                "model": view.model,
                "encoder": self._encoder(view),
                "adversary": LogRatio(view.pair_trunk(), quadratic=self.quadratic),
                "kl_weight": KLWeight(),
            }
        )

    def _encoder(self, view: TrainingView) -> ContrastEncoder:
        if self.encoder == "injected":
            trunk = view.encoder_trunk(self.noise_dim)
            return InjectedEncoder(NoiseInjectedEncoder(trunk, self.noise_dim, view.latent_dim), self.scale_floor)
        basis = BasisNetworks(self.nbasis, self.noise_dim, view.latent_dim, self.basis_width, self.basis_depth)
        return BasisEncoder(view.encoder_trunk(), basis, view.latent_dim, self.offset, self.scale_floor)

    def players(self) -> list[Player]:
        betas = (self.beta1, 0.999)
        return [
            Player("negative_elbo", on=("model", "encoder", "kl_weight"), lr=self.lr, betas=betas),
            Player("adversary", on=("adversary",), lr=self.adversary_lr, betas=betas, steps=self.adversary_steps),
        ]

    def noise(self, view: TrainingView) -> dict[str, tuple[int, ...]]:
        latent = {"eps": (self.noise_dim,), "moment_eps": (self.moment_draws, self.noise_dim)}
        latent = latent if self.encoder == "injected" else {"eps": (self.nbasis, self.noise_dim)}
        return {**latent, "contrast_z": (view.latent_dim,)}

    def schedule(self, modules: Modules, fraction: float) -> None:
        if self.kl_warmup:
            modules["kl_weight"].value.fill_(min(1.0, fraction / self.kl_warmup))

    def losses(self, modules: Modules, x: Tensor, noise: Noise) -> dict[str, Tensor]:
        model, encoder = modules["model"], modules["encoder"]
        z, contrast = encoder.contrasted(x, noise)
        contrast = contrast if modules.training else encoder.reference()(x)
        normalised = torch.stack([contrast.normalised(z), noise["contrast_z"]])
        t_posterior, t_contrast = modules["adversary"](x, normalised)
        kl = modules["kl_weight"](t_posterior + contrast.log_prob(z) - model.log_prior(z))
        return {
            "negative_elbo": (kl - model.log_likelihood(x, z)).mean(),
            "adversary": F.softplus(-t_posterior).mean() + F.softplus(t_contrast).mean(),
        }

    def posterior(self, modules: Modules) -> Posterior:
        return AdaptiveContrastPosterior(modules["encoder"], modules["adversary"], modules["model"])


@hookimpl
def harness_methods() -> list[AVBAC]:
    return [AVBAC()]

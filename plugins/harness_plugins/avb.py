r"""AVB: adversarial variational Bayes, with an implicit posterior z = z_phi(x, eps).

.. math:: \max_{\theta,\phi} E_{p_D(x)} E_{q_\phi(z|x)} [-T^*(x, z) + \log p_\theta(x|z)], \quad
          T^* = \arg\max_T E_{q_\phi(z|x)} \log\sigma(T(x, z)) + E_{p(z)} \log(1 - \sigma(T(x, z)))

At the optimum T*(x, z) = log q_phi(z|x) - log p(z), whose gradient in phi has mean zero.
Mescheder, Nowozin, Geiger 2017, Algorithm 1, https://arxiv.org/abs/1701.04722

Whatever the prior, the adversary tells q from r_0 = N(0, I), so that T* = log q - log r_0. Where the prior is another
one, r_0 is the auxiliary distribution of section 3.3 of the paper, the same for every x and never adapted:

.. math:: \max_{\theta,\phi} E_{p_D(x)} E_{q_\phi(z|x)} [-T^*(x, z) - \log r_0(z) + \log p_\theta(x, z)]
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Annotated, ClassVar

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor
from torch.nn.functional import softplus

from harness import adversarial, hookimpl
from harness.adversarial import LogRatio, NoiseInjectedEncoder
from harness.model import LatentModel, has_standard_normal_prior, log_normal
from harness.posterior import Posterior
from harness.problem import TrainingView
from harness.training import Modules, Noise, Player
from harness.warm_up import WarmUpMethod


def to_prior(t: Tensor, z: Tensor, model: LatentModel) -> Tensor:
    """log q(z|x) - log p(z) from T = log q(z|x) - log r_0(z), r_0 = N(0, I): (..., N) and (..., N, D) -> (..., N)."""
    return t if has_standard_normal_prior(model) else t + log_normal(z) - model.log_prior(z)


class AdversarialPosterior(Posterior):
    """The implicit q(z|x), with the adversary's estimate of log q(z|x) - log p(z)."""

    def __init__(self, model: LatentModel, encoder: NoiseInjectedEncoder, adversary: LogRatio, noise_dim: int) -> None:
        self.model = model
        self.encoder = encoder
        self.adversary = adversary
        self.noise_dim = noise_dim

    def sample(self, x: Tensor, n: int, generator: torch.Generator) -> Tensor:
        eps = torch.randn((n, len(x), self.noise_dim), generator=generator, device=x.device, dtype=x.dtype)
        return self.encoder(x, eps)

    def log_ratio(self, x: Tensor, z: Tensor) -> Tensor:
        return to_prior(self.adversary(x, z), z, self.model)


@dataclass(frozen=True, kw_only=True)
class AVB(WarmUpMethod):
    """Adversarial variational Bayes: primal and adversary updated simultaneously from one shared forward pass.

    Args:
        noise_dim: Dimensions of the encoder's noise eps.
        clip_norm: Largest norm of a player's gradient, 0 for no clipping, as in the released code.
        lr, adversary_lr: Learning rates of Adam for encoder with decoder, and for the adversary.
        adversary_steps: Adversary updates per primal update; those after the first see fresh batches.
        beta1: Adam's decay rate of the first moment, of both players.
    """

    modules: ClassVar[tuple[ModuleType, ...]] = (adversarial,)
    per_replica: ClassVar[frozenset[str]] = frozenset({"lr", "adversary_lr", "beta1"})

    name: str = "avb"
    noise_dim: PositiveInt = 32
    clip_norm: NonNegativeFloat = 50.0
    lr: PositiveFloat = 2e-3
    adversary_lr: PositiveFloat = 4e-3
    adversary_steps: PositiveInt = 1
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.5

    def build(self, view: TrainingView) -> Modules:
        return Modules(
            {
                "model": view.model,
                "encoder": NoiseInjectedEncoder(view.encoder_trunk(self.noise_dim), self.noise_dim, view.latent_dim),
                "adversary": LogRatio(view.pair_trunk()),
                "kl_weight": self.kl_weight(),
            }
        )

    def players(self) -> list[Player]:
        betas = (self.beta1, 0.999)
        return [
            Player("negative_elbo", on=("model", "encoder", "kl_weight"), lr=self.lr, betas=betas),
            Player("adversary", on=("adversary",), lr=self.adversary_lr, betas=betas, steps=self.adversary_steps),
        ]

    def noise(self, view: TrainingView) -> dict[str, tuple[int, ...]]:
        return {"eps": (self.noise_dim,), "prior_z": (view.latent_dim,)}

    def losses(self, modules: Modules, x: Tensor, noise: Noise) -> dict[str, Tensor]:
        model, z = modules["model"], modules["encoder"](x, noise["eps"])
        t_posterior, t_prior = modules["adversary"](x, torch.stack([z, noise["prior_z"]]))
        kl = modules["kl_weight"](to_prior(t_posterior, z, model))
        return {
            "negative_elbo": (kl - model.log_likelihood(x, z)).mean(),
            "adversary": softplus(-t_posterior).mean() + softplus(t_prior).mean(),
        }

    def posterior(self, modules: Modules) -> Posterior:
        return AdversarialPosterior(modules["model"], modules["encoder"], modules["adversary"], self.noise_dim)


@hookimpl
def harness_methods() -> list[AVB]:
    return [AVB()]

r"""Shared-scale VAE: a Gaussian posterior whose standard deviation is the same for every x.

.. math:: q(z|x) = N(z; \mu(x), \operatorname{diag} \sigma^2), \quad
          \max_{\theta, \mu, \sigma} E_q[\log p_\theta(x, z) - \log q(z|x)]
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from pydantic import PositiveFloat
from torch import Tensor, nn

from harness import hookimpl
from harness.model import log_normal
from harness.nn import Trunk, linear
from harness.posterior import Posterior
from harness.problem import TrainingView
from harness.training import GradientMethod, Modules, Noise, Player


class Encoder(nn.Module):
    """Mean (N, D) and log standard deviation (D,) of q(z|x)."""

    def __init__(self, trunk: Trunk, latent_dim: int) -> None:
        super().__init__()
        self.trunk = trunk
        self.head = linear(trunk.features, latent_dim)
        self.log_sd = nn.Parameter(torch.zeros(latent_dim))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.head(self.trunk(x)), self.log_sd


class SharedScalePosterior(Posterior):
    """q(z|x), which can be sampled and whose density is known everywhere."""

    def __init__(self, encoder: Encoder) -> None:
        self.encoder = encoder

    def sample(self, x: Tensor, n: int, generator: torch.Generator) -> Tensor:
        mean, log_sd = self.encoder(x)
        eps = torch.randn((n, *mean.shape), generator=generator, device=mean.device, dtype=mean.dtype)
        return mean + torch.exp(log_sd) * eps

    def sample_and_log_prob(self, x: Tensor, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        z = self.sample(x, n, generator)
        return z, self.log_prob(x, z)

    def log_prob(self, x: Tensor, z: Tensor) -> Tensor:
        return log_normal(z, *self.encoder(x))


@dataclass(frozen=True, kw_only=True)
class SharedScale(GradientMethod):
    """VAE with one standard deviation for all observations."""

    name: str = "shared-scale"
    lr: PositiveFloat = 1e-3

    def build(self, view: TrainingView) -> Modules:
        return Modules({"model": view.model, "encoder": Encoder(view.encoder_trunk(), view.latent_dim)})

    def players(self) -> list[Player]:
        return [Player("negative_elbo", on=("model", "encoder"), lr=self.lr)]

    def noise(self, view: TrainingView) -> dict[str, tuple[int, ...]]:
        return {"eps": (view.latent_dim,)}

    def losses(self, modules: Modules, x: Tensor, noise: Noise) -> dict[str, Tensor]:
        mean, log_sd = modules["encoder"](x)
        z = mean + torch.exp(log_sd) * noise["eps"]
        return {"negative_elbo": (log_normal(z, mean, log_sd) - modules["model"].log_joint(x, z)).mean()}

    def posterior(self, modules: Modules) -> Posterior:
        return SharedScalePosterior(modules["encoder"])


@hookimpl
def harness_methods() -> list[SharedScale]:
    return [SharedScale()]

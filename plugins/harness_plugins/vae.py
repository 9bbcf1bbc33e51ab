r"""VAE: a diagonal Gaussian posterior, trained on the evidence lower bound.

.. math:: \log p_\theta(x) \ge E_{q_\phi(z|x)}[\log p_\theta(x|z)] - KL(q_\phi(z|x) \| p(z))

The KL is analytic where p(z) = N(0, I); for another prior it is the mean of log q(z|x) - log p(z) over the same draws.
Kingma and Welling 2014, https://arxiv.org/abs/1312.6114; Rezende, Mohamed, Wierstra 2014, https://arxiv.org/abs/1401.4082
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from pydantic import PositiveFloat
from torch import Tensor, nn

from harness import hookimpl
from harness.model import has_standard_normal_prior, log_normal
from harness.nn import Trunk, linear
from harness.posterior import LocalFamily, LocalGaussian, Posterior
from harness.problem import TrainingView
from harness.training import Modules, Noise, Player
from harness.warm_up import WarmUpMethod


class GaussianEncoder(nn.Module):
    """Mean and log standard deviation of q(z|x): x (N, *E) -> two of (N, D)."""

    def __init__(self, trunk: Trunk, latent_dim: int) -> None:
        super().__init__()
        self.trunk = trunk
        self.head = linear(trunk.features, 2 * latent_dim)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_sd = self.head(self.trunk(x)).chunk(2, dim=-1)
        return mean, log_sd


def kl_to_standard_normal(mean: Tensor, log_sd: Tensor) -> Tensor:
    """KL(N(mean, sd^2) || N(0, I)), summed over the last axis: (..., D) -> (...), nats."""
    return 0.5 * (mean.square() + torch.exp(2 * log_sd) - 1).sum(-1) - log_sd.sum(-1)


class GaussianPosterior(Posterior):
    """q(z|x) = N(mean(x), diag(sd(x)^2))."""

    def __init__(self, encoder: GaussianEncoder) -> None:
        self.encoder = encoder

    def sample(self, x: Tensor, n: int, generator: torch.Generator) -> Tensor:
        return self.sample_and_log_prob(x, n, generator)[0]

    def sample_and_log_prob(self, x: Tensor, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        mean, log_sd = self.encoder(x)
        eps = torch.randn((n, *mean.shape), generator=generator, device=mean.device, dtype=mean.dtype)
        z = mean + torch.exp(log_sd) * eps
        return z, log_normal(z, mean, log_sd)

    def log_prob(self, x: Tensor, z: Tensor) -> Tensor:
        return log_normal(z, *self.encoder(x))

    def local(self, x: Tensor) -> LocalFamily:
        return LocalGaussian(*self.encoder(x))


class AnalyticGaussianPosterior(GaussianPosterior):
    """The same, where the prior is N(0, I)."""

    def kl_to_prior(self, x: Tensor) -> Tensor:
        """KL(q(z|x) || N(0, I)): x (N, *E) -> (N,), nats."""
        return kl_to_standard_normal(*self.encoder(x))


@dataclass(frozen=True, kw_only=True)
class VAE(WarmUpMethod):
    """Gaussian VAE with one reparametrised sample, and the analytic KL where the prior is a standard normal.

    Args:
        lr: Learning rate of Adam.
    """

    per_replica: ClassVar[frozenset[str]] = frozenset({"lr"})

    name: str = "vae"
    lr: PositiveFloat = 3e-3

    def build(self, view: TrainingView) -> Modules:
        encoder = GaussianEncoder(view.encoder_trunk(), view.latent_dim)
        return Modules({"model": view.model, "encoder": encoder, "kl_weight": self.kl_weight()})

    def players(self) -> list[Player]:
        return [Player("negative_elbo", on=("model", "encoder", "kl_weight"), lr=self.lr)]

    def noise(self, view: TrainingView) -> dict[str, tuple[int, ...]]:
        return {"eps": (view.latent_dim,)}

    def losses(self, modules: Modules, x: Tensor, noise: Noise) -> dict[str, Tensor]:
        model, (mean, log_sd) = modules["model"], modules["encoder"](x)
        z = mean + torch.exp(log_sd) * noise["eps"]
        if has_standard_normal_prior(model):
            kl = kl_to_standard_normal(mean, log_sd)
        else:
            kl = log_normal(noise["eps"]) - log_sd.sum(-1) - model.log_prior(z)
        return {"negative_elbo": (modules["kl_weight"](kl) - model.log_likelihood(x, z)).mean()}

    def posterior(self, modules: Modules) -> Posterior:
        analytic = has_standard_normal_prior(modules["model"])
        return (AnalyticGaussianPosterior if analytic else GaussianPosterior)(modules["encoder"])


@hookimpl
def harness_methods() -> list[VAE]:
    return [VAE()]

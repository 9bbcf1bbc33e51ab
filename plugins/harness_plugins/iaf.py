r"""IAF: a VAE whose posterior is an inverse autoregressive flow, of Pyro's transforms, conditioned on x.

.. math:: z_0 = \mu(x) + \sigma(x) \epsilon, \quad z_k = s_k z_{k-1} + (1 - s_k) m_k, \quad
          \log q(z_K|x) = \log q(z_0|x) - \sum_k \sum_d \log s_{k,d}

where m_k and s_k = sigmoid(2 + ...) of dimension d are functions of the dimensions of z_{k-1} before d and of a context
c(x). The order of the dimensions is reversed from one layer to the next. Sampling is one pass; the density at a point
that was not drawn takes D passes a layer. All parameters of the flow are trained (in the AVB paper's released code
those of this baseline never reach the optimiser).
Kingma et al. 2016, Algorithm 1, https://arxiv.org/abs/1606.04934; Mescheder, Nowozin, Geiger 2017,
https://arxiv.org/abs/1701.04722
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor, nn

from harness import hookimpl
from harness.model import log_normal
from harness.nn import Trunk, linear
from harness.posterior import Posterior
from harness.problem import TrainingView
from harness.training import Modules, Noise, Player
from harness.warm_up import WarmUpMethod


class FlowEncoder(nn.Module):
    """q(z|x) by its transport: noise to latents, and back.

    Args:
        layers: Pyro's conditional transforms, first to last.
    """

    def __init__(self, trunk: Trunk, layers: list[nn.Module], latent_dim: int, context_dim: int) -> None:
        super().__init__()
        self.trunk = trunk
        self.head = linear(trunk.features, 2 * latent_dim + context_dim)
        self.sizes = [latent_dim, latent_dim, context_dim]
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor, eps: Tensor) -> tuple[Tensor, Tensor]:
        """x (N, *E) and eps (..., N, D) -> latents (..., N, D) and their log density (..., N), nats."""
        mean, log_sd, context = self.head(self.trunk(x)).split(self.sizes, dim=-1)
        z = mean + torch.exp(log_sd) * eps
        log_q = log_normal(eps) - log_sd.sum(-1)
        for layer in self.layers:
            with _conditioned(layer, context) as transform:
                before, z = z, transform(z)
                log_q = log_q - transform.log_abs_det_jacobian(before, z)
        return z, log_q

    def log_prob(self, x: Tensor, z: Tensor) -> Tensor:
        """x (N, *E) and z (..., N, D) -> (..., N), nats: one dimension after another in every layer."""
        mean, log_sd, context = self.head(self.trunk(x)).split(self.sizes, dim=-1)
        log_q = torch.zeros_like(z[..., 0])
        for layer in reversed(self.layers):
            with _conditioned(layer, context) as transform:
                after, z = z, transform.inv(z)
                log_q = log_q - transform.log_abs_det_jacobian(z, after)
        return log_q + log_normal(z, mean, log_sd)


@contextmanager
def _conditioned(layer: Any, context: Tensor) -> Iterator[Any]:
    """A layer's transform given a context (N, C), new at every use: it remembers its last arguments and results.

    It also refers to itself, by its stable form's methods and by its inverse: unless it is emptied, all that it
    remembers, with its graph, stays in memory until the garbage collector comes.
    """
    transform = layer.condition(context)
    try:
        yield transform
    finally:
        vars(transform).clear()


def _pyro_classes() -> tuple[Any, Any]:
    """Imported when they are needed: discovery does without Pyro."""
    from pyro.distributions.transforms import ConditionalAffineAutoregressive
    from pyro.nn import ConditionalAutoRegressiveNN

    return ConditionalAffineAutoregressive, ConditionalAutoRegressiveNN


def autoregressive_layers(count: int, latent_dim: int, context_dim: int, hidden: int) -> list[nn.Module]:
    """Gated affine layers, the first in the order of the dimensions, every other in the reverse order."""
    transform, network = _pyro_classes()
    order = torch.arange(latent_dim)
    with warnings.catch_warnings():  # a single dimension is affine given the context, which is as it should be
        warnings.filterwarnings("ignore", "ConditionalAutoRegressiveNN input_dim = 1")
        networks = [
            network(
                latent_dim, context_dim, [hidden], permutation=order.flip(0) if k % 2 else order, nonlinearity=nn.ELU()
            )
            for k in range(count)
        ]
    return [transform(network, stable=True) for network in networks]


class FlowPosterior(Posterior):
    """q(z|x), which can be sampled and whose density is known everywhere."""

    def __init__(self, encoder: FlowEncoder, latent_dim: int) -> None:
        self.encoder, self.latent_dim = encoder, latent_dim

    def sample(self, x: Tensor, n: int, generator: torch.Generator) -> Tensor:
        return self.sample_and_log_prob(x, n, generator)[0]

    def sample_and_log_prob(self, x: Tensor, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        shape = (n, len(x), self.latent_dim)
        return self.encoder(x, torch.randn(shape, generator=generator, device=x.device, dtype=x.dtype))

    def log_prob(self, x: Tensor, z: Tensor) -> Tensor:
        return self.encoder.log_prob(x, z)


@dataclass(frozen=True, kw_only=True)
class IAF(WarmUpMethod):
    """VAE with an inverse autoregressive flow, trained on the ELBO of one reparametrised sample.

    Args:
        flows: Autoregressive layers; the released code of the AVB paper has 8.
        hidden: Hidden units of the network of each layer; at least as many as there are latent dimensions.
        context_dim: Dimensions of the context that every layer sees of x.
        lr: Learning rate of Adam.
    """

    per_replica: ClassVar[frozenset[str]] = frozenset({"lr"})
    libraries: ClassVar[tuple[str, ...]] = ("pyro.distributions.transforms", "pyro.nn")

    name: str = "iaf"
    flows: PositiveInt = 2
    hidden: PositiveInt = 128
    context_dim: PositiveInt = 32
    lr: PositiveFloat = 3e-3

    def unfit(self, view: TrainingView) -> str | None:
        if self.hidden < view.latent_dim:
            return f"hidden={self.hidden}: every latent dimension needs a hidden unit, and there are {view.latent_dim}"
        return super().unfit(view)

    def build(self, view: TrainingView) -> Modules:
        layers = autoregressive_layers(self.flows, view.latent_dim, self.context_dim, self.hidden)
        encoder = FlowEncoder(view.encoder_trunk(), layers, view.latent_dim, self.context_dim)
        return Modules({"model": view.model, "encoder": encoder, "kl_weight": self.kl_weight()})

    def players(self) -> list[Player]:
        return [Player("negative_elbo", on=("model", "encoder", "kl_weight"), lr=self.lr)]

    def noise(self, view: TrainingView) -> dict[str, tuple[int, ...]]:
        return {"eps": (view.latent_dim,)}

    def losses(self, modules: Modules, x: Tensor, noise: Noise) -> dict[str, Tensor]:
        model, (z, log_q) = modules["model"], modules["encoder"](x, noise["eps"])
        if not self.kl_warmup:  # one run of a model that is a program, not two
            return {"negative_elbo": (log_q - model.log_joint(x, z)).mean()}
        kl = modules["kl_weight"](log_q - model.log_prior(z))
        return {"negative_elbo": (kl - model.log_likelihood(x, z)).mean()}

    def posterior(self, modules: Modules) -> Posterior:
        return FlowPosterior(modules["encoder"], modules["model"].latent_dim)


@hookimpl
def harness_methods() -> list[IAF]:
    return [IAF()]

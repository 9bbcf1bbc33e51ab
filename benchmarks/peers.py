"""The VAE and the IAF in Pyro, with the networks of `benchmarks.by_hand`, trained by Pyro's own loop.

Model and guide are those of https://pyro.ai/examples/vae.html, but for what only costs time: images are in memory and
selected by index, and the likelihood is given logits.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO
from pyro.optim import Adam  # pyright: ignore[reportAttributeAccessIssue]
from torch import Tensor, nn

from benchmarks.by_hand import LATENTS, Images, decoder, encoder
from harness_plugins.iaf import IAF, autoregressive_layers


class PyroModel(nn.Module):
    """p(x, z) with a guide to be written, and `SVI` with `pyro.optim.Adam`."""

    elbo: type[Trace_ELBO]

    def __init__(self, lr: float, images: Images) -> None:
        super().__init__()
        self.decoder, self.images = decoder(), images
        pyro.clear_param_store()
        self.svi = SVI(self.model, self.guide, Adam({"lr": lr}), self.elbo())

    def model(self, x: Tensor) -> None:
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("latent", dist.Normal(x.new_zeros(len(x), LATENTS), 1.0).to_event(1))
            pyro.sample("obs", dist.Bernoulli(logits=self.decoder(z), validate_args=False).to_event(1), obs=x)

    @abstractmethod
    def guide(self, x: Tensor) -> None:
        """q(z|x), of the site ``latent``."""

    def loss(self, x: Tensor) -> float:
        """A mean over observations, nats."""
        total: Any = self.svi.evaluate_loss(x)
        return total / len(x)

    def take(self, steps: int) -> None:
        for _ in range(steps):
            self.svi.step(next(self.images))


class PyroVAE(PyroModel):
    """A diagonal Gaussian guide; the KL is analytic."""

    elbo = TraceMeanField_ELBO

    def __init__(self, lr: float, images: Images) -> None:
        super().__init__(lr, images)
        self.encoder = encoder()

    def guide(self, x: Tensor) -> None:
        pyro.module("encoder", self.encoder)
        with pyro.plate("data", len(x)):
            mean, log_sd = self.encoder(2 * x - 1).chunk(2, dim=-1)
            pyro.sample("latent", dist.Normal(mean, log_sd.exp()).to_event(1))


class PyroIAF(PyroModel):
    """An inverse autoregressive flow that is conditioned on x, of the sizes of a method of the harness."""

    elbo = Trace_ELBO

    def __init__(self, method: IAF, images: Images) -> None:
        super().__init__(method.lr, images)
        self.sizes = [LATENTS, LATENTS, method.context_dim]
        self.encoder = encoder(sum(self.sizes))
        self.flows = nn.ModuleList(autoregressive_layers(method.flows, LATENTS, method.context_dim, method.hidden))

    def guide(self, x: Tensor) -> None:
        pyro.module("encoder", self.encoder)
        pyro.module("flows", self.flows)
        with pyro.plate("data", len(x)):
            mean, log_sd, context = self.encoder(2 * x - 1).split(self.sizes, dim=-1)
            base = dist.Normal(mean, torch.exp(log_sd)).to_event(1)
            pyro.sample("latent", dist.ConditionalTransformedDistribution(base, [*self.flows]).condition(context))

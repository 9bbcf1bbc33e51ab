r"""The VAE and AVB written by hand in plain torch, as tightly as they can be: what the harness's loop is timed against.

The same mathematics as `harness_plugins.vae` and `harness_plugins.avb`, for binary images and one size of networks.
Nothing is general here: observations are flat, and there is no clock, no validation, no checkpoint.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from harness.players import Modules
from harness.problem import binarised_, random_bits

PIXELS, LATENTS, WIDTH, NOISE, PAIR_WIDTH, RANK = 784, 32, 300, 32, 512, 128
LOG_EVERY = 100


def mlp(*sizes: int, activation: type[nn.Module] = nn.Softplus) -> nn.Sequential:
    layers = [layer for a, b in pairwise(sizes) for layer in (glorot(nn.Linear(a, b)), activation())]
    return nn.Sequential(*layers[:-1])


def glorot(layer: nn.Linear) -> nn.Linear:
    nn.init.xavier_uniform_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


def decoder() -> nn.Sequential:
    return mlp(LATENTS, WIDTH, WIDTH, PIXELS)


def encoder(outputs: int = 2 * LATENTS) -> nn.Sequential:
    return mlp(PIXELS, WIDTH, WIDTH, outputs)


def minus_log_likelihood(logits: Tensor, x: Tensor) -> Tensor:
    """A mean over observations, nats."""
    return F.binary_cross_entropy_with_logits(logits, x, reduction="sum") / len(x)


def copied(to: Iterable[Tensor], from_: Iterable[Tensor]) -> None:
    with torch.no_grad():
        for own, other in zip(to, from_, strict=True):
            if own.shape != other.shape:
                raise ValueError(f"{tuple(own.shape)} cannot be copied from {tuple(other.shape)}")
            own.copy_(other)


class ByHand(nn.Module, ABC):
    """Networks with their optimisers.

    Args:
        noise_sizes: Of the standard normal draws that a step takes for each observation.
    """

    noise_sizes: Sequence[int]
    decoder: nn.Sequential

    @abstractmethod
    def losses(self, x: Tensor, noise: Sequence[Tensor]) -> Sequence[Tensor]:
        """Scalars, nats: first the negative ELBO, then the adversary's loss if there is one."""

    @abstractmethod
    def step(self, x: Tensor, noise: Sequence[Tensor]) -> Tensor:
        """Update all parameters; the first loss before that."""

    @abstractmethod
    def take_over(self, modules: Modules) -> None:
        """Be the same function as the modules of the harness's method."""


class VAE(ByHand):
    """A diagonal Gaussian posterior."""

    noise_sizes = (LATENTS,)

    def __init__(self, lr: float) -> None:
        super().__init__()
        self.encoder, self.decoder = encoder(), decoder()
        self.optimiser = torch.optim.Adam(self.parameters(), lr=lr, fused=True)

    def losses(self, x: Tensor, noise: Sequence[Tensor]) -> Sequence[Tensor]:
        mean, log_sd = self.encoder(2 * x - 1).chunk(2, dim=-1)
        sd = log_sd.exp()
        kl = (0.5 * (mean.square() + sd.square() - 1) - log_sd).sum() / len(x)
        return [minus_log_likelihood(self.decoder(mean + sd * noise[0]), x) + kl]

    def step(self, x: Tensor, noise: Sequence[Tensor]) -> Tensor:
        [loss] = self.losses(x, noise)
        self.optimiser.zero_grad()
        loss.backward()
        self.optimiser.step()
        return loss.detach()

    def take_over(self, modules: Modules) -> None:
        copied(self.encoder.parameters(), modules["encoder"].parameters())
        copied(self.decoder.parameters(), modules["model"].parameters())


class ImplicitEncoder(nn.Module):
    """z from x and noise, a linear map of which is added in every layer: all in one matrix product."""

    def __init__(self) -> None:
        super().__init__()
        sizes = [PIXELS, WIDTH, WIDTH, LATENTS]
        self.layers = nn.ModuleList(glorot(nn.Linear(a, b)) for a, b in pairwise(sizes))
        self.widths = sizes[1:]
        self.injection = nn.Linear(NOISE, sum(self.widths), bias=False)
        for part in self.injection.weight.detach().split(self.widths):
            nn.init.xavier_uniform_(part)

    def forward(self, x: Tensor, noise: Tensor) -> Tensor:
        first, second, last = self.injection(noise).split(self.widths, dim=-1)
        h = F.softplus(self.layers[0](x) + first)
        h = F.softplus(self.layers[1](h) + second)
        return self.layers[2](h) + last


class Adversary(nn.Module):
    """T(x, z) for several z of every x: two networks that meet in a product."""

    def __init__(self) -> None:
        super().__init__()
        sizes = [PAIR_WIDTH, PAIR_WIDTH, RANK + 1]
        self.from_x, self.from_z = (mlp(inputs, *sizes, activation=_LeakyReLU) for inputs in (PIXELS, LATENTS))
        self.head = glorot(nn.Linear(RANK + 2, 1))

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        f, h_x = self.from_x(x).split([RANK, 1], dim=-1)
        g, k_z = self.from_z(z).split([RANK, 1], dim=-1)
        t = self.head(torch.cat([f * g, h_x.expand_as(k_z), k_z], dim=-1)).squeeze(-1)
        return t + 0.5 * z.square().sum(-1)


class _LeakyReLU(nn.LeakyReLU):
    def __init__(self) -> None:
        super().__init__(0.2)


class AVB(ByHand):
    """Adversarial variational Bayes: an implicit posterior and its adversary; when they move is left open."""

    noise_sizes = (NOISE, LATENTS)

    def __init__(self, lr: float, adversary_lr: float, beta1: float) -> None:
        super().__init__()
        self.encoder, self.decoder, self.adversary = ImplicitEncoder(), decoder(), Adversary()
        self.primal = [*self.encoder.parameters(), *self.decoder.parameters()]
        self.dual = [*self.adversary.parameters()]
        self.lrs, self.betas = (lr, adversary_lr), (beta1, 0.999)

    def losses(self, x: Tensor, noise: Sequence[Tensor]) -> Sequence[Tensor]:
        centred = 2 * x - 1
        z = self.encoder(centred, noise[0])
        t_posterior, t_prior = self.adversary(centred, torch.stack([z, noise[1]]))
        negative_elbo = t_posterior.mean() + minus_log_likelihood(self.decoder(z), x)
        return [negative_elbo, F.softplus(-t_posterior).mean() + F.softplus(t_prior).mean()]

    def take_over(self, modules: Modules) -> None:
        theirs = modules["encoder"]
        copied(self.encoder.layers.parameters(), [*theirs.trunk.layers.parameters(), *theirs.head.parameters()])
        copied([self.encoder.injection.weight], [torch.cat([theirs.trunk.injection.weight, theirs.injection.weight])])
        copied(self.decoder.parameters(), modules["model"].parameters())
        copied(self.dual, modules["adversary"].parameters())


class SharedForwardAVB(AVB):
    """Both players from one forward pass, in one step of one optimiser."""

    def __init__(self, lr: float, adversary_lr: float, beta1: float) -> None:
        super().__init__(lr, adversary_lr, beta1)
        groups = [{"params": own, "lr": rate} for own, rate in zip((self.primal, self.dual), self.lrs, strict=True)]
        self.optimiser = torch.optim.Adam(groups, betas=self.betas, fused=True)

    def step(self, x: Tensor, noise: Sequence[Tensor]) -> Tensor:
        negative_elbo, adversary = self.losses(x, noise)
        gradients = torch.autograd.grad(negative_elbo, self.primal, retain_graph=True)
        gradients += torch.autograd.grad(adversary, self.dual)
        for parameter, gradient in zip(self.primal + self.dual, gradients, strict=True):
            parameter.grad = gradient
        self.optimiser.step()
        return negative_elbo.detach()


class TwoStepAVB(AVB):
    """As it is usually written: a forward pass, a backward pass and a step for either player, with the default Adam.

    Written with care: nothing is differentiated in vain, and the adversary sees both kinds of z in one pass.
    """

    def __init__(self, lr: float, adversary_lr: float, beta1: float) -> None:
        super().__init__(lr, adversary_lr, beta1)
        self.optimisers = [
            torch.optim.Adam(own, lr=rate, betas=self.betas)
            for own, rate in zip((self.primal, self.dual), self.lrs, strict=True)
        ]

    def step(self, x: Tensor, noise: Sequence[Tensor]) -> Tensor:
        centred = 2 * x - 1
        z = self.encoder(centred, noise[0])
        negative_elbo = self.adversary(centred, z).mean() + minus_log_likelihood(self.decoder(z), x)
        self.optimisers[0].zero_grad()
        negative_elbo.backward(inputs=self.primal)
        self.optimisers[0].step()
        with torch.no_grad():
            z = self.encoder(centred, noise[0])
        t_posterior, t_prior = self.adversary(centred, torch.stack([z, noise[1]]))
        loss = F.softplus(-t_posterior).mean() + F.softplus(t_prior).mean()
        self.optimisers[1].zero_grad()
        loss.backward()
        self.optimisers[1].step()
        return negative_elbo.detach()


class Images:
    """Minibatches of images in memory, binarised afresh: (N, PIXELS) uint8 -> (batch_size, PIXELS).

    By `draw`: as quickly as the harness does, so that this is no part of a comparison of loops.
    """

    def __init__(self, pixels: Tensor, batch_size: int) -> None:
        self.pixels, self.batch_size = pixels.flatten(1), batch_size
        self.order, self.at = torch.randperm(len(pixels)), 0

    def __next__(self) -> Tensor:
        if self.at + self.batch_size > len(self.order):
            self.order, self.at = torch.randperm(len(self.order)), 0
        chosen = self.order[self.at : self.at + self.batch_size]
        self.at += self.batch_size
        return self.draw(self.pixels.index_select(0, chosen).float())

    def draw(self, x: Tensor) -> Tensor:
        return binarised_(x, random_bits(x.shape, torch.default_generator), 255)


class PlainlyDrawnImages(Images):
    """The same by the usual expression, as someone writes it who has a loop of a library but no reader of data."""

    def draw(self, x: Tensor) -> Tensor:
        x = x / 255
        return (torch.rand(x.shape) < x).float()


class Loop:
    """A training loop without anything that it could do without."""

    def __init__(self, networks: ByHand, images: Images) -> None:
        self.networks, self.images = networks, images
        self.total, self.steps = torch.zeros(()), 0
        self.curve: list[float] = []

    def take(self, steps: int) -> None:
        sizes, n = self.networks.noise_sizes, self.images.batch_size
        for _ in range(steps):
            self.total += self.networks.step(next(self.images), [torch.randn(n, size) for size in sizes])
            self.steps += 1
            if self.steps % LOG_EVERY == 0:
                self.curve.append(float(self.total) / LOG_EVERY)
                self.total.zero_()

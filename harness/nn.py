"""Networks that model specs and plugins share.

A *trunk* ends in features and is chosen by the problem; a *head* maps features to what a method needs and is the
method's own. Weights are Glorot-uniform and biases zero, as in the released code of the AVB paper.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Activation = Literal["softplus", "elu", "relu", "leaky-relu", "tanh"]

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "softplus": F.softplus,
    "elu": F.elu,
    "relu": F.relu,
    "leaky-relu": lambda h: F.leaky_relu(h, 0.2),
    "tanh": torch.tanh,
}


def linear(inputs: int, outputs: int, *, bias: bool = True, zero: bool = False) -> nn.Linear:
    """A linear layer with Glorot-uniform (or zero) weights and zero bias."""
    layer = nn.Linear(inputs, outputs, bias=bias)
    nn.init.zeros_(layer.weight) if zero else nn.init.xavier_uniform_(layer.weight)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer


def centred(x: Tensor) -> Tensor:
    """From [0, 1] to [-1, 1]: 2 x - 1, in one pass."""
    return torch.rsub(x, -1, alpha=-2)


class MLP(nn.Module):
    """``depth`` hidden layers of ``width``, then a linear layer: (..., inputs) -> (..., outputs)."""

    def __init__(self, inputs: int, outputs: int, width: int, depth: int, activation: Activation) -> None:
        super().__init__()
        sizes = [inputs, *[width] * depth, outputs]
        self.layers = nn.ModuleList(linear(a, b) for a, b in pairwise(sizes))
        self.activation = ACTIVATIONS[activation]

    def forward(self, h: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            h = self.activation(layer(h))
        return self.layers[-1](h)


class Trunk(nn.Module):
    """A network that a problem chooses and that a method puts a head on."""

    features: int
    """Size of the last axis of its output."""


class EncoderTrunk(Trunk):
    """Features of x, into which noise may be injected: a linear map of it is added before every activation.

    With ``depth`` 0 the features are x itself.

    Args:
        centre: Map x from [0, 1] to [-1, 1] first (images).
        noise_dim: Size of the noise; 0 for a deterministic trunk.
    """

    def __init__(
        self, inputs: int, width: int, depth: int, activation: Activation, *, centre: bool, noise_dim: int
    ) -> None:
        super().__init__()
        sizes = [inputs, *[width] * depth]
        self.features = sizes[-1]
        self.noise_dim = noise_dim
        self.centre = centre
        self.activation = ACTIVATIONS[activation]
        self.layers = nn.ModuleList(linear(a, b) for a, b in pairwise(sizes))
        self.widths = sizes[1:]
        self.injection = self._injection(noise_dim) if noise_dim and depth else None

    def _injection(self, noise_dim: int) -> nn.Linear:
        """The maps of the noise to all layers, in one matrix product; each is initialised by itself."""
        layer = linear(noise_dim, sum(self.widths), bias=False)
        for part in layer.weight.detach().split(self.widths):
            nn.init.xavier_uniform_(part)
        return layer

    def forward(self, x: Tensor, noise: Tensor | None = None) -> Tensor:
        """x (N, *E) and noise (..., N, noise_dim) -> (..., N, features)."""
        if (noise is None) != (self.noise_dim == 0):
            raise ValueError(f"trunk built with noise_dim={self.noise_dim}, called with noise={noise is not None}")
        h = x.flatten(1)
        h = centred(h) if self.centre else h
        if noise is None or self.injection is None:
            for layer in self.layers:
                h = self.activation(layer(h))
            return h
        for layer, added in zip(self.layers, self.injection(noise).split(self.widths, dim=-1), strict=True):
            h = self.activation(layer(h) + added)
        return h


class ResidualPairTrunk(Trunk):
    """Features of a pair (x, z): a layer on both, then residual blocks whose second layer starts at zero.

    The discriminator of the AVB paper's toy and Eight Schools code, without its output layer.

    Args:
        branch: Factor on what each block adds; less than 1 for many blocks, whose changes multiply.
    """

    def __init__(
        self,
        inputs: int,
        latent_dim: int,
        width: int,
        blocks: int,
        activation: Activation,
        *,
        centre: bool,
        branch: float = 1.0,
    ):
        super().__init__()
        self.features = width
        self.centre = centre
        self.branch = branch
        self.activation = ACTIVATIONS[activation]
        self.from_x, self.from_z = linear(inputs, width), linear(latent_dim, width, bias=False)
        self.first = nn.ModuleList(linear(width, width) for _ in range(blocks))
        self.second = nn.ModuleList(linear(width, width, zero=True) for _ in range(blocks))

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        """x (N, *E) and z (..., N, D) -> (..., N, features)."""
        h = x.flatten(1)
        h = self.from_x(centred(h) if self.centre else h) + self.from_z(z)
        for first, second in zip(self.first, self.second, strict=True):
            h = torch.add(h, second(self.activation(first(self.activation(h)))), alpha=self.branch)
        return self.activation(h)


class InnerProductPairTrunk(Trunk):
    r"""Features of a pair whose linear combinations contain <f(x), g(z)> + h(x) + k(z).

    The discriminator of the AVB paper's MNIST code: two networks that meet in a product. The part that depends on x is
    computed once, however many z come with it.
    """

    def __init__(
        self, inputs: int, latent_dim: int, width: int, depth: int, rank: int, activation: Activation, *, centre: bool
    ):
        super().__init__()
        self.features = rank + 2
        self.centre = centre
        self.sizes = [rank, 1]
        self.from_x = MLP(inputs, rank + 1, width, depth, activation)
        self.from_z = MLP(latent_dim, rank + 1, width, depth, activation)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        """x (N, *E) and z (..., N, D) -> (..., N, features)."""
        h = x.flatten(1)
        f, h_x = self.from_x(centred(h) if self.centre else h).split(self.sizes, dim=-1)
        g, k_z = self.from_z(z).split(self.sizes, dim=-1)
        return torch.cat([f * g, h_x.expand_as(k_z), k_z], dim=-1)


def count_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())

"""Convolutional networks that model specs share, with the contracts of those in `harness.nn`.

After the networks conv0 and conv1 of the AVB paper's code, https://github.com/LMescheder/AdversarialVariationalBayes.
Kernels are 5x5; weights are Glorot-uniform and biases zero. Documented departures:

- No batch normalisation. It makes q(z|x) depend on what else is in the minibatch, and its running statistics are a
  state besides the parameters, which a loss that is a pure function may not change.
- Edges are padded by two on every side, where TensorFlow puts one zero more behind than before when it halves an even
  side. Sides are the same: halved, rounded up.
- What is injected is added before the activation in every network, as in conv0; the encoder of conv1 adds it after.
  Its linear maps have no bias, as the convolutions have one.

Activations are many times larger than an observation, so that evaluators' blocks would not bound the memory: where
nothing is recorded for a gradient, the networks work on their rows in pieces.

Shapes: N observations (B of them in one piece), D latent dimensions, E elements of one observation, C channels,
H and W height and width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from harness.memory import in_pieces, joined
from harness.nn import ACTIVATIONS, MLP, Activation, Trunk, centred, linear

KERNEL, PADDING = 5, 2
PIECE_ELEMENTS = 2**21  # of the largest map of a piece: 8 MiB in float32

Size = tuple[int, int]  # H, W
Map = tuple[int, int, int]  # C, H, W


def map_sizes(size: Size, strides: Sequence[int]) -> list[Size]:
    """Height and width of an image and of the maps of convolutions on it, one after another."""
    sizes = [size]
    for stride in strides:
        height, width = sizes[-1]
        sizes.append((math.ceil(height / stride), math.ceil(width / stride)))
    return sizes


class ConvolutionalDecoder(nn.Module):
    """The mirror image of convolutions: a map from z, then transposed convolutions up to one channel.

    (..., D) -> (..., E), the elements of an image in the order of its rows.

    Args:
        size: Height and width of the image.
        channels, strides: Of the convolutions whose mirror image this is, from the image on.
        dense: Units of a fully connected layer between z and the first map; 0 for none.
    """

    def __init__(
        self,
        latent_dim: int,
        size: Size,
        channels: Sequence[int],
        strides: Sequence[int],
        dense: int,
        activation: Activation,
    ) -> None:
        super().__init__()
        maps = [(c, *side) for c, side in zip([1, *channels], map_sizes(size, strides), strict=True)][::-1]
        self.smallest = maps[0]
        self.activation = ACTIVATIONS[activation]
        self.dense = MLP(latent_dim, math.prod(maps[0]), dense, 1 if dense else 0, activation)
        steps = zip(pairwise(maps), strides[::-1], strict=True)
        self.convolutions = nn.ModuleList(_transposed(*pair, stride) for pair, stride in steps)
        self.piece = _piece(maps)

    def forward(self, z: Tensor) -> Tensor:
        rows = z.reshape(-1, z.shape[-1])
        size = len(rows) if _recorded(self, z) else self.piece
        return in_pieces(self._decoded, max(1, size), rows).reshape(*z.shape[:-1], -1)

    def _decoded(self, z: Tensor) -> Tensor:
        h = self.dense(z).unflatten(-1, self.smallest)
        for layer in self.convolutions:
            h = layer(self.activation(h))
        return h.flatten(1)


class ConvolutionalTrunk(Trunk):
    """Features of an image, into which noise may be injected, or another vector that a pair is formed with.

    A linear map of it to a whole feature map is added before the activation of every convolution.

    Args:
        size: Height and width of the image.
        channels, strides: Of the convolutions.
        dense: Units of a fully connected layer behind the convolutions; 0 for none.
        centre: Map x from [0, 1] to [-1, 1] first.
        injected: Size of the injected vector; 0 for a trunk of x alone.
    """

    def __init__(
        self,
        size: Size,
        channels: Sequence[int],
        strides: Sequence[int],
        dense: int,
        activation: Activation,
        *,
        centre: bool,
        injected: int,
    ) -> None:
        super().__init__()
        maps = [(c, *side) for c, side in zip(channels, map_sizes(size, strides)[1:], strict=True)]
        self.size, self.centre, self.injected = size, centre, injected
        self.activation = ACTIVATIONS[activation]
        layers = zip(pairwise([1, *channels]), strides, strict=True)
        self.convolutions = nn.ModuleList(_convolution(*pair, stride) for pair, stride in layers)
        self.injections = nn.ModuleList(linear(injected, math.prod(shape), bias=False) for shape in maps if injected)
        self.dense = linear(math.prod(maps[-1]), dense) if dense else None
        self.features = dense or math.prod(maps[-1])
        self.piece = _piece(maps)

    def forward(self, x: Tensor, injected: Tensor | None = None) -> Tensor:
        """x (N, *E) and what is injected (..., N, injected) -> (..., N, features)."""
        if (injected is None) != (self.injected == 0):
            raise ValueError(f"trunk built with injected={self.injected}, called with injected={injected is not None}")
        if injected is None:
            size = len(x) if _recorded(self, x) else self.piece
            return in_pieces(lambda piece: self._features(self._first(piece)), max(1, size), x)
        samples = injected.reshape(-1, *injected.shape[-2:])
        size = max(1, samples[..., 0].numel() if _recorded(self, x, injected) else self.piece)
        blocks = zip(x.split(size), samples.split(size, dim=1), strict=True)
        features = joined([self._paired(*block, size) for block in blocks], dim=1)
        return features.reshape(*injected.shape[:-1], self.features)

    def _paired(self, x: Tensor, injected: Tensor, size: int) -> Tensor:
        """x (B, *E) and what is injected (S, B, injected) -> (S, B, features); the first convolution is done once."""
        h = self._first(x)

        def features(injected: Tensor) -> Tensor:
            rows = h.expand(len(injected), *h.shape).flatten(0, 1)
            return self._features(rows, injected.flatten(0, 1)).unflatten(0, injected.shape[:2])

        return in_pieces(features, max(1, size // len(x)), injected)

    def _first(self, x: Tensor) -> Tensor:
        """The first convolution: (B, *E) -> (B, C, H, W)."""
        h = x.reshape(-1, 1, *self.size)
        return self.convolutions[0](centred(h) if self.centre else h)

    def _features(self, h: Tensor, injected: Tensor | None = None) -> Tensor:
        """What follows on the first convolution: (B, C, H, W) and (B, injected) -> (B, features)."""
        h = self._activated(0, h, injected)
        for i, layer in enumerate(self.convolutions[1:], start=1):
            h = self._activated(i, layer(h), injected)
        h = h.flatten(1)
        return h if self.dense is None else self.activation(self.dense(h))

    def _activated(self, layer: int, h: Tensor, injected: Tensor | None) -> Tensor:
        return self.activation(h if injected is None else h + self.injections[layer](injected).view_as(h))


def _convolution(inputs: int, outputs: int, stride: int) -> nn.Conv2d:
    layer = nn.Conv2d(inputs, outputs, KERNEL, stride, PADDING)
    _initialise(layer)
    return layer


def _transposed(inputs: Map, outputs: Map, stride: int) -> nn.ConvTranspose2d:
    """From a map to a larger one, of exactly the size asked for."""
    missing = [larger - stride * (smaller - 1) - 1 for smaller, larger in zip(inputs[1:], outputs[1:], strict=True)]
    layer = nn.ConvTranspose2d(inputs[0], outputs[0], KERNEL, stride, PADDING, output_padding=(missing[0], missing[1]))
    _initialise(layer)
    return layer


def _initialise(layer: nn.Conv2d | nn.ConvTranspose2d) -> None:
    nn.init.xavier_uniform_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


def _piece(maps: Sequence[Map]) -> int:
    """Rows of a piece, from the largest map."""
    return max(1, PIECE_ELEMENTS // max(map(math.prod, maps)))


def _recorded(module: nn.Module, *inputs: Tensor) -> bool:
    """Whether what the module computes is recorded for a gradient: in pieces that would save nothing."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (*inputs, *module.parameters()))

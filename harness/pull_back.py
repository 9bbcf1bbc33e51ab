"""Fully connected networks with the products of gradients and their Jacobians written by hand.

No graph is made, and passes over activations are saved: for annealing, which takes many gradients of one decoder. All
of it works in place: not for where autograd records.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from harness.nn import ACTIVATIONS, MLP

PullBack = Callable[[Tensor], Tensor]
"""The gradient in what a function makes -> that in what it is given. It may be worked on in place."""


def _softplus(h: Tensor) -> tuple[Tensor, PullBack]:
    """From off = sigmoid(-h): softplus(h) = -log off, its derivative 1 - off. Where off is rounded to 0 it is h.

    Its error is a rounding of 1, so that far below zero it is 0; PyTorch's own is h from 20 on, 2e-9 off.
    """
    if h.dtype in (torch.bfloat16, torch.float16):  # too few digits for off close to 1
        return F.softplus(h), lambda gradient: gradient.mul_(h.sigmoid())
    off = h.neg().sigmoid_()
    activated = off.clamp(min=torch.finfo(h.dtype).tiny).log_().neg_()
    return torch.maximum(activated, h, out=activated), lambda gradient: gradient.addcmul_(gradient, off, value=-1)


def _elu(h: Tensor) -> tuple[Tensor, PullBack]:
    activated = F.elu(h)
    return activated, lambda gradient: gradient.mul_(activated.clamp(max=0).add_(1))


def _relu(h: Tensor) -> tuple[Tensor, PullBack]:
    activated = F.relu(h)
    return activated, lambda gradient: gradient.mul_(activated > 0)


def _leaky_relu(h: Tensor) -> tuple[Tensor, PullBack]:
    return F.leaky_relu(h, 0.2), lambda gradient: torch.where(h > 0, gradient, 0.2 * gradient)


def _tanh(h: Tensor) -> tuple[Tensor, PullBack]:
    activated = torch.tanh(h)
    return activated, lambda gradient: gradient.mul_(1 - activated.square())


WITH_PULL_BACKS = {
    ACTIVATIONS["softplus"]: _softplus,
    ACTIVATIONS["elu"]: _elu,
    ACTIVATIONS["relu"]: _relu,
    ACTIVATIONS["leaky-relu"]: _leaky_relu,
    ACTIVATIONS["tanh"]: _tanh,
}


def forward_with_pull_back(network: MLP, h: Tensor) -> tuple[Tensor, PullBack]:
    """Outputs (..., outputs) for (..., inputs), and how a gradient in them leads to one in the inputs.

    Infinite gradients may become NaN on the way.
    """
    activated = WITH_PULL_BACKS[network.activation]
    *hidden, last = (cast(nn.Linear, layer) for layer in network.layers)
    passed: list[tuple[nn.Linear, PullBack]] = []
    for layer in hidden:
        h, pull_back = activated(layer(h))
        passed.append((layer, pull_back))

    def pulled_back(gradient: Tensor) -> Tensor:
        gradient = gradient @ last.weight
        for layer, pull_back in reversed(passed):
            gradient = pull_back(gradient) @ layer.weight
        return gradient

    return last(h), pulled_back

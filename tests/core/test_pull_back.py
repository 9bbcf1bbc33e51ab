"""Gradients that are written by hand are those of autograd."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from torch.nn import functional as F

from harness.nn import ACTIVATIONS, MLP, Activation
from harness.pull_back import WITH_PULL_BACKS, forward_with_pull_back


def randn(*shape: int, generator: torch.Generator) -> torch.Tensor:
    return torch.randn(shape, generator=generator)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("activation", get_args(Activation))
@pytest.mark.parametrize("depth", [0, 1, 3])
def test_an_mlp_pulls_gradients_back_as_autograd_does(
    activation: Activation, depth: int, dtype: torch.dtype, generator: torch.Generator
) -> None:
    """Also where pre-activations are as far from zero as their exponentials have no number for."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        net = MLP(3, 5, 7, depth, activation).to(dtype)
    h = randn(6, 2, 3, generator=generator).to(dtype)
    h[0] *= 1e4
    h[1] *= 1e-4
    gradient = randn(6, 2, 5, generator=generator).to(dtype)
    before, given = h.clone(), gradient.clone()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter += 0.1 * randn(*parameter.shape, generator=generator).to(dtype)
        outputs, pull_back = forward_with_pull_back(net, h)
        found = pull_back(gradient)
    if activation == "softplus":  # by default it is h from 20 on, which leaves out up to 2e-9
        net.activation = lambda h: F.softplus(h, threshold=80)
    again = h.clone().requires_grad_()
    expected = net(again)
    (slope,) = torch.autograd.grad(expected, again, gradient)
    precision = 50 * torch.finfo(dtype).eps if dtype != torch.bfloat16 else 0.05
    torch.testing.assert_close(outputs, expected.detach(), rtol=precision, atol=precision)
    torch.testing.assert_close(found, slope, rtol=precision, atol=precision)
    assert torch.equal(h, before)
    assert torch.equal(gradient, given)
    assert not outputs.requires_grad


def test_softplus_keeps_its_digits_in_low_precision() -> None:
    """Where sigmoid(-h) is so close to 1 that bfloat16 has only a few steps between them."""
    h = torch.linspace(-5, -3, 21, dtype=torch.bfloat16)
    found, pull_back = WITH_PULL_BACKS[ACTIVATIONS["softplus"]](h)
    torch.testing.assert_close(found.float(), F.softplus(h.float()), rtol=0.005, atol=0)
    torch.testing.assert_close(pull_back(torch.ones_like(h)).float(), h.float().sigmoid(), rtol=0.005, atol=0)

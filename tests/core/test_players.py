"""Laws of a player's step: it is torch's own Adam along torch's own clipped gradient, in whatever pieces that comes."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from harness.players import Modules, Owned, Player

PLAYER = Player("loss", ("net",), lr=0.03, betas=(0.5, 0.99))


class Net(nn.Module):
    """Autograd hands out one tensor as the gradients of two of its parameters, and an expanded one as a third's."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        stream = torch.Generator()
        stream.manual_seed(seed)
        shapes = {"weight": (4, 3), "one": (4,), "two": (4,), "mean": (5,)}
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape, generator=stream, dtype=torch.float64)))

    def loss(self, x: Tensor) -> Tensor:
        p: dict[str, Any] = dict(self.named_parameters())
        return loss_of(p["weight"], p["one"], p["two"], p["mean"], x)


def loss_of(weight: Tensor, one: Tensor, two: Tensor, mean: Tensor, x: Tensor) -> Tensor:
    return (x @ weight.mT + (one + two)).square().sum() + 3 * mean.sum()


@pytest.mark.parametrize("in_place", [False, True], ids=["factor", "factor in a tensor"])
@pytest.mark.parametrize("clip_norm", [0.0, 0.5])
@pytest.mark.parametrize("seeds", [(0,), (0, 1)])
def test_steps_are_those_of_torch(seeds: tuple[int, ...], clip_norm: float, in_place: bool) -> None:
    """Also with learning rates in a tensor, in single precision, as on CUDA."""
    theirs = [Net(seed) for seed in seeds]
    optimisers = [torch.optim.Adam(net.parameters(), lr=0.5 * PLAYER.lr, betas=PLAYER.betas) for net in theirs]
    modules = [Modules({"net": Net(seed)}) for seed in seeds]
    owned = Owned([PLAYER] * len(seeds), modules)
    if len(seeds) > 1:
        owned.batched()
    if in_place:
        owned.adam.factor = torch.ones(())
    owned.adam.rescale(0.5)
    for step in range(5):
        x = torch.full((2, 3), 1.0 + step, dtype=torch.float64)
        for net, optimiser in zip(theirs, optimisers, strict=True):
            optimiser.zero_grad()
            net.loss(x).backward()
            if clip_norm:
                nn.utils.clip_grad_norm_(net.parameters(), clip_norm)
            optimiser.step()
        if len(seeds) > 1:
            weight, one, two, mean = owned.parameters
            loss = torch.func.vmap(partial(loss_of, x=x))(weight, one, two, mean)
        else:
            loss = modules[0]["net"].loss(x)
        owned.adam.step(owned.gradient(loss, None, keep=False), clip_norm)
    for net, own in zip(theirs, modules, strict=True):
        for expected, found in zip(net.parameters(), own.parameters(), strict=True):
            close = 1e-8 if in_place else 1e-12
            torch.testing.assert_close(found, expected, rtol=close, atol=close)

r"""The share of q(z|x) in each mode of the exact posterior.

.. math:: \tfrac12 \sum_m |\hat w_m - w_m|

with w_m the exact probability of mode m and its share of the draws: the total variation between the two, which is 1/2
for a posterior that covers one of two equal modes only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import ClassVar

import torch
from torch import Tensor

from harness import hookimpl, mixing
from harness.distances import Distance, DrawsEvaluator, Target
from harness.mixing import effective_draws
from harness.model import HasModes


@dataclass(frozen=True, kw_only=True)
class Modes(DrawsEvaluator):
    """`mode_error`; settings hold the share of each mode, with its standard error and the exact weight.

    Draws of Markov chains count as so many as all that the chains have kept are worth for that share
    (`harness.mixing.effective_draws`): few, if chains seldom change their mode. The standard error of the total
    variation is sqrt(sum_m w_m (1 - w_m) / 2 n): exact for two modes, too large for more.
    """

    modules: ClassVar[tuple[ModuleType, ...]] = (mixing,)
    by_default: ClassVar[bool] = True
    independent: ClassVar[bool] = False
    needs: ClassVar[tuple[type, str]] = (HasModes, "model has no separate modes")

    name: str = "modes"

    def compare(self, z: Tensor, target: Target, stream: torch.Generator) -> Sequence[Distance]:
        model = target.model
        if not isinstance(model, HasModes):
            raise TypeError(self.needs[1])
        names, weights = list(model.mode_weights), torch.tensor(list(model.mode_weights.values()), dtype=torch.float64)
        counts = torch.bincount(model.mode_of(z).cpu(), minlength=len(names)).double()
        shares = counts / len(z)
        # One draw more in each mode, for the errors alone: without any draw a mode's share is not known to be zero.
        likely = (counts + 1) / (len(z) + len(names))
        stderrs = (likely * (1 - likely) / _worth(model, len(z), len(names), target.chains)).sqrt()
        columns = {"shares": shares, "share_stderrs": stderrs, "exact_shares": weights}
        facts = {name: dict(zip(names, column.tolist(), strict=True)) for name, column in columns.items()}
        value, stderr = 0.5 * (shares - weights).abs().sum(), (0.5 * stderrs.square().sum()).sqrt()
        return [
            Distance(
                metric="mode_error", value=float(value), stderr=float(stderr), kind="consistent", unit="", facts=facts
            )
        ]


def _worth(model: HasModes, n: int, modes: int, kept: Tensor | None) -> Tensor:
    """How many independent draws n draws are worth for the share of each mode, shape (modes,), float64.

    Args:
        kept: Where they are draws of chains: all that these have kept, shape (C, m, D).
    """
    if kept is None:
        return torch.full((modes,), n, dtype=torch.float64)
    visited = model.mode_of(kept).cpu()
    found = [(visited == mode).double().numpy() for mode in range(modes)]
    # Of a mode that all chains stay in, or out of, each says one thing: where it started.
    worth = [effective_draws(each) if each.min() < each.max() else len(kept) for each in found]
    return torch.tensor(worth, dtype=torch.float64).clamp(max=n)


@hookimpl
def harness_evaluators() -> list[Modes]:
    return [Modes()]

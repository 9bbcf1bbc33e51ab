"""Methods whose KL term may be warmed up: its weight grows from 0 to 1 over the first part of a fit.

So latent dimensions are in use before the KL term presses on them (Bowman et al. 2016, https://arxiv.org/abs/1511.06349;
Sønderby et al. 2016, https://arxiv.org/abs/1602.02282). It changes how a fit gets there, not its objective at the end.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from harness.players import Modules
from harness.problem import TrainingView
from harness.target import LogDensityModel
from harness.training import GradientMethod


class KLWeight(nn.Module):
    """The weight of the KL term in training; it is 1 in evaluation.

    Args:
        used: Whether it is ever another one: else it costs nothing.
    """

    value: Tensor

    def __init__(self, *, used: bool) -> None:
        super().__init__()
        self.used = used
        self.register_buffer("value", torch.ones(()), persistent=False)

    def forward(self, kl: Tensor) -> Tensor:
        return self.value * kl if self.used and self.training else kl


@dataclass(frozen=True, kw_only=True)
class WarmUpMethod(GradientMethod):
    """A method whose `build` has `kl_weight()` under ``kl_weight``, which its `losses` put on the KL term.

    Not for a `LogDensityModel`: its prior N(0, I) is a mere reference, and with a weight of 0 what is maximised is
    log f(z) - log N(z; 0, I), which has no bound where f has heavier tails.

    Args:
        kl_warmup: The KL term's weight grows from 0 to 1 over this part of the budget, and the training curve's
            objective with it; validation has the whole term. Without effect where convergence decides.
    """

    kl_warmup: Annotated[float, Field(ge=0, le=1)] = 0.0

    def unfit(self, view: TrainingView) -> str | None:
        if self.kl_warmup and isinstance(view.model, LogDensityModel):
            return (
                "kl_warmup is for models with a likelihood; what is given here as log p(x, z) has no KL term of its own"
            )
        return super().unfit(view)

    def kl_weight(self) -> KLWeight:
        return KLWeight(used=self.kl_warmup > 0)

    def schedule(self, modules: Modules, fraction: float) -> None:
        if self.kl_warmup:
            modules["kl_weight"].value.fill_(min(1.0, fraction / self.kl_warmup))

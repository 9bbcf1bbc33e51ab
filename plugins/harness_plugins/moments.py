r"""Means and standard deviations of named quantities under q(z|x), against the exact ones.

.. math:: \max_j \frac{|\hat\mu_j - \mu_j|}{\sigma_j}, \qquad \max_j \Bigl|\frac{\hat\sigma_j}{\sigma_j} - 1\Bigr|

over the quantities j that the model names, with mu and sigma their exact posterior moments.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from harness import hookimpl, mixing
from harness.distances import Distance, DrawsEvaluator, Target
from harness.mixing import effective_draws
from harness.model import HasQuantities


@dataclass(frozen=True, kw_only=True)
class Moments(DrawsEvaluator):
    """`mean_error` and `sd_error`: the largest over the quantities, in units of their exact standard deviations.

    Settings hold the signed error of every quantity, its standard error (MCSE), and how many of these it is. Draws of
    Markov chains count as so many as all that the chains have kept are worth (`harness.mixing.effective_draws`).
    """

    modules: ClassVar[tuple[ModuleType, ...]] = (mixing,)
    by_default: ClassVar[bool] = True
    independent: ClassVar[bool] = False
    needs: ClassVar[tuple[type, str]] = (HasQuantities, "model names no quantities with exact moments")

    name: str = "moments"

    def compare(self, z: Tensor, target: Target, stream: torch.Generator) -> Sequence[Distance]:
        model = target.model
        if not isinstance(model, HasQuantities):
            raise TypeError(self.needs[1])
        quantities, exact = model.quantities(z), model.exact_moments(target.x)
        kept = {} if target.chains is None else mixing.quantities(model, target.chains)
        found = {
            name: _errors(values.double().cpu(), *exact[name], kept.get(name)) for name, values in quantities.items()
        }
        return [
            _largest("mean_error", {name: errors[:2] for name, errors in found.items()}),
            _largest("sd_error", {name: errors[2:] for name, errors in found.items()}),
        ]


def _errors(values: Tensor, mean: float, sd: float, kept: np.ndarray | None) -> tuple[float, float, float, float]:
    """Error of the mean of values (n,) with its standard error, then that of the standard deviation with its own.

    Args:
        kept: Where they are draws of chains: the values of all that these have kept, shape (C, m).
    """
    n, found = len(values), float(values.std())
    of_mean, of_sd = (n if kept is None else min(n, effective_draws(kept, of)) for of in ("mean", "sd"))
    spread = float((values - values.mean()).square().std()) / (2 * found) if found > 0 else 0.0  # delta method
    mcse = found / sd / math.sqrt(of_mean), spread / sd / math.sqrt(of_sd)
    return (float(values.mean()) - mean) / sd, mcse[0], found / sd - 1, mcse[1]


def _largest(metric: str, errors: Mapping[str, tuple[float, float]]) -> Distance:
    worst = max(errors, key=lambda name: abs(errors[name][0]))
    value, stderr = errors[worst]
    facts = {
        "errors": {name: error for name, (error, _) in errors.items()},
        "mcse": {name: mcse for name, (_, mcse) in errors.items()},
        "errors_in_mcse": {name: error / mcse for name, (error, mcse) in errors.items() if mcse > 0},
    }
    return Distance(metric=metric, value=abs(value), stderr=stderr, kind="consistent", unit="sd", facts=facts)


@hookimpl
def harness_evaluators() -> list[Moments]:
    return [Moments()]

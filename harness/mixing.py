r"""Diagnostics of Markov chains: whether they agree, and how many independent draws theirs are worth.

.. math:: \hat R^2 = \frac{n - 1}{n} + \frac{1}{n} \frac{B}{W}

with B/n the variance of the chains' means and W the mean of their variances, each chain cut in halves and values
replaced by the normal scores of their ranks; once for the values and once for their distances to the median, of which
the larger counts. It is 1 where chains agree. Vehtari, Gelman, Simpson, Carpenter, Bürkner 2021,
https://doi.org/10.1214/20-BA1221

Shapes: C chains, n draws, D latent dimensions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import numpy as np
from torch import Tensor

from harness.model import LatentModel, NamesQuantities

TAILS = (0.05, 0.95)
LARGEST_R_HAT = 1000.0
"""Of chains that stand still, each somewhere else, it is infinite, or whatever rounding makes of it."""


def quantities(model: LatentModel, chains: Tensor) -> dict[str, np.ndarray]:
    """Scalar functions of draws (C, n, D) by name, each (C, n): those that the model names, or the coordinates."""
    if isinstance(model, NamesQuantities):
        named = model.quantities(chains)
    else:
        named = {f"z[{i}]": coordinate for i, coordinate in enumerate(chains.unbind(-1))}
    return {name: values.double().cpu().numpy() for name, values in named.items()}


def diagnostics(found: Mapping[str, np.ndarray]) -> dict[str, dict[str, float]]:
    """R-hat, and effective sample sizes of the bulk and of the tails (the smaller of both), of draws (C, n) by name.

    Raises:
        ArithmeticError: If a quantity is not finite, or no chain moves.
    """
    # Not at the top: scipy, which it brings, takes a second or two that `harness --help` has no use for.
    from arviz_stats.base.array import array_stats

    infinite = [name for name, values in found.items() if not np.isfinite(values).all()]
    if infinite:
        raise ArithmeticError(f"not finite for some draws: {', '.join(infinite)}")
    moving = {name: values for name, values in found.items() if values.min() < values.max()}
    if not any(np.ptp(values, axis=1).any() for values in moving.values()):
        raise ArithmeticError("no chain has moved from where it was after its warm-up")
    draws = np.stack(list(moving.values()))
    still = np.ptp(draws, axis=2).max(1) == 0
    with np.errstate(divide="ignore", invalid="ignore"):
        r_hat = np.minimum(array_stats.rhat(draws, chain_axis=1, draw_axis=2), LARGEST_R_HAT)
    r_hat = np.where(still, LARGEST_R_HAT, r_hat)
    bulk = array_stats.ess(draws, chain_axis=1, draw_axis=2, method="bulk")
    tail = array_stats.ess(draws, chain_axis=1, draw_axis=2, method="tail", prob=TAILS)
    columns = {"r_hat": r_hat, "ess_bulk": bulk, "ess_tail": tail}
    return {
        metric: dict(zip(moving, np.asarray(column, dtype=np.float64).tolist(), strict=True))
        for metric, column in columns.items()
    }


def effective_draws(values: np.ndarray, of: Literal["mean", "sd"] = "mean") -> float:
    """How many independent draws would give the mean, or the standard deviation, of values (C, n) the same error.

    At most C n: draws that repel one another are worth more for the one and less for the other. One, where chains are
    too short to tell.
    """
    from arviz_stats.base.array import array_stats

    if values.min() == values.max():
        return float(values.size)
    found = array_stats.ess(values[None], chain_axis=1, draw_axis=2, method=of)
    worth = np.asarray(found).item()
    return 1.0 if math.isnan(worth) else float(min(worth, values.size))

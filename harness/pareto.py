"""Pareto k-hat: how heavy the tail of importance weights is, hence whether their means are to be believed.

Above 0.7 neither a mean nor its standard error can be, however many draws there are in practice. Vehtari, Simpson,
Gelman, Yao, Gabry 2024, https://arxiv.org/abs/1507.02646
"""

from __future__ import annotations

import math

import numpy as np
from torch import Tensor

SHORTEST_TAIL = 5  # draws; the least that the fit of a tail asks for
BELIEVABLE = 0.7  # k-hat
WIDEST = 600.0  # nats within a tail, whose weights are still well above the smallest double


def tail_length(samples: int) -> int:
    """How many of the largest weights make up their tail. Vehtari et al. 2024, Section 2.4."""
    return int(min(samples / 5, 3 * math.sqrt(samples)))


def k_hat(largest: Tensor) -> np.ndarray:
    """Shape of the generalised Pareto distribution that fits the tail of the weights.

    Args:
        largest: The M largest logarithms of weights and the one after them, in descending order, shape (M + 1, N).

    Returns:
        Shape (N,). nan where there is no tail to fit: too few draws, or a quarter of the tail at its lower end.
        inf where the spread is beyond double precision, so that few weights are everything.
    """
    # Not at the top: scipy, which it brings, takes a second or two that `harness --help` has no use for.
    from arviz_stats.base.array import array_stats

    log_w = largest.double().cpu().numpy()
    tail = len(log_w) - 1
    k = np.full(log_w.shape[1], np.nan)
    if tail < SHORTEST_TAIL:
        return k
    with np.errstate(invalid="ignore"):  # no weight but zeros
        log_w = log_w - log_w[0]
    w = np.exp(log_w)
    # The fit scales the tail by its lower quartile (Zhang and Stephens 2009, https://doi.org/10.1198/tech.2009.08017).
    # Where that is zero the library gives its prior's mean as if it were a result.
    quartile = tail - int(tail / 4 + 0.5)
    k[log_w[quartile] < -WIDEST] = np.inf
    fits = (log_w[quartile] >= -WIDEST) & (w[quartile] > w[-1])
    if fits.any():
        # The library takes the tail's length from the number of draws S and their efficiency e: min(S/5, 3 sqrt(S/e)).
        # With S = 5 M and e = 1/M that is M; what lies below the threshold does not enter the fit.
        draws = np.concatenate([w[:, fits], np.repeat(w[-1:, fits], 4 * tail - 1, axis=0)])
        chains = draws.T[:, None]  # one for each observation
        k[fits] = array_stats.pareto_khat(chains, r_eff=1 / tail, tail="right")
    return k

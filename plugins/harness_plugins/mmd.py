r"""The squared maximum mean discrepancy between draws of q(z|x) and exact ones, without bias.

.. math:: \widehat{\mathrm{MMD}}^2 = \frac{1}{n(n-1)} \sum_{i \ne j} h_{ij}, \quad
          h_{ij} = k(z_i, z_j) + k(y_i, y_j) - k(z_i, y_j) - k(z_j, y_i),
          \quad k(a, b) = \exp\Bigl(-\frac{|a - b|^2}{2 l^2}\Bigr)

for draws z of q and y of p in units of the exact posterior's standard deviations, with l the median distance between
further exact draws. Gretton, Borgwardt, Rasch, Scholkopf, Smola 2012, Lemma 6, https://jmlr.org/papers/v13/gretton12a.html
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from harness import hookimpl
from harness.distances import Distance, DrawsEvaluator, Target

MEDIAN_DRAWS = 1000  # exact draws between which distances are taken, for their median
BLOCK_ELEMENTS = 2**19  # of the matrix of all pairs: 4 MiB


@dataclass(frozen=True, kw_only=True)
class MMD(DrawsEvaluator):
    """`mmd_squared`: zero in expectation if and only if q(z|x) is the exact posterior; negative values are noise."""

    name: str = "mmd"

    def compare(self, z: Tensor, target: Target, stream: torch.Generator) -> Sequence[Distance]:
        bandwidth = float(torch.pdist(target.units[:MEDIAN_DRAWS]).median())
        value, stderr = mmd_squared(target.standardised(z), target.reference, bandwidth)
        facts = {"bandwidth": bandwidth}
        return [Distance(metric="mmd_squared", value=value, stderr=stderr, kind="unbiased", unit="", facts=facts)]


def mmd_squared(z: Tensor, y: Tensor, bandwidth: float) -> tuple[float, float]:
    r"""Estimate and standard error, from draws of shape (n, D), as many of either; in memory that grows with n alone.

    The error is that of a U-statistic (Hoeffding 1948, Eq. 5.13, https://doi.org/10.1214/aoms/1177730196),

    .. math:: \frac{2}{n(n-1)} \bigl(2(n-2)\,\zeta_1 + \zeta_2\bigr), \quad
              \zeta_1 = \operatorname{Var}_i E_j h_{ij}, \quad \zeta_2 = \operatorname{Var} h_{ij},

    with an estimate of zeta_1 that is cut off at zero; for q = p, where zeta_1 is zero, it is too large by a third.
    """
    n = len(z)
    sums, squares = torch.zeros(n, dtype=z.dtype), 0.0
    rows = max(1, BLOCK_ELEMENTS // n)
    for start in range(0, n, rows):  # h is symmetrical: columns before the block are done
        a, b = slice(start, start + rows), slice(start, n)
        h = _kernel(z[a], z[b], bandwidth) + _kernel(y[a], y[b], bandwidth)
        h -= _kernel(z[a], y[b], bandwidth) + _kernel(y[a], z[b], bandwidth)
        h.fill_diagonal_(0)
        inside, beyond = h[:, :rows], h[:, rows:]
        sums[a] += h.sum(1)
        sums[start + rows :] += beyond.sum(0)
        squares += float(inside.square().sum() + 2 * beyond.square().sum())
    value = float(sums.sum()) / (n * (n - 1))
    zeta_2 = squares / (n * (n - 1)) - value**2
    zeta_1 = max(0.0, (float((sums / (n - 1)).var()) - zeta_2 / (n - 1)) * (n - 1) / (n - 2))
    return value, math.sqrt(2 / (n * (n - 1)) * (2 * (n - 2) * zeta_1 + zeta_2))


def _kernel(a: Tensor, b: Tensor, bandwidth: float) -> Tensor:
    """(n, D) and (m, D) -> (n, m)."""
    squared = torch.addmm(b.square().sum(1), a, b.T, alpha=-2).add_(a.square().sum(1, keepdim=True))
    return squared.clamp_(min=0).mul_(-0.5 / bandwidth**2).exp_()


@hookimpl
def harness_evaluators() -> list[MMD]:
    return [MMD()]

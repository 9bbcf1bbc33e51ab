r"""The sliced 2-Wasserstein distance between draws of q(z|x) and exact ones.

.. math:: \mathrm{SW}_2 = \Bigl(\frac1L \sum_{l=1}^L W_2^2(\theta_l^\top z, \theta_l^\top y)\Bigr)^{1/2},
          \quad \theta_l \text{ uniform on the sphere}

in units of the exact posterior's standard deviations. Two sets of draws of one distribution are further from each other
than their distribution is from itself: the floor is well above zero, and falls as the root of n. Bonneel, Rabin, Peyre,
Pfister 2015, https://doi.org/10.1007/s10851-014-0506-3; computed by POT, https://pythonot.github.io
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from harness import hookimpl
from harness.distances import Distance, DrawsEvaluator, Target, blocks_of, over_blocks


@dataclass(frozen=True, kw_only=True)
class SlicedWasserstein(DrawsEvaluator):
    """`sliced_wasserstein`; its error is that of the draws, by subsampling, and that of the projections.

    Args:
        projections: L, the same ones for all methods.
    """

    name: str = "sliced-wasserstein"
    projections: Annotated[int, Field(ge=2)] = 100

    def compare(self, z: Tensor, target: Target, stream: torch.Generator) -> Sequence[Distance]:
        q, p = target.standardised(z), target.reference
        theta = torch.randn(q.shape[1], self.projections, generator=stream, device=stream.device, dtype=torch.float64)
        theta = theta.cpu() / theta.norm(dim=0).cpu()

        def distance(first: Tensor, second: Tensor) -> float:
            return math.sqrt(squared_distances(first, second, theta).mean())

        squared = squared_distances(q, p, theta)
        value = math.sqrt(squared.mean())
        of_draws, _ = over_blocks(distance, q, p, blocks_of(len(q), 2))
        of_projections = float(squared.std(ddof=1) / math.sqrt(self.projections)) / (2 * value)  # delta method
        stderr = math.hypot(of_draws, of_projections)
        return [Distance(metric="sliced_wasserstein", value=value, stderr=stderr, kind="consistent", unit="sd")]


def squared_distances(first: Tensor, second: Tensor, theta: Tensor) -> np.ndarray:
    """W_2^2 of draws (n, D) and (m, D) along each of the directions (D, L), shape (L,)."""
    import ot  # slow to import

    _, log = ot.sliced_wasserstein_distance(first.numpy(), second.numpy(), projections=theta.numpy(), p=2, log=True)
    return log["projected_emds"]


@hookimpl
def harness_evaluators() -> list[SlicedWasserstein]:
    return [SlicedWasserstein()]

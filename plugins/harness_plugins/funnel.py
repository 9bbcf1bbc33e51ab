r"""Neal's funnel: a scale that varies over orders of magnitude, so that no one step or covariance suits all of it.

.. math:: v \sim N(0, 3^2), \quad x_i | v \sim N(0, e^v), \quad i = 1 \dots D - 1

Neal 2003, section 8, https://doi.org/10.1214/aos/1056562461. Normalised: log p(x) = 0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from harness import hookimpl
from harness.model import LatentModel, log_normal
from harness.target import LogDensityModel, PosteriorProblem

SD = 3.0  # of v


class FunnelModel(LogDensityModel):
    """z = (v, x_1 ... x_{D-1})."""

    def log_target(self, z: Tensor) -> Tensor:
        v = z[..., :1]
        return log_normal(v, log_sd=math.log(SD)) + log_normal(z[..., 1:], log_sd=0.5 * v.expand_as(z[..., 1:]))

    def log_evidence(self, x: Tensor) -> Tensor:
        return torch.zeros(len(x), dtype=torch.float64, device=x.device)

    def sample_exact_posterior(self, x: Tensor, n: int, generator: torch.Generator) -> Tensor:
        shape = (n, len(x), self.latent_dim)
        noise = torch.randn(shape, generator=generator, device=x.device, dtype=torch.float64)
        v = SD * noise[..., :1]
        return torch.cat([v, torch.exp(0.5 * v) * noise[..., 1:]], dim=-1).to(x.dtype)

    def quantities(self, z: Tensor) -> dict[str, Tensor]:
        return {"v": z[..., 0], **{f"x[{i}]": z[..., i] for i in range(1, self.latent_dim)}}

    def exact_moments(self, x: Tensor) -> dict[str, tuple[float, float]]:
        """Var x_i = E e^v = exp(9/2), most of it from a few very large ones."""
        spread = math.exp(0.25 * SD**2)
        return {"v": (0.0, SD), **{f"x[{i}]": (0.0, spread) for i in range(1, self.latent_dim)}}


@dataclass(frozen=True, kw_only=True)
class Funnel(PosteriorProblem):
    """Neal's funnel, by default in ten dimensions; log Z = 0.

    Args:
        latent_dim: D, of v and all x_i together.
    """

    name: str = "funnel"
    latent_dim: Annotated[int, Field(ge=2)] = 10

    def target(self) -> LatentModel:
        return FunnelModel(self.latent_dim)


@hookimpl
def harness_problems() -> list[Funnel]:
    return [Funnel()]

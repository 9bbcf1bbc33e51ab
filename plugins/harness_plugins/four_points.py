"""The toy of the AVB paper (section 6.1): four 2x2 images with one pixel on, a latent space of two dimensions."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from pydantic import NonNegativeInt, PositiveInt

from harness import hookimpl
from harness.problem import Dataset, DatasetSpec, MLPSpec, ModelSpec, Problem


@dataclass(frozen=True, kw_only=True)
class FourPointsData(Dataset):
    """Four equally likely 2x2 one-hot images; train, validation and test are all the population itself."""

    name: str = "four-points"

    def load(self) -> DatasetSpec:
        points = np.eye(4, dtype=np.float32).reshape(4, 2, 2)
        return DatasetSpec(
            self.name, points, points, points, binarisation="static", exhaustive=True, test_labels=np.arange(4)
        )


@dataclass(frozen=True, kw_only=True)
class FourPoints(Problem):
    """Four Bernoulli pixels given z in R^2; no model can do better than -log 4 nats."""

    name: str = "four-points"
    latent_dim: PositiveInt = 2
    width: PositiveInt = 64
    depth: NonNegativeInt = 2
    pair_width: PositiveInt = 64
    pair_depth: PositiveInt = 2

    @property
    def default_budget(self) -> str:
        return "steps=5000"

    @property
    def optimum(self) -> float:
        return -math.log(4)

    def dataset(self) -> DatasetSpec:
        return FourPointsData().load()

    def model_spec(self) -> ModelSpec:
        return MLPSpec(
            latent_dim=self.latent_dim,
            width=self.width,
            depth=self.depth,
            activation="elu",
            pair="residual",
            pair_width=self.pair_width,
            pair_depth=self.pair_depth,
            pair_activation="leaky-relu",
        )


@hookimpl
def harness_datasets() -> list[FourPointsData]:
    return [FourPointsData()]


@hookimpl
def harness_problems() -> list[FourPoints]:
    return [FourPoints()]

"""Posterior problems: one observation, a fixed model, and the question how well p(z|x) is approximated.

Shapes: N observations, D latent dimensions, E event shape of one observation.
"""

from __future__ import annotations

import copy
from abc import abstractmethod
from dataclasses import dataclass, field

import numpy as np
from pydantic import NonNegativeInt, PositiveInt

from harness.model import LatentModel
from harness.nn import Activation, EncoderTrunk, ResidualPairTrunk, Trunk
from harness.problem import DatasetSpec, ModelSpec, Problem


@dataclass(frozen=True, kw_only=True, eq=False)
class PosteriorSpec(ModelSpec):
    """A fixed model, an encoder trunk and a residual pair trunk.

    Raises:
        TypeError: If the model has parameters: then there would be something to learn besides the posterior.
    """

    model: LatentModel = field(repr=False)  # what it is made from are the problem's options and source
    width: int
    depth: int
    activation: Activation
    pair_width: int
    pair_depth: int
    pair_activation: Activation

    def __post_init__(self) -> None:
        names = [name for name, _ in self.model.named_parameters()]
        if names:
            raise TypeError(f"the model of a posterior problem is fixed, but it has the parameters {names}")

    @property
    def latent_dim(self) -> int:  # type: ignore[override]
        return self.model.latent_dim

    def new_model(self, event_shape: tuple[int, ...]) -> LatentModel:
        return copy.deepcopy(self.model)

    def encoder_trunk(self, event_shape: tuple[int, ...], noise_dim: int) -> Trunk:
        inputs = int(np.prod(event_shape))
        return EncoderTrunk(inputs, self.width, self.depth, self.activation, centre=False, noise_dim=noise_dim)

    def pair_trunk(self, event_shape: tuple[int, ...]) -> Trunk:
        sizes = (int(np.prod(event_shape)), self.latent_dim, self.pair_width, self.pair_depth)
        return ResidualPairTrunk(*sizes, self.pair_activation, centre=False)


@dataclass(frozen=True, kw_only=True)
class PosteriorProblem(Problem):
    """One observation and a fixed model: a plugin states its `target`, and what was observed where something was.

    The one observation is training, validation and test split, and the whole population: no number has an error of the
    test set.

    Args:
        width, depth, activation: Of the encoder trunk.
        pair_width, pair_depth, pair_activation: Of the trunk of pairs (x, z), with ``pair_depth`` residual blocks.
    """

    width: PositiveInt = 128
    depth: NonNegativeInt = 2
    activation: Activation = "elu"
    pair_width: PositiveInt = 256
    pair_depth: PositiveInt = 5
    pair_activation: Activation = "leaky-relu"

    @abstractmethod
    def target(self) -> LatentModel:
        """The model, without parameters."""

    def observation(self) -> np.ndarray:
        """What was observed, shape (*E,); a one where nothing was."""
        return np.ones(1)

    @property
    def default_budget(self) -> str:
        return "steps=3000"

    def dataset(self) -> DatasetSpec:
        x = self.observation()[None]
        return DatasetSpec(self.name, x, x, x, exhaustive=True)

    def model_spec(self) -> ModelSpec:
        return PosteriorSpec(
            model=self.target(),
            width=self.width,
            depth=self.depth,
            activation=self.activation,
            pair_width=self.pair_width,
            pair_depth=self.pair_depth,
            pair_activation=self.pair_activation,
        )

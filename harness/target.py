r"""Posterior problems: one observation, a fixed model, and the question how well p(z|x) is approximated.

A target that is known only as a log density takes part through a reference prior: with p(z) = N(0, I) and

.. math:: \log p(x|z) = \log f(z) - \log p(z)

the joint density is f itself, and log p(x) is the logarithm of its normaliser.

Shapes: G points of a grid, S samples, N observations, D latent dimensions, E event shape of one observation.
"""

from __future__ import annotations

import copy
from abc import abstractmethod
from dataclasses import dataclass, field

import numpy as np
import torch
from pydantic import NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor

from harness.model import LatentModel, StandardNormalPrior
from harness.nn import Activation, EncoderTrunk, ResidualPairTrunk, Trunk
from harness.problem import DatasetSpec, ModelSpec, Problem

NEGLIGIBLE = -36.0  # nats below the largest value: the rounding of doubles


class LogDensityModel(StandardNormalPrior):
    """A target f(z) known as a log density, seen as a model with the reference prior N(0, I); x says nothing."""

    reference: Tensor

    def __init__(self, latent_dim: int) -> None:
        super().__init__()
        self.latent_dim = latent_dim
        # A model without any tensor would not know its own precision.
        self.register_buffer("reference", torch.zeros(latent_dim), persistent=False)

    @abstractmethod
    def log_target(self, z: Tensor) -> Tensor:
        """log f(z): (..., D) -> (...), nats; it need not be normalised."""

    def log_likelihood(self, x: Tensor, z: Tensor) -> Tensor:
        density = self.log_target(z)
        if density.shape != z.shape[:-1]:
            raise ValueError(
                f"{type(self).__name__}.log_target must return one number for each z: expected the shape "
                f"{tuple(z.shape[:-1])} for z of shape {tuple(z.shape)}, got {tuple(density.shape)}"
            )
        ratio = density - self.log_prior(z)
        return ratio.expand(*ratio.shape[:-1], len(x))


@dataclass(frozen=True, eq=False)
class GridDensity:
    r"""Densities on a line, each known up to a factor at equidistant points: sums over them stand for integrals.

    .. math:: \int f(u)\, du \approx h \sum_g f(u_g)

    Spectrally accurate for a smooth f that vanishes towards both ends (Trefethen and Weideman 2014,
    https://doi.org/10.1137/130932132).

    Args:
        points: Shape (G,), float64.
        log_density: log f of N densities at the points, shape (G, N), float64, nats.

    Raises:
        ArithmeticError: If a density is not negligible at both ends: the grid does not reach as far as it does.
    """

    points: Tensor
    log_density: Tensor

    def __post_init__(self) -> None:
        ends = torch.maximum(self.log_density[0], self.log_density[-1])
        if bool((ends > self.log_density.amax(0) + NEGLIGIBLE).any()):
            reach = f"{float(self.points[0]):g} to {float(self.points[-1]):g}"
            raise ArithmeticError(f"a density is not negligible at the ends of its grid, which goes from {reach}")

    @property
    def spacing(self) -> Tensor:
        return (self.points[-1] - self.points[0]) / (len(self.points) - 1)

    def log_normaliser(self) -> Tensor:
        """log of the integral over the line, shape (N,), nats."""
        return self.log_density.logsumexp(0) + self.spacing.log()

    def mean(self, values: Tensor) -> Tensor:
        """Expectation of a function with these values at the points: (G,) or (G, N) -> (N,)."""
        weights = self.log_density.softmax(0)
        return (weights * (values if values.ndim == 2 else values[:, None])).sum(0)

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """Independent draws by the inverse of the distribution function, linear between the points' midpoints: (n, N).

        The error of the distribution function is of the order of the squared spacing.
        """
        mass = self.log_density.softmax(0).T.contiguous()
        cumulative = mass.cumsum(1)
        kwargs = {"generator": generator, "device": mass.device, "dtype": mass.dtype}
        level = torch.rand((len(mass), n), **kwargs) * cumulative[:, -1:]
        cell = torch.searchsorted(cumulative, level, right=True).clamp(max=len(self.points) - 1)
        inside = mass.gather(1, cell)
        below = cumulative.gather(1, cell) - inside
        fraction = ((level - below) / inside.clamp(min=torch.finfo(inside.dtype).tiny)).clamp(0, 1)
        return (self.points[cell] + self.spacing * (fraction - 0.5)).T


class WithoutObservation(Trunk):
    """A trunk for a single observation, which has nothing to tell apart: it sees a one in the place of x."""

    def __init__(self, trunk: Trunk) -> None:
        super().__init__()
        self.features = trunk.features
        self.trunk = trunk

    def forward(self, x: Tensor, *others: Tensor) -> Tensor:
        """x (N, *E) and whatever the trunk takes besides -> (..., N, features)."""
        return self.trunk(x.new_ones(len(x), 1), *others)


@dataclass(frozen=True, kw_only=True, eq=False)
class PosteriorSpec(ModelSpec):
    """A fixed model, an encoder trunk and a residual pair trunk, neither of which looks at x.

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
    pair_branch: float

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
        trunk = EncoderTrunk(1, self.width, self.depth, self.activation, centre=False, noise_dim=noise_dim)
        return WithoutObservation(trunk)

    def pair_trunk(self, event_shape: tuple[int, ...]) -> Trunk:
        sizes = (1, self.latent_dim, self.pair_width, self.pair_depth)
        return WithoutObservation(
            ResidualPairTrunk(*sizes, self.pair_activation, centre=False, branch=self.pair_branch)
        )


@dataclass(frozen=True, kw_only=True)
class PosteriorProblem(Problem):
    """One observation and a fixed model: a plugin states its `target`, and what was observed where something was.

    The one observation is training, validation and test split, and the whole population: no number has an error of the
    test set. Networks have the sizes of the AVB paper's Eight Schools code.

    Args:
        width, depth, activation: Of the encoder trunk.
        pair_width, pair_depth, pair_activation: Of the trunk of pairs (x, z), with ``pair_depth`` residual blocks.
        pair_branch: Factor on what each residual block adds. With 1, as in that code, five blocks want its learning
            rates, about 1e-4: at 4e-3 an adversary explodes after a thousand steps.
    """

    width: PositiveInt = 128
    depth: NonNegativeInt = 2
    activation: Activation = "elu"
    pair_width: PositiveInt = 256
    pair_depth: PositiveInt = 5
    pair_activation: Activation = "leaky-relu"
    pair_branch: PositiveFloat = 0.2

    @abstractmethod
    def target(self) -> LatentModel:
        """The model, without parameters."""

    def observation(self) -> np.ndarray:
        """What was observed, shape (*E,); a one where nothing was."""
        return np.ones(1)

    @property
    def default_budget(self) -> str:
        return "steps=4000"

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
            pair_branch=self.pair_branch,
        )

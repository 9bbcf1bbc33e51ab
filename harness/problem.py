"""What is shared by all methods of a comparison: data on the device, the generative model, and the networks' trunks."""

from __future__ import annotations

import hashlib
import json
import math
import re
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from types import ModuleType
from typing import Any, ClassVar, Literal, get_args

import numpy as np
import torch
from pydantic import NonNegativeInt, PositiveInt
from torch import Tensor

from harness import model as model_module
from harness import nn as nn_module
from harness.model import DecoderModel, LatentModel, LikelihoodName, likelihood_named
from harness.nn import MLP, Activation, EncoderTrunk, InnerProductPairTrunk, ResidualPairTrunk, Trunk
from harness.options import Configurable, UserError, unknown
from harness.seeding import Streams, generator
from harness.sources import class_sources, source_hash

_SHARED_SOURCES: tuple[ModuleType, ...] = (model_module, nn_module)

Binarisation = Literal["dynamic", "static", "none"]
SplitName = Literal["train", "validation", "test"]
ScoredSplit = Literal["validation", "test"]


@dataclass(frozen=True, eq=False)
class DatasetSpec:
    """Arrays of a data set, before binarisation.

    Args:
        train, validation, test: Shape (N, *E). uint8 intensities when ``levels`` is given, else floats, used as is.
        levels: The intensity that stands for probability 1; element v is Bernoulli(v / levels). None: no scaling.
        binarisation: ``dynamic`` (a fresh Bernoulli draw at every training read; validation and test drawn once, from a
            fixed seed), ``static`` (already binary) or ``none``.
        exhaustive: The test split is the whole population, so its mean has no sampling error.
        test_labels: Classes of the test observations, for colouring figures only; shape (N,).
    """

    name: str
    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray
    levels: int | None = None
    binarisation: Binarisation = "none"
    exhaustive: bool = False
    test_labels: np.ndarray | None = None

    @property
    def event_shape(self) -> tuple[int, ...]:
        return self.train.shape[1:]

    @cached_property
    def content_hash(self) -> str:
        """SHA-256 of everything that a method or an evaluator can see of the data."""
        digest = hashlib.sha256(f"{self.levels}|{self.binarisation}|{self.exhaustive}".encode())
        for array in (self.train, self.validation, self.test):
            digest.update(f"|{array.dtype.str}{array.shape}|".encode())
            digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()


class Dataset(Configurable, ABC):
    """A named source of data: a plugin is a frozen dataclass that derives from this."""

    @abstractmethod
    def load(self) -> DatasetSpec:
        """Read the data, verified.

        Raises:
            DataError: If it is not there, damaged or not what it should be.
        """

    @property
    def location(self) -> str:
        """Where the data come from, for `harness data list`."""
        return "embedded"

    def fetch(self) -> str:
        """Download or prepare what `load` reads, verify it, and say where it is. Embedded data need nothing."""
        self.load()
        return self.location


class DataError(Exception):
    """Data that are missing, truncated, tampered with or of the wrong form; the message names the remedy."""


@dataclass(frozen=True, eq=False)
class Split:
    """One split, resident on the device.

    Args:
        values: Intensities (uint8) or values, shape (N, *E).
    """

    values: Tensor
    levels: int | None
    dtype: torch.dtype
    binarise: bool

    def __len__(self) -> int:
        return self.values.shape[0]

    def read(self, indices: Tensor, stream: torch.Generator) -> Tensor:
        """Observations ``indices``, binarised afresh from ``stream`` where the data are dynamic: (B,) -> (B, *E).

        The probability of each element is then its intensity to the nearest 2**-16: 16 random bits are drawn for it.
        """
        x = self.values.index_select(0, indices).to(self.dtype)
        if self.binarise:
            return binarised_(x, random_bits(x.shape, stream), self.levels or 1)
        return x if self.levels is None else x.div_(self.levels)


def random_bits(shape: torch.Size, stream: torch.Generator) -> Tensor:
    """16 random bits for each element, as int16 of that shape: four of one draw, a third of the time of floats."""
    n = shape.numel()
    words = torch.empty(math.ceil(n / 4), dtype=torch.int64, device=stream.device)
    return words.random_(-(2**63), None, generator=stream).view(torch.int16)[:n].view(shape)


def binarised_(x: Tensor, bits: Tensor, levels: int) -> Tensor:
    """In place, 1 where x / levels is above (bits + 1/2) / 2**16, else 0; as signed numbers bits start at -2**15.

    Floats are compared, and in place, since other comparisons take many times as long; for up to 255 levels all that
    is near the threshold is exact in float32.
    """
    return x.sub_(bits, alpha=levels * 2**-16).gt_(levels * (0.5 + 2**-17))


@dataclass(frozen=True, eq=False)
class DeviceData:
    """A data set on one device. Validation and test are drawn once, the same for every job and every seed."""

    spec: DatasetSpec
    train: Split
    validation: Tensor
    test: Tensor

    @staticmethod
    def place(spec: DatasetSpec, device: torch.device, dtype: torch.dtype) -> DeviceData:
        def split(name: SplitName) -> Split:
            values = torch.from_numpy(np.ascontiguousarray(getattr(spec, name))).to(device)
            return Split(values, spec.levels, dtype, spec.binarisation == "dynamic")

        def frozen(name: SplitName) -> Tensor:
            # Drawn on the CPU so that every device scores the same images.
            values = torch.from_numpy(np.ascontiguousarray(getattr(spec, name)))
            stream = generator(torch.device("cpu"), "binarisation", spec.name, name)
            x = Split(values, spec.levels, torch.float64, binarise=False).read(torch.arange(len(values)), stream)
            if spec.binarisation == "dynamic":
                x = torch.rand(x.shape, generator=stream, dtype=x.dtype) < x
            return x.to(device=device, dtype=dtype)

        return DeviceData(spec, split("train"), frozen("validation"), frozen("test"))

    def scored(self, n: int, split: ScoredSplit = "test") -> tuple[Tensor, Tensor]:
        """The fixed subset of ``n`` observations that every method is scored on, and its indices in its split.

        Subsets of different size are nested, so a larger one refines a smaller one. The validation split is for the
        choice of settings only.
        """
        observations = self.test if split == "test" else self.validation
        order = torch.randperm(len(observations), generator=generator(torch.device("cpu"), "scored", self.spec.name))
        indices = order[:n].sort().values.to(observations.device)
        return observations[indices], indices


class ModelSpec(ABC):
    """The decoder with its likelihood, and the trunks that every method on this problem uses."""

    modules: ClassVar[tuple[ModuleType, ...]] = ()
    """Modules besides those of its classes that define its networks: an edit there makes stored results stale."""

    latent_dim: int

    def unfit(self, event_shape: tuple[int, ...]) -> str | None:
        """Why there are no such networks for observations of this shape, or None."""
        return None

    @abstractmethod
    def new_model(self, event_shape: tuple[int, ...]) -> LatentModel:
        """A model with fresh initial weights."""

    @abstractmethod
    def encoder_trunk(self, event_shape: tuple[int, ...], noise_dim: int) -> Trunk:
        """Features of x (and noise): see `harness.nn.EncoderTrunk`."""

    @abstractmethod
    def pair_trunk(self, event_shape: tuple[int, ...]) -> Trunk:
        """Features of a pair (x, z): see `harness.nn.ResidualPairTrunk`."""


@dataclass(frozen=True, kw_only=True)
class MLPSpec(ModelSpec):
    """Fully connected decoder and trunks.

    Args:
        pair: Form of the pair trunk: ``residual`` (``pair_depth`` blocks) or ``inner-product`` (two networks of
            ``pair_depth`` layers that meet in a product of rank ``pair_rank``).
    """

    latent_dim: PositiveInt
    width: PositiveInt = 300
    depth: NonNegativeInt = 2
    activation: Activation = "softplus"
    likelihood: LikelihoodName = "bernoulli"
    pair: Literal["residual", "inner-product"] = "inner-product"
    pair_width: PositiveInt = 512
    pair_depth: PositiveInt = 2
    pair_rank: PositiveInt = 128
    pair_activation: Activation = "leaky-relu"

    @property
    def _centre(self) -> bool:
        return self.likelihood == "bernoulli"

    def new_model(self, event_shape: tuple[int, ...]) -> LatentModel:
        decoder = MLP(self.latent_dim, int(np.prod(event_shape)), self.width, self.depth, self.activation)
        return DecoderModel(self.latent_dim, event_shape, decoder, likelihood_named(self.likelihood))

    def encoder_trunk(self, event_shape: tuple[int, ...], noise_dim: int) -> Trunk:
        inputs = int(np.prod(event_shape))
        return EncoderTrunk(inputs, self.width, self.depth, self.activation, centre=self._centre, noise_dim=noise_dim)

    def pair_trunk(self, event_shape: tuple[int, ...]) -> Trunk:
        sizes = (int(np.prod(event_shape)), self.latent_dim, self.pair_width, self.pair_depth)
        if self.pair == "residual":
            return ResidualPairTrunk(*sizes, self.pair_activation, centre=self._centre)
        return InnerProductPairTrunk(*sizes, self.pair_rank, self.pair_activation, centre=self._centre)


@dataclass(frozen=True, eq=False)
class TrainingView:
    """All that a method may see of a problem: no test split, no reference, no exact answer.

    Args:
        train: Training split; methods read it through `Run.batches`.
        validation: Observations, shape (N, *E).
        model: The job's own model with the initial weights that all methods of a comparison share.
    """

    train: Split
    validation: Tensor
    model: LatentModel
    event_shape: tuple[int, ...]
    spec: ModelSpec = field(repr=False)

    @property
    def latent_dim(self) -> int:
        return self.model.latent_dim

    def encoder_trunk(self, noise_dim: int = 0) -> Trunk:
        return self.spec.encoder_trunk(self.event_shape, noise_dim)

    def pair_trunk(self) -> Trunk:
        return self.spec.pair_trunk(self.event_shape)


class Problem(Configurable, ABC):
    """Data and a model spec under one name: a plugin is a frozen dataclass that derives from this.

    Its fields are the options of the problem (``latent_dim``, ``width`` ...).
    """

    @property
    @abstractmethod
    def default_budget(self) -> str:
        """In the command line's form: ``steps=5000``."""

    @abstractmethod
    def dataset(self) -> DatasetSpec:
        """The data, verified."""

    @abstractmethod
    def model_spec(self) -> ModelSpec: ...

    @property
    def stream_name(self) -> str:
        """What names the random streams: the same for whatever may be typed for one and the same thing."""
        return self.label

    @property
    def optimum(self) -> float | None:
        """The highest expected test log-likelihood that any model can reach, where it is known; nats."""
        return None

    @property
    def spec_hash(self) -> str:
        """Identifies data, model spec and the source that defines them; the same for every method."""
        spec = self.model_spec()
        if re.search(r" at 0x|\b(array|tensor)\(", repr(spec)):  # an address; numbers to a few digits
            raise TypeError(f"{self.name}: a model spec is known by its repr(), which is {repr(spec)[:200]}: make it "
                            "a dataclass of numbers and texts")  # fmt: skip
        facts = {
            "data": loaded(self).content_hash,
            "problem": [type(self).__qualname__, self.stream_name],
            "config": self.config,
            "model": repr(spec),
            "source": [
                *class_sources(type(self)),
                *class_sources(type(spec)),
                *map(source_hash, (*spec.modules, *_SHARED_SOURCES)),
            ],
        }
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]

    def training_view(self, data: DeviceData, streams: Streams) -> TrainingView:
        """Data and a fresh model for one job. Initial weights do not depend on the method."""
        spec = self.model_spec()
        with streams.initial_weights(shared=True):
            model = spec.new_model(data.spec.event_shape)
        model = model.to(device=data.validation.device, dtype=data.validation.dtype)
        return TrainingView(data.train, data.validation, model, data.spec.event_shape, spec)


@lru_cache(maxsize=4)
def loaded(problem: Problem) -> DatasetSpec:
    """The data of a problem, read and checked once per process.

    Raises:
        DataError: If they are not there, damaged or not what is said of them.
    """
    spec = problem.dataset()
    check_data(spec)
    return spec


def check_data(spec: DatasetSpec) -> None:
    """What is said of data is true. It costs a look at their smallest and largest values.

    Raises:
        DataError: If it is not.
    """
    if not isinstance(spec, DatasetSpec):
        raise DataError(f"expected a harness.problem.DatasetSpec as data, got {type(spec).__name__}")
    if spec.binarisation not in get_args(Binarisation):
        raise DataError(f"{spec.name}: {unknown('binarisation', str(spec.binarisation), get_args(Binarisation))}")
    if spec.levels is not None and spec.levels < 1:
        raise DataError(f"{spec.name}: levels={spec.levels}; expected the intensity that stands for probability 1")
    arrays = {name: _array(f"{spec.name}: {name}", getattr(spec, name)) for name in get_args(SplitName)}
    for name, array in arrays.items():
        if array.shape[1:] != spec.event_shape:
            raise DataError(f"{spec.name}: {name} has observations of shape {array.shape[1:]}, train of "
                            f"{spec.event_shape}; they must be the same")  # fmt: skip
    for name, array in arrays.items():
        _check_values(f"{spec.name}: {name}", array, spec)
    labels: Any = spec.test_labels
    if labels is not None and np.shape(labels) != (len(spec.test),):
        raise DataError(f"{spec.name}: test_labels has shape {np.shape(labels)}; expected ({len(spec.test)},), one for "
                        "each observation of test")  # fmt: skip


def _array(what: str, array: Any) -> np.ndarray:
    if not isinstance(array, np.ndarray):
        raise DataError(f"{what} is a {type(array).__name__}; expected a numpy array (numpy.asarray makes one)")
    if array.ndim == 0 or array.size == 0:
        raise DataError(f"{what} has shape {array.shape}; expected (observations, ...) with at least one of each")
    if array.dtype.kind not in "buif" or not array.dtype.isnative or array.dtype.itemsize > 8:
        raise DataError(f"{what} has dtype {array.dtype.str}; expected whole numbers or floats of at most 64 bits in "
                        "the machine's byte order")  # fmt: skip
    return array


def _check_values(what: str, array: np.ndarray, spec: DatasetSpec) -> None:
    low, high = array.min(), array.max()  # not a number if any is not, so that all need not be looked at again
    if not (np.isfinite(low) and np.isfinite(high)):
        raise DataError(f"{what} has values that are not finite; remove or replace them")
    if spec.binarisation == "none":
        return
    top = spec.levels or 1
    _check_range(what, array, top, f"binarisation={spec.binarisation!r} needs probabilities", "'none'")
    if spec.binarisation == "static" and not _is_binary(array, top):
        raise DataError(f"{what} has values besides 0 and {top}, but binarisation='static' says that it is binary; "
                        "choose 'dynamic' for probabilities")  # fmt: skip


def _is_binary(array: np.ndarray, top: int) -> bool:
    """Whether values between 0 and ``top`` are one of these."""
    return (array.dtype.kind in "bui" and top == 1) or bool(((array == 0) | (array == top)).all())


def check_suited(problem: Problem) -> None:
    """The networks and the likelihood of a problem suit its data.

    Raises:
        UserError, DataError: If they do not, or if there are no such data.
    """
    data, networks = loaded(problem), problem.model_spec()
    if not isinstance(networks, ModelSpec):
        raise UserError(f"{problem.label}: model_spec must return a harness.problem.ModelSpec, got {networks!r}")
    reason = networks.unfit(data.event_shape)
    if reason is not None:
        raise UserError(f"{problem.label}: {reason}")
    if getattr(networks, "likelihood", None) == "bernoulli":
        for name in get_args(SplitName):
            what = f"{data.name}: {name}"
            _check_range(
                what, getattr(data, name), data.levels or 1, "a Bernoulli likelihood needs values", "a Gaussian one"
            )


def _check_range(what: str, array: np.ndarray, top: int, needs: str, otherwise: str) -> None:
    """Values are from 0 to ``top``, the one that stands for a probability of 1."""
    low, high = array.min(), array.max()
    if low < 0 or high > top:
        after = f" after division by levels={top}" if top != 1 else ""
        raise DataError(f"{what} has values from {low!s} to {high!s}, but {needs} in [0, 1]{after}; "
                        f"rescale them, state levels or choose {otherwise}")  # fmt: skip


@lru_cache(maxsize=4)
def placed(problem: Problem, device: torch.device, dtype: torch.dtype) -> DeviceData:
    """The data of a problem on a device, placed once per process and shared by all jobs."""
    return DeviceData.place(loaded(problem), device, dtype)

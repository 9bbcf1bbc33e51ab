"""The user's own arrays: ``file:PATH.npz`` with arrays train, test and, if wanted, validation and test_labels."""

from __future__ import annotations

import dataclasses
import logging
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from pydantic import PositiveInt

from harness import hookimpl
from harness.model import LikelihoodName
from harness.options import UserError, unknown
from harness.problem import Binarisation, DataError, DatasetSpec, ModelSpec, Problem
from harness.specs import NetworksProblem

log = logging.getLogger(__name__)

_SPLITS = ("train", "validation", "test")
_KNOWN = (*_SPLITS, "test_labels")
_STANDARD = 0.1, 10.0
"""Standard deviations that networks cope with, and how many of them the mean may be off."""
_FORM = "expected an .npz file with arrays train and test, and if wanted validation and test_labels"


@dataclass(frozen=True, kw_only=True)
class ArraysFile(NetworksProblem):
    """Arrays of shape (N, ...) from an .npz file, modelled by fully connected networks unless ``model`` says otherwise.

    With ``likelihood=bernoulli`` arrays of zeros and ones are taken as they are; otherwise uint8 intensities v are 1
    with probability v / 255, and floats in [0, 1] are probabilities, drawn afresh at every read. With
    ``likelihood=gaussian`` uint8 intensities are divided by 255 and other numbers are taken as they are. Without an
    array validation, a tenth of train, drawn once from a fixed seed, is held out for it.
    """

    name: str = "file"
    latent_dim: PositiveInt = 8
    likelihood: LikelihoodName = "bernoulli"
    _written: tuple[int, int] | None = field(init=False, repr=False)
    """When, and how long it was: part of what the problem is, so that a changed file is read anew."""

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "_written", _written(self.path) if self.path else None)

    def with_argument(self, text: str) -> ArraysFile:
        """The problem on the file at the path ``text``.

        Raises:
            UserError: If there is no such file.
        """
        problem = dataclasses.replace(self, name=f"{self.name.partition(':')[0]}:{text}")
        if not problem.path or not Path(problem.path).is_file():
            raise UserError(
                f"{problem.name}: there is no file {problem.path!r} (its path cannot have commas and brackets); {_FORM}"
            )
        return problem

    @property
    def path(self) -> str:
        return str(Path(text).expanduser()) if (text := self.name.partition(":")[2]) else ""

    @property
    def stream_name(self) -> str:
        """With the name of the file for its path, so that one file gives one result wherever it is called from."""
        return self.label.replace(self.name, self._short, 1)

    @property
    def _short(self) -> str:
        return f"file:{Path(self.path).name}" if self.path else self.name

    @property
    def default_budget(self) -> str:
        return "steps=5000"

    def dataset(self) -> DatasetSpec:
        if not self.path:
            raise UserError(f"problem 'file' needs a path: file:PATH.npz; {_FORM}")
        try:
            return _spec(self._short, _read(Path(self.path)), self.likelihood)
        except DataError as error:
            raise DataError(f"{self.name}: {error}") from None

    def model_spec(self) -> ModelSpec:
        return self.networks(self.likelihood)


def _written(path: str) -> tuple[int, int] | None:
    try:
        facts = Path(path).stat()
    except OSError:
        return None
    return facts.st_mtime_ns, facts.st_size


def _read(path: Path) -> dict[str, np.ndarray]:
    if not path.is_file():
        raise DataError(f"there is no file {str(path)!r}; {_FORM}")
    if not zipfile.is_zipfile(path):
        raise DataError(f"no .npz file, or truncated; {_FORM} (numpy.savez_compressed writes one)")
    try:
        with np.load(path, allow_pickle=False) as archive:
            wrong = [key for key in archive.files if key not in _KNOWN]
            if wrong:
                raise DataError(f"{unknown('array', wrong[0], _KNOWN)}; {_FORM}")
            arrays = {key: archive[key] for key in archive.files}
    except (ValueError, OSError, EOFError, KeyError, zipfile.BadZipFile, zlib.error, MemoryError) as error:
        raise DataError(f"cannot be read as arrays of numbers: {error}; {_FORM}") from None
    for key in ("train", "test"):
        if key not in arrays:
            raise DataError(f"has no array {key!r}, only {', '.join(arrays) or 'none'}; {_FORM}")
    for key, array in arrays.items():
        if not isinstance(array, np.ndarray):
            raise DataError(f"{key} is not an array; {_FORM}")
    return arrays


def _spec(name: str, arrays: dict[str, np.ndarray], likelihood: LikelihoodName) -> DatasetSpec:
    labels = arrays.pop("test_labels", None)
    _check_shapes(arrays, labels)
    if "validation" not in arrays:
        arrays["train"], arrays["validation"] = _hold_out(arrays["train"])
    values, levels = _values(arrays)
    binarisation: Binarisation = "none"
    if likelihood == "bernoulli":
        binarisation = "static" if all(_is_binary(array) for array in values.values()) else "dynamic"
    if binarisation == "static":
        values, levels = {key: array.astype(np.uint8) for key, array in values.items()}, 1
    elif binarisation == "dynamic" and levels is None:
        _check_probabilities(values)
    for doubt in _doubts(values["train"], levels, binarisation):
        log.warning("%s: %s", name, doubt)
    return DatasetSpec(
        name,
        train=values["train"],
        validation=values["validation"],
        test=values["test"],
        levels=levels,
        binarisation=binarisation,
        test_labels=None if labels is None else labels.astype(np.int64),
    )


def _check_shapes(arrays: dict[str, np.ndarray], labels: np.ndarray | None) -> None:
    for key, array in arrays.items():
        if array.ndim < 2 or array.size == 0:
            raise DataError(f"{key} has shape {array.shape}; expected (observations, ...) with at least one of each")
        if array.dtype.kind not in "buif":
            raise DataError(f"{key} has dtype {array.dtype}; expected uint8 intensities, zeros and ones, or floats")
        if array.shape[1:] != arrays["train"].shape[1:] or array.dtype != arrays["train"].dtype:
            train = arrays["train"]
            raise DataError(
                f"{key} ({array.dtype} {array.shape}) disagrees with train ({train.dtype} {train.shape}): "
                "all but the number of observations must be the same"
            )
    if labels is not None and (labels.shape != arrays["test"].shape[:1] or labels.dtype.kind not in "ui"):
        raise DataError(f"test_labels ({labels.dtype} {labels.shape}) must be whole numbers, one for each of test")


def _hold_out(train: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    if len(train) < 2:
        raise DataError("train has 1 observation and there is no validation; give an array validation")
    # Raw output of a bit generator is the same in all versions of NumPy.
    order = np.random.PCG64(0).random_raw(len(train)).argsort(kind="stable")
    held = max(1, len(train) // 10)
    return train[np.sort(order[held:])], train[np.sort(order[:held])]


def _values(arrays: dict[str, np.ndarray]) -> tuple[dict[str, np.ndarray], int | None]:
    """uint8 with its number of levels; everything else as float32."""
    if arrays["train"].dtype == np.uint8:
        return arrays, 255
    with np.errstate(over="ignore"):
        values = {key: array.astype(np.float32) for key, array in arrays.items()}
    for key, array in values.items():
        if not np.isfinite(array).all():
            raise DataError(f"{key} has values that are not finite (as float32); remove or rescale them")
    return values, None


def _is_binary(array: np.ndarray) -> bool:
    return bool(((array == 0) | (array == 1)).all())


def _doubts(train: np.ndarray, levels: int | None, binarisation: Binarisation) -> Iterator[str]:
    """What can be trained on and is hardly meant."""
    if levels == 255 and train.max() < levels / 2:
        yield (
            f"uint8 values are intensities out of 255, and the largest is {train.max()}: if these are counts or other "
            "numbers, give them as floats with likelihood=gaussian"
        )
    if binarisation == "none" and not levels:
        mean, sd = float(train.mean(dtype=np.float64)), float(train.std(dtype=np.float64))
        low, high = _STANDARD
        if not low <= sd <= high or abs(mean) > high * sd:
            yield (
                f"values have mean {mean:.3g} and standard deviation {sd:.3g}, and networks are made for about 0 and "
                "1: standardise them (log p(x) is then that of the standardised values)"
            )


def _check_probabilities(values: dict[str, np.ndarray]) -> None:
    for key, array in values.items():
        low, high = array.min(), array.max()
        if low < 0 or high > 1:
            raise DataError(
                f"{key} has values from {low!s} to {high!s}, but likelihood=bernoulli needs probabilities in [0, 1] "
                "or uint8 intensities; convert them or choose likelihood=gaussian"
            )


@hookimpl
def harness_problems() -> list[Problem]:
    return [ArraysFile()]

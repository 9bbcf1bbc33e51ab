"""scikit-learn's 1,797 handwritten digits of 8x8 pixels: real data that need no download.

The test set of Alpaydin and Kaynak 1998, https://archive.ics.uci.edu/dataset/80
"""

from __future__ import annotations

import dataclasses
import importlib.util
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pydantic import PositiveInt

from harness import hookimpl
from harness.formats import check_sha256
from harness.model import LikelihoodName
from harness.problem import DataError, Dataset, DatasetSpec, ModelSpec, Problem
from harness.specs import NetworksProblem

_SHA256 = "68aea062d35a127749050fa0e52dca09d6569ac08092c925610e0954e172dde2"  # of the table below
_VALIDATION, _TEST = 200, 400


@dataclass(frozen=True, kw_only=True)
class DigitsData(Dataset):
    """1,797 images of intensities 0 to 16, 1,197 / 200 / 400; a pixel v is 1 with probability v / 16.

    The split is one fixed random permutation. It mixes the writers (the source keeps no record of who wrote what).
    """

    name: str = "digits"

    def load(self) -> DatasetSpec:
        images, labels = _published()
        # Raw output of a bit generator, unlike that of `Generator.permutation`, is the same in all versions of NumPy.
        order = np.random.PCG64(0).random_raw(len(images)).argsort(kind="stable")
        test, validation, train = np.split(order, [_TEST, _TEST + _VALIDATION])
        return DatasetSpec(
            self.name,
            train=images[train],
            validation=images[validation],
            test=images[test],
            levels=16,
            binarisation="dynamic",
            test_labels=labels[test],
        )


def _published() -> tuple[np.ndarray, np.ndarray]:
    """Images (1797, 8, 8) and labels (1797,), in the order of scikit-learn."""
    table = _installed_table()
    try:
        check_sha256(table.tobytes(), _SHA256)
    except DataError as error:
        raise DataError(f"digits of the installed scikit-learn: {error}; reinstall scikit-learn") from None
    return table[:, :-1].reshape(-1, 8, 8), table[:, -1].astype(np.int64)


def _installed_table() -> np.ndarray:
    """Shape (1797, 65), uint8: pixels and label. From scikit-learn's file: importing scikit-learn takes seconds."""
    package = importlib.util.find_spec("sklearn")
    if package is None or package.origin is None:
        raise DataError("digits: scikit-learn is not installed; run: pip install scikit-learn")
    path = Path(package.origin).parent / "datasets" / "data" / "digits.csv.gz"
    if path.is_file():
        return np.loadtxt(path, delimiter=",").astype(np.uint8)
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    return np.column_stack([np.asarray(pixels), np.asarray(labels)]).astype(np.uint8)


@dataclass(frozen=True, kw_only=True)
class Digits(NetworksProblem):
    """8x8 digits, binarised afresh at every read; with ``likelihood=gaussian`` the intensities v / 16 as they are."""

    name: str = "digits"
    latent_dim: PositiveInt = 2
    width: PositiveInt = 128
    likelihood: LikelihoodName = "bernoulli"

    @property
    def default_budget(self) -> str:
        return "steps=2000"

    def dataset(self) -> DatasetSpec:
        data = DigitsData().load()
        return data if self.likelihood == "bernoulli" else dataclasses.replace(data, binarisation="none")

    def model_spec(self) -> ModelSpec:
        return self.networks(self.likelihood, pair_width=128)


@hookimpl
def harness_datasets() -> list[Dataset]:
    return [DigitsData()]


@hookimpl
def harness_problems() -> list[Problem]:
    return [Digits()]

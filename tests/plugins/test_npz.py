"""The user's own arrays: what each dtype becomes, and what is refused with which words."""

from __future__ import annotations

import dataclasses
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import harness
from harness.comparison import plan
from harness.options import UserError
from harness.problem import DataError, DeviceData, loaded
from harness_plugins.npz import ArraysFile

STREAM = np.random.Generator(np.random.PCG64(0))
BYTES = STREAM.integers(0, 256, (30, 4, 5), dtype=np.uint8)
FLOATS = STREAM.random((30, 4, 5))
BITS = STREAM.integers(0, 2, (30, 4, 5))


def saved(folder: Path, **arrays: Any) -> ArraysFile:
    path = folder / "images.npz"
    np.savez_compressed(path, **arrays)
    return ArraysFile().with_argument(str(path))


def halves(array: np.ndarray, **more: Any) -> dict[str, Any]:
    return {"train": array[:20], "test": array[20:], **more}


def test_the_name_carries_the_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    np.savez(tmp_path / "images.npz", **halves(BYTES))
    problem = ArraysFile(latent_dim=2).with_argument("images.npz")
    assert problem.label == "file:images.npz[latent_dim=2]"
    assert "images" not in str(problem.config)  # what the data are is in their hash, not in where they lie
    assert problem.dataset().name == "file:images.npz"


@pytest.mark.parametrize(
    ("array", "binarisation", "levels"),
    [
        pytest.param(BYTES, "dynamic", 255, id="bytes"),
        pytest.param(FLOATS, "dynamic", None, id="probabilities"),
        pytest.param(FLOATS.astype(np.float16), "dynamic", None, id="half precision"),
        *(pytest.param(BITS.astype(dtype), "static", 1, id=f"bits as {dtype}") for dtype in "?Bqfd"),
    ],
)
def test_what_a_dtype_becomes_for_bernoulli(tmp_path: Path, array: np.ndarray, binarisation: str, levels: Any) -> None:
    spec = saved(tmp_path, **halves(array)).dataset()
    assert (spec.binarisation, spec.levels) == (binarisation, levels)
    data = DeviceData.place(spec, torch.device("cpu"), torch.float32)
    batch = data.train.read(torch.arange(18), torch.Generator().manual_seed(0))
    assert set(batch.unique().tolist()) == {0.0, 1.0}
    assert set(data.test.unique().tolist()) == {0.0, 1.0}
    if binarisation == "static":
        np.testing.assert_array_equal(data.test.numpy(), array[20:].astype(np.float32))


def test_float_probabilities_are_those_of_the_draws(tmp_path: Path) -> None:
    n = 40_000
    array = np.full((n, 1), 0.3)
    spec = saved(tmp_path, train=array, validation=array[:1], test=array[:1]).dataset()
    split = DeviceData.place(spec, torch.device("cpu"), torch.float32).train
    mean = float(split.read(torch.arange(n), torch.Generator().manual_seed(0)).mean())
    assert abs(mean - 0.3) < 4 * (0.21 / n) ** 0.5  # beyond 4 standard errors once in 16,000 seeds


@pytest.mark.parametrize(
    ("array", "scale"),
    [(BYTES, 255), (100 * FLOATS - 50, 1), (BITS, 1), (BITS.astype(bool), 1), (BYTES.astype(np.int32) - 128, 1)],
)
def test_gaussian_takes_values_as_they_are_and_scales_bytes(tmp_path: Path, array: np.ndarray, scale: int) -> None:
    problem = saved(tmp_path, **halves(array))
    spec = ArraysFile(name=problem.name, likelihood="gaussian").dataset()
    data = DeviceData.place(spec, torch.device("cpu"), torch.float64)
    assert spec.binarisation == "none"
    np.testing.assert_allclose(data.test.numpy(), array[20:] / scale, rtol=1e-6)


@pytest.mark.parametrize(
    ("array", "likelihood", "told"),
    [
        (np.full((20, 4), 11, np.uint8), "bernoulli", "the largest is 11: if these are counts"),
        (np.full((20, 4), 130, np.uint8), "bernoulli", ""),
        (np.eye(20, dtype=np.uint8), "bernoulli", ""),
        (np.full((20, 4), 11, np.uint8), "gaussian", "the largest is 11: if these are counts"),
        (100 + 3 * np.eye(20), "gaussian", "values have mean 100 and standard deviation 0.65"),
        (1e6 * np.eye(20), "gaussian", "standard deviation 2.18e+05, and networks are made for about 0 and 1"),
        (1e-3 * np.eye(20), "gaussian", "standardise them"),
        (3 * np.eye(20), "gaussian", ""),
    ],
)
def test_what_is_hardly_meant_is_told_of(
    tmp_path: Path, array: np.ndarray, likelihood: Any, told: str, caplog: pytest.LogCaptureFixture
) -> None:
    dataclasses.replace(saved(tmp_path, train=array, test=array), likelihood=likelihood).dataset()
    assert told in caplog.text
    assert bool(caplog.text) == bool(told)


def test_validation_is_a_fixed_tenth_of_train_unless_given(tmp_path: Path) -> None:
    array = np.arange(200, dtype=np.uint8).reshape(200, 1)
    spec = saved(tmp_path, train=array, test=array).dataset()
    assert [len(part) for part in (spec.train, spec.validation, spec.test)] == [180, 20, 200]
    assert sorted([*spec.train[:, 0], *spec.validation[:, 0]]) == list(range(200))
    assert spec.validation.max() - spec.validation.min() > 100  # not a block: arrays may be in the order of classes
    assert spec.content_hash == saved(tmp_path, train=array, test=array).dataset().content_hash
    given = saved(tmp_path, train=array, test=array, validation=array[:3]).dataset()
    assert [len(part) for part in (given.train, given.validation)] == [200, 3]


def test_labels_are_taken_along(tmp_path: Path) -> None:
    spec = saved(tmp_path, **halves(BYTES, test_labels=np.arange(10, dtype=np.int32))).dataset()
    assert spec.test_labels is not None
    assert spec.test_labels.tolist() == list(range(10))


def test_a_changed_file_is_read_anew_in_the_same_process(tmp_path: Path) -> None:
    first = saved(tmp_path, **halves(BYTES))
    same = ArraysFile().with_argument(first.path)
    assert first == same
    assert hash(first) == hash(same)
    assert loaded(first) is loaded(same)
    changed = saved(tmp_path, **halves(BYTES ^ 1))
    os.utime(changed.path, ns=(1, 1))  # clocks of file systems are coarse
    changed = ArraysFile().with_argument(changed.path)
    assert changed != first
    assert loaded(changed).content_hash != loaded(first).content_hash
    assert changed.spec_hash != first.spec_hash


def refused(problem: ArraysFile, reason: str) -> None:
    with pytest.raises(DataError) as caught:
        problem.dataset()
    message = str(caught.value)
    assert reason in message
    assert message.startswith(problem.name)
    assert "\n" not in message


NAN = np.where(FLOATS < 0.01, np.nan, FLOATS)


@pytest.mark.parametrize(
    ("arrays", "reason"),
    [
        pytest.param({"train": BYTES}, "has no array 'test', only train", id="no test"),
        pytest.param({}, "has no array 'train', only none", id="no arrays"),
        pytest.param(halves(BYTES, valid=BYTES), "unknown array 'valid'; did you mean 'validation'?", id="misspelt"),
        pytest.param({"train": BYTES, "test": BYTES[:, :3]}, "test (uint8 (30, 3, 5)) disagrees", id="shape"),
        pytest.param({"train": BYTES, "test": FLOATS}, "test (float64 (30, 4, 5)) disagrees", id="dtypes"),
        pytest.param({"train": BYTES[:0], "test": BYTES}, "train has shape (0, 4, 5)", id="empty"),
        pytest.param(halves(BYTES[:, :0]), "train has shape (20, 0, 5)", id="no elements"),
        pytest.param(halves(BYTES[:, 0, 0]), "train has shape (20,)", id="one axis"),
        pytest.param({"train": BYTES[:1], "test": BYTES}, "give an array validation", id="one observation"),
        pytest.param(halves(NAN), "not finite", id="nan"),
        pytest.param(halves(FLOATS * 1e60), "not finite", id="beyond float32"),
        pytest.param(halves(BYTES.astype(np.int64)), "needs probabilities in [0, 1] or uint8", id="integers"),
        pytest.param(halves(FLOATS - 0.5), "needs probabilities in [0, 1] or uint8", id="negative"),
        pytest.param(halves(FLOATS.astype(complex)), "dtype complex128", id="complex"),
        pytest.param(halves(BYTES.astype(str)), "dtype <U3", id="text"),
        pytest.param(halves(BYTES.astype(object)), "cannot be read as arrays of numbers", id="objects"),
        pytest.param(halves(BYTES, test_labels=np.arange(9)), "test_labels (int64 (9,))", id="labels"),
        pytest.param(halves(BYTES, test_labels=np.zeros(10)), "test_labels (float64 (10,))", id="float labels"),
    ],
)
def test_arrays_that_make_no_sense_are_refused(tmp_path: Path, arrays: dict[str, Any], reason: str) -> None:
    refused(saved(tmp_path, **arrays), reason)


def test_truncated_damaged_and_foreign_files_are_refused(tmp_path: Path) -> None:
    problem = saved(tmp_path, **halves(BYTES))
    path = Path(problem.path)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    refused(problem, "no .npz file, or truncated")
    middle = len(content) // 3
    path.write_bytes(content[:middle] + bytes(b ^ 255 for b in content[middle : middle + 50]) + content[middle + 50 :])
    refused(problem, "cannot be read as arrays of numbers")
    path.write_text("not an archive")
    refused(problem, "no .npz file")
    np.save(tmp_path / "array.npy", BYTES)
    refused(ArraysFile().with_argument(str(tmp_path / "array.npy")), "no .npz file")
    path.unlink()
    refused(problem, "there is no file")


@pytest.mark.parametrize("text", ["", "nowhere.npz", "."])
def test_a_path_without_a_file_is_the_users_mistake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="there is no file"):
        ArraysFile().with_argument(text)


def test_without_a_path_the_problem_says_how_to_give_one() -> None:
    with pytest.raises(UserError, match=r"file:PATH\.npz"):
        ArraysFile().dataset()


def test_floats_are_kept_in_single_precision(tmp_path: Path) -> None:
    spec = saved(tmp_path, **halves(FLOATS)).dataset()
    assert {array.dtype for array in (spec.train, spec.validation, spec.test)} == {np.dtype(np.float32)}


def test_one_file_gives_one_result_however_its_path_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test set that is drawn, the initial weights and the minibatches are named by the file."""
    problem = saved(tmp_path, **halves(FLOATS))
    file = Path(problem.path)
    monkeypatch.chdir(file.parent)
    (file.parent / "sub").mkdir()
    names = [f"file:{text}" for text in (str(file), file.name, f"./{file.name}", f"sub/../{file.name}")]
    found = [harness.data(name).test for name in names]
    assert all(torch.equal(each, found[0]) for each in found)
    assert set(found[0].unique().tolist()) == {0.0, 1.0}
    asked: dict[str, Any] = {"seeds": 1, "budget": "steps=5", "evaluators": "elbo"}
    records = [harness.compare("vae", name, **asked, out=tmp_path / f"out{i}") for i, name in enumerate(names)]
    assert len({table["job_id"].iloc[0] for table in records}) == 1
    assert len({tuple(table["value"]) for table in records}) == 1
    both = harness.compare("vae", names[:2], **asked, out=tmp_path / "both")
    assert both["status"].unique().tolist() == ["ok"]


def test_a_comparison_on_it_is_kept_and_a_changed_file_is_another_problem(tmp_path: Path) -> None:
    problem = saved(tmp_path, **halves(BYTES))
    assert problem.config  # kept on first use, beside what the problem is
    for same in (dataclasses.replace(problem), pickle.loads(pickle.dumps(problem))):
        assert same == problem
        assert hash(same) == hash(problem)
    asked: dict[str, Any] = {"seeds": 2, "budget": "steps=5", "evaluators": "elbo", "out": tmp_path / "out"}
    records = harness.compare("vae,avb", problem.name, **asked)
    assert set(records.query("method == 'vae'")["status"]) == {"ok"}
    assert all(job.done for job in plan("vae,avb", problem.name, **asked))
    os.utime(problem.path, (0, 0))  # the same data, written at another time: read anew, and the same jobs
    assert problem.with_argument(problem.path) != problem
    assert all(job.done for job in plan("vae,avb", problem.name, **asked))
    saved(tmp_path, **halves(BYTES[::-1]))
    assert not any(job.done for job in plan("vae,avb", problem.name, **asked))

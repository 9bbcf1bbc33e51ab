"""The embedded digits: real data, a split that never moves, and no scikit-learn where its file will do."""

from __future__ import annotations

import importlib.util
import sys
from collections import Counter
from importlib.machinery import ModuleSpec
from pathlib import Path

import numpy as np
import pytest
import torch

from harness.problem import DataError, DeviceData
from harness_plugins import digits
from harness_plugins.digits import Digits, DigitsData

# Fits and records are comparable over machines and versions as long as this stays.
CONTENT = "feb8bb6620e9f0ffbe6fb15430e86edebcb67684826d2a2029bab318ee38970e"


def rows(images: np.ndarray) -> Counter[bytes]:
    return Counter(image.astype(np.uint8).tobytes() for image in images)


def test_the_splits_are_those_of_every_other_machine() -> None:
    assert DigitsData().load().content_hash == CONTENT


def test_the_splits_part_what_scikit_learn_publishes() -> None:
    datasets = pytest.importorskip("sklearn.datasets")
    published = datasets.load_digits()
    spec = DigitsData().load()
    parts = (spec.train, spec.validation, spec.test)
    assert [len(part) for part in parts] == [1197, 200, 400]
    assert sum((rows(part) for part in parts), Counter()) == rows(published.images)
    assert (spec.levels, spec.binarisation, spec.train.max()) == (16, "dynamic", 16)
    labels = dict(zip((image.tobytes() for image in published.images.astype(np.uint8)), published.target, strict=True))
    assert spec.test_labels is not None
    assert [labels[image.tobytes()] for image in spec.test] == spec.test_labels.tolist()


def test_every_class_is_in_every_split() -> None:
    labels = DigitsData().load().test_labels
    assert labels is not None
    assert np.bincount(labels, minlength=10).min() > 25  # of about 40


def test_scikit_learn_is_not_imported_where_its_file_is_at_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)  # importing it now raises
    assert DigitsData().load().content_hash == CONTENT


def test_without_the_file_scikit_learn_is_asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    elsewhere = ModuleSpec("sklearn", None, origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: elsewhere)
    assert DigitsData().load().content_hash == CONTENT


def test_other_digits_than_the_published_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    table = digits._installed_table()
    table[5, 5] ^= 1
    monkeypatch.setattr(digits, "_installed_table", lambda: table)
    with pytest.raises(DataError, match=r"not the expected content .* reinstall scikit-learn"):
        DigitsData().load()


def test_a_missing_scikit_learn_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(DataError, match="pip install scikit-learn"):
        DigitsData().load()


def test_the_gaussian_likelihood_sees_intensities_between_0_and_1() -> None:
    data = DeviceData.place(Digits(likelihood="gaussian").dataset(), torch.device("cpu"), torch.float32)
    assert data.test.min() == 0
    assert data.test.max() == 1
    assert data.test.unique().numel() == 17

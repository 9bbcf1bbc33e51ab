"""Fixtures that all tests share: one seed, no data folder of the user's, no window for figures."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from harness.cli import main

_SURROUNDINGS = pytest.MonkeyPatch()


def pytest_configure() -> None:
    """Before collection, which looks at the registered data sets already."""
    _SURROUNDINGS.setenv("HARNESS_DATA", tempfile.mkdtemp(prefix="harness-data-"))
    _SURROUNDINGS.setenv("MPLBACKEND", "Agg")
    for name in ("COLUMNS", "LINES"):  # of a terminal, which tests have none of: parallel ones inherit them
        _SURROUNDINGS.delenv(name, raising=False)
    # The networks of tests are so small that a second thread costs more than it brings; the variable is for processes.
    _SURROUNDINGS.setenv("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)


def pytest_unconfigure() -> None:
    shutil.rmtree(os.environ["HARNESS_DATA"], ignore_errors=True)
    _SURROUNDINGS.undo()


@pytest.fixture
def seed() -> int:
    """The seed of every stochastic test."""
    return 0


@pytest.fixture
def generator(seed: int) -> torch.Generator:
    """A fresh random stream on the CPU."""
    stream = torch.Generator()
    stream.manual_seed(seed)
    return stream


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run a command line; exit code, stdout, stderr."""

    def call(*words: str) -> tuple[int, str, str]:
        code = main(words)
        said = capsys.readouterr()
        return code, said.out, said.err

    return call


@pytest.fixture
def write_distribution(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Make importlib.metadata see a distribution with one plugin, as if it were installed."""

    def write(name: str, source: str, version: str = "1.0", value: str | None = None) -> None:
        folder = tmp_path / name
        module = name.replace("-", "_")
        information = folder / f"{module}-{version}.dist-info"
        information.mkdir(parents=True)
        (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        (information / "entry_points.txt").write_text(f"[harness.plugins]\n{name} = {value or module}\n")
        (folder / f"{module}.py").write_text(source)
        monkeypatch.syspath_prepend(folder)
        monkeypatch.delitem(sys.modules, module, raising=False)

    return write


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    if item.get_closest_marker("compiler") and not (shutil.which("g++") or shutil.which("clang++")):
        pytest.skip("needs a C++ compiler")

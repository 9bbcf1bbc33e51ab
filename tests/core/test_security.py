"""Nothing that is read is executed, and nothing of the user's surroundings is told."""

from __future__ import annotations

import io
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import harness
from harness.cli import main
from harness.problem import DataError
from harness.store import Store

SECRET = "correct-horse-battery-staple"

PLUGIN = """
from dataclasses import dataclass
from pathlib import Path
from harness import hookimpl
from harness_plugins.vae import VAE

@dataclass(frozen=True, kw_only=True)
class Homesick(VAE):
    '''Wants a file.'''
    name: str = "homesick"

    def build(self, view):
        raise ValueError(f"no such file: {Path.home() / 'secrets'}")

@hookimpl
def harness_methods():
    return [Homesick()]
"""


class Trap:
    """Whoever unpickles it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def trapped(path: Path, *names: str) -> bytes:
    """An archive of arrays of objects."""
    content = io.BytesIO()
    np.savez(content, allow_pickle=True, **{name: np.array([Trap(path)], dtype=object) for name in names})
    return content.getvalue()


@pytest.fixture
def out(tmp_path: Path) -> Path:
    harness.compare("vae", "four-points", seeds=1, budget="steps=5", evaluators="exact", out=tmp_path / "out")
    return tmp_path / "out"


def test_the_trap_works(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Trap(tmp_path / "sprung")))
    assert (tmp_path / "sprung").exists()


def test_arrays_for_figures_are_not_unpickled(out: Path) -> None:
    [path] = out.glob("fits/*/gallery.npz")
    path.write_bytes(trapped(out / "sprung", *np.load(path).files))
    with pytest.raises(FileNotFoundError):
        Store(out).gallery(path.parent.name)
    assert (out / "quarantine").exists()
    assert not (out / "sprung").exists()


def test_values_per_observation_are_not_unpickled(out: Path) -> None:
    [path] = out.glob("measurements/*/*.npz")
    path.write_bytes(trapped(out / "sprung", *np.load(path).files))
    facts = json.loads(path.with_suffix(".json").read_text())
    path.with_suffix(".json").write_text(json.dumps({**facts, "npz_bytes": path.stat().st_size}))
    assert Store(out).values(path.parent.name, path.stem) is None
    assert (out / "quarantine").exists()
    assert not (out / "sprung").exists()


@pytest.mark.parametrize("pattern", ["fits/*/state.safetensors", "records.parquet", "jobs/*.json"])
def test_other_files_of_results_are_not_unpickled(out: Path, pattern: str) -> None:
    [path] = out.glob(pattern)
    path.write_bytes(pickle.dumps(Trap(out / "sprung")))
    assert main(["plan", "--methods", "vae", "--problems", "four-points", "--seeds", "1", "--out", str(out)]) == 0
    main(["evaluate", str(out), "--evaluators", "elbo"])
    assert not (out / "sprung").exists()


def test_data_are_not_unpickled(tmp_path: Path) -> None:
    (tmp_path / "data.npz").write_bytes(trapped(tmp_path / "sprung", "train", "test"))
    with pytest.raises(DataError):
        harness.data(f"file:{tmp_path / 'data.npz'}")
    assert not (tmp_path / "sprung").exists()


def test_reports_tell_nothing_of_the_users_surroundings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "home-of-somebody"
    home.mkdir()
    (home / "plugin.py").write_text(PLUGIN)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("API_TOKEN", SECRET)
    monkeypatch.chdir(home)
    words = ["--methods", "vae,homesick", "--problems", "four-points", "--seeds", "1", "--budget", "steps=5"]
    assert (
        main(["compare", *words, "--out", "out", "--evaluators", "exact,elbo", "--plugin", str(home / "plugin.py")])
        == 1
    )
    assert main(["report", "out"]) == 0
    report = Path("out/report/report.md").read_text()
    assert "no such file: ~/secrets" in report.replace("\\", "")
    for path in [*Path("out").glob("*.*"), *Path("out/report").rglob("*.*")]:
        assert SECRET.encode() not in path.read_bytes(), path
        assert path.parent == Path("out") or home.name.encode() not in path.read_bytes(), path

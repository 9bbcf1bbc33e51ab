"""Folders of results that can only be read: what reads works, what writes says at once that it cannot."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

import harness
from harness import working
from harness.merging import merge
from harness.store import Store

ASKED: dict[str, Any] = {
    "methods": "vae", "problems": "four-points", "seeds": 1, "budget": "steps=5", "evaluators": "exact",
}  # fmt: skip
WORDS = [f"--{key}={value}" for key, value in ASKED.items()]
ANY = [word for word in WORDS if "budget" not in word]
REASONS = ("Read-only file system", "Permission denied")
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Store:
    store = Store(tmp_path_factory.mktemp("whole") / "store")
    harness.compare(**ASKED, out=store.path)
    return store


@pytest.fixture
def disk(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A folder that `read_only` can make so: where permissions do not stop this user, on a disk of its own."""
    return request.getfixturevalue("tmpfs")() if os.geteuid() == 0 else tmp_path


@pytest.fixture
def store(disk: Path, whole: Store) -> Iterator[Store]:
    """A copy of what has been done, on such a disk."""
    shutil.copytree(whole.path, disk / "store")
    with read_only(disk, disk / "store"):
        yield Store(disk / "store")


@contextmanager
def read_only(disk: Path, folder: Path) -> Iterator[None]:
    """Root is stopped by nothing but the file system."""
    if os.geteuid() == 0:
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        yield
        return
    folders = [folder, *(path for path in folder.glob("**/*") if path.is_dir())]
    for each in folders:
        each.chmod(0o555)
    try:
        yield
    finally:
        for each in folders:
            each.chmod(0o755)


def told(found: tuple[int, str, str], place: str) -> str:
    """What was printed, of a command that has ended with one line on stderr that names a place and a reason."""
    code, out, error = found
    assert code == 2
    assert error.count("\n") == 1, error
    assert any(f"{place}: {reason}" in error.replace("'", "") for reason in REASONS), error
    return out


@pytest.fixture
def never(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is fitted."""
    monkeypatch.setattr(working, "fit_jobs", lambda *a, **k: pytest.fail("hours of fitting"))


def test_what_reads_works(store: Store, whole: Store, run: Run) -> None:
    [job_id] = store.job_ids()
    for words in (["plan", *WORDS, "--out"], ["gc"], ["gc", "--keep=1"]):
        code, out, error = run(*words, str(store.path))
        assert (code, error) == (0, "")
        assert out
    assert run("why", str(store.path), job_id)[0] == 0
    pd.testing.assert_frame_equal(store.examples(), whole.examples())
    fits = [harness.load(each.path, job_id).state for each in (store, whole)]
    assert all(torch.equal(fits[0][name], fits[1][name]) for name in fits[1])


def test_a_report_is_printed_before_it_cannot_be_written(store: Store, run: Run) -> None:
    assert "four-points" in told(run("report", str(store.path)), f"{store.path}/report")


@pytest.mark.usefixtures("never")
@pytest.mark.parametrize("further", [["--budget=steps=6"], ["--budget=steps=6", "--jobs=2"], ["--budget=steps=5"]])
def test_a_comparison_says_so_before_it_begins(further: list[str], store: Store, run: Run) -> None:
    assert told(run("compare", *ANY, *further, "--out", str(store.path)), f"cannot write to {store.path}") == ""


def test_what_writes_says_so(store: Store, whole: Store, run: Run, tmp_path: Path) -> None:
    folder = str(store.path)
    assert told(run("evaluate", folder, "--evaluators=elbo"), f"{folder}/environment.json") == ""
    assert told(run("merge", folder, str(whole.path)), f"cannot write to {folder}") == ""
    assert "fits/" in told(run("gc", folder, "--keep=1", "--yes"), f"{store.state_path(store.job_ids()[0])}")
    assert merge(tmp_path / "another", [folder]).jobs == 1  # from there, others may take


@pytest.mark.usefixtures("never")
@pytest.mark.parametrize("name", ["jobs", "fits", "checkpoints", "measurements"])
def test_a_part_that_cannot_be_written_to_is_found_before_anything_is_fitted(
    name: str, whole: Store, tmp_path: Path, run: Run, request: pytest.FixtureRequest
) -> None:
    """Somebody else's, for example."""
    out = Path(shutil.copytree(whole.path, tmp_path / "out"))
    part = out / name
    part.mkdir(exist_ok=True)
    disk = part
    if os.geteuid() == 0:
        disk = request.getfixturevalue("tmpfs")()
        shutil.copytree(part, disk, dirs_exist_ok=True)
        shutil.rmtree(part)
        part.symlink_to(disk)
    with read_only(disk, part):
        told(run("compare", *ANY, "--budget=steps=6", "--out", str(out)), f"cannot write to {part}")


def test_files_are_as_readable_as_the_user_wants_them(tmp_path: Path) -> None:
    usual = os.umask(0o027)
    try:
        Store.create(tmp_path / "out")
    finally:
        os.umask(usual)
    assert (tmp_path / "out" / "store.json").stat().st_mode & 0o777 == 0o640

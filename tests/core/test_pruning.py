"""What a store can do without: told first, dropped when asked for; never a record."""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

import harness
from harness.comparison import evaluate, plan
from harness.pruning import YOUNG, surplus
from harness.store import Store

ASKED: dict[str, Any] = {
    "methods": "vae", "problems": "four-points", "seeds": 3, "budget": "steps=10", "evaluators": "exact",
}  # fmt: skip
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With three fits; the one that began first has the last id."""
    store = Store(tmp_path_factory.mktemp("made") / "store")
    harness.compare(**ASKED, out=store.path)
    for hour, job_id in enumerate(reversed(store.job_ids())):
        store.write_job(job_id, {**(store.job(job_id) or {}), "started_at": f"2026-01-01T0{hour}:00:00+00:00"})
    store.derive()
    return store.path


@pytest.fixture
def store(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """A copy of it in the working folder."""
    monkeypatch.chdir(tmp_path)
    return Store(shutil.copytree(made, "store"))


def aged(path: Path) -> Path:
    """As if it had been written before the last hour."""
    then = time.time() - YOUNG - 60
    for each in (*path.glob("**/*"), path):
        os.utime(each, (then, then))
    return path


def written(path: Path, content: bytes = b"x" * 100) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def with_status(store: Store, job_id: str, status: str) -> None:
    store.write_job(job_id, {**(store.job(job_id) or {}), "status": status})


def found(store: Store, keep: int | None = None) -> dict[str, str]:
    return {str(each.path.relative_to(store.path)): each.reason for each in surplus(store, keep)}


def test_a_store_with_nothing_to_spare(store: Store, run: Run) -> None:
    aged(store.path)
    assert run("gc", "store") == (0, "nothing to drop\n", "")
    assert run("gc", "store", "--keep", "1GiB", "--yes") == (0, "nothing to drop\n", "")


def test_what_would_be_dropped_is_told_first(store: Store, run: Run) -> None:
    aged(written(store.path / "fits" / "gone" / "state.safetensors", b"x" * 2048).parent)
    code, out, err = run("gc", "store")
    assert (code, err) == (0, "")
    assert re.search(r"^fits/gone +2\.0 KiB +there is no such job", out, re.MULTILINE)
    assert out.splitlines()[-1] == "2.0 KiB in 1 place; nothing has been dropped, --yes drops it"
    assert (store.path / "fits" / "gone").exists()
    assert run("gc", "store", "--yes")[1].splitlines()[-1] == "dropped: 2.0 KiB in 1 place"
    assert not (store.path / "fits" / "gone").exists()
    assert run("gc", "store", "--yes")[1] == "nothing to drop\n"


def test_fits_that_no_record_needs(store: Store) -> None:
    """Of a job that is not there, or not ok; but a run may be about to write its job."""
    failed, young, _ = store.job_ids()
    with_status(store, failed, "failed")
    with_status(store, young, "failed")
    aged(store.path / "fits" / failed)
    aged(written(store.path / "fits" / "0123456789abcdef" / "state.safetensors").parent)
    young_file = written(store.path / "fits" / "fedcba9876543210" / "state.safetensors")
    aged(young_file.parent)
    os.utime(young_file)
    assert found(store) == {"fits/0123456789abcdef": "there is no such job", f"fits/{failed}": "its job is failed"}


@pytest.mark.parametrize(
    ("status", "dropped"), [("ok", True), ("diverged", True), ("skipped", True), ("failed", False), ("killed", False)]
)
def test_checkpoints_of_jobs_that_may_be_tried_again_from_there_are_kept(
    status: str, dropped: bool, store: Store
) -> None:
    job_id = store.job_ids()[0]
    with_status(store, job_id, status)
    for name in (job_id, "of-a-job-that-goes-on"):
        store.write_checkpoint(name, b"a checkpoint")
        assert f"checkpoints/{name}" not in found(store)
        aged(store.checkpoint_path(name).parent)
    kept = {name: reason for name, reason in found(store).items() if name.startswith("checkpoints")}
    assert kept == ({f"checkpoints/{job_id}": f"its job is done ({status})"} if dropped else {})


def test_what_killed_writes_have_left_is_dropped_and_files_of_others_are_not(store: Store) -> None:
    job_id = store.job_ids()[0]
    half = [f"jobs/.{job_id}.json.abcd1234", f"fits/{job_id}/.state.safetensors.a_cd1234", ".records.csv.x_y_z_00"]
    for name in half:
        written(store.path / name)
    assert found(store) == {}
    for name in [
        *half,
        ".gitignore",
        ".git/config.json.abcd1234",
        "report/.notes.txt.abcd1234",
        f"jobs/.{job_id}.json",
    ]:
        aged(written(store.path / name))
    assert found(store) == dict.fromkeys(half, "half written")


def test_damaged_files_are_kept_until_they_are_computed_anew(store: Store) -> None:
    job_id = store.job_ids()[0]
    store.state_path(job_id).write_bytes(b"garbage")
    assert not store.has_whole_fit(job_id)
    assert found(store) == {}
    harness.compare(**ASKED, out=store.path)
    assert found(store) == {}  # still young
    aged(store.path / "quarantine")
    assert found(store) == {f"quarantine/fits/{job_id}/state.safetensors": "damaged, and computed anew since"}


def test_the_oldest_fits_beyond_a_size_are_dropped_and_no_record(store: Store, run: Run) -> None:
    size = store.state_path(store.job_ids()[0]).stat().st_size
    newest, middle, oldest = store.job_ids()
    records = store.records()
    assert found(store, 3 * size) == {}
    assert list(found(store, 3 * size - 1)) == [f"fits/{oldest}/state.safetensors"]
    assert list(found(store, size)) == [f"fits/{name}/state.safetensors" for name in (oldest, middle)]
    assert len(found(store, 0)) == 3
    code, out, _ = run("gc", "store", "--keep", str(size), "--yes")
    assert code == 0
    assert "begun 2026-01-01T00:00:00+00:00" in out
    assert [store.has_fit(job_id) for job_id in (newest, middle, oldest)] == [True, False, False]
    pd.testing.assert_frame_equal(store.records(), records)
    assert len(store.curve(oldest)) >= 2  # what figures are made of stays
    assert store.gallery(oldest)
    assert all(job.done for job in plan(**ASKED, out=store.path))


def test_jobs_whose_fits_were_dropped_are_left_out_and_compare_fits_them_anew(store: Store, run: Run) -> None:
    *_, oldest = store.job_ids()
    before = store.records()
    state = store.state(oldest)
    shutil.rmtree(store.state_path(oldest).parent)
    code, _, err = run("evaluate", "store", "--evaluators", "elbo")
    assert code == 0
    expected = f"job {oldest} (vae on four-points) is left out: its stored fit is gone; `harness compare` fits it anew"
    assert err.splitlines()[0] == f"harness: warning: {expected}"
    assert err.count("started") == 2
    words = [f"--{key}={value}" for key, value in ASKED.items()] + ["--out=store", "--evaluators=elbo"]
    words.remove("--evaluators=exact")
    assert "3 jobs: 2 done, 1 to fit, 0 to measure" in run("plan", *words)[1]
    assert run("compare", *words)[0] == 0
    assert all((store.state(oldest)[name] == state[name]).all() for name in state)
    exact = store.records().query("evaluator == 'exact'")
    assert list(exact["value"]) == list(before["value"])  # of the same fit, so that they still hold


def test_where_no_fit_is_left_evaluate_says_so(store: Store, run: Run) -> None:
    run("gc", "store", "--keep", "1", "--yes")
    code, out, err = run("evaluate", "store", "--evaluators", "elbo")
    assert (code, out) == (2, "")
    assert err.count("is left out: its stored fit is gone") == 3
    assert "no stored fit that can be measured" in err.splitlines()[-1]
    assert {row["evaluator"] for row in evaluate("store", "exact").to_dict("records")} == {"exact"}


@pytest.mark.parametrize("size", ["-1", "nan", "inf", "much", "0"])
def test_a_size_is_a_number(size: str, store: Store, run: Run) -> None:
    code, out, err = run("gc", "store", "--keep", size, "--yes")
    assert (code, out) == (2, "")
    assert err.startswith(f"harness: error: keep '{size}': expected a positive number of bytes, or as 500MB")

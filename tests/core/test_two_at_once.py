"""Two commands at once on one folder: nothing is lost, and tables are made of all that there is."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

import harness
from harness.files import Facts, T
from harness.merging import merge
from harness.record import TIMING_COLUMNS
from harness.store import Store

PLUGIN = """
import os, time
from dataclasses import dataclass
from pathlib import Path
from harness import hookimpl
from harness_plugins.vae import VAE

@dataclass(frozen=True, kw_only=True)
class Waiting(VAE):
    '''Ends when as many processes have begun with its seed as it waits for.'''
    name: str = "waiting"

    def fit(self, view, run):
        seed, notes = run.streams.seed, Path(os.environ["NOTES"])
        fitted = super().fit(view, run)
        (notes / f"{seed} {os.getpid()}").touch()
        end = time.monotonic() + 60
        while str(seed) in os.environ["SHARED"].split() and len(list(notes.glob(f"{seed} *"))) < 2:
            assert time.monotonic() < end, "nobody else has begun"
            time.sleep(0.01)
        return fitted

@hookimpl
def harness_methods():
    return [Waiting()]
"""
ASKED: dict[str, Any] = {"problems": "four-points", "budget": "steps=5", "methods": "waiting"}
HARNESS = [sys.executable, "-c", "import sys; from harness.cli import main; sys.exit(main())"]


@pytest.fixture(scope="module")
def plugin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("plugin") / "waiting.py"
    path.write_text(PLUGIN)
    return path


@pytest.fixture(scope="module")
def whole(plugin: Path, tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Seeds 0 to 3, measured by two evaluators, undisturbed."""
    store = Store(tmp_path_factory.mktemp("whole") / "store")
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("NOTES", str(tmp_path_factory.mktemp("notes")))
        patched.setenv("SHARED", "")
        harness.compare(**ASKED, seeds=4, evaluators="exact,elbo", plugins=[plugin], out=store.path)
    return store


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "out")


@pytest.fixture
def notes(tmp_path: Path) -> Path:
    (tmp_path / "notes").mkdir()
    return tmp_path / "notes"


def started(store: Store, plugin: Path, notes: Path, shared: str, seeds: str, evaluators: str) -> subprocess.Popen[str]:
    """A command that waits in the fits of shared seeds for another one."""
    words = [f"--{key}={value}" for key, value in ASKED.items()] + ["--plugin", str(plugin), "--out", str(store.path)]
    return subprocess.Popen(
        [*HARNESS, "compare", *words, "--seeds", seeds, "--evaluators", evaluators],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "NOTES": str(notes), "SHARED": shared},
    )  # fmt: skip


def ended_well(commands: Sequence[subprocess.Popen[str]]) -> list[str]:
    """What they have printed; none has warned of anything."""
    said = [command.communicate(timeout=120) for command in commands]
    assert [command.returncode for command in commands] == [0] * len(commands), said
    assert not any("warning" in error or "Traceback" in error for _, error in said), said
    return [out for out, _ in said]


def results(records: pd.DataFrame) -> pd.DataFrame:
    same = records.drop(columns=[*TIMING_COLUMNS, "run_id", "threads"]).convert_dtypes()
    return same.sort_values(["job_id", "evaluator", "metric"]).reset_index(drop=True)


def assert_same(store: Store, expected: pd.DataFrame) -> None:
    """The records, and the tables that are there without anybody deriving them anew."""
    assert store.is_derived()
    for found in (store.records(), pd.read_parquet(store.path / "records.parquet")):
        assert not found.duplicated(["job_id", "evaluator", "metric"]).any()
        pd.testing.assert_frame_equal(results(found), results(expected))
    assert len(pd.read_csv(store.path / "records.csv")) == len(expected)
    examples = pd.read_parquet(store.path / "examples.parquet")
    assert set(examples["job_id"]) == set(expected["job_id"])
    assert not list(store.path.glob("**/.*"))
    assert not (store.path / "quarantine").exists()


def test_two_comparisons_that_share_jobs(store: Store, whole: Store, plugin: Path, notes: Path) -> None:
    """Both fit seeds 1 and 2 at the same time, and measure them by different evaluators besides a common one."""
    shared = "1 2"
    ended_well([
        started(store, plugin, notes, shared, "0,1,2", "exact"),
        started(store, plugin, notes, shared, "1,2,3", "exact,elbo"),
    ])  # fmt: skip
    assert sorted(path.name.split()[0] for path in notes.iterdir()) == ["0", "1", "1", "2", "2", "3"]
    records = whole.records()
    assert_same(store, records[(records["evaluator"] == "exact") | (records["seed"] > 0)])


def test_the_same_comparison_twice(store: Store, whole: Store, plugin: Path, notes: Path) -> None:
    tables = ended_well([started(store, plugin, notes, "0 1", "0,1", "exact,elbo") for _ in range(2)])
    records = whole.records()
    assert_same(store, records[records["seed"] < 2])
    assert all("exact" in table and "2 seeds" in table for table in tables)


def test_a_comparison_beside_merges(store: Store, whole: Store, plugin: Path, notes: Path, tmp_path: Path) -> None:
    """A job comes by a merge into the folder just when it is fitted there; and others take from it all the time."""
    comparison = started(store, plugin, notes, "1", "0,1", "exact")
    end = time.monotonic() + 120
    while not list(notes.glob("1 *")):
        assert comparison.poll() is None
        assert time.monotonic() < end
        time.sleep(0.01)
    assert merge(store.path, [whole.path]).jobs == 3
    (notes / "1 of this test").touch()
    while comparison.poll() is None:
        merge(tmp_path / "copy", [store.path])
    ended_well([comparison])
    merge(tmp_path / "copy", [store.path])
    for each in (store, Store(tmp_path / "copy")):
        records = whole.records()
        assert_same(each, records)


# The moments that processes seldom hit


def copied(whole: Store, path: Path) -> Store:
    return Store(shutil.copytree(whole.path, path))


def test_what_is_stored_while_tables_are_made_comes_into_them(
    whole: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other process derives its tables first; then come those that were begun before."""
    merge(tmp_path / "out", [whole.path])
    store, other, derive = Store(tmp_path / "out"), Store(tmp_path / "out"), Store.records
    first, *_ = store.job_ids()
    facts, states = store.job(first) or {}, store.state(first)
    left = iter([True])

    def disturbed(self: Store) -> pd.DataFrame:
        records = derive(self)
        if self is store and next(left, False):
            other.write_fit("0" * 16, states, [], {}, {**facts, "job_id": "0" * 16})
            assert len(other.derive()) == len(records) + 1
        return records

    monkeypatch.setattr(Store, "records", disturbed)
    returned = store.derive()
    assert "0" * 16 in set(returned["job_id"])
    assert "0" * 16 in set(pd.read_csv(store.path / "records.csv")["job_id"])


def test_tables_of_a_process_that_is_killed_do_not_pass_for_newer_ones(whole: Store, tmp_path: Path) -> None:
    store = copied(whole, tmp_path / "out")
    store.derive()
    assert store.is_derived()
    before = {path: path.stat() for path in store.path.glob("records.*")}
    facts = store.job(store.job_ids()[0]) or {}

    class Slow(Store):
        def records(self, job_ids: Iterable[str] | None = None) -> pd.DataFrame:
            records = super().records(job_ids)
            store.write_job("0" * 16, {**facts, "job_id": "0" * 16, "status": "failed"})
            return records

    Slow(store.path)._derive()
    assert all(path.stat().st_ino != stat.st_ino for path, stat in before.items())
    assert not store.is_derived()


def test_measurements_of_who_was_faster_are_kept(whole: Store, tmp_path: Path) -> None:
    """It ends the same fit, and measures it, just before this process stores its own."""

    class Overtaken(Store):
        def job(self, job_id: str) -> Facts | None:
            found = super().job(job_id)
            if found is None:
                merge(self.path, [whole.path])
            return found

    job_id = whole.job_ids()[0]
    store = Overtaken(Store.create(tmp_path / "out").path)
    store.write_fit(job_id, whole.state(job_id), [], {}, whole.job(job_id) or {})
    assert Store(store.path).measured_by(job_id) == whole.measured_by(job_id)


def test_a_measurement_of_a_fit_that_was_replaced_meanwhile_is_not_kept(
    whole: Store, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """By another process, on a machine that gives other bits: what the job is now was never measured so."""
    store = copied(whole, tmp_path / "out")
    job_id = store.job_ids()[0]
    [name, *_] = store.measured_by(job_id)
    measured, values = store.measured(job_id, name), store.values(job_id, name)
    assert measured is not None
    assert measured["fit_sha256"] == (store.job(job_id) or {})["fit_sha256"]
    state = {key: array + 1 for key, array in store.state(job_id).items()}
    store.write_fit(job_id, state, [], {}, store.job(job_id) or {})
    assert store.measured_by(job_id) == []
    store.write_measured(job_id, name, measured, values or {})
    assert store.measured_by(job_id) == []
    assert "its fit was replaced while" in caplog.text
    store.write_measured(
        job_id, name, {**measured, "fit_sha256": (store.job(job_id) or {})["fit_sha256"]}, values or {}
    )
    assert store.measured_by(job_id) == [name]


def test_a_measurement_that_is_replaced_while_it_is_read_is_not_taken_for_damaged(whole: Store, tmp_path: Path) -> None:
    store = copied(whole, tmp_path / "out")
    job_id = store.job_ids()[0]
    evaluator = store.measured_by(job_id)[0]
    another, left = {**(store.measured(job_id, evaluator) or {}), "key": "another"}, iter([True])

    class Interrupted(Store):
        def read(self, name: str, parse: Callable[[bytes], T]) -> T | None:
            found = super().read(name, parse)
            if next(left, False):
                store.write_measured(job_id, evaluator, another, {"x": np.zeros(2)})
            return found

    assert (Interrupted(store.path).measured(job_id, evaluator) or {})["key"] == "another"
    assert not (store.path / "quarantine").exists()


def test_values_of_another_metric_than_was_said_are_of_who_measured_anew(whole: Store, tmp_path: Path) -> None:
    store = copied(whole, tmp_path / "out")
    job_id = store.job_ids()[0]
    evaluator = store.measured_by(job_id)[0]
    facts = store.measured(job_id, evaluator) or {}
    row = next(row for row in facts["rows"] if row["status"] == "ok")
    another = {**facts, "key": "another", "rows": [{**row, "metric": "other"}]}
    values = {f"other/{column}": np.arange(3.0) for column in ("index", "value", "stderr")}

    class Interrupted(Store):
        def read(self, name: str, parse: Callable[[bytes], T]) -> T | None:
            if name.endswith(f"{evaluator}.npz"):
                store.write_measured(job_id, evaluator, another, values)
            return super().read(name, parse)

    Interrupted(store.path).derive()
    examples = store.examples()
    assert "other" in set(examples.loc[examples["job_id"] == job_id, "metric"])
    assert not (store.path / "quarantine").exists()


def test_the_same_measurement_is_there_while_it_is_written_again(
    whole: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = copied(whole, tmp_path / "out")
    job_id = store.job_ids()[0]
    name = store.measured_by(job_id)[0]
    facts, values = store.measured(job_id, name), store.values(job_id, name)
    assert facts
    assert values
    seen, replace = list[Facts | None](), os.replace

    def watched(source: Any, target: Any) -> None:
        seen.append(store.measured(job_id, name))
        replace(source, target)

    monkeypatch.setattr(os, "replace", watched)
    store.write_measured(job_id, name, facts, values)
    assert seen == [facts, facts]


def test_a_folder_that_is_removed_while_a_file_is_written_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, opened, left = Store(tmp_path), Path.open, iter([True])

    def removed(self: Path, mode: str) -> Any:
        if next(left, False):
            store.remove_checkpoint("job")
        return opened(self, mode)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "open", removed)
        store.write_checkpoint("job", b"content")
    assert store.checkpoint_path("job").read_bytes() == b"content"

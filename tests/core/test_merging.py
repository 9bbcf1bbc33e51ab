"""Stores are merged: nothing is lost, nothing is taken twice, and what is whole stays so."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

import harness
from harness import files
from harness.cli import main
from harness.comparison import plan
from harness.merging import Merged, merge
from harness.options import UserError
from harness.record import TIMING_COLUMNS
from harness.store import Store

SMALL: dict[str, Any] = {"problems": "four-points", "budget": "steps=10", "evaluators": "exact"}


def results(records: pd.DataFrame) -> pd.DataFrame:
    same = records.drop(columns=[*TIMING_COLUMNS, "run_id"]).convert_dtypes()
    return same.sort_values(["job_id", "evaluator", "metric"]).reset_index(drop=True)


def contents(store: Store) -> dict[str, bytes]:
    """Every file that is not derived."""
    paths = [path for path in store.path.glob("*/**/*") if path.is_file()]
    return {str(path.relative_to(store.path)): path.read_bytes() for path in paths}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders with jobs of seed 0, of seeds 0 and 1 and a further evaluator, and all of it at once."""
    folder = tmp_path_factory.mktemp("made")
    harness.compare("vae", seeds=[0], out=folder / "a", **SMALL)
    shutil.copytree(folder / "a", folder / "b")
    harness.compare("vae", seeds=[0, 1], out=folder / "b", **{**SMALL, "evaluators": "exact,elbo"})
    harness.compare("vae", seeds=[0, 1], out=folder / "whole", **{**SMALL, "evaluators": "exact,elbo"})
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    """A copy of them."""
    shutil.copytree(made, tmp_path / "made")
    return tmp_path / "made"


def test_what_is_merged_is_what_one_run_would_have_made(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = contents(Store(folder / "b"))
    assert merge(folder / "a", [folder / "b"]) == Merged(jobs=1, fits=1, measurements=3, had=1)
    store = Store(folder / "a")
    whole = Store(folder / "whole")
    assert results(store.records()).equals(results(whole.records()))
    assert results(pd.read_parquet(store.path / "records.parquet")).equals(results(whole.records()))
    assert len(pd.read_parquet(store.path / "examples.parquet")) == len(whole.examples())
    assert contents(Store(folder / "b")) == before
    assert contents(store).keys() == contents(whole).keys()
    monkeypatch.setattr("harness.working.fit_jobs", lambda *a, **k: pytest.fail("a finished job was run again"))
    assert all(job.done for job in plan("vae", seeds=2, out=store.path, **{**SMALL, "evaluators": "exact,elbo"}))
    assert (
        harness.load(store.path, store.job_ids()[1]).state.keys()
        == harness.load(whole.path, whole.job_ids()[1]).state.keys()
    )


def test_merging_again_changes_nothing(folder: Path, made: Path) -> None:
    merge(folder / "new", [folder / "a", folder / "b"])
    before = contents(Store(folder / "new"))
    assert merge(folder / "new", [folder / "b", folder / "a"]) == Merged(had=3)
    assert contents(Store(folder / "new")) == before
    assert results(Store(folder / "new").records()).equals(results(Store(folder / "whole").records()))
    assert Store(folder / "new").environment() == Store(folder / "a").environment()
    assert merge(folder / "b", [folder / "a"]) == Merged(had=1)
    assert Store(folder / "b").environment() == Store(made / "b").environment()


def with_status(store: Store, job_id: str, status: str) -> None:
    store.write_job(job_id, {**(store.job(job_id) or {}), "status": status, "reason": "made up"})


def test_what_has_not_ended_well_gives_way_to_what_has(folder: Path) -> None:
    into, other = Store(folder / "a"), Store(folder / "b")
    [job_id] = into.job_ids()
    with_status(into, job_id, "failed")
    into.write_checkpoint(job_id, b"of the fit that failed")
    merge(into.path, [other.path])
    assert results(into.records()).equals(results(other.records()))
    assert not into.checkpoint_path(job_id).exists()  # what is done needs none
    with_status(other, job_id, "failed")
    merge(into.path, [other.path])
    assert set(into.records()["status"]) == {"ok"}
    assert merge(other.path, [into.path]).jobs == 1


def test_of_two_that_have_not_ended_well_the_one_that_is_there_stays(folder: Path) -> None:
    into, other = Store(folder / "a"), Store(folder / "b")
    [job_id] = into.job_ids()
    with_status(into, job_id, "failed")
    with_status(other, job_id, "diverged")
    merge(into.path, [other.path])
    assert (into.job(job_id) or {})["status"] == "failed"


@pytest.mark.parametrize("status", ["failed", "timeout", "killed"])
def test_a_fit_that_goes_on_does_not_give_way_to_one_that_failed(status: str, folder: Path) -> None:
    into, other = Store.create(folder / "new"), Store(folder / "a")
    [job_id] = other.job_ids()
    into.write_checkpoint(job_id, b"of a fit that was stopped")
    with_status(other, job_id, status)
    assert merge(into.path, [other.path]) == Merged(had=1)
    assert into.job_ids() == []
    assert into.checkpoint_path(job_id).read_bytes() == b"of a fit that was stopped"
    with_status(other, job_id, "ok")
    assert merge(into.path, [other.path]).jobs == 1
    assert not into.checkpoint_path(job_id).exists()


def test_what_a_job_says_of_its_failure_comes_along(folder: Path) -> None:
    other = Store(folder / "b")
    other.write_job("0123456789abcdef", {"job_id": "0123456789abcdef", "status": "failed"}, "Traceback")
    other.write_text("jobs/0123456789abcdef.output.txt", "last words")
    merge(folder / "a", [folder / "b"])
    assert (folder / "a" / "jobs" / "0123456789abcdef.output.txt").read_text() == "last words"
    assert (folder / "a" / "jobs" / "0123456789abcdef.traceback.txt").read_text() == "Traceback"


def test_what_both_have_stays_and_a_measurement_that_failed_gives_way(folder: Path) -> None:
    into, other = Store(folder / "a"), Store(folder / "b")
    [job_id] = into.job_ids()
    [evaluator] = into.measured_by(job_id)
    measured, values = other.measured(job_id, evaluator), other.values(job_id, evaluator)
    assert measured is not None
    assert values is not None
    rows = [{**row, "value": -1.0} for row in measured["rows"]]
    into.write_measured(job_id, evaluator, {**measured, "rows": rows}, values)
    merge(into.path, [other.path])
    found = into.records().query(f"job_id == '{job_id}' and evaluator == 'exact'")
    assert set(found["value"]) == {-1.0}
    failed = [{**row, "status": "failed"} for row in rows[:1]]
    into.write_measured(job_id, evaluator, {**measured, "rows": failed}, {})
    assert merge(into.path, [other.path]) == Merged(measurements=1, had=2)
    assert results(into.records()).equals(results(other.records()))


@pytest.mark.parametrize("known", ["fit_sha256", "started_at"])
def test_measurements_of_a_fit_with_other_bits_are_left_where_they_are(known: str, folder: Path) -> None:
    into, other = Store(folder / "a"), Store(folder / "b")
    [job_id] = into.job_ids()
    facts = into.job(job_id) or {}
    earlier = {key: value for key, value in facts.items() if key != "fit_sha256"}  # an earlier version has none
    into.write_job(job_id, {**(facts if known == "fit_sha256" else earlier), known: "another"})
    assert merge(into.path, [other.path]) == Merged(jobs=1, fits=1, measurements=2, had=1, of_other_fits=1)
    assert set(into.records().query(f"job_id == '{job_id}'")["evaluator"]) == {"exact"}


def test_a_fit_that_was_dropped_comes_back(folder: Path) -> None:
    into, other = Store(folder / "a"), Store(folder / "b")
    [job_id] = into.job_ids()
    shutil.rmtree(into.path / "fits" / job_id)
    assert merge(into.path, [other.path]).fits == 2
    states = [harness.load(store.path, job_id).state for store in (into, other)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[1])


def test_checkpoints_and_what_is_damaged_are_not_taken(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    other = Store(folder / "b")
    first, second = other.job_ids()
    other.write_checkpoint("0123456789abcdef", b"of a job that goes on")
    (other.path / "fits" / first / "state.safetensors").write_bytes(b"garbage")
    (other.path / "jobs" / f"{second}.json").write_bytes(b"garbage")
    assert merge(folder / "new", [other.path]) == Merged(jobs=1, measurements=2)
    assert caplog.text.count("is damaged") == 2
    new = Store(folder / "new")
    assert not (new.path / "checkpoints").exists()
    assert new.job_ids() == [first]
    assert not new.has_fit(first)


@pytest.mark.parametrize("writes", range(0, 16, 3))
def test_a_merge_that_is_interrupted_goes_on(writes: int, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left, write = [writes], files._write

    def interrupted(path: Path, content: bytes) -> None:
        left[0] -= 1
        if left[0] == -1:  # the derived tables are written all the same
            raise KeyboardInterrupt
        write(path, content)

    with monkeypatch.context() as patched:
        patched.setattr(files, "_write", interrupted)
        with pytest.raises(KeyboardInterrupt):
            merge(folder / "new", [folder / "a", folder / "b"])
    new = Store(folder / "new")
    for job_id in new.job_ids():  # whole, or not there
        assert new.has_whole_fit(job_id)
    merge(folder / "new", [folder / "a", folder / "b"])
    assert results(new.records()).equals(results(Store(folder / "whole").records()))


def test_the_same_folder_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    (folder / "link").symlink_to("a")
    for others in (["a"], ["./b/../a"], ["link"], ["b", "b"], ["b", str(folder / "b")]):
        with pytest.raises(UserError, match="is given twice; expected different folders"):
            merge("a", others)


def test_a_folder_of_something_else_is_refused(folder: Path) -> None:
    (folder / "prose").mkdir()
    (folder / "prose" / "night.txt").write_text("It was a dark and stormy night.")
    with pytest.raises(UserError, match="holds no results, but something else"):
        merge(folder / "prose", [folder / "a"])
    assert len(list((folder / "prose").iterdir())) == 1


def test_tables_without_their_jobs_are_never_written_over(folder: Path) -> None:
    """As they are in a repository, where fits would be too large."""
    shutil.rmtree(folder / "b" / "jobs")
    before = (folder / "b" / "records.csv").read_bytes()
    for into, other in (("b", "a"), ("a", "b")):
        with pytest.raises(UserError, match="has tables, but not the jobs that they were made of"):
            merge(folder / into, [folder / other])
    assert (folder / "b" / "records.csv").read_bytes() == before


def test_the_command_tells_what_it_took(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    assert main(["merge", "new", "a", "b"]) == 0
    said = capsys.readouterr()
    assert said.out == "new: took 2 jobs, 2 fits, 4 measurements; had 1 job already\nrecords: new/records.csv\n"
    assert said.err == ""
    assert main(["report", "new"]) == 0

"""Files of a store that are damaged: told of, put aside, computed again; and no command ends for it."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import harness
from harness.cli import main
from harness.comparison import evaluate, plan
from harness.files import Facts, Folder
from harness.options import UserError
from harness.record import TIMING_COLUMNS
from harness.store import Store

ASKED: dict[str, Any] = {
    "methods": "avb[noise_dim=4],vae", "problems": "four-points", "seeds": 1, "budget": "steps=30",
    "evaluators": "exact,reconstruction",
}  # fmt: skip
DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda good: b"",
    "garbage": lambda good: b"garbage" * 100,
    "half written": lambda good: good[: len(good) // 2],
}
FILES = [
    "store.json", "environment.json", "jobs/{}.json", "measurements/{}/exact-*.json", "measurements/{}/exact-*.npz",
    "fits/{}/state.safetensors", "fits/{}/curve.csv", "fits/{}/gallery.npz",
]  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """With everything done that is asked for."""
    store = Store(tmp_path_factory.mktemp("whole") / "store")
    harness.compare(**ASKED, out=store.path)
    return store


@pytest.fixture
def store(whole: Store, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> Store:
    """A copy of it."""
    shutil.copytree(whole.path, tmp_path / "store")
    caplog.clear()
    return Store(tmp_path / "store")


def vae(store: Store) -> str:
    """The id of the job that is damaged."""
    return next(job_id for job_id in store.job_ids() if (store.job(job_id) or {})["method"] == "vae")


def damaged(store: Store, pattern: str, damage: str = "garbage") -> Path:
    """Damage a file of the store; returns it."""
    [path] = store.path.glob(pattern.format(vae(store)))
    path.write_bytes(DAMAGES[damage](path.read_bytes()))
    return path


def flip(path: Path) -> None:
    """Change one bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def aside(store: Store, path: Path) -> Path:
    return store.path / "quarantine" / path.relative_to(store.path)


def results(records: pd.DataFrame) -> pd.DataFrame:
    same = records.drop(columns=TIMING_COLUMNS)
    return same.sort_values(["job_id", "evaluator", "metric"]).reset_index(drop=True)


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["jobs/{}.json", "measurements/{}/exact-*.json", "measurements/{}/exact-*.npz"])
def test_what_is_damaged_is_told_of_put_aside_and_computed_again(
    name: str, damage: str, store: Store, whole: Store, caplog: pytest.LogCaptureFixture
) -> None:
    path = damaged(store, name, damage)
    bad = path.read_bytes()
    assert results(harness.compare(**ASKED, out=store.path)).equals(results(whole.records()))
    assert store.examples().equals(whole.examples())
    assert caplog.text.count("is damaged") == 1
    json = path.with_suffix(".json")  # without its values per observation a measurement is none
    assert f"{json} is damaged" in caplog.text
    assert f"moved to {aside(store, path).parent}" in caplog.text
    assert aside(store, json).read_bytes() == (
        bad if path == json else (whole.path / json.relative_to(store.path)).read_bytes()
    )


def test_values_that_have_changed_are_found_when_they_are_read(
    store: Store, whole: Store, caplog: pytest.LogCaptureFixture
) -> None:
    """Not by the plan, which reads none of them; nor is the measurement shown without them."""
    [path] = store.path.glob(f"measurements/{vae(store)}/exact-*.npz")
    flip(path)
    assert all(job.done for job in plan(**ASKED, out=store.path))
    store.derive()
    assert len(store.records()) == len(whole.records()) - 2
    assert len(pd.read_csv(store.path / "records.csv")) == len(whole.records()) - 2
    assert results(harness.compare(**ASKED, out=store.path)).equals(results(whole.records()))


@pytest.mark.parametrize("damage", [*DAMAGES, "changed"])
def test_a_damaged_fit_is_made_again_where_it_is_needed(
    damage: str, store: Store, whole: Store, caplog: pytest.LogCaptureFixture
) -> None:
    [path] = store.path.glob(f"fits/{vae(store)}/state.safetensors")
    flip(path) if damage == "changed" else damaged(store, "fits/{}/state.safetensors", damage)
    with pytest.raises(UserError, match=rf"has no stored fit '{vae(store)}' \(it was damaged\); `harness compare`"):
        harness.load(store.path, vae(store))
    assert aside(store, path).is_file()
    assert f"{path} is damaged" in caplog.text
    assert [job.status for job in plan(**ASKED, out=store.path)] == ["ok", ""]
    records = harness.compare(**ASKED, out=store.path)
    assert results(records).equals(results(whole.records()))
    again, before = (harness.load(each.path, vae(store)).state for each in (store, whole))
    assert all(torch.equal(again[name], before[name]) for name in before)


def test_a_fit_that_is_damaged_is_left_out_where_nothing_is_trained(
    store: Store, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    job_id = vae(store)
    damaged(store, "fits/{}/state.safetensors")
    monkeypatch.setattr("harness.working.fit_jobs", lambda *a, **k: pytest.fail("trained"))
    assert set(evaluate(store.path, "elbo")["method"]) == {"avb"}
    assert "state.safetensors is damaged" in caplog.text
    caplog.clear()
    assert set(evaluate(store.path, "importance[samples=10]")["method"]) == {"avb"}
    assert f"job {job_id} (vae on four-points) is left out: its stored fit is gone; `harness compare`" in caplog.text
    assert set(evaluate(store.path, "exact")["method"]) == {"avb", "vae"}  # has measured it already


def test_measurements_of_a_fit_outlive_its_like_and_not_another(store: Store) -> None:
    """The bits of a fit decide: another machine may fit the same job to other digits."""
    job_id = vae(store)
    facts, state = store.job(job_id), store.state(job_id)
    assert facts is not None
    store.write_fit(job_id, state, [], {}, facts)
    assert store.job(job_id) == facts
    assert len(store.measured_by(job_id)) == 2
    store.write_fit(job_id, {name: array + 1e-7 for name, array in state.items()}, [], {}, facts)
    assert store.measured_by(job_id) == []


def test_a_fit_made_again_keeps_the_measurements_that_were_not_asked_for(store: Store) -> None:
    evaluate(store.path, "importance[samples=10]")
    damaged(store, "fits/{}/state.safetensors")
    harness.compare(**{**ASKED, "evaluators": "elbo"}, out=store.path)
    evaluators = set(store.records().groupby("evaluator")["job_id"].nunique().items())
    assert evaluators == {("exact", 2), ("reconstruction", 2), ("importance[samples=10]", 2), ("elbo", 2)}


def test_a_fit_that_is_another_one_when_made_again_is_measured_anew(store: Store, whole: Store) -> None:
    job_id = vae(store)
    store.write_job(job_id, {**(store.job(job_id) or {}), "fit_sha256": "that of another machine's"})
    damaged(store, "fits/{}/state.safetensors")
    [kept] = store.path.glob(f"measurements/{job_id}/exact-*.json")
    before = kept.stat().st_mtime_ns
    evaluate(store.path, "elbo")  # finds the damage
    again = harness.compare(**ASKED, out=store.path)
    pd.testing.assert_frame_equal(results(again), results(whole.records()), check_dtype=False)
    assert kept.stat().st_mtime_ns > before


@pytest.mark.parametrize("name", FILES)
def test_no_command_ends_for_a_damaged_file(
    name: str, whole: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    asked = [f"--{key}={value}" for key, value in ASKED.items()]
    told = ""
    for words in (
        ["plan", *asked, "--out"],
        ["report"],
        ["evaluate", "--evaluators=elbo"],
        ["compare", *asked, "--out"],
    ):
        shutil.copytree(whole.path, words[0])
        damaged(Store(words[0]), name)
        assert main([*words, words[0]]) == 0
        told += capsys.readouterr().err
    assert ("is damaged (" in told) == (name != "environment.json")  # which is not read here
    assert main([*words, words[0]]) == 0  # the last one again
    assert capsys.readouterr().err == ""


def test_a_store_that_cannot_be_written_to_is_read_all_the_same(
    store: Store, whole: Store, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = damaged(store, "measurements/{}/exact-*.json")
    (store.path / "quarantine").write_text("no folder")
    assert len(store.records()) == len(whole.records()) - 2
    assert len(store.records()) == len(whole.records()) - 2
    assert caplog.text.count("it counts as missing, but cannot be moved") == 1
    assert path.is_file()


def test_a_file_that_another_process_has_written_anew_is_not_put_aside(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    folder.write("file", b"bad")

    def parse(content: bytes) -> str:
        if content == b"bad":
            folder.write("file", b"good")
            raise ValueError
        return content.decode()

    assert folder.read("file", parse) == "good"
    assert not (tmp_path / "quarantine").exists()


def test_a_file_that_cannot_be_read_is_not_damaged(tmp_path: Path) -> None:
    (tmp_path / "file").mkdir()
    with pytest.raises(IsADirectoryError):
        Folder(tmp_path).read("file", bytes.decode)
    assert (tmp_path / "file").exists()


def test_values_are_read_from_the_table_as_long_as_it_is_whole_and_newer(
    store: Store, whole: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = whole.examples()
    store.derive()
    with monkeypatch.context() as patched:
        patched.setattr(Store, "_examples", lambda self: pytest.fail("ten thousand files were read"))
        pd.testing.assert_frame_equal(store.examples(), expected)
    damaged(store, "examples.parquet")
    pd.testing.assert_frame_equal(store.examples(), expected)
    store.derive()
    [path] = store.path.glob(f"measurements/{vae(store)}/exact-*.json")
    path.unlink()
    assert len(store.examples()) < len(expected)


def rewritten(store: Store, change: Callable[[dict[str, np.ndarray], Facts], object]) -> tuple[str, str]:
    """Store the exact values of a job again, changed, as an earlier version may have stored what it was given."""
    job_id = vae(store)
    [evaluator] = [name for name in store.measured_by(job_id) if name.startswith("exact")]
    arrays, facts = store.values(job_id, evaluator), store.measured(job_id, evaluator)
    assert arrays is not None
    assert facts is not None
    change(arrays, facts)
    store.write_measured(job_id, evaluator, facts, arrays)
    return job_id, evaluator


def without_metric(arrays: dict[str, np.ndarray], facts: Facts) -> None:
    for found in facts["rows"]:
        del found["metric"]


COLUMNS = ("index", "value", "stderr")
UNFIT: dict[str, tuple[Callable[[dict[str, np.ndarray], Facts], object], str]] = {
    "a matrix": (
        lambda arrays, _: arrays.update({"log_likelihood/value": np.zeros((2, 4))}),
        r"log_likelihood: index, value, stderr are no numbers of one shape \(N,\), but int64\(4,\), float64\(2, 4\)",
    ),
    "a scalar": (
        lambda arrays, _: arrays.update({f"log_likelihood/{column}": np.zeros(()) for column in COLUMNS}),
        r"log_likelihood: index, value, stderr are no numbers of one shape",
    ),
    "too few indices": (
        lambda arrays, _: arrays.update({"kl_to_posterior/index": np.arange(3)}),
        r"kl_to_posterior: index, value, stderr are no numbers of one shape \(N,\), but int64\(3,\), float64\(4,\)",
    ),
    "text": (
        lambda arrays, _: arrays.update({"log_likelihood/value": np.array(["a"] * 4)}),
        r"log_likelihood: index, value, stderr are no numbers of one shape \(N,\), but int64\(4,\), <U1\(4,\)",
    ),
    "no values": (
        lambda arrays, _: arrays.pop("log_likelihood/value"),
        "log_likelihood/value is not a file in the arc",
    ),
    "no metric": (without_metric, "a row lacks metric"),
}


@pytest.mark.parametrize("how", UNFIT)
def test_values_that_no_table_can_hold_are_put_aside_and_measured_again(
    how: str, store: Store, whole: Store, caplog: pytest.LogCaptureFixture
) -> None:
    change, told = UNFIT[how]
    job_id, evaluator = rewritten(store, change)
    assert len(Store(store.path).examples()) == len(whole.examples()) - 2 * 4
    assert re.search(rf"{evaluator}\.(npz|json) is damaged \(.*{told}", caplog.text)
    assert aside(store, store.path / f"measurements/{job_id}/{evaluator}.json").is_file()
    assert len(store.derive()) == len(whole.records()) - 2
    assert results(harness.compare(**ASKED, out=store.path)).equals(results(whole.records()))
    assert store.examples().equals(whole.examples())

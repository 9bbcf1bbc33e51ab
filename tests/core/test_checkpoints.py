"""Checkpoints of jobs: records of fits in several runs, damaged files, full disks, runs whose time is up."""

from __future__ import annotations

import math
import re
import resource
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

import harness
from harness import checkpoint as checkpoint_module
from harness import environment
from harness.comparison import plan
from harness.options import UserError
from harness.record import TIMING_COLUMNS
from harness.stopping import Stopped
from harness.store import Store
from harness.training import Modules, Noise
from harness_plugins.vae import VAE

ONE: dict[str, Any] = {"problems": "four-points", "seeds": 1, "budget": "steps=30", "evaluators": "exact"}


AVB = "avb[noise_dim=4]"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """With a fit that was never interrupted."""
    store = Store(tmp_path_factory.mktemp("whole"))
    harness.compare(AVB, out=store.path, **ONE)
    return store


def stopped(out: Path, method: Any = AVB) -> Path:
    """Fit for one step; returns the checkpoint."""
    with pytest.raises(Stopped, match="stopped after 1e-09 seconds"):
        harness.compare(method, out=out, stop_after=1e-9, **ONE)
    [path] = (out / "checkpoints").glob("*/*")
    return path


def results(records: Any) -> Any:
    return records.drop(columns=TIMING_COLUMNS)


def test_a_fit_in_memory_keeps_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(checkpoint_module, "EVERY", 0.0)
    harness.fit("vae", "four-points", budget="steps=5")
    assert not list(tmp_path.iterdir())


def test_a_job_in_two_runs_has_the_records_of_one(tmp_path: Path, whole: Store) -> None:
    checkpoint = stopped(tmp_path)
    [planned] = plan(AVB, out=tmp_path, **ONE)
    assert (planned.status, planned.step, planned.fraction) == ("", 1, 1 / 30)
    parts = harness.compare(AVB, out=tmp_path, **ONE)
    assert results(parts).equals(results(whole.records()))
    assert set(whole.records()["fit_parts"]) == {1}
    assert set(parts["fit_parts"]) == {2}
    assert parts["timing_valid"].all()
    assert not checkpoint.parent.exists()  # what is done needs none
    curves = [store.curve(planned.job_id).drop(columns="seconds") for store in (whole, Store(tmp_path))]
    assert curves[0].equals(curves[1])


def test_parts_on_other_hardware_make_times_invalid(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    stopped(tmp_path)
    described = environment.describe
    monkeypatch.setattr(environment, "describe", lambda device: {**described(device), "hardware": "another processor"})
    records = harness.compare(AVB, out=tmp_path, **ONE)
    assert not records["timing_valid"].any()
    assert set(records["hardware"]) == {"another processor"}
    assert "other hardware" in caplog.text


@pytest.mark.parametrize("damage", ["empty", "garbage", "truncated", "changed", "other schema"])
def test_a_checkpoint_that_is_damaged_is_told_of_and_the_fit_starts_anew(
    damage: str, tmp_path: Path, whole: Store, caplog: pytest.LogCaptureFixture
) -> None:
    path = stopped(tmp_path)
    good = path.read_bytes()
    bad = {
        "empty": b"",
        "garbage": b"garbage" * 100,
        "truncated": good[: len(good) // 2],
        "changed": good[:-5] + bytes([good[-5] ^ 1]) + good[-4:],
        "other schema": good.replace(rb"\"schema\": 1", rb"\"schema\": 7"),
    }
    assert bad[damage] != good
    path.write_bytes(bad[damage])
    records = harness.compare(AVB, out=tmp_path, **ONE)
    assert "state.safetensors is damaged" in caplog.text
    assert (tmp_path / "quarantine" / path.relative_to(tmp_path)).read_bytes() == bad[damage]
    assert "the fit starts anew" in caplog.text
    assert ("schema 7" in caplog.text) == (damage == "other schema")
    assert set(records["fit_parts"]) == {1}
    assert results(records).equals(results(whole.records()))


def test_a_machine_that_cannot_read_a_checkpoint_now_does_not_lose_it(
    tmp_path: Path, whole: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = stopped(tmp_path)
    kept = path.read_bytes()

    def stale(*_: Any, **__: Any) -> None:
        raise OSError(116, "Stale file handle", str(path))

    with monkeypatch.context() as broken:
        broken.setattr(checkpoint_module, "safe_open", stale)
        records = harness.compare(AVB, out=tmp_path, **ONE)
    assert set(records["status"]) == {"failed"}
    assert "Stale file handle" in records["reason"][0]
    assert path.read_bytes() == kept
    records = harness.compare(AVB, out=tmp_path, retry="failed", **ONE)
    assert set(records["fit_parts"]) == {2}
    assert results(records).drop(columns="fit_parts", errors="ignore").equals(results(whole.records()))


def test_a_folder_that_cannot_be_written_to_loses_no_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It is told of once, and does not even end a fit whose time is up, since that could not be taken up again."""
    (tmp_path / "checkpoints").write_text("no folder")
    tried, write = [], Store.write_checkpoint
    monkeypatch.setattr(Store, "write_checkpoint", lambda *arguments: (tried.append(1), write(*arguments)))
    with pytest.raises(Stopped):  # when the fit is stored, and before it is measured
        harness.compare("vae", out=tmp_path, stop_after=1e-9, **ONE)
    assert caplog.text.count("the fit goes on, but for now it cannot be taken up again") == 1
    assert len(tried) == 1  # the next is due in a minute, not at the next step
    assert [(job.status, job.missing) for job in plan("vae", out=tmp_path, **ONE)] == [("ok", ("exact",))]
    assert set(harness.compare("vae", out=tmp_path, **ONE)["fit_steps"]) == {30}


@contextmanager
def disk_with_room_for(size: int) -> Iterator[None]:
    """Larger files cannot be written; the error is the system's own."""
    usual = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, usual[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, usual)


def test_a_disk_too_full_for_a_checkpoint_loses_no_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    size = stopped(tmp_path).stat().st_size
    monkeypatch.setattr(checkpoint_module, "EVERY", 0.0)
    with disk_with_room_for(size // 2):
        records = harness.compare(AVB, out=tmp_path, **ONE)
    assert re.search(r"state\.safetensors: File too large; the fit goes on", caplog.text)
    assert set(records["status"]) == {"ok"}
    assert set(records["fit_parts"]) == {2}  # the checkpoint that was there before is as it was
    assert not list(tmp_path.glob("**/.*"))  # nor is half a file left


def test_a_fit_that_could_not_be_stored_is_tried_again_from_its_checkpoint(tmp_path: Path) -> None:
    path = stopped(tmp_path)
    with disk_with_room_for(path.stat().st_size // 6):
        records = harness.compare(AVB, out=tmp_path, **ONE)
    assert list(records["status"]) == ["failed"]
    assert re.search(r"File too large: .*fits.*state\.safetensors", records["reason"][0])
    [planned] = plan(AVB, out=tmp_path, retry=["failed"], **ONE)
    assert planned.step == 1
    again = harness.compare(AVB, out=tmp_path, retry=["failed"], **ONE)
    assert set(again["fit_parts"]) == {2}
    assert not path.exists()


@dataclass(frozen=True, kw_only=True)
class Faulty(VAE):
    """Ends in some way from the second step on."""

    name: str = "faulty"
    fault: str = ""

    def losses(self, modules: Modules, x: Tensor, noise: Noise) -> dict[str, Tensor]:
        losses = super().losses(modules, x, noise)
        bias = modules["encoder"].head.bias  # zero before the first step
        return {name: self.ended(loss) if bool(bias.any()) else loss for name, loss in losses.items()}

    def ended(self, loss: Tensor) -> Tensor:
        if self.fault == "raises":
            raise RuntimeError("out of ideas")
        return loss * math.nan


@pytest.mark.parametrize(("fault", "status", "kept"), [("raises", "failed", True), ("nan", "diverged", False)])
def test_what_failed_keeps_its_checkpoint_and_what_diverged_does_not(
    fault: str, status: str, kept: bool, tmp_path: Path
) -> None:
    path = stopped(tmp_path, [Faulty(fault=fault)])
    records = harness.compare([Faulty(fault=fault)], out=tmp_path, **ONE)
    assert list(records["status"]) == [status]
    assert path.exists() == kept


def test_every_run_gets_something_done_however_short_its_time(tmp_path: Path) -> None:
    """A step of a fit, or a measurement; and the records are those of one run."""
    arguments = {**ONE, "seeds": 2, "budget": "steps=3", "evaluators": "exact,reconstruction"}
    whole = harness.compare("vae", out=tmp_path / "whole", **arguments)
    parts, runs = None, 0
    while parts is None:
        runs += 1
        assert runs <= 2 * (3 + 2)
        with suppress(Stopped):
            parts = harness.compare("vae", out=tmp_path / "parts", stop_after=1e-9, **arguments)
    assert results(parts).equals(results(whole))


@pytest.mark.parametrize("seconds", [0, -1.0, math.nan, math.inf, "soon", ""])
def test_the_time_of_a_run_is_positive(seconds: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="expected a positive number of seconds"):
        harness.compare("vae", out=tmp_path / "out", stop_after=seconds, **ONE)
    with pytest.raises(UserError, match="expected a positive number of seconds"):
        plan("vae", out=tmp_path / "out", stop_after=seconds, **ONE)
    assert not (tmp_path / "out").exists()

"""Disks without room: nothing is lost, it is said clearly, and with room again all goes on as if nothing had been.

A small tmpfs where one can be mounted, and a pretended disk everywhere: its files cannot be synchronised beyond a size.
"""

from __future__ import annotations

import errno
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

import harness
from harness import checkpoint as checkpoint_module
from harness import running
from harness.checkpoint import reached
from harness.cli import main
from harness.files import DiskFull
from harness.merging import merge
from harness.pruning import YOUNG
from harness.record import TIMING_COLUMNS
from harness.stopping import Stopped
from harness.store import Store

ASKED: dict[str, Any] = {
    "methods": "vae", "problems": "four-points", "seeds": 2, "budget": "steps=5", "evaluators": "exact",
}  # fmt: skip
WORDS = [f"--{key}={value}" for key, value in ASKED.items()]
NO_ROOM = "No space left on device; what is done is kept, and the same command goes on when there is room"
PLENTY = 2**24
PAGE = 4096
Run = Callable[..., tuple[int, str, str]]


@dataclass(frozen=True)
class Disk:
    """A folder on a disk of its own.

    Args:
        resize: Called with a number of bytes.
    """

    path: Path
    resize: Callable[[int], None]

    def used(self) -> int:
        """Whole pages, as a tmpfs counts them."""
        sizes = [path.stat().st_size for path in self.path.glob("**/*") if path.is_file()]
        return sum(-(-size // PAGE) * PAGE for size in sizes)

    def fill(self) -> None:
        """Leave no room at all."""
        with suppress(OSError), (self.path / "ballast").open("wb", buffering=0) as file:
            while True:
                file.write(bytes(64 * PAGE))
                os.fsync(file.fileno())


@pytest.fixture(params=["tmpfs", "pretended"])
def disk(request: pytest.FixtureRequest, tmpfs: Callable[[], Path]) -> Iterator[Disk]:
    if request.param == "tmpfs":
        folder = tmpfs()
        yield Disk(folder, lambda size: mounted(folder, f"size={size}"))
        return
    folder, size = request.getfixturevalue("tmp_path") / "disk", [PLENTY]
    folder.mkdir()
    pretended, usual = Disk(folder, lambda wanted: size.__setitem__(0, wanted)), os.fsync

    def synchronised(descriptor: int) -> None:
        if pretended.used() > size[0]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        usual(descriptor)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(os, "fsync", synchronised)
        yield pretended


def mounted(folder: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", str(folder)], check=True)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """With everything done that is asked for."""
    store = Store(tmp_path_factory.mktemp("whole") / "store")
    harness.compare(**ASKED, out=store.path)
    return store


def results(records: pd.DataFrame) -> pd.DataFrame:
    same = records.drop(columns=[*TIMING_COLUMNS, "run_id", "threads", "timing_valid"]).convert_dtypes()
    return same.sort_values(["job_id", "evaluator", "metric"]).reset_index(drop=True)


def assert_same(store: Store, whole: Store) -> None:
    pd.testing.assert_frame_equal(results(store.records()), results(whole.records()))
    pd.testing.assert_frame_equal(results(pd.read_parquet(store.path / "records.parquet")), results(whole.records()))
    assert store.is_derived()


def assert_whole(store: Store) -> None:
    """Every fit of a job that is ok can be read, and no write has left half a file."""
    for job_id in store.job_ids():
        assert (store.job(job_id) or {})["status"] == "ok"
        assert store.has_whole_fit(job_id)
        assert len(store.curve(job_id))
        store.gallery(job_id)
    assert len(store.records()) >= len(store.job_ids())
    assert not list(store.path.glob("**/.*"))
    assert not (store.path / "quarantine").exists()


def contents(store: Store) -> dict[str, bytes]:
    """Of every job, fit and measurement."""
    paths = [path for name in ("jobs", "fits", "measurements") for path in store.path.glob(f"{name}/**/*")]
    return {str(path): path.read_bytes() for path in paths if path.is_file()}


def told(error: str) -> str:
    """The only line that is no progress."""
    [line] = [line for line in error.splitlines() if not line.startswith("[")]
    return line


def test_however_little_room_there_is_a_comparison_loses_nothing(disk: Disk, whole: Store, run: Run) -> None:
    """A bit more room each time; what has been stored is never computed again."""
    store, done, ends, room = Store(disk.path / "out"), dict[str, bytes](), set[str](), PAGE
    disk.resize(room)
    while (found := run("compare", *WORDS, "--out", str(store.path)))[0] != 0:
        code, _, error = found
        match = re.fullmatch(rf"harness: error: .*{store.path}/?(.*): {NO_ROOM}", told(error))
        assert code == 2
        assert match, error
        ends.add(match[1].partition("/")[0])
        assert_whole(store)
        assert contents(store).items() >= done.items()
        done, room = contents(store), room + 3 * PAGE
        disk.resize(room)
    assert {"environment.json", "fits"} <= ends
    assert done
    assert contents(store).items() >= done.items()
    assert_same(store, whole)


def test_with_workers_it_is_the_same(tmpfs: Callable[[], Path], whole: Store, run: Run) -> None:
    folder = tmpfs()
    store, words = Store(folder / "out"), ["compare", *WORDS, "--jobs=2", "--out", str(folder / "out")]
    mounted(folder, f"size={3 * sum(path.stat().st_size for path in whole.path.glob('fits/**/*')) // 4}")
    code, _, error = run(*words)
    assert code == 2
    assert re.fullmatch(rf"harness: error: {store.path}/.*: {NO_ROOM}", told(error))
    assert_whole(store)
    done = contents(store)
    mounted(folder, f"size={PLENTY}")
    assert run(*words)[0] == 0
    assert contents(store).items() >= done.items()
    assert_same(store, whole)


def test_a_fit_that_finds_no_room_goes_on_from_its_checkpoint(disk: Disk, whole: Store) -> None:
    store = Store(disk.path / "out")
    with pytest.raises(Stopped):
        harness.compare(**ASKED, out=store.path, stop_after=1e-9)
    [job_id] = [path.name for path in store.path.glob("checkpoints/*")]
    disk.resize(disk.used() + 16384)
    with pytest.raises(DiskFull, match="fits"):
        harness.compare(**ASKED, out=store.path)
    begun = reached(store, job_id)
    assert begun
    assert begun.step == 1
    disk.resize(PLENTY)
    records = harness.compare(**ASKED, out=store.path)
    assert set(records.loc[records["job_id"] == job_id, "fit_parts"]) == {2}
    assert_same(store, whole)


def test_a_checkpoint_that_finds_no_room_does_not_end_its_fit(
    disk: Disk, whole: Store, monkeypatch: pytest.MonkeyPatch, run: Run
) -> None:
    """A checkpoint is larger than a fit, for which there is room."""
    monkeypatch.setattr(checkpoint_module, "EVERY", 0.0)
    store, write = Store(disk.path / "out"), Store.write_checkpoint

    def without_room(self: Store, job_id: str, content: bytes) -> None:
        disk.fill()
        try:
            write(self, job_id, content)
        finally:
            (disk.path / "ballast").unlink()

    monkeypatch.setattr(Store, "write_checkpoint", without_room)
    code, _, error = run("compare", *WORDS, "--out", str(store.path))
    assert code == 0
    [*warnings] = [line for line in error.splitlines() if "warning" in line]
    assert len(warnings) == 2  # one for each fit
    assert all(
        re.search(r"No space left on device; the fit goes on, but for now it cannot be", line) for line in warnings
    )
    assert_whole(store)
    assert_same(store, whole)


def test_who_interrupts_on_a_full_disk_is_told_that_it_was_interrupted(
    disk: Disk, whole: Store, monkeypatch: pytest.MonkeyPatch, run: Run
) -> None:
    def interrupted(*_: Any) -> None:
        disk.fill()
        raise KeyboardInterrupt

    merge(disk.path / "out", [whole.path])
    monkeypatch.setattr(running, "_fitted", interrupted)
    code, _, error = run("compare", *WORDS[:2], "--seeds=3", *WORDS[3:], "--out", str(disk.path / "out"))
    assert (code, told(error)) == (
        130, "harness: interrupted; finished jobs are kept, and the same command goes on from there"
    )  # fmt: skip
    assert_whole(Store(disk.path / "out"))


def test_what_is_made_anew_is_kept_until_there_is_room(disk: Disk, whole: Store) -> None:
    """Another fit drops the measurements of the one before, another measurement that before: once they are stored."""
    store = Store(disk.path / "out")
    merge(store.path, [whole.path])
    before, job_id = contents(store), store.job_ids()[0]
    facts, [name] = store.job(job_id) or {}, store.measured_by(job_id)
    other = {key: array + 1e-7 for key, array in store.state(job_id).items()}
    large = {"x": np.random.default_rng(0).normal(size=2**14)}
    disk.resize(disk.used() + 4096)
    with pytest.raises(DiskFull):
        store.write_fit(job_id, other, [], {}, facts)
    with pytest.raises(DiskFull):
        store.write_measured(job_id, name, store.measured(job_id, name) or {}, large)
    assert contents(store) == before
    assert_whole(store)


def test_a_report_is_printed_and_the_one_before_left_as_it_was(disk: Disk, whole: Store, run: Run) -> None:
    out = disk.path / "out"
    merge(out, [whole.path])
    assert run("report", str(out))[0] == 0
    before = {path: b"smaller" for path in out.glob("report/**/*") if path.is_file()}
    assert len(before) > 2
    for path, content in before.items():
        path.write_bytes(content)
    disk.fill()
    code, printed, error = run("report", str(out))
    assert code == 2
    assert "four-points" in printed
    assert re.fullmatch(rf"harness: error: {out}/report/.*: {NO_ROOM}", told(error))
    assert {path: path.read_bytes() for path in out.glob("report/**/*") if path.is_file()} == before


def test_a_merge_goes_on_when_there_is_room(disk: Disk, whole: Store, tmp_path: Path, run: Run) -> None:
    part, out, room = tmp_path / "part", Store(disk.path / "out"), 65536
    harness.compare(**{**ASKED, "seeds": 1}, out=part)
    words, codes = ["merge", str(out.path), str(part), str(whole.path)], list[int]()
    disk.resize(room)
    while 0 not in codes:
        code, _, error = run(*words)
        codes.append(code)
        assert code == 0 or re.fullmatch(rf"harness: error: {out.path}/.*: {NO_ROOM}", told(error))
        assert_whole(out)
        room += 32768
        disk.resize(room)
    assert codes[:2] == [2, 2]
    assert_same(out, whole)


def test_surplus_is_dropped_without_any_room(disk: Disk, whole: Store, run: Run) -> None:
    store = Store(disk.path / "out")
    merge(store.path, [whole.path])
    half = store.path / "jobs" / ".0123456789abcdef.json.abcd1234"
    half.write_bytes(b"x" * 10_000)
    os.utime(half, (then := time.time() - YOUNG - 60, then))
    disk.fill()
    code, out, error = run("gc", str(store.path), "--keep=1", "--yes")
    assert (code, error) == (0, "")
    assert "dropped: " in out
    assert not half.exists()
    assert not list(store.path.glob("fits/*/state.safetensors"))
    assert run("plan", *WORDS, "--out", str(store.path))[0] == 0
    assert run("why", str(store.path), store.job_ids()[0])[0] == 0


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_log_that_finds_no_room_does_not_decide_how_a_job_ends(
    tmp_path: Path, whole: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("harness.cli.progress.PLAIN_SECONDS", 0.0)
    full = open("/dev/full", "w", buffering=1)  # noqa: SIM115
    monkeypatch.setattr(sys, "stderr", full)
    assert main(["compare", *WORDS, "--out", str(tmp_path)]) == 0
    monkeypatch.undo()
    with pytest.raises(OSError):
        full.close()
    assert_same(Store(tmp_path), whole)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_what_is_printed_without_room_is_told_in_one_line() -> None:
    script = "import sys; from harness.cli import main; sys.exit(main(['--version']))"
    with open("/dev/full", "w") as full:
        ended = subprocess.run([sys.executable, "-c", script], stdout=full, stderr=subprocess.PIPE, text=True)
    assert (ended.returncode, ended.stderr) == (2, f"harness: error: what is printed: {NO_ROOM}\n")


def test_what_a_method_says_of_its_own_full_disk_is_its_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the folder of results ends a run."""

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/scratch")

    monkeypatch.setattr(running, "_fitted", full)
    assert set(harness.compare(**ASKED, out=tmp_path)["status"]) == {"failed"}

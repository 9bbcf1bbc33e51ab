"""The data folder: what is not whole and verified is never used, whatever goes wrong while it is fetched."""

from __future__ import annotations

import errno
import gzip
import hashlib
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import platformdirs
import pytest

from harness.cache import CachedFile, FileSet, Mirror, data_folder
from harness.formats import IdxFile
from harness.problem import DataError

VALUES = {"a": np.arange(24, dtype=np.uint8).reshape(2, 3, 4), "b": np.arange(7, dtype=np.uint8)}


def idx_file(name: str) -> tuple[IdxFile, bytes]:
    values = VALUES[name]
    content = IdxFile(name, values.shape, "").encode(values)
    return IdxFile(name, values.shape, hashlib.sha256(content).hexdigest()), content


FILES, CONTENTS = zip(*(idx_file(name) for name in VALUES), strict=True)


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FileSet:
    monkeypatch.setenv("HARNESS_DATA", str(tmp_path / "data"))
    return FileSet("toy", "toy-folder", FILES)


@dataclass
class Given:
    """A source that hands out given contents and counts how often it is asked."""

    contents: Sequence[bytes]
    asked: int = 0
    label: str = "given"

    def read(self, files: Sequence[CachedFile]) -> Iterator[tuple[CachedFile, bytes]]:
        self.asked += 1
        by_name = dict(zip(VALUES, self.contents, strict=True))
        for file in files:
            yield file, by_name[file.name]


def assert_whole(files: FileSet) -> None:
    for found, expected in zip(files.load(), VALUES.values(), strict=True):
        np.testing.assert_array_equal(found, expected)
        assert found.flags.writeable  # torch.from_numpy warns otherwise


def test_fetch_then_load_gives_the_arrays_and_asks_no_source_again(files: FileSet) -> None:
    assert "not fetched; run: harness data fetch toy" in files.location
    source = Given(CONTENTS)
    files.fetch([source])
    assert_whole(files)
    assert files.location == str(files.path)
    files.fetch([source])
    assert source.asked == 1


def test_only_what_is_missing_or_damaged_is_replaced(files: FileSet) -> None:
    files.fetch([Given(CONTENTS)])
    (files.path / "a").write_bytes(b"damaged")
    untouched = (files.path / "b").stat().st_mtime_ns
    assert "not the" in error_of(files) or "truncated" in error_of(files)
    files.fetch([Given(CONTENTS)])
    assert_whole(files)
    assert (files.path / "b").stat().st_mtime_ns == untouched


def error_of(files: FileSet) -> str:
    with pytest.raises(DataError) as caught:
        files.load()
    return str(caught.value)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        pytest.param(lambda content: content[:-1], "truncated (39 of 40 bytes)", id="truncated"),
        pytest.param(lambda content: b"", "truncated (0 of 40 bytes)", id="empty"),
        pytest.param(lambda content: content[:-1] + b"\x00", "not the expected content", id="tampered"),
        pytest.param(lambda content: content + b"x", "larger than", id="longer"),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_a_damaged_file_is_refused_with_the_remedy(files: FileSet, damage, reason: str, packed: bool) -> None:
    files.fetch([Given(CONTENTS)])
    plain = files.path / "a"
    content = damage(plain.read_bytes())
    if packed:
        plain.unlink()
        (files.path / "a.gz").write_bytes(gzip.compress(content))
    else:
        plain.write_bytes(content)
    message = error_of(files)
    assert reason in message
    assert message.endswith("run: harness data fetch toy")
    assert "\n" not in message
    files.fetch([Given(CONTENTS)])
    assert_whole(files)


def test_a_copy_that_the_user_put_there_gzipped_is_used_and_a_truncated_one_refused(files: FileSet) -> None:
    files.path.mkdir(parents=True)
    for name, content in zip(VALUES, CONTENTS, strict=True):
        (files.path / f"{name}.gz").write_bytes(gzip.compress(content))
    assert_whole(files)
    packed = files.path / "a.gz"
    packed.write_bytes(packed.read_bytes()[:-9])
    assert "truncated" in error_of(files)


def test_missing_file_is_named(files: FileSet) -> None:
    files.fetch([Given(CONTENTS)])
    (files.path / "b").unlink()
    assert "toy: b is not in" in error_of(files)
    assert "incomplete, without b" in files.location


def test_a_failing_source_is_followed_by_the_next_and_every_reason_is_told(
    files: FileSet, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def mirror(name: str, change) -> Mirror:
        folder = tmp_path / name
        folder.mkdir()
        for file, content in zip(VALUES, CONTENTS, strict=True):
            (folder / f"{file}.gz").write_bytes(change(gzip.compress(content)))
        return Mirror(f"{folder.as_uri()}/", ".gz")

    dead = Mirror(f"{(tmp_path / 'nowhere').as_uri()}/", ".gz")
    page = mirror("page", lambda _: b"<html>Please sign in</html>")
    cut = mirror("cut", lambda content: content[:-4])
    endless = mirror("endless", lambda _: os.urandom(5000))
    bomb = mirror("bomb", lambda _: gzip.compress(bytes(1 << 19)))
    liars = [dead, page, cut, endless, bomb, Given([b"x" * 40, b"y" * 15])]
    with pytest.raises(DataError) as caught:
        files.fetch(liars)
    message = str(caught.value)
    for reason in (
        "No such file",
        "truncated or not gzip",
        "more than 1,064 bytes",
        "larger than a can be",
        "not the expected content",
    ):
        assert reason in message
    assert str(files.path) in message
    assert not list(files.path.iterdir())  # nothing that was not verified is kept

    files.fetch([*liars, mirror("good", lambda content: content)])
    assert_whole(files)
    assert capsys.readouterr().err.count("failed") == 2 * len(liars)


def test_a_mirror_that_takes_too_long_is_given_up(
    files: FileSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("harness.download._DOWNLOAD_SECONDS", -1)
    (tmp_path / "a").write_bytes(CONTENTS[0])
    with pytest.raises(DataError, match="not done after"):
        files.fetch([Mirror(f"{tmp_path.as_uri()}/")])


def test_what_killed_fetches_left_behind_is_cleared_after_a_day(files: FileSet) -> None:
    files.path.mkdir(parents=True)
    old, recent = (files.path / f".a.{n}.part" for n in (1, 2))
    for path in (old, recent):
        path.touch()
    os.utime(old, (0, 0))
    files.fetch([Given(CONTENTS)])
    assert recent.exists()  # it may be another fetch at work
    assert not old.exists()


def test_a_crash_while_writing_leaves_the_old_file(files: FileSet, monkeypatch: pytest.MonkeyPatch) -> None:
    files.fetch([Given(CONTENTS)])
    (files.path / "a").write_bytes(b"old")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DataError, match=r"cannot write to .*No space left"):
        files.fetch([Given(CONTENTS)])
    assert (files.path / "a").read_bytes() == b"old"
    assert sorted(path.name for path in files.path.iterdir()) == ["a", "b"]


def test_a_folder_that_cannot_be_made_fails_before_any_source_is_asked(
    files: FileSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "occupied").touch()
    monkeypatch.setenv("HARNESS_DATA", str(tmp_path / "occupied"))
    source = Given(CONTENTS)
    with pytest.raises(DataError, match="cannot write to"):
        files.fetch([source])
    assert source.asked == 0


def test_several_fetches_at_once_leave_whole_files(files: FileSet) -> None:
    def fetch_and_load(_: int) -> None:
        files.fetch([Given(CONTENTS)])
        assert_whole(files)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(fetch_and_load, range(64)))
    assert sorted(path.name for path in files.path.iterdir()) == ["a", "b"]


def test_the_folder_is_per_user_unless_the_environment_says_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HARNESS_DATA", raising=False)
    assert data_folder("x").parent == platformdirs.user_data_path("inference-harness", appauthor=False)
    monkeypatch.setenv("HARNESS_DATA", "~/somewhere")
    assert data_folder("x") == Path.home() / "somewhere" / "x"

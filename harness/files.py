"""Files of a folder of results: written whole or not at all, checked when they are read, put aside when damaged."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import logging
import os
import secrets
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar

import numpy as np

if TYPE_CHECKING:
    import pandas as pd

log = logging.getLogger(__name__)

T = TypeVar("T")
Facts = dict[str, Any]

QUARANTINE = "quarantine"
NO_ROOM = (errno.ENOSPC, errno.EDQUOT)


class DiskFull(OSError):
    """A file could not be written because its disk is full, or a quota is used up; other files may be as they are."""


class Folder:
    """A folder whose files several processes and hosts may read and write at once.

    Args:
        path: Made by the first write.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._told = set[Path]()

    def write(self, name: str, content: bytes) -> None:
        """Atomic and durable: a reader sees the old file or the new one, whenever the process or machine dies.

        Raises:
            DiskFull, OSError: If it cannot be written; the old file is as it was.
        """
        with self.staged({name: content}):
            pass

    @contextmanager
    def staged(self, files: Mapping[str, bytes]) -> Generator[list[Path]]:
        """Write all files or none: they get their names, one after another, when what is done inside ends well.

        Returns:
            Where they are until then.

        Raises:
            DiskFull, OSError: If they cannot be written; no file has changed then, and nothing inside been done.
        """
        temporaries = [_temporary(self.path / name) for name in files]
        try:
            for (name, content), temporary in zip(files.items(), temporaries, strict=True):
                with _told_of(self.path / name):
                    _write(temporary, content)
            yield temporaries
            for name, temporary in zip(files, temporaries, strict=True):
                with _told_of(self.path / name):
                    os.replace(temporary, self.path / name)
                    _sync_folder(temporary.parent)
        except BaseException:
            for temporary in temporaries:
                with suppress(OSError):
                    temporary.unlink()
            raise

    def write_text(self, name: str, content: str) -> None:
        self.write(name, content.encode())

    def read(self, name: str, parse: Callable[[bytes], T]) -> T | None:
        """What a file holds; None if it is not there, or was damaged and is now in quarantine.

        Args:
            parse: Raises whatever it likes if the file is damaged.

        Raises:
            OSError: If the file is there and cannot be read.
        """
        try:
            with open(f"{self.path}/{name}", "rb") as file:  # paths as objects take as long as the file
                content = file.read()
        except FileNotFoundError:
            return None
        try:
            return parse(content)
        except MemoryError:  # of the machine, and not of the file
            raise
        except Exception as error:  # libraries raise their own and others' errors on damaged files
            with suppress(OSError):
                if (self.path / name).read_bytes() != content:  # another process has written it anew
                    return self.read(name, parse)
            self.quarantine(name, f"{error}")
            return None

    def content(self, name: str) -> bytes | None:
        """The bytes of a file, or None if it is not there."""
        return self.read(name, bytes)

    def quarantine(self, name: str, reason: str) -> None:
        """Put a damaged file aside, and tell of it; where that cannot be done, it still counts as missing."""
        path, aside = self.path / name, self.path / QUARANTINE / name
        moved = f"it has been moved to {aside.parent}, and is computed again when it is needed"
        try:
            aside.parent.mkdir(parents=True, exist_ok=True)
            os.replace(path, aside)
        except FileNotFoundError:  # another process was faster, and has told of it
            return
        except OSError as error:
            moved = f"it counts as missing, but cannot be moved to {aside.parent}: {error.strerror or error}"
        if path not in self._told:
            log.warning("%s is damaged (%s): %s", path, reason, moved)
        self._told.add(path)


def facts_with(*needed: str) -> Callable[[bytes], Facts]:
    """Parses a JSON object that has these keys."""

    def parse(content: bytes) -> Facts:
        facts = json.loads(content)
        if not isinstance(facts, dict):
            raise ValueError("it is no JSON object")
        if missing := [key for key in needed if key not in facts]:
            raise ValueError(f"it lacks {', '.join(missing)}")
        return facts  # pyright: ignore[reportUnknownVariableType]

    return parse


def checksum(arrays: Mapping[str, np.ndarray], text: str = "") -> str:
    """SHA-256 of arrays with their names and forms, and of a text that belongs to them."""
    digest = hashlib.sha256(text.encode())
    for name, array in sorted(arrays.items()):
        digest.update(f"|{name} {array.dtype.str} {array.shape}|".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def npz(arrays: Mapping[str, np.ndarray]) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **dict(arrays))  # type: ignore[arg-type]
    return buffer.getvalue()


Wanted = Callable[[Sequence[str]], Iterable[str]]
"""Given the names of the arrays in a file, those to be read."""


def arrays_of(content: bytes, wanted: Wanted = lambda names: names) -> dict[str, np.ndarray]:
    """The arrays of an npz file, or some of them.

    Raises:
        KeyError: If one is not there.
    """
    with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
        return {name: arrays[name] for name in wanted(arrays.files)}


def parquet(table: pd.DataFrame) -> bytes:
    buffer = io.BytesIO()
    table.to_parquet(buffer, index=False)
    return buffer.getvalue()


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}")


def _write(path: Path, content: bytes) -> None:
    with _created(path) as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _created(path: Path) -> BinaryIO:
    """A new file; its folder is made if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        return path.open("xb")
    except FileNotFoundError:  # another process has removed the folder at that moment
        path.parent.mkdir(parents=True, exist_ok=True)
        return path.open("xb")


@contextmanager
def _told_of(path: Path) -> Generator[None]:
    """Errors name the file that is meant: a full disk names none, and a temporary file's name says nothing."""
    try:
        yield
    except OSError as error:
        error.filename = str(path)
        if error.errno in NO_ROOM:
            raise DiskFull(error.errno, error.strerror, str(path)) from None
        raise


def _sync_folder(folder: Path) -> None:
    """Make a rename survive the loss of power, where folders can be opened (not on Windows)."""
    with suppress(PermissionError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

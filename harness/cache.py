"""The per-user data folder: files that are verified at every read, written atomically and fetched from several sources.

What is there is either a whole file whose content is the expected one, or it is not used.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import platformdirs

from harness.download import download, unpacked
from harness.problem import DataError


def data_folder(name: str) -> Path:
    """The folder ``name`` in the user's data folder, which the environment variable ``HARNESS_DATA`` overrides."""
    chosen = os.environ.get("HARNESS_DATA")
    home = Path(chosen).expanduser() if chosen else platformdirs.user_data_path("inference-harness", appauthor=False)
    return home / name


class CachedFile(Protocol):
    """A file of the data folder: its name there, its largest size, and what it must contain."""

    @property
    def name(self) -> str: ...

    @property
    def limit(self) -> int:
        """Bytes that a copy, unpacked, may have at most."""
        ...

    def decode(self, content: bytes) -> np.ndarray:
        """The array in it, writable.

        Raises:
            DataError: If the content is not exactly what it should be; says only what is wrong with it.
        """
        ...


class Source(Protocol):
    """A place that files come from."""

    @property
    def label(self) -> str: ...

    def read(self, files: Sequence[CachedFile]) -> Iterator[tuple[CachedFile, bytes]]:
        """The files with their contents, unpacked and not yet verified.

        Raises:
            DataError: If they cannot be had; says why.
        """
        ...


@dataclass(frozen=True)
class Mirror:
    """A web folder with the files.

    Args:
        url: Ends in a slash.
        suffix: ``.gz`` where the files are gzipped there.
    """

    url: str
    suffix: Literal["", ".gz"] = ""

    @property
    def label(self) -> str:
        return self.url

    def read(self, files: Sequence[CachedFile]) -> Iterator[tuple[CachedFile, bytes]]:
        for file in files:
            if self.suffix == ".gz":
                largest = file.limit + file.limit // 100 + 1024  # what cannot be compressed grows a little
                content = unpacked(download(f"{self.url}{file.name}.gz", largest), file.limit)
            else:
                content = download(f"{self.url}{file.name}", file.limit)
            yield file, content


@dataclass(frozen=True)
class FileSet:
    """The files of one data set in the data folder, plain or gzipped (``NAME.gz``).

    Args:
        dataset: Name of the data set, for `harness data fetch`.
        folder: Name of its folder.
    """

    dataset: str
    folder: str
    files: tuple[CachedFile, ...]

    @property
    def path(self) -> Path:
        return data_folder(self.folder)

    @property
    def location(self) -> str:
        missing = [file.name for file in self.files if self._copy(file) is None]
        if not missing:
            return str(self.path)
        state = "not fetched" if len(missing) == len(self.files) else f"incomplete, without {', '.join(missing)}"
        return f"{self.path} ({state}; run: harness data fetch {self.dataset})"

    def load(self) -> list[np.ndarray]:
        """The arrays of all files, each verified.

        Raises:
            DataError: If one is missing, truncated or not what it should be.
        """
        return [self._load(file) for file in self.files]

    def fetch(self, sources: Sequence[Source]) -> None:
        """Get what is missing or damaged from the first source that gives it; says on stderr what is tried.

        Raises:
            DataError: If the folder cannot be written, or no source gives what is missing; lists every reason.
        """
        try:
            failures = self._fetch(sources)
        except OSError as error:
            raise DataError(f"{self.dataset}: cannot write to {self.path}: {error.strerror}") from None
        missing = ", ".join(file.name for file in self._unusable())
        if missing:
            raise DataError(
                f"{self.dataset} could not be fetched: {'; '.join(failures)}. "
                f"Put {missing} (plain or .gz) into {self.path} yourself, or try again"
            )

    def _fetch(self, sources: Sequence[Source]) -> list[str]:
        failures: list[str] = []
        for source in sources:
            wanted = self._unusable()
            if not wanted:
                break
            _prepare(self.path)
            _say(f"{self.dataset}: {len(wanted)} files wanted, trying {source.label}")
            try:
                for file, content in source.read(wanted):
                    _verified(file, content)
                    _write_atomically(self.path / file.name, content)
            except DataError as error:
                failures.append(f"{source.label}: {error}")
                _say(f"{self.dataset}: failed: {error}")
        return failures

    def _unusable(self) -> list[CachedFile]:
        unusable: list[CachedFile] = []
        for file in self.files:
            try:
                self._load(file)
            except DataError:
                unusable.append(file)
        return unusable

    def _copy(self, file: CachedFile) -> Path | None:
        plain = self.path / file.name
        return next((path for path in (plain, plain.with_name(f"{plain.name}.gz")) if path.is_file()), None)

    def _load(self, file: CachedFile) -> np.ndarray:
        remedy = f"run: harness data fetch {self.dataset}"
        path = self._copy(file)
        if path is None:
            raise DataError(f"{self.dataset}: {file.name} is not in {self.path}; {remedy}")
        try:
            content = path.read_bytes()
            return _verified(file, unpacked(content, file.limit) if path.suffix == ".gz" else content)
        except OSError as error:
            raise DataError(f"{self.dataset}: {path} cannot be read: {error.strerror}; {remedy}") from None
        except DataError as error:
            raise DataError(f"{self.dataset}: {path}: {error}; {remedy}") from None


def _verified(file: CachedFile, content: bytes) -> np.ndarray:
    if len(content) > file.limit:
        raise DataError(f"larger than {file.name} can be ({file.limit:,} bytes)")
    return file.decode(content)


def _prepare(folder: Path) -> None:
    """Make the folder, before any download, and clear what fetches that were killed have left behind."""
    folder.mkdir(parents=True, exist_ok=True)
    for partial in folder.glob(".*.part"):
        with contextlib.suppress(FileNotFoundError):  # another fetch may clear it at the same time
            if time.time() - partial.stat().st_mtime > 24 * 3600:
                partial.unlink()


def _write_atomically(path: Path, content: bytes) -> None:
    """Readers see the old file or the whole new one, also after a crash and when two processes write at once."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.part")
    try:
        with temporary.open("xb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _say(text: str) -> None:
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()

"""What a store can do without: fits that no record needs, the oldest beyond a size, and what runs have left behind."""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from harness.files import QUARANTINE
from harness.record import RETRIED
from harness.store import Store

TEMPORARY = re.compile(r"\..+\.(json|txt|csv|npz|parquet|safetensors)\.[a-z0-9_]{8}")
YOUNG = 3600.0
"""Seconds for which a file may belong to a run that goes on, so that it is left."""


@dataclass(frozen=True)
class Surplus:
    """Something that can be dropped.

    Args:
        path: A file, or a folder with everything in it.
        reason: Why nobody needs it.
    """

    path: Path
    size: int
    reason: str


def surplus(store: Store, keep: float | None = None) -> list[Surplus]:
    """What can be dropped; no record is, nor what has been written within the last hour and may be in use.

    Args:
        keep: Bytes that trained fits may have together; the oldest beyond that are surplus, young ones too: a disk may
            be full of them. Any number unless given.
    """
    return [*_unneeded(store), *_left_behind(store), *_beyond(store, keep)]


def drop(found: list[Surplus]) -> None:
    """Delete it.

    Raises:
        OSError: If something cannot be deleted; what comes before it has been.
    """
    for each in found:
        if each.path.is_dir():
            shutil.rmtree(each.path)
        else:
            each.path.unlink(missing_ok=True)


def _unneeded(store: Store) -> Iterator[Surplus]:
    """Fits without a job that is ok, and checkpoints of jobs that have ended for good."""
    for folder in _folders(store.path / "fits"):
        status = (store.job(folder.name) or {}).get("status", "")
        if status != "ok":
            yield from _old(folder, f"its job is {status}" if status else "there is no such job")
    for folder in _folders(store.path / "checkpoints"):
        status = (store.job(folder.name) or {}).get("status", "")
        if status and status not in RETRIED:
            yield from _old(folder, f"its job is done ({status})")


def _left_behind(store: Store) -> Iterator[Surplus]:
    """Files of writes that were killed, and damaged files whose content has been computed anew."""
    for pattern in ("*", "jobs/*", "fits/*/*", "measurements/*/*", "checkpoints/*/*"):
        for path in sorted(store.path.glob(pattern)):
            if TEMPORARY.fullmatch(path.name) and path.is_file():
                yield from _old(path, "half written")
    for path in sorted((store.path / QUARANTINE).glob("**/*")):
        if path.is_file() and (store.path / path.relative_to(store.path / QUARANTINE)).is_file():
            yield from _old(path, "damaged, and computed anew since")


def _beyond(store: Store, keep: float | None) -> Iterator[Surplus]:
    """The oldest trained fits; training curves and arrays for figures stay, they are small."""
    if keep is None:
        return
    jobs = [facts for job_id in store.job_ids() if (facts := store.job(job_id)) and facts["status"] == "ok"]
    begun = {str(facts["job_id"]): str(facts.get("started_at") or "") for facts in jobs}
    fits = [store.state_path(job_id) for job_id in sorted(begun, key=begun.__getitem__) if store.has_fit(job_id)]
    total = sum(_size(path) for path in fits)
    for path in fits:
        if total > keep:
            yield Surplus(path, _size(path), f"one of the oldest, begun {begun[path.parent.name]}")
            total -= _size(path)


def _old(path: Path, reason: str) -> Iterator[Surplus]:
    """A file or folder, unless something in it is young."""
    newest = max(each.stat().st_mtime for each in (path, *path.glob("**/*")))
    if newest < time.time() - YOUNG:
        yield Surplus(path, _size(path), reason)


def _size(path: Path) -> int:
    return sum(each.stat().st_size for each in (path, *path.glob("**/*")) if each.is_file())


def _folders(path: Path) -> list[Path]:
    return sorted(each for each in path.glob("*") if each.is_dir())

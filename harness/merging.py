"""Stores are merged: what others have comes into one, file by file, and what it has already stays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from harness.files import Facts
from harness.options import UserError
from harness.record import RETRIED
from harness.store import Store

_SETTLED = ("ok", "skipped")


@dataclass
class Merged:
    """What has come into a store.

    Args:
        jobs, measurements, fits: Taken from the others; fits of jobs that had lost theirs are told apart.
        had: Jobs that the store had already, or had begun where the other's has failed.
        of_other_fits: Measurements left where they are: they speak of a fit of the same job with other bits.
    """

    jobs: int = 0
    measurements: int = 0
    fits: int = 0
    had: int = 0
    of_other_fits: int = 0


def merge(into: str | Path, others: Sequence[str | Path]) -> Merged:
    """Bring jobs, fits and measurements of other stores into one; the others are left as they are.

    What both have stays as it is in ``into``, unless it has not ended well there and has in the other. Checkpoints and
    damaged files are not taken. Interrupted, the same call goes on; called again, it changes nothing.

    Args:
        into: Made if there is no such folder.

    Raises:
        UserError: If a folder is missing, is no store, is given twice, or has tables without the jobs that they were
            made of; nothing is merged then.
    """
    sources = [_opened(other) for other in others]
    places = [Path(path).resolve() for path in (into, *others)]
    for number, place in enumerate(places):
        if place in places[:number]:
            raise UserError(f"{str((into, *others)[number])!r} is given twice; expected different folders of results")
    store, merged = _made(Path(into)), Merged()
    with store.derived_anyway():
        for source in sources:
            for job_id in source.job_ids():
                _merge_job(job_id, source, store, merged)
            if not store.environment() and (environment := source.content("environment.json")):
                store.write("environment.json", environment)
    store.derive()
    return merged


def _opened(path: str | Path) -> Store:
    if not Path(path).is_dir():
        raise UserError(f"{str(path)!r}: there is no such folder")
    store = Store.open(path)
    _check_complete(store)
    return store


def _made(path: Path) -> Store:
    if path.is_dir() and any(path.iterdir()) and not Store(path).exists():
        raise UserError(f"{str(path)!r} holds no results, but something else; expected a new folder or one of results")
    store = Store.create(path)
    _check_complete(store)
    return store


def _check_complete(store: Store) -> None:
    """Tables are derived from jobs; without these they would be written anew from nothing."""
    csv = store.path / "records.csv"
    told = csv.read_bytes().count(b"\n") > 1 if csv.is_file() else (store.path / "records.parquet").is_file()
    if told and not store.job_ids():
        raise UserError(f"{str(store.path)!r} has tables, but not the jobs that they were made of: nothing to merge")


def _merge_job(job_id: str, source: Store, store: Store, merged: Merged) -> None:
    theirs, ours = source.job(job_id), store.job(job_id)
    if theirs is None:
        return
    if ours is None and theirs["status"] in RETRIED and store.checkpoint_path(job_id).exists():
        merged.had += 1
        return
    if ours is None or (ours["status"] != "ok" and theirs["status"] == "ok"):
        _take_job(theirs, source, store, merged)
        return
    merged.had += 1
    same = _same_fit(ours, theirs)
    if same and not store.has_fit(job_id) and source.has_whole_fit(job_id):
        _copy(f"fits/{job_id}", source, store)
        merged.fits += 1
    for evaluator in source.measured_by(job_id):
        if _is_wanted(job_id, evaluator, source, store):
            merged.of_other_fits += not same
            merged.measurements += same and _take_measured(job_id, evaluator, source, store)


def _take_job(theirs: Facts, source: Store, store: Store, merged: Merged) -> None:
    """The job's own file last, as it is the commit."""
    job_id = theirs["job_id"]
    store.drop_measured(job_id, unless=theirs.get("fit_sha256"))
    if source.has_whole_fit(job_id):
        _copy(f"fits/{job_id}", source, store)
        merged.fits += 1
    for evaluator in source.measured_by(job_id):
        merged.measurements += _take_measured(job_id, evaluator, source, store)
    for name in (f"jobs/{job_id}.traceback.txt", f"jobs/{job_id}.output.txt", f"jobs/{job_id}.json"):
        if (content := source.content(name)) is not None:
            store.write(name, content)
    store.remove_checkpoint(job_id)
    merged.jobs += 1


def _is_wanted(job_id: str, evaluator: str, source: Store, store: Store) -> bool:
    """Whether a measurement is missing, or has not ended well where the other has."""
    theirs, ours = source.measured(job_id, evaluator), store.measured(job_id, evaluator)
    return theirs is not None and (ours is None or (_ended_well(theirs) and not _ended_well(ours)))


def _ended_well(measured: Facts) -> bool:
    return all(found["status"] in _SETTLED for found in measured["rows"])


def _take_measured(job_id: str, evaluator: str, source: Store, store: Store) -> bool:
    """Whether it could be taken: it is not, if it turns out to be damaged."""
    facts = source.measured(job_id, evaluator)
    arrays = source.values(job_id, evaluator) if facts else None
    if facts is None or arrays is None:
        return False
    store.write_measured(job_id, evaluator, facts, arrays)
    return True


def _same_fit(ours: Facts, theirs: Facts) -> bool:
    """Whether two stores hold the same fit of a job: by its bits, or else by the run that made it."""
    keys = ["fit_sha256"] if "fit_sha256" in ours and "fit_sha256" in theirs else ["started_at", "hardware"]
    return all(ours.get(key) == theirs.get(key) for key in keys)


def _copy(folder: str, source: Store, store: Store) -> None:
    for path in sorted((source.path / folder).glob("[!.]*")):
        if (content := source.content(f"{folder}/{path.name}")) is not None:
            store.write(f"{folder}/{path.name}", content)

"""The store: atomic files in, one pandas DataFrame out.

DIR/store.json                              schema version
DIR/environment.json                        machine and versions of the last run
DIR/jobs/JOB.json                           facts and status of a finished job; written last, so it is the commit
DIR/jobs/JOB.traceback.txt                  of a job that failed
DIR/fits/JOB/state.safetensors              the trained fit
DIR/fits/JOB/curve.csv  gallery.npz         training curve; arrays for the figures
DIR/checkpoints/JOB/state.safetensors       how far an unfinished fit has come
DIR/measurements/JOB/EVALUATOR.json .npz    measurements of one evaluator; values per observation, traces
DIR/records.parquet  .csv  examples.parquet derived from the above, can be rebuilt at any time
DIR/quarantine/...                          damaged files, under the names that they had
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import tempfile
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from harness import record
from harness.artifacts import Artifacts
from harness.files import QUARANTINE, Facts, arrays_of, facts_with, parquet
from harness.options import UserError
from harness.record import COLUMNS, SCHEMA, row

if TYPE_CHECKING:
    import pandas as pd  # slow to import: what makes no table does without

__all__ = ["Facts", "Store"]

_NAMES = ["job_id", "evaluator", "metric"]
_VALUES = ["index", "value", "stderr"]
_FOLDERS = ("jobs", "fits", "checkpoints", "measurements")
_TRIES = 5
_MADE_BY = "made by"


class Store(Artifacts):
    """A folder of results. What is damaged in it counts as missing: see `harness.files.Folder`.

    Args:
        path: The folder; made by the first write.
    """

    @staticmethod
    def create(path: str | Path) -> Store:
        """Open a folder for writing, make it if need be.

        Raises:
            UserError: If it cannot be written to, or was written by a version with another schema.
        """
        store, place = Store(path), str(path)
        try:
            store.path.mkdir(parents=True, exist_ok=True)
            if not store.exists():
                store._write_schema()
            for folder in (store.path, *(store.path / name for name in _FOLDERS)):
                if folder.is_dir():
                    place = str(folder)
                    tempfile.TemporaryFile(dir=folder).close()
        except OSError as error:
            raise UserError(f"cannot write to {place!r}: {error.strerror or error}; choose another folder") from None
        if not store._check_schema():
            store._write_schema()
        return store

    @staticmethod
    def open(path: str | Path) -> Store:
        """Open an existing store for reading.

        Raises:
            UserError: If there is none.
        """
        store = Store(path)
        if not store.exists():
            raise UserError(f"{str(path)!r} holds no results; expected a folder that `harness compare --out` made")
        store._check_schema()
        return store

    def exists(self) -> bool:
        return any((self.path / name).is_file() for name in ("store.json", f"{QUARANTINE}/store.json"))

    def _write_schema(self) -> None:
        self.write("store.json", json.dumps({"schema": SCHEMA}).encode())

    def _check_schema(self) -> bool:
        """Whether the schema is known.

        Raises:
            UserError: If it is another one.
        """
        facts = self.read("store.json", facts_with("schema"))
        if facts is not None and facts["schema"] != SCHEMA:
            raise UserError(
                f"{str(self.path)!r} has schema {facts['schema']}; this version of the harness reads {SCHEMA}"
            )
        return facts is not None

    # Derived tables

    def tables(self) -> tuple[pd.DataFrame, pd.DataFrame]:
        """Records and values per observation; as they were derived, if that was from what is there and by this code."""
        if self.is_derived():
            records = self.read("records.parquet", _records)
            examples = self.read("examples.parquet", _examples)
            if records is not None and examples is not None and records.attrs.get(_MADE_BY) == _sources():
                return records, examples
        examples = self._examples()  # first: what is found damaged here is no record
        return self.records(), examples

    def records(self, job_ids: Iterable[str] | None = None) -> pd.DataFrame:
        """One row per measurement; a job or evaluator without one has a row with its status.

        Args:
            job_ids: Of which jobs; of all unless given.
        """
        import pandas as pd

        rows = [found for job_id in job_ids or self.job_ids() for found in self._rows(job_id)]
        records = pd.DataFrame(rows, columns=COLUMNS)
        records.attrs[_MADE_BY] = _sources()  # parquet keeps it
        return records

    def _rows(self, job_id: str) -> Iterator[Facts]:
        job = self.job(job_id)
        if job is None:
            return
        # Those of a fit that is gone, and could not be made anew, say nothing of a job that is ok.
        found = self._measurements(job_id) if job["status"] == "ok" else ()
        results = [facts for _, measured in found for facts in measured["rows"]]
        yield from (row(job, facts) for facts in results)
        if not results:
            yield row(job)

    def examples(self) -> pd.DataFrame:
        """Values per observation: job_id, evaluator, metric, index (in the test split), value, stderr."""
        derived = self.read("examples.parquet", _examples) if self.is_derived() else None
        return self._examples() if derived is None else derived

    def _examples(self) -> pd.DataFrame:
        import pandas as pd

        found = [
            ((job_id, facts["evaluator"], facts["metric"]), arrays)
            for job_id in self.job_ids()
            for name, measured in self._measurements(job_id)
            for facts, arrays in self._example_columns(job_id, name, measured)
        ]
        if not found:
            return pd.DataFrame(columns=[*_NAMES, *_VALUES])
        sizes = [len(arrays["index"]) for _, arrays in found]
        labels = {name: np.repeat([key[i] for key, _ in found], sizes) for i, name in enumerate(_NAMES)}
        values = {name: np.concatenate([arrays[name] for _, arrays in found]) for name in _VALUES}
        return pd.DataFrame({**labels, **values})

    def _example_columns(self, job_id: str, name: str, facts: Facts) -> Iterator[tuple[Facts, dict[str, np.ndarray]]]:
        rows = [found for found in facts["rows"] if found["status"] == "ok"]
        if any("metric" not in found for found in rows):
            self._quarantine_measured(job_id, name, "a row lacks metric")
            return
        metrics = [found["metric"] for found in rows]
        file, renewed = f"measurements/{job_id}/{name}", False

        def parsed(content: bytes) -> dict[str, dict[str, np.ndarray]]:
            nonlocal renewed
            try:
                return _values(content, metrics)
            except Exception:
                renewed = self.measured(job_id, name) != facts  # another process has measured anew, something else
                if renewed:
                    return {}
                raise

        values = self.read(f"{file}.npz", parsed) if rows else {}
        if renewed:
            again = self.measured(job_id, name)
            yield from self._example_columns(job_id, name, again) if again else ()
            return
        if values is None:
            self._quarantine_measured(job_id, name, "its values per observation are damaged")
            return
        yield from ((found, values[found["metric"]]) for found in rows)

    def is_derived(self) -> bool:
        """Whether the derived tables are there and newer than everything that they are derived from."""
        derived = [self.path / name for name in ("records.parquet", "records.csv", "examples.parquet")]
        oldest = min(path.stat().st_mtime_ns if path.is_file() else -1 for path in derived)
        return oldest >= self._changed()

    def _changed(self) -> int:
        """When anything that tables are derived from has last changed, in nanoseconds."""
        folders = [self.path / "jobs", self.path / "measurements"]
        return max((_newest(str(folder), 2) for folder in folders if folder.is_dir()), default=0)

    def derive(self) -> pd.DataFrame:
        """Write records.parquet, records.csv and examples.parquet anew; returns the records.

        What other processes have stored meanwhile comes in too, unless they go on and on: they will derive them again.
        """
        records = self._derive()
        for _ in range(_TRIES):
            if self.is_derived():
                break
            records = self._derive()
        return records

    def _derive(self) -> pd.DataFrame:
        """The tables get the time of what they are derived from: what is stored while they are made is newer."""
        changed = self._changed()
        examples = self._examples()  # first: what is found damaged here is no record
        records = self.records()
        tables = {
            "records.parquet": parquet(records),
            "records.csv": records.to_csv(index=False).encode(),
            "examples.parquet": parquet(examples),
        }
        with self.staged(tables) as paths:
            for path in paths:
                os.utime(path, ns=(changed, changed))
        return records

    @contextmanager
    def derived_anyway(self) -> Generator[None]:
        """If what is done inside fails, the derived tables are written all the same, where they can be."""
        try:
            yield
        except BaseException:
            with suppress(OSError):  # what has failed before says more
                if self.job_ids():
                    self.derive()
            raise


def _sources() -> str:
    """Hash of what makes records of the files of jobs: by another version they may be others."""
    files = (Path(module).read_bytes() for module in (__file__, record.__file__))
    return hashlib.sha256(b"".join(files)).hexdigest()[:16]


def _records(content: bytes) -> pd.DataFrame:
    import pandas as pd

    return pd.read_parquet(io.BytesIO(content))


def _examples(content: bytes) -> pd.DataFrame:
    import pandas as pd

    table = pd.read_parquet(io.BytesIO(content))
    return table[[*_NAMES, *_VALUES]]


def _values(content: bytes, metrics: Sequence[str]) -> dict[str, dict[str, np.ndarray]]:
    """Index, value and standard error per observation of each metric: numbers, each (N,)."""
    arrays = arrays_of(content, lambda _: [f"{metric}/{column}" for metric in metrics for column in _VALUES])
    for metric in metrics:
        own = [arrays[f"{metric}/{column}"] for column in _VALUES]
        if len({array.shape for array in own}) > 1 or own[0].ndim != 1 or any(a.dtype.kind not in "fiu" for a in own):
            forms = ", ".join(f"{array.dtype}{array.shape}" for array in own)
            raise ValueError(f"{metric}: {', '.join(_VALUES)} are no numbers of one shape (N,), but {forms}")
    return {metric: {column: arrays[f"{metric}/{column}"] for column in _VALUES} for metric in metrics}


def _newest(path: str, deep: int) -> int:
    """When something in a folder has last changed, its own entries among it; so many levels down; in nanoseconds."""
    times = [os.stat(path).st_mtime_ns]
    with os.scandir(path) as entries:
        for entry in entries:
            with suppress(FileNotFoundError):  # another process has removed it; its folder has changed
                if entry.is_dir() and deep > 1:
                    times.append(_newest(entry.path, deep - 1))
                elif entry.name.endswith(".json"):
                    times.append(entry.stat().st_mtime_ns)
    return max(times)

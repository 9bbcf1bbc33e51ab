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
"""

from __future__ import annotations

import io
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from harness.options import UserError
from harness.record import COLUMNS, SCHEMA, row

Facts = dict[str, Any]


class Store:
    """A folder of results.

    Args:
        path: The folder; made by the first write.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    @staticmethod
    def create(path: str | Path) -> Store:
        """Open a folder for writing, make it if need be.

        Raises:
            UserError: If it cannot be written to, or was written by a version with another schema.
        """
        store = Store(path)
        try:
            store.path.mkdir(parents=True, exist_ok=True)
            if not store.exists():
                store._write("store.json", json.dumps({"schema": SCHEMA}).encode())
            with tempfile.TemporaryFile(dir=store.path):
                pass
        except OSError as error:
            raise UserError(f"cannot write to {str(path)!r}: {error.strerror or error}; choose another --out") from None
        store._check_schema()
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
        return (self.path / "store.json").is_file()

    def _check_schema(self) -> None:
        schema = self._read_json(self.path / "store.json").get("schema")
        if schema != SCHEMA:
            raise UserError(f"{str(self.path)!r} has schema {schema}; this version of the harness reads {SCHEMA}")

    # Jobs and fits

    def job(self, job_id: str) -> Facts | None:
        """Facts of a finished job, or None."""
        path = self.path / "jobs" / f"{job_id}.json"
        return self._read_json(path) if path.is_file() else None

    def job_ids(self) -> list[str]:
        return sorted(path.stem for path in (self.path / "jobs").glob("*.json"))

    def write_job(self, job_id: str, facts: Mapping[str, Any], traceback: str = "") -> None:
        if traceback:
            self._write(f"jobs/{job_id}.traceback.txt", traceback.encode())
        self._write(f"jobs/{job_id}.json", json.dumps(facts, indent=1).encode())

    def write_fit(
        self,
        job_id: str,
        state: Mapping[str, np.ndarray],
        curve: Sequence[Mapping[str, Any]],
        gallery: Mapping[str, np.ndarray],
    ) -> None:
        shutil.rmtree(self.path / "measurements" / job_id, ignore_errors=True)  # they speak of an earlier fit
        self._write(f"fits/{job_id}/state.safetensors", save_tensors(dict(state)))
        table = pd.DataFrame(curve, columns=["step", "seconds", "objective", "validation"])
        self._write(f"fits/{job_id}/curve.csv", table.to_csv(index=False).encode())
        self._write(f"fits/{job_id}/gallery.npz", _npz(gallery))

    def state(self, job_id: str) -> dict[str, np.ndarray]:
        """Tensors of a stored fit.

        Raises:
            UserError: If there is none, or it is damaged.
        """
        path = self.path / "fits" / job_id / "state.safetensors"
        if not path.is_file():
            raise UserError(f"{str(self.path)!r} has no stored fit {job_id!r}")
        try:
            return load_tensors(path.read_bytes())
        except Exception as error:  # safetensors raises its own and others' errors on damaged files
            raise UserError(f"{path} is damaged ({error}); delete it and its job's file to fit anew") from None

    def curve(self, job_id: str) -> pd.DataFrame:
        """Training curve: step, seconds on the fit clock, objective, validation (nan between checks)."""
        return pd.read_csv(self.path / "fits" / job_id / "curve.csv")

    def gallery(self, job_id: str) -> dict[str, np.ndarray]:
        """Arrays for figures, see `harness.gallery`."""
        with np.load(self.path / "fits" / job_id / "gallery.npz", allow_pickle=False) as arrays:
            return dict(arrays)

    # Checkpoints

    def checkpoint_path(self, job_id: str) -> Path:
        """Where the checkpoint of a job is, if it has one."""
        return self.path / "checkpoints" / job_id / "state.safetensors"

    def write_checkpoint(self, job_id: str, content: bytes) -> None:
        """Replace the checkpoint of a job.

        Raises:
            OSError: If it cannot be written; the one before is left as it was.
        """
        self._write(str(self.checkpoint_path(job_id).relative_to(self.path)), content)

    def remove_checkpoint(self, job_id: str) -> None:
        shutil.rmtree(self.checkpoint_path(job_id).parent, ignore_errors=True)

    def environment(self) -> Facts:
        """Machine and versions of the last run that fitted or measured anything; empty if none has."""
        path = self.path / "environment.json"
        return self._read_json(path) if path.is_file() else {}

    # Measurements

    def measured(self, job_id: str, evaluator: str) -> Facts | None:
        """What the evaluator with that file name has said of a job, or None."""
        path = self.path / "measurements" / job_id / f"{evaluator}.json"
        return self._read_json(path) if path.is_file() else None

    def write_measured(self, job_id: str, evaluator: str, facts: Facts, examples: Mapping[str, np.ndarray]) -> None:
        """Write measurements; the values per observation first."""
        (self.path / "measurements" / job_id / f"{evaluator}.json").unlink(missing_ok=True)
        self._write(f"measurements/{job_id}/{evaluator}.npz", _npz(examples))
        self._write(f"measurements/{job_id}/{evaluator}.json", json.dumps(facts, indent=1).encode())

    def traces(self, job_id: str, evaluator: str, metric: str) -> dict[str, np.ndarray]:
        """Diagnostic arrays of a measurement by name; empty if there are none.

        Args:
            evaluator: As in the column of that name.
        """
        prefix = f"{metric}/traces/"
        for path in self._measurement_files(job_id):
            if any(facts["evaluator"] == evaluator for facts in self._read_json(path)["rows"]):
                with np.load(path.with_suffix(".npz"), allow_pickle=False) as arrays:
                    return {name.removeprefix(prefix): arrays[name] for name in arrays if name.startswith(prefix)}
        return {}

    # Derived tables

    def records(self) -> pd.DataFrame:
        """One row per measurement; a job or evaluator without one has a row with its status."""
        rows = [record for job_id in self.job_ids() for record in self._rows(job_id)]
        return pd.DataFrame(rows, columns=COLUMNS)

    def _rows(self, job_id: str) -> Iterator[Facts]:
        job = self.job(job_id) or {}
        results = [facts for path in self._measurement_files(job_id) for facts in self._read_json(path)["rows"]]
        yield from (row(job, facts) for facts in results)
        if not results:
            yield row(job)

    def examples(self) -> pd.DataFrame:
        """Values per observation: job_id, evaluator, metric, index (in the test split), value, stderr."""
        tables = [
            pd.DataFrame({"job_id": job_id, "evaluator": facts["evaluator"], "metric": facts["metric"], **columns})
            for job_id in self.job_ids()
            for path in self._measurement_files(job_id)
            for facts, columns in self._example_columns(path)
        ]
        columns = ["job_id", "evaluator", "metric", "index", "value", "stderr"]
        return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame(columns=columns)

    def _measurement_files(self, job_id: str) -> list[Path]:
        return sorted((self.path / "measurements" / job_id).glob("*.json"))

    def _example_columns(self, path: Path) -> Iterator[tuple[Facts, dict[str, np.ndarray]]]:
        with np.load(path.with_suffix(".npz"), allow_pickle=False) as arrays:
            for facts in self._read_json(path)["rows"]:
                if facts["status"] == "ok":
                    metric = facts["metric"]
                    yield facts, {column: arrays[f"{metric}/{column}"] for column in ("index", "value", "stderr")}

    def is_derived(self) -> bool:
        """Whether the derived tables are there and newer than everything that they are derived from."""
        derived = [self.path / name for name in ("records.parquet", "records.csv", "examples.parquet")]
        sources = [*(self.path / "jobs").glob("*.json"), *(self.path / "measurements").glob("*/*.json")]
        newest = max((path.stat().st_mtime_ns for path in sources), default=0)
        return all(path.is_file() and path.stat().st_mtime_ns >= newest for path in derived)

    def derive(self) -> pd.DataFrame:
        """Write records.parquet, records.csv and examples.parquet anew; returns the records."""
        records, examples = self.records(), self.examples()
        self._write("records.parquet", _parquet(records))
        self._write("records.csv", records.to_csv(index=False).encode())
        self._write("examples.parquet", _parquet(examples))
        return records

    # Files

    def write_text(self, name: str, content: str) -> None:
        self._write(name, content.encode())

    def _write(self, name: str, content: bytes) -> None:
        """Atomic and durable: a reader sees the old file or the new one, whenever the process or machine dies."""
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
            _sync_folder(path.parent)
        except BaseException as error:
            if isinstance(error, OSError):
                error.filename = str(path)  # a full disk names none, a temporary file's name says nothing
            Path(temporary).unlink(missing_ok=True)
            raise

    def _read_json(self, path: Path) -> Facts:
        try:
            return json.loads(path.read_bytes())
        except (OSError, ValueError) as error:
            raise UserError(f"{path} is damaged ({error}); delete it to have it computed anew") from None


def _sync_folder(folder: Path) -> None:
    """Make a rename survive the loss of power, where folders can be opened (not on Windows)."""
    with suppress(PermissionError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _npz(arrays: Mapping[str, np.ndarray]) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **dict(arrays))  # type: ignore[arg-type]
    return buffer.getvalue()


def _parquet(table: pd.DataFrame) -> bytes:
    buffer = io.BytesIO()
    table.to_parquet(buffer, index=False)
    return buffer.getvalue()

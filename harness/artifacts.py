"""What is kept of jobs: facts, fits, checkpoints and measurements, each an atomic file (see `harness.store`)."""

from __future__ import annotations

import io
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from harness.files import QUARANTINE, Facts, Folder, T, Wanted, arrays_of, checksum, facts_with, npz
from harness.options import UserError

log = logging.getLogger(__name__)

if TYPE_CHECKING:
    import pandas as pd


class Artifacts(Folder):
    """Files of jobs; what is damaged of them counts as missing."""

    def __init__(self, path: str | Path) -> None:
        super().__init__(path)
        self._traceless = set[tuple[str, str, str]]()  # figures ask one after another, of thousands of jobs

    # Jobs and fits

    def job(self, job_id: str) -> Facts | None:
        """Facts of a finished job, or None."""
        return self.read(f"jobs/{job_id}.json", _job)

    def job_ids(self) -> list[str]:
        return sorted(path.stem for path in (self.path / "jobs").glob("*.json"))

    def write_job(self, job_id: str, facts: Mapping[str, Any], traceback: str = "") -> None:
        told = {f"jobs/{job_id}.traceback.txt": traceback.encode()} if traceback else {}
        with self.staged({**told, f"jobs/{job_id}.json": _text(facts)}):
            pass

    def write_fit(
        self,
        job_id: str,
        state: Mapping[str, np.ndarray],
        curve: Sequence[Mapping[str, Any]],
        gallery: Mapping[str, np.ndarray],
        facts: Mapping[str, Any],
    ) -> None:
        """Write a fit and its job; measurements of an earlier one are dropped, unless it was the same bit for bit.

        Args:
            facts: Of the job; the checksum of the state becomes one of them.

        Raises:
            DiskFull, OSError: If they cannot be written; what there was is as it was.
        """
        import pandas as pd

        digest = checksum(state)
        files = {
            f"fits/{job_id}/state.safetensors": save_tensors(dict(state), {"sha256": digest}),
            f"fits/{job_id}/curve.csv": pd.DataFrame(curve, columns=_CURVE).to_csv(index=False).encode(),
            f"fits/{job_id}/gallery.npz": npz(gallery),
            f"jobs/{job_id}.json": _text({**facts, "fit_sha256": digest}),
        }
        with self.staged(files):
            self.drop_measured(job_id, unless=digest)

    def has_fit(self, job_id: str) -> bool:
        """Whether the trained fit is there; it may have been dropped since, or put into quarantine."""
        return os.path.isfile(f"{self.path}/fits/{job_id}/state.safetensors")

    def has_lost_fit(self, job_id: str) -> bool:
        """Whether the trained fit was damaged, and has not been replaced."""
        return not self.has_fit(job_id) and (self.path / QUARANTINE / "fits" / job_id / "state.safetensors").is_file()

    def has_whole_fit(self, job_id: str) -> bool:
        """Whether the trained fit is there and undamaged; reads all of it."""
        return self.read(f"fits/{job_id}/state.safetensors", _tensors) is not None

    def state_path(self, job_id: str) -> Path:
        """Where the trained fit of a job is, if it has one."""
        return self.path / "fits" / job_id / "state.safetensors"

    def state(self, job_id: str) -> dict[str, np.ndarray]:
        """Tensors of a stored fit.

        Raises:
            UserError: If there is none, or it is damaged.
        """
        state = self.read(f"fits/{job_id}/state.safetensors", _tensors)
        if state is None:
            why = "it was damaged" if self.has_lost_fit(job_id) else "it was dropped, or never made"
            raise UserError(f"{str(self.path)!r} has no stored fit {job_id!r} ({why}); `harness compare` fits it anew")
        return state

    def curve(self, job_id: str) -> pd.DataFrame:
        """Training curve: step, seconds on the fit clock, objective, validation (nan between checks).

        Raises:
            FileNotFoundError: If there is none, or it was damaged.
        """
        return self._there(f"fits/{job_id}/curve.csv", _curve)

    def gallery(self, job_id: str) -> dict[str, np.ndarray]:
        """Arrays for figures, see `harness.gallery`.

        Raises:
            FileNotFoundError: If there are none, or they were damaged.
        """
        return self._there(f"fits/{job_id}/gallery.npz", arrays_of)

    def _there(self, name: str, parse: Callable[[bytes], T]) -> T:
        found = self.read(name, parse)
        if found is None:
            raise FileNotFoundError(2, "not there, or damaged", str(self.path / name))
        return found

    # Checkpoints

    def checkpoint_path(self, job_id: str) -> Path:
        """Where the checkpoint of a job is, if it has one."""
        return self.path / "checkpoints" / job_id / "state.safetensors"

    def write_checkpoint(self, job_id: str, content: bytes) -> None:
        """Replace the checkpoint of a job.

        Raises:
            OSError: If it cannot be written; the one before is left as it was.
        """
        self.write(str(self.checkpoint_path(job_id).relative_to(self.path)), content)

    def remove_checkpoint(self, job_id: str) -> None:
        shutil.rmtree(self.checkpoint_path(job_id).parent, ignore_errors=True)

    def environment(self) -> Facts:
        """Machine and versions of the last run that fitted or measured anything; empty if none has."""
        return self.read("environment.json", facts_with()) or {}

    # Measurements

    def measured(self, job_id: str, evaluator: str) -> Facts | None:
        """What the evaluator with that file name has said of a job, or None."""
        facts = self.read(f"measurements/{job_id}/{evaluator}.json", _measurement)
        if facts is None:
            return None
        try:
            size = os.stat(f"{self.path}/measurements/{job_id}/{evaluator}.npz").st_size
        except FileNotFoundError:
            size = 0
        if size == 0 or size != facts.get("npz_bytes", size):  # which is all that can be told without reading it
            if self.read(f"measurements/{job_id}/{evaluator}.json", _measurement) != facts:
                return self.measured(job_id, evaluator)  # another process has written both anew
            self._quarantine_measured(job_id, evaluator, f"its values per observation are of {size} bytes")
            return None
        return facts

    def measured_by(self, job_id: str) -> list[str]:
        """File names of the evaluators that have measured a job."""
        with suppress(FileNotFoundError):
            names = os.listdir(f"{self.path}/measurements/{job_id}")
            return sorted(name.removesuffix(".json") for name in names if name.endswith(".json"))
        return []

    def write_measured(self, job_id: str, evaluator: str, facts: Facts, examples: Mapping[str, np.ndarray]) -> None:
        """Write measurements; the values per observation first, without what was said of others.

        Those of a fit (``fit_sha256`` of the facts) that another process has replaced by one with other bits are not
        kept, and a warning in the log says so.
        """
        current = (self.job(job_id) or {}).get("fit_sha256")
        if current is not None and facts.get("fit_sha256", current) != current:
            log.warning("job %s: its fit was replaced while %s measured it; measure again", job_id, evaluator)
            return
        self._traceless.clear()
        name, content = f"measurements/{job_id}/{evaluator}", npz(examples)
        text = _text({**facts, "npz_bytes": len(content), "arrays": list(examples)})
        with self.staged({f"{name}.npz": content, f"{name}.json": text}):
            if self.content(f"{name}.npz") != content:  # else another process has measured the same
                (self.path / f"{name}.json").unlink(missing_ok=True)

    def drop_measured(self, job_id: str, unless: str | None) -> None:
        """Drop the measurements of a job that speak of another fit than that with a checksum (None: of any)."""
        found = list((self.path / "measurements" / job_id).glob("[!.]*"))
        job = self.job(job_id) or {}  # who finishes it from now on has measured nothing that was found
        if unless is None or job.get("fit_sha256") != unless:
            for path in found:
                path.unlink(missing_ok=True)

    def values(self, job_id: str, evaluator: str) -> dict[str, np.ndarray] | None:
        """All arrays of a measurement, values per observation and traces; None if they are not there or damaged."""
        return self._arrays(job_id, evaluator, lambda names: names)

    def left_behind(self, job_id: str, evaluator: str | None) -> Path | None:
        """The file that says more of how a job has failed, or an evaluator of it: a traceback, or what it printed last.

        Args:
            evaluator: As in the column of that name.
        """
        names = [f"jobs/{job_id}"]
        if evaluator:
            measured = self._measurements(job_id)
            names = [f"measurements/{job_id}/{name}" for name, facts in measured if _is_by(evaluator, facts)]
        paths = [self.path / f"{name}.{what}.txt" for name in names for what in ("traceback", "output")]
        return max((path for path in paths if path.is_file()), key=lambda path: path.stat().st_mtime, default=None)

    def traces(self, job_id: str, evaluator: str, metric: str) -> dict[str, np.ndarray]:
        """Diagnostic arrays of a measurement by name; empty if there are none.

        Args:
            evaluator: As in the column of that name.
        """
        if (job_id, evaluator, metric) in self._traceless:
            return {}
        prefix = f"{metric}/traces/"
        begins = json.dumps(prefix)[:-1].encode()
        for name in self.measured_by(job_id):
            content = self.content(f"measurements/{job_id}/{name}.json") or b""
            if b'"arrays"' in content and begins not in content:
                continue  # without parsing it: this is asked of thousands of jobs that have none
            facts = self.measured(job_id, name)
            if facts and _is_by(evaluator, facts):
                arrays = self._arrays(job_id, name, lambda names: [each for each in names if each.startswith(prefix)])
                return {key.removeprefix(prefix): array for key, array in (arrays or {}).items()}
        self._traceless.add((job_id, evaluator, metric))
        return {}

    def _measurements(self, job_id: str) -> Iterator[tuple[str, Facts]]:
        for evaluator in self.measured_by(job_id):
            if facts := self.measured(job_id, evaluator):
                yield evaluator, facts

    def _arrays(self, job_id: str, evaluator: str, wanted: Wanted) -> dict[str, np.ndarray] | None:
        """Some of the arrays of a measurement; None if they are damaged: then it is to be made anew."""
        name = f"measurements/{job_id}/{evaluator}.npz"
        arrays = self.read(name, lambda content: arrays_of(content, wanted))
        if arrays is None:
            self._quarantine_measured(job_id, evaluator, "its values per observation are damaged")
        return arrays

    def _quarantine_measured(self, job_id: str, evaluator: str, reason: str) -> None:
        self.quarantine(f"measurements/{job_id}/{evaluator}.json", reason)


def _is_by(evaluator: str, measured: Facts) -> bool:
    return any(found["evaluator"] == evaluator for found in measured["rows"])


def _text(facts: Mapping[str, Any]) -> bytes:
    return json.dumps(facts, indent=1).encode()


# What files must hold to be whole

_CURVE = ["step", "seconds", "objective", "validation"]
_job = facts_with("job_id", "status")


def _measurement(content: bytes) -> Facts:
    facts = facts_with("key", "rows")(content)
    if any(not {"evaluator", "status"} <= found.keys() for found in facts["rows"]):
        raise ValueError("a row lacks evaluator or status")
    return facts


def _tensors(content: bytes) -> dict[str, np.ndarray]:
    tensors = load_tensors(content)
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    expected = header.get("__metadata__", {}).get("sha256")  # earlier versions wrote none
    if expected is not None and expected != checksum(tensors):
        raise ValueError("its checksum is wrong")
    return tensors


def _curve(content: bytes) -> pd.DataFrame:
    import pandas as pd

    table = pd.read_csv(io.BytesIO(content))
    if missing := set(_CURVE).difference(table.columns):
        raise ValueError(f"it lacks {', '.join(sorted(missing))}")
    return table

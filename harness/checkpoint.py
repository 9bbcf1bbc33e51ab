"""Checkpoints in the store: a fit goes on where an earlier run of the same job stopped."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.numpy import save as save_tensors

from harness.files import checksum
from harness.method import Checkpoint, CurvePoint, Run, State
from harness.stopping import Stop
from harness.store import Facts, Store

log = logging.getLogger(__name__)

EVERY = 60.0
"""Seconds on the fit clock from one checkpoint to the next."""
COST = 0.005
"""The part of a fit's time that may go into checkpoints: where writing is slow, they are fewer."""

SCHEMA = 1
_PLACE = ("hardware", "threads", "torch_version")


class Damaged(Exception):
    """A checkpoint that cannot be used: it is damaged, or of a version with another schema."""


@dataclass(frozen=True)
class Reached:
    """How far a fit has come; the fraction is 0 where nobody knows."""

    step: int
    fraction: float


def reached(store: Store, job_id: str) -> Reached | None:
    """Where the fit of a job would go on, or None if it would start anew."""
    with suppress(Damaged, OSError), _opened(store.checkpoint_path(job_id)) as file:
        facts = _facts(file)
        return Reached(facts["step"], facts["fraction"])
    return None


class StoredCheckpoint(Checkpoint):
    """The checkpoint of one job, in the store.

    Args:
        run: The job's, whose curve and clock are kept and taken up again.
        environment: The columns of a record that speak of the machine.
        on_resumed: Told the fraction and the step from which the fit goes on.
        together: How many fits share the run's clock.
    """

    def __init__(
        self,
        run: Run,
        store: Store,
        job_id: str,
        environment: Mapping[str, Any],
        stop: Stop,
        on_resumed: Callable[[float, int], None] = lambda fraction, step: None,
        together: int = 1,
    ) -> None:
        self.run = run
        self.store = store
        self.job_id = job_id
        self.stop = stop
        self.on_resumed = on_resumed
        here = {column: environment.get(column) for column in _PLACE}
        self.places: list[Facts] = [here | {"together": together, "beside": environment.get("beside", 1)}]
        self._next = EVERY
        self._failing = False

    def load(self) -> State | None:
        path = self.store.checkpoint_path(self.job_id)
        if not path.is_file():
            return None
        try:
            with self.run.clock.aside():
                arrays, facts = _read(path)
        except Damaged as error:
            self.store.quarantine(str(path.relative_to(self.store.path)), f"{error}; the fit starts anew")
            return None
        tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
        self.run.curve[:] = _points(tensors.pop("curve").tolist())
        self.run.clock.resume(facts["seconds"], facts["peak_bytes"], facts.get("busy_elsewhere"))
        self.run.clock.seconds["compile"] = facts["compile_seconds"]
        self._next = facts["seconds"] + EVERY
        self.places = [*facts["places"], *self.places]
        if not self._one_place():
            log.warning("job %s goes on with other hardware, threads or torch than it began with: its times are not "
                        "valid, and its last digits may not be those of a fit in one go", self.job_id)  # fmt: skip
        self.on_resumed(facts["fraction"], facts["step"])
        return State({name.removeprefix("method/"): tensor for name, tensor in tensors.items()}, facts["method"])

    def due(self) -> bool:
        asked = self.stop.asked() and (not self._failing or self.stop.signal is not None)
        return asked or self.run.clock.elapsed_on_host() >= self._next

    def save(self, state: State, step: int, fraction: float) -> None:
        clock = self.run.clock
        seconds, began = clock.elapsed(), clock.now()
        spent = {"step": step, "fraction": fraction, "seconds": seconds, "peak_bytes": clock.peak()}
        spent["compile_seconds"], spent["busy_elsewhere"] = clock.seconds.get("compile", 0.0), clock.busy()
        with clock.aside():
            written = self._write(state, {**spent, "places": self.places, "method": dict(state.facts)})
        self._next = seconds + max(EVERY, (clock.now() - began) / COST)
        if written or self.stop.signal is not None:  # out of time, a fit that cannot be kept had better go on
            self.stop.obey()

    def _write(self, state: State, facts: Facts) -> bool:
        """Whether it could be written; if not, the user is told, and the fit goes on without."""
        arrays = {
            f"method/{name}": np.asarray(tensor.detach().cpu().numpy(), order="C")  # safetensors knows no strides
            for name, tensor in state.tensors.items()
        }
        try:
            self.store.write_checkpoint(self.job_id, _content({**arrays, "curve": _array(self.run.curve)}, facts))
        except OSError as error:
            if not self._failing:
                log.warning("%s: %s; the fit goes on, but for now it cannot be taken up again from where it is",
                            error.filename, error.strerror or error)  # fmt: skip
            self._failing = True
            return False
        self._failing = False
        return True

    def facts(self) -> Facts:
        """The columns of a record that speak of the parts of the fit."""
        shared = any(place["together"] > 1 for place in self.places)
        alone = all(place.get("beside", 1) == 1 for place in self.places)
        valid = self._one_place() and not shared and alone  # else it is no single fit's time
        return {"fit_parts": len(self.places), "timing_valid": valid, "shared_clock": shared}

    def _one_place(self) -> bool:
        where = [{column: place[column] for column in _PLACE} for place in self.places]
        return all(place == where[0] for place in where)


def _array(curve: list[CurvePoint]) -> np.ndarray:
    """A curve as an array of float64, shape (P, 4); nan where there was no validation."""
    rows = [
        (point.step, point.seconds, point.objective, math.nan if point.validation is None else point.validation)
        for point in curve
    ]
    return np.array(rows, dtype=np.float64).reshape(-1, 4)


def _points(rows: list[list[float]]) -> list[CurvePoint]:
    return [
        CurvePoint(int(step), seconds, objective, None if math.isnan(validation) else validation)
        for step, seconds, objective, validation in rows
    ]


# One file, so that tensors and facts never belong to different moments


def _content(arrays: dict[str, np.ndarray], facts: Facts) -> bytes:
    text = json.dumps({**facts, "schema": SCHEMA})
    return save_tensors(arrays, {"facts": text, "sha256": checksum(arrays, text)})


def _read(path: Path) -> tuple[dict[str, np.ndarray], Facts]:
    with _opened(path) as file:
        facts = _facts(file)
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if checksum(arrays, file.metadata()["facts"]) != file.metadata()["sha256"]:
            raise ValueError("its checksum is wrong")
    return arrays, facts


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="numpy") as file:
            yield file
    except (OSError, MemoryError):  # of the machine, which may be well again tomorrow, and not of the file
        raise
    except Exception as error:  # safetensors raises its own and others' errors on damaged files
        raise Damaged(f"{error}") from None


def _facts(file: Any) -> Facts:
    facts = json.loads(file.metadata()["facts"])
    if facts["schema"] != SCHEMA:
        raise ValueError(f"schema {facts['schema']}; this version of the harness reads {SCHEMA}")
    return facts

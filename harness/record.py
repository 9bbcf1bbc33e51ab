"""The record of a measurement: one flat row, by contract (DESIGN: "Records")."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any

SCHEMA = 1

JOB_COLUMNS = (
    "schema run_id job_id problem dataset binarisation split model spec_hash decoder_parameters method config "
    "method_parameters plugin plugin_version seed status reason"
).split()
MEASUREMENT_COLUMNS = (
    "evaluator metric value kind bounds unit stderr stderr_test n_observations settings"
).split()  # fmt: skip
COST_COLUMNS = (  # of a fit in fit_parts runs: seconds add up, memory is the largest, place and start the last's
    "fit_seconds fit_steps steps_per_second gradient_evaluations compile_seconds evaluate_seconds peak_memory_bytes "
    "timing_valid shared_clock fit_parts busy_elsewhere"
).split()
PLACE_COLUMNS = (
    "device precision step_mode step_used hardware threads torch_version git_commit git_dirty started_at budget "
    "bits_per_dim source_hash"
).split()
COLUMNS = [*JOB_COLUMNS, *MEASUREMENT_COLUMNS, *COST_COLUMNS, *PLACE_COLUMNS]

TIMING_COLUMNS = [
    "fit_seconds", "steps_per_second", "compile_seconds", "evaluate_seconds", "peak_memory_bytes", "started_at",
    "fit_parts", "busy_elsewhere",
]  # fmt: skip
"""Columns in which two runs of the same command on one machine may differ."""

FROM_FILE = "file "
"""Begins what the column ``plugin`` says of a plugin that is no installed package; the file's name follows."""

STATUSES = ("ok", "failed", "diverged", "timeout", "killed", "skipped")
RETRIED = ("failed", "killed", "timeout")
"""Those of jobs that may be tried again from their checkpoints."""


def row(job: Mapping[str, Any], measurement: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """A record from the facts of a job and of one of its measurements; columns that do not apply are None."""
    facts = {**job, **(measurement or {})}
    facts["bits_per_dim"] = _bits_per_dim(facts)
    facts["source_hash"] = _source_hash(facts.get("sources"))
    return {column: facts.get(column) for column in COLUMNS}


def _source_hash(sources: Mapping[str, str] | None) -> str | None:
    """Of all sources that a fit depends on; None for records of versions that kept no note of them."""
    return hashlib.sha256(json.dumps(sources, sort_keys=True).encode()).hexdigest()[:16] if sources else None


def _bits_per_dim(facts: Mapping[str, Any]) -> float | None:
    """-log2 p(x) per element: only for log-likelihoods of observations with an image's shape."""
    shape = facts.get("event_shape") or ()
    density = facts.get("binarisation") == "none"
    if facts.get("metric") != "log_likelihood" or len(shape) < 2 or facts.get("value") is None or density:
        return None
    return -facts["value"] / (math.prod(shape) * math.log(2))

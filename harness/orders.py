"""Orders: what is left of a plan as texts, each of which any machine with the same folders can carry out by itself."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.audience import Progress
from harness.bundling import Task, bundles
from harness.executing import execute, limited, stopping
from harness.options import UserError
from harness.planning import UNUSABLE, Comparison, find_device, rebuilt
from harness.registry import Registry
from harness.store import Store
from harness.working import WorkElsewhere

if TYPE_CHECKING:
    import pandas as pd

Order = Mapping[str, Any]

SCHEMA = 1
_OF_JOB = ("job_id", "problem_name", "problem_config", "method", "config", "seed", "budget", "precision", "step_mode")
_KEYS = {"schema": int, "folder": str, "out": str, "plugins": list, "device": str, "retry": list, "jobs": list}
_KEYS |= {"evaluators": list}


def orders_of(comparison: Comparison, store: Store, plugins: Iterable[str | Path]) -> list[Order]:
    """One for each job that is not done, or for so many as are fitted together; JSON-compatible."""
    tasks = [Task(job, entry) for job in comparison.jobs if not (entry := comparison.planned(job, store)).done]
    common = {
        "schema": SCHEMA,
        "folder": os.getcwd(),
        "out": str(store.path.absolute()),
        "plugins": [str(Path(path).absolute()) for path in plugins],
        "device": comparison.device.type,
        "retry": sorted(comparison.retry),
        "evaluators": [{"name": by.name, "config": by.config} for by in comparison.evaluators],
    }
    return [{**common, "jobs": [_job(task) for task in bundle]} for bundle in bundles(tasks)]


def _job(task: Task) -> dict[str, Any]:
    facts = task.job.facts()
    return {**{name: facts[name] for name in _OF_JOB}, "device": task.job.fitted_on or task.job.device.type}


def parsed(text: str | bytes) -> Order:
    """An order from its text, in UTF-8.

    Raises:
        UserError: If it is none.
    """
    try:
        order = json.loads(text)
    except ValueError as error:
        raise UserError(f"not an order, which is JSON as `harness plan --format jsonl` prints it: {error}") from None
    if not isinstance(order, dict) or any(not isinstance(order.get(key), kind) for key, kind in _KEYS.items()):
        raise UserError(f"not an order: expected {', '.join(_KEYS)}, as `harness plan --format jsonl` prints them")
    if order["schema"] != SCHEMA:
        raise UserError(f"the order has schema {order['schema']}; this version of the harness reads {SCHEMA}")
    return order


def comparison_of(order: Order) -> Comparison:
    """What is ordered.

    Raises:
        UserError: If it cannot be had here, or would be something else than where it was planned.
    """
    registry, device = Registry.discover(order["plugins"]), find_device(order["device"])
    try:
        evaluators = [
            dataclasses.replace(registry.prototype("evaluators", by["name"]), **by["config"])
            for by in order["evaluators"]
        ]
        jobs = [rebuilt(registry, facts, device) for facts in order["jobs"]]
        found = [job.job_id for job in jobs]
        wanted = [facts["job_id"] for facts in order["jobs"]]
    except KeyError as error:
        raise UserError(f"not an order: {error} is missing in it") from None
    except UNUSABLE as error:
        raise UserError(f"the order cannot be carried out here: {error}") from None
    if found != wanted:
        raise UserError(
            "the order would be another job here: sources, data or versions differ from those where it was planned; "
            "plan anew"
        )
    return Comparison(registry, jobs, evaluators, device, frozenset(order["retry"]))


def carry_out(
    order: Order,
    *,
    stop_after: float | str | None = None,
    time_limit: float | str | None = None,
    memory_limit: float | str | None = None,
    apart: bool = False,
    progress: Progress | None = None,
) -> pd.DataFrame:
    """Do what is ordered and not done yet; the folder's tables are left for whoever reads them to derive.

    Args:
        stop_after, time_limit, memory_limit: As in `harness.compare`.
        apart: Nothing else runs on this machine meanwhile; only then seconds are taken for comparable.

    Returns:
        The records of the order's jobs.

    Raises:
        UserError: If that is not possible here.
        Stopped: If the run has ended before its work was done; a KeyboardInterrupt.
    """
    stop, limits = stopping(stop_after), limited(time_limit, memory_limit)
    folder = Path(order["folder"])
    if not folder.is_dir():
        raise UserError(f"{order['folder']!r}, where it was planned, is not there on this machine")
    with contextlib.chdir(folder):
        comparison, store = comparison_of(order), Store.create(order["out"])
        elsewhere, beside = None, 1 if apart else 2
        if limits.any:
            elsewhere = WorkElsewhere(partial(comparison_of, order), store.path, None, beside, limits)
        return execute(comparison, store, progress or Progress(), stop, elsewhere, derive=False, beside=beside)

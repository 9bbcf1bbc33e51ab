"""The plan of a comparison and its execution; the Python interface that the command line calls."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import pandas as pd

from harness import environment
from harness.bundling import Task, bundles
from harness.evaluator import Evaluator
from harness.executors import LocalExecutor
from harness.job import Job
from harness.method import CurvePoint, Fit, Method
from harness.options import UserError, parse_seconds, unknown
from harness.planning import (
    Comparison,
    PlannedJob,
    Selection,
    find_device,
    find_dtype,
    resolve,
    select,
    stored_job,
)
from harness.problem import DeviceData, Problem, placed
from harness.registry import Registry
from harness.running import JobOutcome, fit_in_memory, fit_jobs, measure_job, restored
from harness.stopping import Stop
from harness.store import Store

log = logging.getLogger(__name__)

DEFAULT_PROBLEMS = ("four-points", "digits")
DEFAULT_OUT = "results/local"


class Progress(Protocol):
    """What is told of the work while it goes on."""

    def started(self, jobs: int) -> None: ...
    def job_started(self, job: PlannedJob, together: int = 1) -> None: ...
    def resumed(self, fraction: float, step: int) -> None: ...
    def step(self, fraction: float, step: int, objective: float, seconds: float) -> None: ...
    def measuring(self, evaluator: str) -> None: ...
    def measured(self, fraction: float, facts: str) -> None: ...
    def job_finished(self, job: PlannedJob, status: str, reason: str) -> None: ...
    def finished(self) -> None: ...


class Silent:
    """Progress that is not shown."""

    def started(self, jobs: int) -> None: ...
    def job_started(self, job: PlannedJob, together: int = 1) -> None: ...
    def resumed(self, fraction: float, step: int) -> None: ...
    def step(self, fraction: float, step: int, objective: float, seconds: float) -> None: ...
    def measuring(self, evaluator: str) -> None: ...
    def measured(self, fraction: float, facts: str) -> None: ...
    def job_finished(self, job: PlannedJob, status: str, reason: str) -> None: ...
    def finished(self) -> None: ...


def compare(
    methods: Selection,
    problems: Selection = DEFAULT_PROBLEMS,
    seeds: int | str | Sequence[int] = 3,
    *,
    budget: str | None = None,
    evaluators: Selection | None = None,
    device: str = "auto",
    precision: str = "float32",
    vectorize_seeds: bool = False,
    out: str | Path = DEFAULT_OUT,
    plugins: Iterable[str | Path] = (),
    retry: Iterable[str] = (),
    stop_after: float | str | Stop | None = None,
    progress: Progress | None = None,
) -> pd.DataFrame:
    """Fit every method to every problem from every seed, measure all fits alike, and keep everything under ``out``.

    What is done already is not done again.

    Args:
        methods, problems, evaluators: As on the command line (``"avb[lr=1e-4],vae"``), or objects, or a list of these.
            Evaluators: all that are used by default, unless given.
        seeds: How many (0, 1, ...), or which.
        budget: ``steps=5000`` and the like for all problems; each problem's own default unless given.
        vectorize_seeds: Fit all seeds of a method on a problem, and its learning rates, as one batched program. Each
            is the fit of its seed alone, but for the order of sums; they share a clock. Methods that cannot be batched
            are fitted one by one, with a warning in the log, and so are budgets of seconds or convergence.
        retry: Statuses (``failed`` ...) of finished jobs that are to be tried again.
        stop_after: Seconds after which this run ends at the next checkpoint, or before the next job or measurement; the
            same call goes on from there. To the end unless given. Several calls may share a `Stop`.

    Returns:
        The records of this comparison, one row per measurement.

    Raises:
        UserError: For any mistake in the arguments, before anything is run.
        Stopped: If the run has ended before its work was done; a KeyboardInterrupt.
    """
    stop = stopping(stop_after)
    comparison = resolve(
        methods, problems, seeds, budget, evaluators, device, precision, plugins, retry, vectorize_seeds
    )
    return _execute(comparison, Store.create(out), progress or Silent(), stop)


def plan(
    methods: Selection,
    problems: Selection = DEFAULT_PROBLEMS,
    seeds: int | str | Sequence[int] = 3,
    *,
    budget: str | None = None,
    evaluators: Selection | None = None,
    device: str = "auto",
    precision: str = "float32",
    vectorize_seeds: bool = False,
    out: str | Path = DEFAULT_OUT,
    plugins: Iterable[str | Path] = (),
    retry: Iterable[str] = (),
    stop_after: float | str | None = None,
) -> list[PlannedJob]:
    """Every job that `compare` with the same arguments would look at, done or not; runs none and writes nothing."""
    stopping(stop_after)
    comparison = resolve(
        methods, problems, seeds, budget, evaluators, device, precision, plugins, retry, vectorize_seeds
    )
    return [comparison.planned(job, Store(out)) for job in comparison.jobs]


def evaluate(
    out: str | Path,
    evaluators: Selection,
    *,
    device: str = "auto",
    plugins: Iterable[str | Path] = (),
    stop_after: float | str | None = None,
    progress: Progress | None = None,
) -> pd.DataFrame:
    """Measure all stored fits of a folder by further evaluators; nothing is trained.

    Fits whose method, problem or data have changed since are left out, with a warning in the log.

    Args:
        stop_after: Seconds after which this run ends before the next measurement. To the end unless given.

    Raises:
        UserError: If the folder holds no results, or for any mistake in the arguments.
        Stopped: If the run has ended before its work was done; a KeyboardInterrupt.
    """
    stop = stopping(stop_after)
    store, registry = Store.open(out), Registry.discover(plugins)
    chosen: list[Evaluator] = select(registry, "evaluators", evaluators)
    place = find_device(device)
    facts = [store.job(job_id) for job_id in store.job_ids()]
    jobs = [job for found in facts if found and found["status"] == "ok" and (job := stored_job(registry, found, place))]
    return _execute(Comparison(registry, jobs, chosen, place), store, progress or Silent(), stop)


def fit(
    method: str | Method,
    problem: str | Problem,
    seed: int = 0,
    *,
    budget: str | None = None,
    device: str = "auto",
    precision: str = "float32",
    plugins: Iterable[str | Path] = (),
) -> Fit:
    """Fit one method to one problem, in memory: the same fit, bit for bit, as that of `compare`.

    Raises:
        UserError: For any mistake in the arguments.
        Skipped, Diverged: As in `harness.running.fit_in_memory`.
    """
    comparison = resolve(method, problem, [seed], budget, None, device, precision, plugins, ())
    job: Job = _one(comparison.jobs, "fit")
    return fit_in_memory(job)


def load(out: str | Path, job_id: str, *, device: str = "auto", plugins: Iterable[str | Path] = ()) -> Fit:
    """A stored fit, with a posterior that can be sampled.

    Raises:
        UserError: If the folder has no such fit, or what defines it has changed since.
    """
    store, registry = Store.open(out), Registry.discover(plugins)
    facts = store.job(job_id)
    if facts is None:
        raise UserError(unknown("job", job_id, store.job_ids()))
    job = stored_job(registry, facts, find_device(device))
    if job is None:
        raise UserError(f"job {job_id!r}: its method, problem or data have changed since it was fitted; fit it anew")
    return restored(job, store)


def data(problem: str | Problem, *, device: str = "auto", precision: str = "float32") -> DeviceData:
    """The data of a problem as methods and evaluators see them.

    Raises:
        UserError: For any mistake in the arguments.
    """
    chosen: Problem = _one(select(Registry.discover(), "problems", problem), "data")
    return placed(chosen, find_device(device), find_dtype(precision))


def _one(items: Sequence[Any], what: str) -> Any:
    if len(items) != 1:
        raise UserError(f"{what} takes exactly one method and one problem, got {len(items)} combinations")
    return items[0]


# Execution


def _execute(comparison: Comparison, store: Store, progress: Progress, stop: Stop) -> pd.DataFrame:
    """Work on what is not done yet; the derived tables are written whatever happens."""
    tasks = [Task(job, entry) for job in comparison.jobs if not (entry := comparison.planned(job, store)).done]
    if not tasks:
        return _of(comparison, store.records() if store.is_derived() else store.derive())
    facts = {**environment.describe(comparison.device), "run_id": comparison.run_id}
    store.write_text("environment.json", json.dumps({**environment.versions(), **facts}, indent=1))

    def work(bundle: Sequence[Task]) -> None:
        stop.before_job()
        progress.job_started(bundle[0].entry, len(bundle))
        for task in bundle:
            comparison.registry.notify("harness_job_started", job=task.job)
        fits: list[tuple[JobOutcome, Fit | None]] = [(JobOutcome("ok"), None)]  # a single one, that is stored
        if not bundle[0].entry.status:
            jobs = [task.job for task in bundle]
            fits = fit_jobs(jobs, store, facts, _reporter(progress), progress.resumed, stop)
        for (job, entry), (outcome, fit) in zip(bundle, fits, strict=True):
            if len(bundle) > 1:
                progress.job_started(entry)
            if outcome.status == "ok":
                outcome = measure_job(job, entry.waiting, fit, store, progress.measuring, progress.measured, stop)
            progress.job_finished(entry, outcome.status, outcome.reason)
            comparison.registry.notify("harness_job_finished", job=job, outcome=outcome)

    progress.started(len(tasks))
    try:
        LocalExecutor().run(work, bundles(tasks))
    finally:
        progress.finished()
        records = store.derive()
    return _of(comparison, records)


def stopping(after: float | str | Stop | None) -> Stop:
    """The stop that is asked for as on the command line.

    Raises:
        UserError: If it is no positive number of seconds.
    """
    if isinstance(after, Stop):
        return after
    return Stop() if after is None else Stop(parse_seconds("stop-after", after))


def _of(comparison: Comparison, records: pd.DataFrame) -> pd.DataFrame:
    """The records that speak of a comparison, in the order of its jobs."""
    order = {job.job_id: i for i, job in enumerate(comparison.jobs)}
    labels = {by.label for by in comparison.evaluators}
    mine = records[records["job_id"].isin(order) & (records["evaluator"].isin(labels) | records["evaluator"].isna())]
    return mine.sort_values("job_id", key=lambda ids: ids.map(order), kind="stable").reset_index(drop=True)


def _reporter(progress: Progress) -> Any:
    def report(fraction: float, point: CurvePoint) -> None:
        progress.step(fraction, point.step, point.objective, point.seconds)

    return report

"""The plan of a comparison and its execution; the Python interface that the command line calls."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, get_args

import pandas as pd
import torch

from harness import environment
from harness.evaluator import Evaluator
from harness.executors import LocalExecutor
from harness.job import Job, Precision, evaluator_file, fit_in_memory, is_measured, restored, run_job
from harness.method import Budget, CurvePoint, Fit, Method
from harness.options import UserError, parse_seeds, unknown
from harness.problem import DeviceData, Problem, placed
from harness.record import STATUSES
from harness.registry import Registry
from harness.store import Facts, Store

log = logging.getLogger(__name__)

DEFAULT_PROBLEMS = ("four-points", "digits")
DEFAULT_OUT = "results/local"

Selection = str | Method | Problem | Evaluator | Iterable[str | Method | Problem | Evaluator]


@dataclass(frozen=True)
class PlannedJob:
    """A job of a plan: what it is, how it ended if it is done, and which evaluators have not measured it yet.

    Args:
        problem, label: Problem and method with the options that differ from their defaults, for reading.
    """

    job_id: str
    problem: str
    method: str
    label: str
    config: dict[str, Any]
    seed: int
    budget: str
    status: str
    waiting: tuple[Evaluator, ...]

    @property
    def missing(self) -> tuple[str, ...]:
        """Names of the evaluators that have not measured it yet."""
        return tuple(by.name for by in self.waiting)

    @property
    def done(self) -> bool:
        return bool(self.status) and not self.waiting


class Progress(Protocol):
    """What is told of the work while it goes on."""

    def started(self, jobs: int) -> None: ...
    def job_started(self, index: int, job: PlannedJob) -> None: ...
    def step(self, fraction: float, step: int, objective: float, seconds: float) -> None: ...
    def measuring(self, evaluator: str) -> None: ...
    def job_finished(self, job: PlannedJob, status: str, reason: str) -> None: ...
    def finished(self) -> None: ...


class Silent:
    """Progress that is not shown."""

    def started(self, jobs: int) -> None: ...
    def job_started(self, index: int, job: PlannedJob) -> None: ...
    def step(self, fraction: float, step: int, objective: float, seconds: float) -> None: ...
    def measuring(self, evaluator: str) -> None: ...
    def job_finished(self, job: PlannedJob, status: str, reason: str) -> None: ...
    def finished(self) -> None: ...


@dataclass(frozen=True)
class Comparison:
    """What is to be compared, resolved and validated: every job with the evaluators that are to measure it."""

    registry: Registry
    jobs: Sequence[Job]
    evaluators: Sequence[Evaluator]
    device: torch.device
    retry: frozenset[str] = field(default_factory=frozenset)

    @property
    def run_id(self) -> str:
        """Identifies what was asked for: the same command has the same one."""
        asked = [[job.job_id for job in self.jobs], [evaluator_file(by) for by in self.evaluators]]
        return hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:12]

    def planned(self, job: Job, store: Store) -> PlannedJob:
        """What is left to do for a job."""
        facts = store.job(job.job_id) or {"status": ""}
        status = "" if facts["status"] in self.retry else facts["status"]
        waiting = [by for by in self.evaluators if not is_measured(job, by, store, self.retry)]
        return PlannedJob(
            job.job_id,
            job.problem.label,
            job.method.name,
            job.method.label,
            job.method.config,
            job.seed,
            str(job.budget),
            status,
            tuple(waiting) if status in ("", "ok") else (),
        )


def compare(
    methods: Selection,
    problems: Selection = DEFAULT_PROBLEMS,
    seeds: int | str | Sequence[int] = 3,
    *,
    budget: str | None = None,
    evaluators: Selection | None = None,
    device: str = "auto",
    precision: str = "float32",
    out: str | Path = DEFAULT_OUT,
    plugins: Iterable[str | Path] = (),
    retry: Iterable[str] = (),
    progress: Progress | None = None,
) -> pd.DataFrame:
    """Fit every method to every problem from every seed, measure all fits alike, and keep everything under ``out``.

    What is done already is not done again.

    Args:
        methods, problems, evaluators: As on the command line (``"avb[lr=1e-4],vae"``), or objects, or a list of these.
            Evaluators: all that are used by default, unless given.
        seeds: How many (0, 1, ...), or which.
        budget: ``steps=5000`` and the like for all problems; each problem's own default unless given.
        retry: Statuses (``failed`` ...) of finished jobs that are to be tried again.

    Returns:
        The records of this comparison, one row per measurement.

    Raises:
        UserError: For any mistake in the arguments, before anything is run.
    """
    comparison = _resolve(methods, problems, seeds, budget, evaluators, device, precision, plugins, retry)
    return _execute(comparison, Store.create(out), progress or Silent())


def plan(
    methods: Selection,
    problems: Selection = DEFAULT_PROBLEMS,
    seeds: int | str | Sequence[int] = 3,
    *,
    budget: str | None = None,
    evaluators: Selection | None = None,
    device: str = "auto",
    precision: str = "float32",
    out: str | Path = DEFAULT_OUT,
    plugins: Iterable[str | Path] = (),
    retry: Iterable[str] = (),
) -> list[PlannedJob]:
    """Every job that `compare` with the same arguments would look at, done or not; runs none and writes nothing."""
    comparison = _resolve(methods, problems, seeds, budget, evaluators, device, precision, plugins, retry)
    return [comparison.planned(job, Store(out)) for job in comparison.jobs]


def evaluate(
    out: str | Path,
    evaluators: Selection,
    *,
    device: str = "auto",
    plugins: Iterable[str | Path] = (),
    progress: Progress | None = None,
) -> pd.DataFrame:
    """Measure all stored fits of a folder by further evaluators; nothing is trained.

    Fits whose method, problem or data have changed since are left out, with a warning in the log.

    Raises:
        UserError: If the folder holds no results, or for any mistake in the arguments.
    """
    store, registry = Store.open(out), Registry.discover(plugins)
    chosen: list[Evaluator] = _select(registry, "evaluators", evaluators)
    place = _device(device)
    facts = [store.job(job_id) for job_id in store.job_ids()]
    jobs = [job for found in facts if found and found["status"] == "ok" and (job := _stored_job(registry, found, place))]
    return _execute(Comparison(registry, jobs, chosen, place), store, progress or Silent())


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
        Skipped, Diverged: As in `harness.job.fit_in_memory`.
    """
    comparison = _resolve(method, problem, [seed], budget, None, device, precision, plugins, ())
    return fit_in_memory(_one(comparison.jobs, "fit"))[0]


def load(out: str | Path, job_id: str, *, device: str = "auto", plugins: Iterable[str | Path] = ()) -> Fit:
    """A stored fit, with a posterior that can be sampled.

    Raises:
        UserError: If the folder has no such fit, or what defines it has changed since.
    """
    store, registry = Store.open(out), Registry.discover(plugins)
    facts = store.job(job_id)
    if facts is None:
        raise UserError(unknown("job", job_id, store.job_ids()))
    job = _stored_job(registry, facts, _device(device))
    if job is None:
        raise UserError(f"job {job_id!r}: its method, problem or data have changed since it was fitted; fit it anew")
    return restored(job, store)


def data(problem: str | Problem, *, device: str = "auto", precision: str = "float32") -> DeviceData:
    """The data of a problem as methods and evaluators see them.

    Raises:
        UserError: For any mistake in the arguments.
    """
    chosen: Problem = _one(_select(Registry.discover(), "problems", problem), "data")
    return placed(chosen, _device(device), _dtype(precision))


def _one(items: Sequence[Any], what: str) -> Any:
    if len(items) != 1:
        raise UserError(f"{what} takes exactly one method and one problem, got {len(items)} combinations")
    return items[0]


# Resolving what was asked for


def _resolve(
    methods: Selection,
    problems: Selection,
    seeds: int | str | Sequence[int],
    budget: str | None,
    evaluators: Selection | None,
    device: str,
    precision: str,
    plugins: Iterable[str | Path],
    retry: Iterable[str],
) -> Comparison:
    registry = Registry.discover(plugins)
    chosen_methods: list[Method] = _select(registry, "methods", methods)
    chosen_problems: list[Problem] = _select(registry, "problems", problems)
    chosen_evaluators: list[Evaluator] = (
        [provided.thing for provided in registry.evaluators.values() if provided.thing.by_default]
        if evaluators is None
        else _select(registry, "evaluators", evaluators)
    )
    place, numbers = _device(device), parse_seeds(seeds)
    _dtype(precision)
    everywhere = Budget.parse(budget) if budget is not None else None
    jobs = [
        Job(
            problem,
            method,
            seed,
            everywhere or Budget.parse(problem.default_budget),
            place,
            precision,  # type: ignore[arg-type]
            plugin=registry.plugin_of("methods", method),
        )
        for problem in chosen_problems
        for seed in numbers
        for method in chosen_methods
    ]
    return Comparison(registry, jobs, chosen_evaluators, place, _statuses(retry))


def _select(registry: Registry, kind: str, selection: Selection) -> list[Any]:
    if isinstance(selection, str):
        return registry.select(kind, selection)
    items = selection if isinstance(selection, Iterable) else [selection]
    chosen = [
        thing for item in items for thing in (registry.select(kind, item) if isinstance(item, str) else [item])
    ]
    if not chosen:
        raise UserError(f"{kind}: expected at least one, got none")
    repeated = [item.label for i, item in enumerate(chosen) if item in chosen[:i]]
    if repeated:
        raise UserError(f"{kind}: the same run is asked for twice: {repeated[0]}")
    return chosen


def _statuses(retry: Iterable[str]) -> frozenset[str]:
    known = [status for status in STATUSES if status not in ("ok", "skipped")]
    for status in retry:
        if status not in known:
            raise UserError(unknown("status to retry", status, known))
    return frozenset(retry)


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name not in ("cpu", "cuda"):
        raise UserError(unknown("device", name, ["auto", "cpu", "cuda"]))
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("device 'cuda' is not available on this machine; use --device cpu or auto")
    return torch.device(name)


def _dtype(precision: str) -> torch.dtype:
    if precision not in get_args(Precision):
        raise UserError(unknown("precision", precision, get_args(Precision)))
    return getattr(torch, precision)


def _stored_job(registry: Registry, facts: Facts, device: torch.device) -> Job | None:
    """The job that a store's facts speak of, or None if it would be another job today."""
    try:
        method = registry.prototype("methods", facts["method"])
        problem = registry.prototype("problems", facts["problem_name"])
        job = Job(
            dataclasses.replace(problem, **facts["problem_config"]),
            dataclasses.replace(method, **json.loads(facts["config"])),
            facts["seed"],
            Budget.parse(facts["budget"]),
            device,
            facts["precision"],
            facts["step_mode"],
            registry.plugin_of("methods", method),
            fitted_on=facts["device"],
        )
    except (UserError, TypeError) as error:
        log.warning("job %s is left out: %s", facts["job_id"], error)
        return None
    if job.job_id != facts["job_id"]:
        log.warning("job %s (%s on %s) is left out: its sources or data have changed since it was fitted",
                    facts["job_id"], facts["method"], facts["problem"])  # fmt: skip
        return None
    return job


# Execution


def _execute(comparison: Comparison, store: Store, progress: Progress) -> pd.DataFrame:
    """Work on what is not done yet; the derived tables are written whatever happens."""
    tasks = [(job, entry) for job in comparison.jobs if not (entry := comparison.planned(job, store)).done]
    if not tasks:
        return _of(comparison, store.records())
    facts = {**environment.describe(comparison.device), "run_id": comparison.run_id}
    store.write_text("environment.json", json.dumps({**environment.versions(), **facts}, indent=1))
    counter = itertools.count(1)

    def work(task: tuple[Job, PlannedJob]) -> None:
        job, entry = task
        progress.job_started(next(counter), entry)
        comparison.registry.manager.hook.harness_job_started(job=job)
        outcome = run_job(job, entry.waiting, store, facts, _reporter(progress), progress.measuring)
        progress.job_finished(entry, outcome.status, outcome.reason)
        comparison.registry.manager.hook.harness_job_finished(job=job, outcome=outcome)

    progress.started(len(tasks))
    try:
        LocalExecutor().run(work, tasks)
    finally:
        progress.finished()
        records = store.derive()
    return _of(comparison, records)


def _of(comparison: Comparison, records: pd.DataFrame) -> pd.DataFrame:
    """The records that speak of a comparison, in the order of its jobs."""
    order = {job.job_id: i for i, job in enumerate(comparison.jobs)}
    names = {by.name for by in comparison.evaluators}
    mine = records[records["job_id"].isin(order) & (records["evaluator"].isin(names) | records["evaluator"].isna())]
    return mine.sort_values("job_id", key=lambda ids: ids.map(order), kind="stable").reset_index(drop=True)


def _reporter(progress: Progress) -> Any:
    def report(fraction: float, point: CurvePoint) -> None:
        progress.step(fraction, point.step, point.objective, point.seconds)

    return report

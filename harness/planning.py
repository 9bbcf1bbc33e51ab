"""The plan of a comparison: from what a user asks for to jobs and evaluators, validated before anything runs."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import sys
import traceback
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from harness.checkpoint import Reached, reached
from harness.evaluator import Evaluator
from harness.job import VECTORISED, Job, evaluator_file, is_measured
from harness.loading import reason_of
from harness.method import Budget, Method
from harness.options import UserError, one_of, parse_seeds, several, unknown
from harness.precision import parse_precision
from harness.problem import DataError, Problem, check_suited
from harness.record import FROM_FILE, STATUSES
from harness.registry import KINDS, Registry
from harness.stepping import parse_step
from harness.store import Facts, Store
from harness.training import OF_ITS_OWN

log = logging.getLogger(__name__)

Selection = str | Method | Problem | Evaluator | Iterable[str | Method | Problem | Evaluator]


@dataclass(frozen=True)
class PlannedJob:
    """A job of a plan: what it is, how it ended if it is done, and which evaluators have not measured it yet.

    Args:
        problem, label: Problem and method with the options that differ from their defaults, for reading.
        step, fraction: How far its fit has come, if it has a checkpoint; 0 if it has none or if nobody knows.
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
    step: int = 0
    fraction: float = 0.0

    @property
    def missing(self) -> tuple[str, ...]:
        """Names of the evaluators that have not measured it yet."""
        return tuple(by.name for by in self.waiting)

    @property
    def done(self) -> bool:
        return bool(self.status) and not self.waiting


@dataclass(frozen=True)
class Comparison:
    """What is to be compared, resolved and validated: every job with the evaluators that are to measure it.

    Args:
        trains: Whether a job without a stored fit may be fitted.
    """

    registry: Registry
    jobs: Sequence[Job]
    evaluators: Sequence[Evaluator]
    device: torch.device
    retry: frozenset[str] = frozenset()
    trains: bool = True

    @property
    def run_id(self) -> str:
        """Identifies what was asked for: the same command has the same one."""
        asked = [[job.job_id for job in self.jobs], [evaluator_file(by) for by in self.evaluators]]
        return hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:12]

    def waiting(self, job: Job, store: Store) -> tuple[Evaluator, ...]:
        """The evaluators that have not measured a job yet."""
        return tuple(by for by in self.evaluators if not is_measured(job, by, store, self.retry))

    def planned(self, job: Job, store: Store) -> PlannedJob:
        """What is left to do for a job."""
        facts = store.job(job.job_id) or {"status": ""}
        status = "" if facts["status"] in self.retry else facts["status"]
        waiting = self.waiting(job, store)
        needed = bool(waiting) or (self.trains and store.has_lost_fit(job.job_id))
        if status == "ok" and needed and not store.has_fit(job.job_id):
            status = ""
        begun = (None if status else reached(store, job.job_id)) or Reached(0, 0.0)
        return PlannedJob(
            job.job_id,
            job.problem.label,
            job.method.name,
            job.method.label,
            job.method.config,
            job.seed,
            str(job.budget),
            status,
            waiting if status in ("", "ok") else (),
            begun.step,
            begun.fraction,
        )


def resolve(
    methods: Selection,
    problems: Selection,
    seeds: int | str | Sequence[int],
    budget: str | None,
    evaluators: Selection | None,
    device: str,
    precision: str,
    step: str,
    plugins: Iterable[str | Path],
    retry: Iterable[str],
    vectorize_seeds: bool = False,
    here: bool = True,
) -> Comparison:
    """The comparison that is asked for.

    Args:
        here: Whether its jobs are to run on this machine: then the device must be there.

    Raises:
        UserError: For any mistake in the arguments.
    """
    registry = Registry.discover(plugins)
    chosen_methods: list[Method] = select(registry, "methods", methods)
    chosen_problems: list[Problem] = select(registry, "problems", problems)
    chosen_evaluators: list[Evaluator] = (
        [provided.thing for provided in registry.evaluators.values() if provided.thing.by_default]
        if evaluators is None
        else select(registry, "evaluators", evaluators)
    )
    place, numbers = find_device(device, here), parse_seeds(seeds)
    precisely, mode = parse_precision(precision), parse_step(step)
    everywhere = Budget.parse(budget) if budget is not None else None
    for problem in chosen_problems:
        check(problem)
    jobs = [
        Job(
            problem,
            method,
            seed,
            everywhere or Budget.parse(problem.default_budget),
            place,
            precisely,
            registry.plugin_of("methods", method),
            mode,
        )
        for problem in chosen_problems
        for seed in numbers
        for method in chosen_methods
    ]
    jobs = vectorised(jobs) if vectorize_seeds else jobs
    return Comparison(registry, jobs, chosen_evaluators, place, parse_statuses(retry))


def vectorised(jobs: Iterable[Job]) -> list[Job]:
    """The jobs, those whose steps can be shared in that mode; why others' cannot is told in the log."""
    reasons = {job: _one_by_one(job) for job in jobs}
    for name, reason in dict.fromkeys((job.method.name, reason) for job, reason in reasons.items() if reason):
        log.warning("%s: seeds are fitted one by one: %s", name, reason)
    return [
        job if reason else dataclasses.replace(job, step_mode=f"{VECTORISED} {job.step_mode}")
        for job, reason in reasons.items()
    ]


def _one_by_one(job: Job) -> str | None:
    if job.budget.unit in OF_ITS_OWN:
        return OF_ITS_OWN[job.budget.unit]
    return job.method.one_by_one()


def check(problem: Problem) -> None:
    """Data that are missing, wrong or not suited, and mistakes in a problem's program, are told before anything runs.

    Raises:
        UserError, DataError: If there is one.
    """
    with _mistakes_told(problem):
        check_suited(problem)
        Budget.parse(problem.default_budget)
        _ = problem.spec_hash


@contextmanager
def _mistakes_told(problem: Problem) -> Iterator[None]:
    """Whatever a problem's author has done wrong becomes an error of one line that says where."""
    try:
        yield
    except (UserError, DataError):
        raise
    except Exception as error:
        raise UserError(f"problem {problem.label!r}: {reason_of(error)}{_place(error, type(problem))}") from error


def _place(error: Exception, cls: type) -> str:
    """Where in the files that define a class, as far as these are not the harness's own, an error has come up."""
    own = [base for base in cls.__mro__ if base.__module__.partition(".")[0] not in ("harness", "builtins")]
    files = {getattr(sys.modules.get(base.__module__), "__file__", None) for base in own}
    lines = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename in files]
    return f" ({Path(lines[-1].filename).name}, line {lines[-1].lineno})" if lines else ""


def select(registry: Registry, kind: str, selection: Selection) -> list[Any]:
    if isinstance(selection, str):
        return registry.select(kind, selection)
    items = tuple(selection) if isinstance(selection, Iterable) else (selection,)
    wrong = [item for item in items if not isinstance(item, str | KINDS[kind])]
    if wrong:
        raise UserError(f"{kind}: expected names, or objects of class {KINDS[kind].__name__}, got {wrong[0]!r}")
    chosen = [thing for item in items for thing in (registry.select(kind, item) if isinstance(item, str) else [item])]
    if not chosen:
        raise UserError(f"{kind}: expected at least one, got none")
    repeated = [item.label for i, item in enumerate(chosen) if item in chosen[:i]]
    if repeated:
        raise UserError(f"{kind}: the same run is asked for twice: {repeated[0]}")
    return chosen


def parse_statuses(retry: Iterable[str]) -> frozenset[str]:
    """Statuses that are to be tried again: one by one, or as on the command line, ``"failed,diverged"``.

    Raises:
        UserError: If one is none that a job or a measurement can end badly with.
    """
    known = [status for status in STATUSES if status not in ("ok", "skipped")]
    given = [status.strip() for text in several(retry) for status in text.split(",")]
    return frozenset(one_of("status to retry", status, known) for status in given)


def find_device(name: str | torch.device, here: bool = True) -> torch.device:
    if one_of("device", str(name), ["auto", "cpu", "cuda"]) == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if here and str(name) == "cuda" and not torch.cuda.is_available():
        raise UserError("device 'cuda' is not available on this machine; use --device cpu or auto")
    return torch.device(name)


UNUSABLE = (UserError, DataError, TypeError)
"""What is raised where a stored job has no counterpart today: its plugin, an option or its data are not there."""


def rebuilt(registry: Registry, facts: Facts, device: torch.device) -> Job:
    """The job that would be computed today where a store's facts speak of one; it may be another one.

    Raises:
        UserError, DataError, TypeError: `UNUSABLE`, if there is none; or later, when it is asked for its id.
    """
    method = registry.prototype("methods", facts["method"])
    problem = dataclasses.replace(registry.prototype("problems", facts["problem_name"]), **facts["problem_config"])
    with _mistakes_told(problem):
        _ = problem.spec_hash
    return Job(
        problem,
        dataclasses.replace(method, **json.loads(facts["config"])),
        facts["seed"],
        Budget.parse(facts["budget"]),
        device,
        facts["precision"],
        registry.plugin_of("methods", method),
        facts["step_mode"],
        fitted_on=facts["device"],
    )


def only(found: Sequence[str], job_id: str, known: Iterable[str]) -> str:
    """The one job that was found by the beginning of its id.

    Raises:
        UserError: If there is none, or several.
    """
    if not found:
        raise UserError(unknown("job", job_id, known))
    if len(found) > 1:
        raise UserError(f"{len(found)} jobs begin with {job_id!r}: {', '.join(found[:3])}{' ...' * (len(found) > 3)}")
    return found[0]


def stored_job(registry: Registry, facts: Facts, device: torch.device) -> Job:
    """The job that a store's facts speak of.

    Raises:
        UserError: If there is none today, or if it would be another one; it says why.
    """
    try:
        job = rebuilt(registry, facts, device)
        if job.job_id == facts["job_id"]:
            return job
        reason = "its method, problem or data have changed since it was fitted; fit it anew"
    except UNUSABLE as error:
        reason = str(error)
    missing = _missing_files(registry, facts)
    if missing:
        reason = f"it comes from file {' and '.join(missing)}: give --plugin, or plugins= in Python"
    raise UserError(reason)


def _missing_files(registry: Registry, facts: Facts) -> list[str]:
    """The plugin files that a stored job was made with and that are not loaded."""
    loaded = {plugin.distribution for plugin in registry.plugins}
    noted = {f"{FROM_FILE}{name}" for name in facts.get("sources") or {} if name.endswith(".py")}  # of problems too
    if str(facts.get("plugin")).startswith(FROM_FILE):
        noted.add(facts["plugin"])
    return [name.removeprefix(FROM_FILE) for name in sorted(noted - loaded)]

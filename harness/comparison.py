"""The plan of a comparison and its execution; the Python interface that the command line calls."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.audience import Progress
from harness.evaluator import Evaluator
from harness.executing import execute, limited, records_of, stopping
from harness.executor import Executor
from harness.executors.workers import sent
from harness.job import Job
from harness.method import Fit, Method
from harness.options import UserError, parse_jobs, several
from harness.planning import (
    Comparison,
    PlannedJob,
    Selection,
    find_device,
    only,
    parse_statuses,
    resolve,
    select,
    stored_job,
)
from harness.precision import dtype_of, parse_precision
from harness.problem import DeviceData, Problem, placed
from harness.registry import Registry
from harness.running import fit_in_memory, restored
from harness.stopping import Stop
from harness.store import Facts, Store
from harness.working import NO_FIT, WorkElsewhere, threads_each

if TYPE_CHECKING:
    import pandas as pd
    import torch

log = logging.getLogger(__name__)

DEFAULT_PROBLEMS = ("four-points", "digits")
DEFAULT_OUT = "results/local"


def compare(
    methods: Selection,
    problems: Selection = DEFAULT_PROBLEMS,
    seeds: int | str | Sequence[int] = 3,
    *,
    budget: str | None = None,
    evaluators: Selection | None = None,
    device: str = "auto",
    precision: str = "float32",
    step: str = "auto",
    vectorize_seeds: bool = False,
    out: str | Path = DEFAULT_OUT,
    plugins: Iterable[str | Path] = (),
    retry: Iterable[str] = (),
    only_failed: bool = False,
    stop_after: float | str | Stop | None = None,
    jobs: int | str = 1,
    executor: str | Executor | None = None,
    time_limit: float | str | None = None,
    memory_limit: float | str | None = None,
    progress: Progress | None = None,
) -> pd.DataFrame:
    """Fit every method to every problem from every seed, measure all fits alike, and keep everything under ``out``.

    What is done already is not done again.

    Args:
        methods, problems, evaluators: As on the command line (``"avb[lr=1e-4],vae"``), or objects, or a list of these.
            Evaluators: all that are used by default, unless given.
        seeds: How many (0, 1, ...), or which.
        budget: ``steps=5000`` and the like for all problems; each problem's own default unless given.
        precision: ``float32``, ``float64``, or ``bf16``: layers of networks multiply in bfloat16 while they train.
        step: How a step of training is taken: ``eager``, operation by operation; ``graph``, from a recording of them,
            to the same numbers on a CPU; ``compile``, the recording compiled; ``auto`` is ``graph`` after the first 100
            updates. Methods that cannot be recorded take theirs eagerly; what was done is in the column ``step_used``.
        vectorize_seeds: Fit all seeds of a method on a problem, and its learning rates, as one batched program. Each
            is the fit of its seed alone, but for the order of sums; they share a clock. Methods that cannot be batched
            are fitted one by one, with a warning in the log, and so are budgets of seconds or convergence.
        retry: Statuses (``failed`` ...) of finished jobs that are to be tried again.
        only_failed: Leave out jobs that have not been tried yet; ``retry`` is ``failed`` then unless given.
        stop_after: Seconds after which this run ends at the next checkpoint, or before the next job or measurement; the
            same call goes on from there. To the end unless given. Several calls may share a `Stop`.
        jobs: How many to work on at once, each in a worker process with its part of the cores. What is timed is not
            comparable then, and says so; fits whose budget is seconds run one at a time, with as many threads. Objects
            among the arguments must be such that they can be pickled.
        executor: Where jobs run, if not on this machine (``"slurm[minutes=120]"``), or an object. What is found here of
            methods, problems and data must be there too. Unless a device is named, it is one as this machine has.
        time_limit: Seconds (or ``"10min"``) after which a fit, or a measurement, is killed; it gets the status
            ``timeout``, and the work goes on. Fits that are trained together have that time for each of them.
        memory_limit: Bytes (or ``"8GiB"``) of main memory beyond which the process of a fit or measurement is killed;
            looked at five times a second. With a limit all work is done in worker processes, also with ``jobs=1``.

    Returns:
        The records of this comparison, one row per measurement.

    Raises:
        UserError: For any mistake in the arguments, before anything is run.
        Stopped: If the run has ended before its work was done; a KeyboardInterrupt.
    """
    stop, workers, limits = stopping(stop_after), parse_jobs(jobs), limited(time_limit, memory_limit)
    asked = {
        "methods": _kept(methods),
        "problems": _kept(problems),
        "seeds": seeds,
        "budget": budget,
        "evaluators": _kept(evaluators),
        "device": device,
        "precision": precision,
        "step": step,
        "plugins": several(plugins),
        "retry": _to_retry(retry, only_failed),
        "vectorize_seeds": vectorize_seeds,
    }
    chosen = executor_of(executor, plugins, workers)
    comparison = _tried(resolve(**asked, here=chosen is None), Store(out), only_failed)
    elsewhere = None
    if chosen:
        asked |= {"device": comparison.device.type, "here": True}
        elsewhere = WorkElsewhere(
            partial(resolve, **asked), Path(out).resolve(), chosen.threads, 1 if chosen.apart else 2, limits
        )
    elif workers > 1 or limits.any:
        elsewhere = WorkElsewhere(partial(resolve, **asked), Path(out), threads_each(workers), workers, limits)
    if elsewhere:
        sent(elsewhere)
    return execute(comparison, Store.create(out), progress or Progress(), stop, elsewhere, chosen)


def plan(methods: Selection, *arguments: Any, out: str | Path = DEFAULT_OUT, **asked: Any) -> list[PlannedJob]:
    """Every job that `compare` with the same arguments would look at, done or not; runs none.

    Nothing is written; but a damaged file that it comes upon goes into quarantine.

    Raises:
        UserError: For any mistake in the arguments.
    """
    found, store = planned(methods, *arguments, out=out, **asked), Store(out)
    return [found.planned(job, store) for job in found.jobs]


def stored(methods: Selection, *arguments: Any, out: str | Path = DEFAULT_OUT, **asked: Any) -> pd.DataFrame:
    """The records that `compare` with the same arguments has made so far; it runs nothing.

    Raises:
        UserError: For any mistake in the arguments.
    """
    comparison = planned(methods, *arguments, out=out, **asked)
    return records_of(comparison, Store(out).records(job.job_id for job in comparison.jobs))


def planned(
    methods: Selection,
    problems: Selection = DEFAULT_PROBLEMS,
    seeds: int | str | Sequence[int] = 3,
    *,
    budget: str | None = None,
    evaluators: Selection | None = None,
    device: str = "auto",
    precision: str = "float32",
    step: str = "auto",
    vectorize_seeds: bool = False,
    out: str | Path = DEFAULT_OUT,
    plugins: Iterable[str | Path] = (),
    retry: Iterable[str] = (),
    only_failed: bool = False,
    stop_after: float | str | None = None,
    jobs: int | str = 1,
    executor: str | Executor | None = None,
    time_limit: float | str | None = None,
    memory_limit: float | str | None = None,
    here: bool = True,
) -> Comparison:
    """What `compare` with the same arguments would work on.

    Args:
        here: Whether its jobs are to run on this machine, unless an executor is named: then the device must be there.

    Raises:
        UserError: For any mistake in the arguments.
    """
    stopping(stop_after)
    limited(time_limit, memory_limit)
    here = executor_of(executor, plugins, parse_jobs(jobs)) is None and here
    statuses, store = _to_retry(retry, only_failed), Store(out)
    comparison = resolve(
        methods, problems, seeds, budget, evaluators, device, precision, step, plugins, statuses, vectorize_seeds, here
    )
    return _tried(comparison, store, only_failed)


def evaluate(
    out: str | Path,
    evaluators: Selection,
    *,
    device: str = "auto",
    plugins: Iterable[str | Path] = (),
    retry: Iterable[str] = (),
    stop_after: float | str | None = None,
    progress: Progress | None = None,
) -> pd.DataFrame:
    """Measure all stored fits of a folder by further evaluators; nothing is trained.

    Fits that are gone, or whose method, problem or data have changed since, are left out, with a warning in the log.

    Args:
        retry: Statuses (``failed`` ...) of measurements that are to be tried again.
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
    jobs = _usable(registry, [found for found in facts if found and found["status"] == "ok"], place)
    comparison = Comparison(registry, jobs, chosen, place, parse_statuses(retry), trains=False)
    kept = [job for job in jobs if comparison.planned(job, store).status == "ok"]
    for job in jobs:
        if job not in kept:
            log.warning("job %s (%s on %s) is left out: %s", job.job_id, job.method.label, job.problem.label, NO_FIT)
    return execute(dataclasses.replace(comparison, jobs=kept), store, progress or Progress(), stop)


def _usable(registry: Registry, facts: Iterable[Facts], device: torch.device) -> list[Job]:
    """The stored jobs that would be the same today; why others would not is told in the log."""
    jobs: list[Job] = []
    for found in facts:
        try:
            jobs.append(stored_job(registry, found, device))
        except UserError as error:
            named = (found["job_id"], found["method"], found["problem"])
            log.warning("job %s (%s on %s) is left out: %s", *named, error)
    return jobs


def fit(
    method: str | Method,
    problem: str | Problem,
    seed: int = 0,
    *,
    budget: str | None = None,
    device: str = "auto",
    precision: str = "float32",
    step: str = "auto",
    plugins: Iterable[str | Path] = (),
) -> Fit:
    """Fit one method to one problem, in memory: the same fit, bit for bit, as that of `compare`.

    Raises:
        UserError: For any mistake in the arguments.
        Skipped, Diverged: As in `harness.running.fit_in_memory`.
    """
    comparison = resolve(method, problem, [seed], budget, None, device, precision, step, plugins, ())
    job: Job = _one(comparison.jobs, "fit")
    return fit_in_memory(job)


def load(out: str | Path, job_id: str, *, device: str = "auto", plugins: Iterable[str | Path] = ()) -> Fit:
    """A stored fit, with a posterior that can be sampled.

    Args:
        job_id: So much of it as no other job's begins with.

    Raises:
        UserError: If the folder has no such fit, or what defines it is not there or has changed since.
    """
    store, registry = Store.open(out), Registry.discover(plugins)
    names = store.job_ids()
    facts = store.job(only([name for name in names if name.startswith(job_id)], job_id, names)) or {}
    try:
        job = stored_job(registry, facts, find_device(device))
    except UserError as error:
        raise UserError(f"job {job_id!r}: {error}") from None
    return restored(job, store)


def data(
    problem: str | Problem,
    *,
    device: str = "auto",
    precision: str = "float32",
    plugins: Iterable[str | Path] = (),
) -> DeviceData:
    """The data of a problem as methods and evaluators see them.

    Raises:
        UserError: For any mistake in the arguments.
    """
    chosen: Problem = _one(select(Registry.discover(plugins), "problems", problem), "data")
    return placed(chosen, find_device(device), dtype_of(parse_precision(precision)))


def _one(items: Sequence[Any], what: str) -> Any:
    if len(items) != 1:
        raise UserError(f"{what} takes exactly one method and one problem, got {len(items)} combinations")
    return items[0]


def executor_of(given: str | Executor | None, plugins: Iterable[str | Path], jobs: int) -> Executor | None:
    """Where jobs run, if not on this machine.

    Raises:
        UserError: If there is none of that name, or if it is asked for several jobs at once on this machine too.
    """
    if given is None or given == "local":
        return None
    chosen: list[Executor] = (
        [given] if isinstance(given, Executor) else Registry.discover(plugins).select("executors", given)
    )
    if len(chosen) != 1:
        raise UserError(f"executor: expected one, got {len(chosen)}: {given!r}")
    if jobs > 1:
        raise UserError(f"jobs: how many run at once is up to the executor {chosen[0].label!r}; leave jobs at 1")
    return chosen[0]


def _to_retry(retry: Iterable[str], only_failed: bool) -> tuple[str, ...]:
    return several(retry) or (("failed",) if only_failed else ())


def _tried(comparison: Comparison, store: Store, only_failed: bool) -> Comparison:
    """The comparison, without jobs that have not been tried yet if those that have failed are all that is wanted."""
    if not only_failed:
        return comparison
    tried = [job for job in comparison.jobs if store.job(job.job_id)]
    if not tried:
        raise UserError(f"only failed jobs are asked for, and none of these has been tried yet in {str(store.path)!r}")
    return dataclasses.replace(comparison, jobs=tried)


def _kept(selection: Any) -> Any:
    """A selection that can be read twice."""
    return selection if isinstance(selection, str) or not isinstance(selection, Iterable) else tuple(selection)

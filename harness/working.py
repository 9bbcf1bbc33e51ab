"""The work on a bundle of jobs, wherever it is done: fit, measure, store, and tell the boss how it goes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from threadpoolctl import threadpool_limits

from harness import environment
from harness.bundling import Task
from harness.evaluator import Evaluator
from harness.executors import NO_LIMITS, Boss, End, Limits
from harness.job import Job, is_measured
from harness.method import CurvePoint, Fit
from harness.options import UserError
from harness.planning import Comparison
from harness.running import JobOutcome, fit_jobs, measure_job, store_end, store_measured
from harness.store import Store

NO_FIT = "its stored fit is gone; `harness compare` fits it anew"
"""Why a job that is done cannot be measured where nothing is trained."""
MOST_DEATHS = 3
"""Workers that may die of a bundle of which nobody can tell what killed them."""


@dataclass(frozen=True)
class Bundle:
    """What is worked on at a time.

    Args:
        jobs: Ids of jobs that are fitted together; of one, mostly.
        without: Labels of evaluators that are left out: a worker has died of them.
        deaths: Workers that have died of it before.
    """

    jobs: tuple[str, ...]
    without: tuple[str, ...] = ()
    deaths: int = 0


class Work:
    """Called with a bundle of a comparison's jobs, it does what is left to do for them.

    What it tells: ``bundle_started`` (ids of the jobs); ``resumed``, ``step``; ``fitted``; of each job ``job_started``
    (if there are several), ``measuring`` (name and label of the evaluator), ``measured`` and ``job_finished``.

    Args:
        beside: How many bundles are worked on at a time.
    """

    def __init__(self, comparison: Comparison, store: Store, boss: Boss, beside: int = 1) -> None:
        import pandas  # noqa: F401  # slow, and needed for the first fit that is stored: not while a job is watched

        self.comparison = comparison
        self.store = store
        self.boss = boss
        self.facts = machine(comparison) | {"beside": beside, "versions": environment.versions()}
        self.jobs = {job.job_id: job for job in comparison.jobs}

    def __call__(self, bundle: Bundle) -> None:
        tell, stop = self.boss.tell, self.boss.stop
        stop.before_job()
        tasks = [self._task(job_id) for job_id in bundle.jobs]
        tell("bundle_started", bundle.jobs)
        fits = self._fits(tasks)
        tell("fitted")
        for (job, _), (outcome, fit) in zip(tasks, fits, strict=True):
            if len(tasks) > 1:
                tell("job_started", job.job_id)
            if outcome.status == "ok":
                waiting = [by for by in self.comparison.waiting(job, self.store) if by.label not in bundle.without]
                outcome = measure_job(job, waiting, fit, self.store, self._measuring, self._measured, stop)
            tell("job_finished", job.job_id, outcome.status, outcome.reason)

    def _fits(self, tasks: Sequence[Task]) -> list[tuple[JobOutcome, Fit | None]]:
        status, job_id = tasks[0].entry.status, tasks[0].job.job_id
        if status and (status != "ok" or self.store.has_whole_fit(job_id)):  # a single one, that is stored
            reason = (self.store.job(job_id) or {}).get("reason", "")
            return [(JobOutcome(status, reason), None)]
        if not self.comparison.trains:
            return [(JobOutcome("skipped", NO_FIT), None)]
        jobs = [task.job for task in tasks]
        self.boss.piece_begins(len(jobs))
        return fit_jobs(jobs, self.store, self.facts, self._step, self._resumed, self.boss.stop)

    def _task(self, job_id: str) -> Task:
        job = self.jobs.get(job_id)
        if job is None:
            raise UserError("the sources of a method or problem have changed since the run began; start it again")
        return Task(job, self.comparison.planned(job, self.store))

    def _step(self, fraction: float, point: CurvePoint) -> None:
        self.boss.tell("step", fraction, point.step, point.objective, point.seconds)

    def _resumed(self, fraction: float, step: int) -> None:
        self.boss.tell("resumed", fraction, step)

    def _measuring(self, by: Evaluator) -> None:
        self.boss.piece_begins()
        self.boss.tell("measuring", by.name, by.label)

    def _measured(self, fraction: float, facts: str) -> None:
        self.boss.tell("measured", fraction, facts)


@dataclass(frozen=True)
class WorkElsewhere:
    """`Work`, made somewhere else from what the user asked for.

    Args:
        comparison: Makes the comparison, from what the user asked for.
        out: Of the store.
        threads: Of each worker; None leaves it to where it is.
        beside: As in `Work`.
        limits: Of a fit (of so many as are trained together) and of a measurement.
    """

    comparison: Callable[[], Comparison]
    out: Path
    threads: int | None
    beside: int
    limits: Limits = NO_LIMITS

    def __call__(self, boss: Boss) -> Callable[[Bundle], None]:
        if self.threads is not None:
            torch.set_num_threads(self.threads)
        work = Work(self.comparison(), Store(self.out), boss, self.beside)
        if self.threads is not None:
            threadpool_limits(self.threads)  # of the libraries that plugins have loaded too
        return work


def machine(comparison: Comparison) -> dict[str, Any]:
    """The columns of a record that speak of the machine and of the run."""
    return {**environment.describe(comparison.device), "run_id": comparison.run_id}


@dataclass
class Whereabouts:
    """What a worker has told of its bundle so far.

    Args:
        job: The one that it measures.
        evaluator: Label of the one that it measures by.
    """

    job: str = ""
    fitted: bool = False
    evaluator: str = ""


class Deaths:
    """What becomes of the jobs of a worker that has died; its bundle's other jobs and evaluators are worked on yet.

    What the worker has printed last is kept beside the job or the measurement.

    Args:
        facts: The columns of a record that speak of the machine and of the run.
        on_end: Told of the jobs that have ended so.
    """

    def __init__(
        self,
        comparison: Comparison,
        store: Store,
        facts: Mapping[str, Any],
        on_end: Callable[[str, JobOutcome], None],
    ) -> None:
        self.jobs = {job.job_id: job for job in comparison.jobs}
        self.evaluators = {by.label: by for by in comparison.evaluators}
        self.store = store
        self.facts = facts
        self.on_end = on_end

    def of(self, bundle: Bundle, left: Sequence[str], at: Whereabouts | None, end: End) -> list[Bundle]:
        """Store that a worker has died.

        Args:
            left: Of the bundle's jobs those that have not ended.
            at: Where it was; None if it had not begun.

        Returns:
            What is to be worked on yet.
        """
        again = dataclasses.replace(bundle, deaths=bundle.deaths + end.times)
        if at is None and again.deaths < MOST_DEATHS and end.status != "timeout":
            return [again]
        killed = JobOutcome(end.status, end.reason)
        fitted = [job_id for job_id in left if (at and at.fitted) or self._is_fitted(job_id)]
        for job_id in left:
            if job_id not in fitted:
                store_end(self.jobs[job_id], killed, self.store, self.facts, end.output)
                self.on_end(job_id, killed)
        without = bundle.without
        if at and at.evaluator:
            store_measured(self.jobs[at.job], self.evaluators[at.evaluator], killed, self.store, output=end.output)
            without = (*without, at.evaluator)
        elif again.deaths >= MOST_DEATHS:
            for job_id in fitted:
                self._unmeasured(self.jobs[job_id], killed)
            return []
        return [
            Bundle((job_id,), without if at and job_id == at.job else bundle.without, again.deaths) for job_id in fitted
        ]

    def _unmeasured(self, job: Job, outcome: JobOutcome) -> None:
        for by in self.evaluators.values():
            if not is_measured(job, by, self.store):
                store_measured(job, by, outcome, self.store)
        self.on_end(job.job_id, outcome)

    def _is_fitted(self, job_id: str) -> bool:
        return (self.store.job(job_id) or {}).get("status") == "ok" and self.store.has_fit(job_id)


def threads_each(jobs: int) -> int:
    """Threads of each of so many workers, that together they have no more than this process."""
    return max(1, torch.get_num_threads() // jobs)


@contextmanager
def threads_limited(threads: int) -> Iterator[None]:
    usual = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with threadpool_limits(threads):
            yield
    finally:
        torch.set_num_threads(usual)

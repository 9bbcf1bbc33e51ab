"""The work on a bundle of jobs, wherever it is done: fit, measure, store, and tell the boss how it goes."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from threadpoolctl import threadpool_limits

from harness import environment
from harness.bundling import Task
from harness.executors import Boss
from harness.method import CurvePoint, Fit
from harness.options import UserError
from harness.planning import Comparison, resolve
from harness.running import JobOutcome, fit_jobs, measure_job, store_end
from harness.store import Store

Bundle = Sequence[str]
"""Ids of the jobs that are fitted together; of one, mostly."""


class Work:
    """Called with a bundle of a comparison's jobs, it does what is left to do for them.

    Args:
        beside: How many bundles are worked on at a time.
    """

    def __init__(self, comparison: Comparison, store: Store, boss: Boss, beside: int = 1) -> None:
        self.comparison = comparison
        self.store = store
        self.boss = boss
        self.facts = machine(comparison) | {"beside": beside}
        self.jobs = {job.job_id: job for job in comparison.jobs}

    def __call__(self, bundle: Bundle) -> None:
        tell, stop = self.boss.tell, self.boss.stop
        stop.before_job()
        tasks = [self._task(job_id) for job_id in bundle]
        tell("bundle_started", bundle)
        fits: list[tuple[JobOutcome, Fit | None]] = [(JobOutcome("ok"), None)]  # a single one, that is stored
        if not tasks[0].entry.status:
            fits = fit_jobs([task.job for task in tasks], self.store, self.facts, self._step, self._resumed, stop)
        for (job, entry), (outcome, fit) in zip(tasks, fits, strict=True):
            if len(tasks) > 1:
                tell("job_started", job.job_id)
            if outcome.status == "ok":
                outcome = measure_job(job, entry.waiting, fit, self.store, self._measuring, self._measured, stop)
            tell("job_finished", job.job_id, outcome.status, outcome.reason)

    def _task(self, job_id: str) -> Task:
        job = self.jobs.get(job_id)
        if job is None:
            raise UserError("the sources of a method or problem have changed since the run began; start it again")
        return Task(job, self.comparison.planned(job, self.store))

    def _step(self, fraction: float, point: CurvePoint) -> None:
        self.boss.tell("step", fraction, point.step, point.objective, point.seconds)

    def _resumed(self, fraction: float, step: int) -> None:
        self.boss.tell("resumed", fraction, step)

    def _measuring(self, evaluator: str) -> None:
        self.boss.tell("measuring", evaluator)

    def _measured(self, fraction: float, facts: str) -> None:
        self.boss.tell("measured", fraction, facts)


@dataclass(frozen=True)
class WorkElsewhere:
    """`Work`, made in a worker process from what the user asked for.

    Args:
        asked: Arguments of `harness.planning.resolve`.
        out: Of the store.
        threads: Of each worker.
        beside: As in `Work`.
    """

    asked: Mapping[str, Any]
    out: Path
    threads: int
    beside: int

    def __call__(self, boss: Boss) -> Callable[[Bundle], None]:
        torch.set_num_threads(self.threads)
        threadpool_limits(self.threads)
        return Work(resolve(**self.asked), Store(self.out), boss, self.beside)


def machine(comparison: Comparison) -> dict[str, Any]:
    """The columns of a record that speak of the machine and of the run."""
    return {**environment.describe(comparison.device), "run_id": comparison.run_id}


def died(comparison: Comparison, store: Store, bundle: Bundle, reason: str) -> Iterator[tuple[str, JobOutcome]]:
    """Store that the process which worked on a bundle is gone; ids and outcomes of the jobs that it has not done."""
    facts, end = machine(comparison), JobOutcome("killed", reason)
    for job in comparison.jobs:
        if job.job_id in bundle and not (entry := comparison.planned(job, store)).done:
            store_end(job, entry.waiting if entry.status else (), end, store, facts)
            yield job.job_id, end


def threads_each(jobs: int) -> int:
    """Threads of each of so many workers, that together they have no more than there are cores."""
    return max(1, (os.cpu_count() or 1) // jobs)


@contextmanager
def threads_limited(threads: int) -> Iterator[None]:
    usual = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with threadpool_limits(threads):
            yield
    finally:
        torch.set_num_threads(usual)

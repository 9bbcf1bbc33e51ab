"""Which jobs are fitted together, their steps one batched program."""

from __future__ import annotations

import json
from collections.abc import Hashable, Iterable, Sequence
from typing import NamedTuple

from harness.job import Job
from harness.planning import PlannedJob
from harness.training import GradientMethod


class Task(NamedTuple):
    """A job, and what is left to do for it."""

    job: Job
    entry: PlannedJob


def bundles(tasks: Iterable[Task]) -> list[Sequence[Task]]:
    """The tasks in their order, those that are to be fitted together in one bundle: what differs is the seed.

    And options that the method says only its players read. Fits that have come to different steps are not one bundle.
    """
    found: dict[Hashable, list[Task]] = {}
    for task in tasks:
        found.setdefault(_key(task), []).append(task)
    return list(found.values())


def _key(task: Task) -> Hashable:
    job, entry = task
    if not job.vectorised or entry.status or not isinstance(job.method, GradientMethod):
        return job.job_id
    alike = {option: value for option, value in job.method.config.items() if option not in job.method.per_replica}
    return job.problem, type(job.method), json.dumps(alike, sort_keys=True), str(job.budget), entry.step

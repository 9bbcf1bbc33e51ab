"""Those who want to know how the work goes: the user, and plugins."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from harness.bundling import Task
from harness.planning import PlannedJob
from harness.registry import Registry
from harness.running import JobOutcome
from harness.working import Bundle, Whereabouts


class Progress:
    """What is told of the work while it goes on; this one shows nothing of it."""

    def started(self, jobs: int) -> None: ...
    def job_started(self, job: PlannedJob, together: int = 1) -> None: ...
    def resumed(self, fraction: float, step: int) -> None: ...
    def step(self, fraction: float, step: int, objective: float, seconds: float) -> None: ...
    def measuring(self, evaluator: str) -> None: ...
    def measured(self, fraction: float, facts: str) -> None: ...
    def job_finished(self, job: PlannedJob, status: str, reason: str) -> None: ...
    def finished(self) -> None: ...

    def lane(self, number: int) -> Progress:
        """That of one worker of several; the first is this one itself."""
        return self


@dataclass(frozen=True)
class Audience:
    """Those who want to know how the work goes: the user, and plugins.

    Args:
        tasks: By the ids of their jobs.
        at: Where each worker is.
        places: Number of the worker that each job was last in the hands of.
    """

    registry: Registry
    tasks: Mapping[str, Task]
    progress: Progress
    at: dict[int, Whereabouts] = field(default_factory=dict[int, Whereabouts])
    places: dict[str, int] = field(default_factory=dict[str, int])
    begun: set[str] = field(default_factory=set[str])
    ended: set[str] = field(default_factory=set[str])

    def left(self, worker: int, bundle: Bundle) -> tuple[list[str], Whereabouts | None]:
        """What a worker that has died has left of its bundle, and where it was in it."""
        at = self.at.pop(worker, None)
        for job_id in bundle.jobs:
            self.places[job_id] = worker
        left = [job_id for job_id in bundle.jobs if job_id not in self.ended]
        return left, at if at and at.job in bundle.jobs else None

    def lost(self, job_id: str, outcome: JobOutcome) -> None:
        """A job that cannot tell its end itself."""
        self._announce(job_id)
        self.heard(self.places[job_id], "job_finished", job_id, outcome.status, outcome.reason)

    def heard(self, worker: int, event: str, *facts: Any) -> None:
        """What `harness.working.Work` tells."""
        lane = self.progress.lane(worker)
        match event, facts:
            case "bundle_started", [job_ids]:
                self.at[worker] = Whereabouts(job_ids[0])
                lane.job_started(self.tasks[job_ids[0]].entry, len(job_ids))
                for job_id in job_ids:
                    self.places[job_id] = worker
                    self._announce(job_id)
            case "fitted", _:
                self.at[worker].fitted = True
            case "job_started", [job_id]:
                self.at[worker].job, self.at[worker].evaluator = job_id, ""
                lane.job_started(self.tasks[job_id].entry)
            case "measuring", [name, label]:
                self.at[worker].evaluator = label
                lane.measuring(name)
            case "job_finished", [job_id, status, reason]:
                self.ended.add(job_id)
                lane.job_finished(self.tasks[job_id].entry, status, reason)
                self._notify("harness_job_finished", job_id, outcome=JobOutcome(status, reason))
            case _:
                getattr(lane, event)(*facts)

    def _announce(self, job_id: str) -> None:
        """Once, however many workers die of it."""
        if job_id not in self.begun:
            self.begun.add(job_id)
            self._notify("harness_job_started", job_id)

    def _notify(self, hook: str, job_id: str, **facts: Any) -> None:
        self.registry.notify(hook, job=self.tasks[job_id].job, **facts)

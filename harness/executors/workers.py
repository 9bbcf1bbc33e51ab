"""In worker processes, several tasks at once; a worker that dies costs only the task that it worked on.

Each worker has a connection of its own, and nothing else is shared: a lock could be taken into a worker's grave. Nobody
but the worker's connection and its exit code is asked how a task has ended. What goes over a limit is killed, whatever
it is at.
"""

from __future__ import annotations

import logging
import math
import multiprocessing
import pickle
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from multiprocessing.connection import wait
from typing import Any, Generic

from harness.executors.process import NO_LIMITS, PATIENCE, Limits, WorkerProcess
from harness.executors.runner import Died, End, Heard, Prepare, Runner, T
from harness.options import UserError
from harness.stopping import Stop, Stopped

STARTS = 3
"""Workers that may fail to start, one after another."""

MEMORY_LOOK = 0.2
"""Seconds between looks at the memory that workers have taken."""

log = logging.getLogger("harness")


@dataclass(frozen=True)
class WorkerProcesses(Runner):
    """Runs jobs in worker processes of this machine, several at once.

    Args:
        jobs: How many at once.
        limits: A worker that goes over one of these is killed, and another one goes on.
    """

    jobs: int = 2
    limits: Limits = NO_LIMITS

    def run(self, prepare: Prepare[T], tasks: Iterable[T], heard: Heard, died: Died[T], stop: Stop) -> None:
        if multiprocessing.current_process().daemon:
            raise UserError(
                "worker processes are needed, and this one may not start processes: dask's workers may with --no-nanny,"
                " or with distributed.worker.daemon: false"
            )
        run = _Run(sent(prepare), deque(tasks), heard, died, stop, self.limits)
        try:
            run.work(self.jobs)
        finally:
            run.end()
        if run.stopped:
            stop.obey()
            raise Stopped("stopped")


def sent(prepare: Prepare[T]) -> bytes:
    """As it travels to a worker process.

    Raises:
        UserError: If it cannot.
    """
    try:
        return pickle.dumps(prepare)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise UserError(f"cannot be sent to a worker process: {error}; use jobs=1 without limits") from None


class _Run(Generic[T]):
    def __init__(
        self, prepare: bytes, waiting: deque[T], heard: Heard, died: Died[T], stop: Stop, limits: Limits
    ) -> None:
        self.prepare = prepare
        self.waiting = waiting
        self.heard = heard
        self.died = died
        self.stop = stop
        self.limits = limits
        self.stopped = False
        self.workers: list[WorkerProcess[T]] = []
        self.started = False
        self.failures = 0

    def work(self, jobs: int) -> None:
        for number in range(min(jobs, len(self.waiting))):
            self.start(number)
        while self.going_on():
            by_end = self.ends()
            for end in wait([*by_end], self.patience()):
                worker = by_end[end]
                if end is worker.printed:
                    worker.read_output()
                    continue
                try:
                    message = worker.connection.recv()
                except (EOFError, OSError):
                    self.bury(worker)
                else:
                    self.receive(worker, *message)
            for worker in self.workers:
                worker.keep_within(self.limits)

    def ends(self) -> dict[Any, WorkerProcess[T]]:
        """Where something may come from, and whom it is from."""
        printed = {worker.printed: worker for worker in self.workers if worker.prints}
        return printed | {worker.connection: worker for worker in self.workers}

    def patience(self) -> float | None:
        """Seconds until somebody may be over a limit."""
        left = [worker.deadline - time.monotonic() for worker in self.workers if worker.busy]
        first = min([*left, MEMORY_LOOK if left and self.limits.memory < math.inf else math.inf], default=math.inf)
        return max(first, 0.0) if first < math.inf else None

    def start(self, number: int) -> None:
        try:
            self.workers.append(WorkerProcess(number, self.prepare, self.stop.left()))
        except OSError as error:
            if not self.workers:
                raise UserError(f"no worker process can be started: {error}; use jobs=1") from None
            log.warning("%d worker processes instead of more: %s", len(self.workers), error)

    def going_on(self) -> bool:
        """Give idle workers something to do; whether anybody has."""
        if not self.stopped:
            for worker in self.workers:
                if worker.ready and not worker.busy and self.waiting:
                    worker.begin(self.waiting.popleft())
        return any(worker.busy for worker in self.workers) or (bool(self.waiting) and not self.stopped)

    def receive(self, worker: WorkerProcess[T], what: str, *facts: Any) -> None:
        match what, facts:
            case "ready", _:
                worker.ready, self.started, self.failures = True, True, 0
            case "piece begins", [times]:
                worker.deadline = time.monotonic() + times * self.limits.seconds
            case "logged", [level, text]:
                log.log(level, "%s", text)
            case "told", [event, *rest]:
                self.heard(worker.number, event, *rest)
            case "done", [stopped]:
                worker.task, worker.deadline, self.stopped = [], math.inf, self.stopped or stopped
            case _:  # of the harness, not of a method: those become statuses
                raise facts[0]

    def bury(self, worker: WorkerProcess[T]) -> None:
        self.workers.remove(worker)
        end = worker.end()
        if not worker.ready:
            self.failures += 1
            if not (self.started or worker.was_killed) or self.failures > STARTS:
                raise UserError(
                    f"worker processes do not start ({end}): a script that is run again as a module must do nothing, so"
                    " guard it by `if __name__ == '__main__':`; or use jobs=1"
                )
        for task in worker.task:
            status, reason = worker.over or ("killed", f"its worker process {end}")
            self.waiting.extendleft(self.died(worker.number, task, End(status, reason, worker.output_text())))
        if self.waiting and not self.stopped:
            self.start(worker.number)

    def end(self) -> None:
        """Idle workers leave; what others have done so far is saved, if they can."""
        for worker in self.workers:
            worker.process.terminate()
        limit, alive = time.monotonic() + PATIENCE, self.ends()
        try:
            while any(end is worker.connection for end, worker in alive.items()):
                if (left := limit - time.monotonic()) <= 0:
                    break
                for end in wait([*alive], left):  # nobody hears it any more, but a full pipe would hold the worker up
                    worker = alive[end]
                    try:
                        going_on = worker.read_output() if end is worker.printed else bool(worker.connection.recv())
                    except Exception:  # its end, or half a message
                        going_on = False
                    if not going_on:
                        del alive[end]
        finally:
            for worker in self.workers:
                worker.process.kill()  # who is not done by now
                worker.end()

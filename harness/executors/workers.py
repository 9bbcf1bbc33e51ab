"""In worker processes, several tasks at once; a worker that dies costs only the task that it worked on.

Each worker has a connection of its own, and nothing else is shared: a lock could be taken into a worker's grave. Nobody
but the worker's connection and its exit code is asked how a task has ended.
"""

from __future__ import annotations

import logging
import multiprocessing
import pickle
import signal
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import wait
from typing import Any, ClassVar, Generic

from harness.executors.executor import Died, Executor, Heard, Prepare, T
from harness.executors.worker import PATIENCE, work_for
from harness.options import UserError
from harness.stopping import Stop, Stopped

STARTS = 3
"""Workers that may fail to start, one after another."""

log = logging.getLogger("harness")
_spawn = multiprocessing.get_context("spawn")  # a fork of a process with threads may hang


@dataclass(frozen=True)
class WorkerProcesses(Executor):
    """Runs jobs in worker processes of this machine, several at once.

    Args:
        jobs: How many at once.
    """

    name: ClassVar[str] = "workers"
    jobs: int = 2

    def run(self, prepare: Prepare[T], tasks: Iterable[T], heard: Heard, died: Died[T], stop: Stop) -> None:
        run = _Run(sent(prepare), deque(tasks), heard, died, stop)
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
        raise UserError(f"cannot be sent to a worker process: {error}; use jobs=1") from None


class _Run(Generic[T]):
    def __init__(self, prepare: bytes, waiting: deque[T], heard: Heard, died: Died[T], stop: Stop) -> None:
        self.prepare = prepare
        self.waiting = waiting
        self.heard = heard
        self.died = died
        self.stop = stop
        self.stopped = False
        self.workers: list[_Worker[T]] = []
        self.started = False
        self.failures = 0

    def work(self, jobs: int) -> None:
        for number in range(min(jobs, len(self.waiting))):
            self.start(number)
        while self.going_on():
            for connection in wait([worker.connection for worker in self.workers]):
                worker = self.at(connection)
                try:
                    message = worker.connection.recv()
                except (EOFError, OSError):
                    self.bury(worker)
                else:
                    self.receive(worker, *message)

    def at(self, connection: object) -> _Worker[T]:
        return next(worker for worker in self.workers if worker.connection is connection)

    def start(self, number: int) -> None:
        try:
            self.workers.append(_Worker(number, self.prepare, self.stop.left()))
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

    def receive(self, worker: _Worker[T], what: str, *facts: Any) -> None:
        match what, facts:
            case "ready", _:
                worker.ready, self.started, self.failures = True, True, 0
            case "logged", [level, text]:
                log.log(level, "%s", text)
            case "told", [event, *rest]:
                self.heard(worker.number, event, *rest)
            case "done", [stopped]:
                worker.task, self.stopped = [], self.stopped or stopped
            case _:  # of the harness, not of a method: those become statuses
                raise facts[0]

    def bury(self, worker: _Worker[T]) -> None:
        self.workers.remove(worker)
        end = worker.end()
        if not worker.ready:
            self.failures += 1
            if not self.started or self.failures > STARTS:
                raise UserError(
                    f"worker processes do not start ({end}): a script that is run again as a module must do nothing, so"
                    " guard it by `if __name__ == '__main__':`; or use jobs=1"
                )
        for task in worker.task:
            self.waiting.extendleft(self.died(worker.number, task, f"its worker process {end}"))
        if self.waiting and not self.stopped:
            self.start(worker.number)

    def end(self) -> None:
        """Idle workers leave; what others have done so far is saved, if they can."""
        for worker in self.workers:
            worker.process.terminate()
        limit, alive = time.monotonic() + PATIENCE, [worker.connection for worker in self.workers]
        try:
            while alive and (left := limit - time.monotonic()) > 0:
                for connection in [self.at(found).connection for found in wait(alive, left)]:
                    try:
                        connection.recv()  # nobody hears it any more, but a full pipe would hold the worker up
                    except Exception:  # its end, or half a message
                        alive.remove(connection)
        finally:
            for worker in self.workers:
                worker.process.kill()  # who is not done by now
                worker.end()


class _Worker(Generic[T]):
    """A worker process, as its boss sees it; it gets a task once it is ready."""

    def __init__(self, number: int, prepare: bytes, seconds: float) -> None:
        self.number = number
        self.ready = False
        self.task: Sequence[T] = []
        self.connection, theirs = _spawn.Pipe()
        self.process = _spawn.Process(target=work_for, args=(theirs, prepare, time.time() + seconds), daemon=False)
        try:
            with _interrupts_blocked():  # for the worker too: only its boss is interrupted
                self.process.start()
        except BaseException:
            self.connection.close()
            raise
        finally:
            theirs.close()

    @property
    def busy(self) -> bool:
        return bool(self.task)

    def begin(self, task: T) -> None:
        self.task = [task]
        with suppress(OSError):  # it has died: who receives from it will see that
            self.connection.send(task)

    def end(self) -> str:
        """How the process has ended, in words; one that is still there when nobody can reach it is killed."""
        self.process.join(PATIENCE)
        self.process.kill()
        self.process.join()
        self.connection.close()
        code = self.process.exitcode
        self.process.close()
        if code is not None and code < 0:
            with suppress(ValueError):
                return f"was killed by {signal.Signals(-code).name}"
        return f"ended with exit code {code}"


@contextmanager
def _interrupts_blocked() -> Iterator[None]:
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    usual = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, usual)

"""Wherever an executor sends them: tasks are errands, which run on their own and bring back what was told of them."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import platform
import threading
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic

from harness import executor
from harness.executor import Executor, Handle, Submit
from harness.executors.local import LocalExecutor
from harness.executors.process import NO_LIMITS, PATIENCE, Limits
from harness.executors.runner import Died, End, Heard, Prepare, Runner, T
from harness.executors.worker import Forwarder, unpickled
from harness.executors.workers import WorkerProcesses, sent
from harness.options import UserError
from harness.problem import DataError
from harness.stopping import Stop, Stopped

LOOK = 0.2
"""Seconds between looks at what is done."""

log = logging.getLogger("harness")
_one_at_a_time = threading.Lock()  # the work sets what is the process's: random states, threads, the working folder


@dataclass
class Told:
    """What an errand brings back.

    Args:
        facts: What the work has told, and of whom it has died, in their order.
        error: Of the user; those of a method become statuses.
    """

    facts: list[tuple[Any, ...]] = field(default_factory=list[tuple[Any, ...]])
    stopped: bool = False
    error: Exception | None = None

    def say(self, *facts: Any) -> None:
        self.facts.append(facts)

    def heard(self, worker: int, event: str, *facts: Any) -> None:
        if event != "step":  # nobody sees them in time
            self.say("told", event, *facts)

    def died(self, worker: int, task: Any, end: End) -> list[Any]:
        self.say("died", end)
        return []


@dataclass(frozen=True)
class Errand(Generic[T]):
    """The work on a task, wherever it is called.

    Args:
        prepare: Pickled, a `Prepare`.
        end: Of the run, in seconds since the epoch.
        folder: In which the user has started the run: paths may be relative to it.
    """

    prepare: bytes
    supervised: bool
    limits: Limits
    end: float
    folder: str

    def __call__(self, task: T) -> Told:
        told = Told()
        if time.time() >= self.end:
            told.stopped = True
            return told
        forwarder = Forwarder(told.say)
        with _one_at_a_time:
            log.addHandler(forwarder)
            try:
                with self._folder():
                    self._run(task, told)
            except Stopped:
                told.stopped = True
            except (UserError, DataError) as error:
                told.error = error
            finally:
                log.removeHandler(forwarder)
        return told

    def _run(self, task: T, told: Told) -> None:
        watched = self.supervised or self.limits.any
        runner = WorkerProcesses(1, self.limits) if watched else LocalExecutor()
        runner.run(unpickled(self.prepare), [task], told.heard, told.died, Stop(self.end - time.time()))

    def _folder(self) -> contextlib.AbstractContextManager[None]:
        if not os.path.isdir(self.folder):
            raise UserError(f"{self.folder!r}, where the run was started, is not there on {platform.node()}")
        return contextlib.chdir(self.folder)


@dataclass(frozen=True)
class Elsewhere(Runner):
    """Runs jobs where an executor sends them.

    Args:
        folder: Of the results.
        limits: Of a piece of the work.
        one_at_a_time: Whether a task is handed in only when the one before it is done.
    """

    executor: Executor
    folder: Path
    limits: Limits = NO_LIMITS
    one_at_a_time: bool = False

    def run(self, prepare: Prepare[T], tasks: Iterable[T], heard: Heard, died: Died[T], stop: Stop) -> None:
        end = time.time() + stop.left() if stop.left() < math.inf else math.inf
        errand = Errand(sent(prepare), self.executor.supervised, self.limits, end, os.getcwd())
        waiting = deque(tasks)
        with self.executor.connected(self.folder) as submit:
            run = _Run(submit, errand, waiting, heard, died)
            try:
                run.work(stop, 1 if self.one_at_a_time else len(waiting))
            finally:
                for handle in run.handed_in:
                    handle.cancel()
        if run.stopped:
            stop.obey()
            raise Stopped("stopped")


@dataclass
class _Run(Generic[T]):
    submit: Submit
    errand: Errand[T]
    waiting: deque[T]
    heard: Heard
    died: Died[T]
    handed_in: dict[Handle, T] = field(default_factory=dict[Handle, T])
    stopped: bool = False

    def work(self, stop: Stop, at_once: int) -> None:
        while self.handed_in or (self.waiting and not self.stopped):
            if stop.left() < -PATIENCE:  # what has not begun by now would only say that it is too late
                stop.obey()
            new = [self.waiting.popleft() for _ in range(self._more(at_once))]
            self.handed_in |= zip(self.submit(self.errand, new), new, strict=True) if new else ()
            for handle in [handle for handle in self.handed_in if handle.done()]:
                self._receive(handle, self.handed_in.pop(handle))
            time.sleep(LOOK)

    def _more(self, at_once: int) -> int:
        return 0 if self.stopped else min(max(0, at_once - len(self.handed_in)), len(self.waiting))

    def _receive(self, handle: Handle, task: T) -> None:
        try:
            told: Told = handle.result()
        except executor.Died as death:
            self._bury(task, End(death.status, death.reason, death.output, death.times))
            return
        for what, *facts in told.facts:
            match what:
                case "told":
                    self.heard(0, *facts)
                case "logged":
                    level, text = facts
                    log.log(level, "%s", text)
                case _:
                    [end] = facts
                    self._bury(task, end)
        self.stopped = self.stopped or told.stopped
        if told.error is not None:
            raise told.error

    def _bury(self, task: T, end: End) -> None:
        self.waiting.extendleft(self.died(0, task, end))

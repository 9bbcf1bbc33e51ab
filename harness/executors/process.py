"""A worker process, as its boss sees it: what it is at, what it has printed, what it may take, and how it has ended."""

from __future__ import annotations

import math
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Generic

import psutil

from harness.executors.runner import T
from harness.executors.worker import PATIENCE, work_for

KEPT_OUTPUT = 2**16
"""Bytes of what a worker has printed last."""
LAST_READS = 16
"""Reads of what is left when a worker has ended: as much as a pipe can hold."""

_spawn = multiprocessing.get_context("spawn")  # a fork of a process with threads may hang


@dataclass(frozen=True)
class Limits:
    """What goes over one of these is killed.

    Args:
        seconds: Of a piece of the work.
        memory: Bytes of a worker process (its resident set), whatever has been at work in it before.
    """

    seconds: float = math.inf
    memory: float = math.inf

    @property
    def any(self) -> bool:
        return min(self.seconds, self.memory) < math.inf


NO_LIMITS = Limits()


class WorkerProcess(Generic[T]):
    """A worker process, as its boss sees it; it gets a task once it is ready."""

    def __init__(self, number: int, prepare: bytes, seconds: float) -> None:
        self.number = number
        self.ready = self.was_killed = False
        self.task: Sequence[T] = []
        self.deadline = math.inf
        self.over: tuple[str, str] | None = None
        self.connection, theirs = _spawn.Pipe()
        self.printed, to_print = _spawn.Pipe(duplex=False)
        self.prints, self.output = True, b""
        given = (theirs, (self.printed, to_print), prepare, time.time() + seconds)
        self.process = _spawn.Process(target=work_for, args=given, daemon=False)
        try:
            with _interrupts_blocked():  # for the worker too: only its boss is interrupted
                self.process.start()
        except BaseException:
            self.connection.close()
            self.printed.close()
            raise
        finally:
            theirs.close()
            to_print.close()

    @property
    def busy(self) -> bool:
        return bool(self.task)

    def begin(self, task: T) -> None:
        self.task, self.output = [task], b""
        with suppress(OSError):  # it has died: who receives from it will see that
            self.connection.send(task)

    def read_output(self) -> bool:
        """Keep the end of what it has printed; whether there may be more to come."""
        try:
            found = os.read(self.printed.fileno(), KEPT_OUTPUT)
        except OSError:
            found = b""
        self.output = (self.output + found)[-KEPT_OUTPUT:]
        self.prints = bool(found)
        return self.prints

    def output_text(self) -> str:
        return self.output.decode(errors="replace")

    def keep_within(self, limits: Limits) -> None:
        """Kill the process if it is over a limit, and remember why."""
        if not self.busy or self.over:
            return
        if time.monotonic() > self.deadline:
            self.over = "timeout", f"it was killed after the time limit of {limits.seconds:g} seconds"
        elif limits.memory < math.inf and (taken := self._memory()) > limits.memory:
            sizes = f"{taken / 2**20:,.0f} MiB, more than the memory limit of {limits.memory / 2**20:,.0f} MiB"
            self.over = "killed", f"its worker process had taken {sizes}"
        if self.over:
            self.deadline = math.inf
            self.process.kill()

    def _memory(self) -> int:
        try:
            return psutil.Process(self.process.pid).memory_info().rss
        except psutil.Error:
            return 0

    def end(self) -> str:
        """How the process has ended, in words; one that is still there when nobody can reach it is killed."""
        self.process.join(PATIENCE)
        self.process.kill()
        self.process.join()
        for _ in range(LAST_READS):  # no more: a process that it has started may still be printing
            if self.prints and self.printed.poll():
                self.read_output()
        self.connection.close()
        self.printed.close()
        code = self.process.exitcode
        self.process.close()
        self.was_killed = code is not None and code < 0
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

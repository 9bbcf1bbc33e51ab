"""What a worker process does: it prepares itself once, works on the tasks that it is sent, and says how it goes."""

from __future__ import annotations

import faulthandler
import logging
import os
import pickle
import signal
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any

from harness.executors.runner import Prepare
from harness.options import UserError
from harness.stopping import Stop, Stopped

PATIENCE = 10.0
"""Seconds in which work is saved after an interrupt."""

log = logging.getLogger("harness")


class _Line:
    """The connection to the boss, as a worker sees it. Whether it holds must not decide how a job ends."""

    def __init__(self, connection: Connection, end: float) -> None:
        self.stop = Stop(max(0.0, end - time.time()))
        self._connection = connection
        self._lock = threading.Lock()

    def tell(self, event: str, *facts: Any) -> None:
        self.say("told", event, *facts)

    def piece_begins(self, times: int = 1) -> None:
        self.say("piece begins", times)

    def say(self, *facts: Any) -> None:
        if self._lock.acquire(timeout=1.0):  # else this is a warning from inside of it
            try:
                with suppress(OSError):
                    self._connection.send(facts)
            finally:
                self._lock.release()


class Forwarder(logging.Handler):
    """Says what is logged, from warnings on."""

    def __init__(self, say: Callable[..., None]) -> None:
        super().__init__(logging.WARNING)
        self.say = say

    def emit(self, record: logging.LogRecord) -> None:
        self.say("logged", record.levelno, record.getMessage())


def work_for(connection: Connection, output: tuple[Connection, Connection], prepare: bytes, end: float) -> None:
    """Until the boss ends it.

    Args:
        output: Both ends of a pipe that the boss reads: for what is printed, be it by Python or not, and for the
            traceback of what kills the worker. As this process could read too, printing does not fail without a boss.
        prepare: Pickled, a `Prepare`.
        end: Of the run, in seconds since the epoch.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _, to_print = output
    for stream in (1, 2):
        os.dup2(to_print.fileno(), stream)
    to_print.close()
    faulthandler.enable(file=2)
    if hasattr(os, "register_at_fork"):  # else the boss would wait for the end of what this process has forked
        os.register_at_fork(after_in_child=connection.close)
    _no_semaphores()
    line, tasks = _Line(connection, end), _Tasks(connection)
    line.say("ready")
    work: Callable[[Any], None] | None = None
    for task in tasks:
        try:
            if work is None:
                work = _prepared(prepare, line)
            work(task)
        except Stopped:
            line.say("done", True)
        except Exception as error:
            line.say("raised", _sendable(error))
        else:
            line.say("done", False)


class _Tasks:
    """What the boss sends, one after another; read in a thread of its own, which sees at once if the boss dies."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._sent: deque[Any] = deque()
        self._some = threading.Semaphore(0)
        threading.Thread(target=self._read, daemon=True).start()

    def __iter__(self) -> Iterator[Any]:
        while True:
            self._some.acquire()
            yield self._sent.popleft()

    def _read(self) -> None:
        with suppress(EOFError, OSError):
            while True:
                self._sent.append(self._connection.recv())
                self._some.release()
        os.kill(os.getpid(), signal.SIGTERM)  # a fit is kept first
        time.sleep(PATIENCE)
        os._exit(1)


def _no_semaphores() -> None:
    """Progress bars of others, torch's compiler among them, would lock by one of the system, which a killed process
    leaves behind."""
    with suppress(ImportError):
        from tqdm import tqdm

        tqdm.set_lock(threading.RLock())


def _prepared(prepare: bytes, line: _Line) -> Callable[[Any], None]:
    """Warnings are forwarded from then on: those of the preparation the boss has had too."""
    silent = logging.NullHandler()
    log.addHandler(silent)
    with warnings.catch_warnings(action="ignore"):
        work = unpickled(prepare)(line)
    log.removeHandler(silent)
    _forward_warnings(line)
    return work


def unpickled(prepare: bytes) -> Prepare[Any]:
    """What `harness.executors.workers.sent` has made of it.

    Raises:
        UserError: If it cannot be imported here.
    """
    try:
        return pickle.loads(prepare)
    except (AttributeError, ImportError) as error:  # of a notebook, or of a module that is not installed
        raise UserError(f"a worker process cannot import what it was given: {error}; use jobs=1") from None


def _sendable(error: Exception) -> Exception:
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def _forward_warnings(line: _Line) -> None:
    log.addHandler(Forwarder(line.say))

    def show(message: Warning | str, category: type[Warning], filename: str, lineno: int, *_: Any) -> None:
        ours = category.__module__.partition(".")[0] == "harness"
        where = "" if ours else f" ({category.__name__}, {filename}:{lineno})"
        line.say("logged", logging.WARNING, f"{message}{where}")

    warnings.showwarning = show

"""In worker processes, several tasks at once; a worker that dies costs only its task.

Tasks and their ends go through pebble's pool. What is told of the work, and that it is to stop, has a connection of its
own for each worker: a lock that workers share could be taken into a worker's grave.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import pickle
import queue
import secrets
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterable
from concurrent.futures import CancelledError, Future
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Connection, Listener
from typing import Any, ClassVar

from harness.executors.executor import Executor, Heard, Prepare, T
from harness.options import UserError
from harness.stopping import Stop, Stopped

PATIENCE = 2.0
"""Seconds that workers have to save their work after an interrupt."""
_LOGGED = "logged"

log = logging.getLogger("harness")


@dataclass(frozen=True)
class WorkerProcesses(Executor):
    """Runs jobs in worker processes of this machine, several at once.

    Args:
        jobs: How many at once.
    """

    name: ClassVar[str] = "workers"
    jobs: int = 2

    def run(
        self, prepare: Prepare[T], tasks: Iterable[T], heard: Heard, died: Callable[[T, str], None], stop: Stop
    ) -> None:
        from pebble import ProcessExpired, ProcessPool

        try:
            sent = pickle.dumps(prepare)
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise UserError(f"cannot be sent to a worker process: {error}; use jobs=1") from None
        exchange = _Exchange()
        settings = (exchange.address, exchange.key, time.time() + stop.left(), sent)
        spawn = multiprocessing.get_context("spawn")  # a fork of a process with threads may hang
        pool = ProcessPool(self.jobs, initializer=_begin, initargs=settings, context=spawn)
        waiting: dict[Future[bool], T] = {pool.schedule(_work, args=(task,)): task for task in tasks}
        error: BaseException | None = None
        try:
            stopped = False
            while waiting:
                exchange.pass_on(heard, 0.1)
                for future in [future for future in waiting if future.done()]:
                    task = waiting.pop(future)
                    try:
                        stopped |= future.result()
                    except CancelledError:
                        pass
                    except ProcessExpired as end:
                        exchange.pass_on(heard, 0.0)
                        died(task, _end(end.exitcode))
                    except Exception as raised:  # of the harness, not of a method: those become statuses
                        error = error or raised
                        for other in waiting:
                            other.cancel()
        except BaseException:
            exchange.stop()
            _wait(waiting, PATIENCE)
            pool.stop()
            raise
        finally:
            if pool.active:
                pool.close()
            pool.join()
            exchange.close(heard)
        if error is not None:
            raise error
        if stopped:
            stop.obey()
            raise Stopped("stopped")


def _wait(futures: Iterable[Future[bool]], seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end and any(future.running() for future in futures):
        time.sleep(0.05)


def _end(code: int | None) -> str:
    """How a process has ended, in words."""
    if code is not None and code < 0:
        with suppress(ValueError):
            return f"its worker process was killed by {signal.Signals(-code).name}"
    return f"its worker process ended with exit code {code}"


class _Exchange:
    """Connections to all workers; what they tell is put in a row."""

    def __init__(self) -> None:
        self.key = secrets.token_bytes(16)
        self._listener = Listener(authkey=self.key)
        self._open = True
        self._told: queue.SimpleQueue[tuple[int, str, tuple[Any, ...]]] = queue.SimpleQueue()
        self._workers: dict[int, Connection] = {}
        self._lock = threading.Lock()
        self._readers: list[threading.Thread] = []
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def address(self) -> Any:
        return self._listener.address

    def _accept(self) -> None:
        while self._open:
            with suppress(OSError, EOFError, AuthenticationError):  # a worker that died before it had a say
                worker = self._listener.accept()
                with self._lock:
                    number = next(n for n in range(len(self._workers) + 1) if n not in self._workers)
                    self._workers[number] = worker
                reader = threading.Thread(target=self._read, args=(number, worker), daemon=True)
                reader.start()
                self._readers.append(reader)

    def _read(self, number: int, worker: Connection) -> None:
        with suppress(EOFError, OSError):
            while True:
                event, *facts = worker.recv()
                self._told.put((number, event, tuple(facts)))
        with self._lock:
            del self._workers[number]
        worker.close()

    def pass_on(self, heard: Heard, seconds: float) -> None:
        """Say what has been told so far; wait that long for something to be told."""
        with suppress(queue.Empty):
            while True:
                number, event, facts = self._told.get(timeout=seconds) if seconds else self._told.get_nowait()
                seconds = 0.0
                log.log(*facts) if event == _LOGGED else heard(number, event, *facts)

    def stop(self) -> None:
        """Tell all workers to stop where their work can be taken up again."""
        with self._lock:
            workers = list(self._workers.values())
        for worker in workers:
            with suppress(OSError):
                worker.send("stop")

    def close(self, heard: Heard) -> None:
        """Once all workers have ended."""
        self._open = False
        with suppress(OSError, EOFError, AuthenticationError):
            Client(self.address, authkey=self.key).close()  # closing it would not wake who waits for a connection
        for reader in self._readers:
            reader.join(PATIENCE)
        self._listener.close()
        self.pass_on(heard, 0.0)


# In the worker


class _Line:
    """The connection to the boss: the process that has started this one."""

    def __init__(self, address: Any, key: bytes, end: float) -> None:
        self._connection = Client(address, authkey=key)
        self._lock = threading.Lock()
        self._asked = threading.Event()
        self.stop = Stop(max(0.0, end - time.time()), self._asked.is_set)
        threading.Thread(target=self._listen, daemon=True).start()

    def tell(self, event: str, *facts: Any) -> None:
        with self._lock:
            self._connection.send((event, *facts))

    def _listen(self) -> None:
        with suppress(EOFError, OSError):
            while True:
                self._connection.recv()  # all that a boss ever says
                self._asked.set()
        self._asked.set()  # the boss has died: a fit can still be kept
        time.sleep(PATIENCE)
        os._exit(1)


class _Forwarder(logging.Handler):
    def __init__(self, line: _Line) -> None:
        super().__init__(logging.WARNING)
        self.line = line

    def emit(self, record: logging.LogRecord) -> None:
        self.line.tell(_LOGGED, record.levelno, "%s", record.getMessage())


_line: _Line
_prepare: bytes
_ready: Callable[[Any], None] | None = None


def _begin(address: Any, key: bytes, end: float, prepare: bytes) -> None:
    global _line, _prepare
    _line, _prepare = _Line(address, key, end), prepare
    log.addHandler(_Forwarder(_line))

    def warn(message: Warning | str, category: type[Warning], filename: str, lineno: int, *_: Any) -> None:
        _line.tell(_LOGGED, logging.WARNING, "%s (%s, %s:%d)", str(message), category.__name__, filename, lineno)

    warnings.showwarning = warn


def _work(task: Any) -> bool:
    """Whether it has stopped before its end."""
    global _ready
    try:
        if _ready is None:
            _ready = pickle.loads(_prepare)(_line)
        assert _ready is not None
        _ready(task)
    except Stopped:
        return True
    return False

"""Jobs on the workers of a dask.distributed scheduler that is running already."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import NonNegativeInt, PositiveFloat

from harness import hookimpl
from harness.executor import Died, Executor, Handle, Submit
from harness.options import UserError

NO_DISTRIBUTED = "dask.distributed is not installed: pip install 'inference-harness[dask]'"


@dataclass(frozen=True, kw_only=True)
class Dask(Executor):
    """Sends jobs to the workers of a dask.distributed scheduler.

    A worker process does one job at a time, whatever its number of threads, and keeps the data on its device: start
    workers with ``--nthreads 1``. What a worker has died of is tried again by the scheduler as often as it allows
    failures (``distributed.scheduler.allowed-failures``), and ends as ``killed``. Workers need this package, the same
    plugins and the folder of results under the same path. Limits of time and memory need workers that may start
    processes of their own: ``--no-nanny``, or ``distributed.worker.daemon: false``. What is being worked on when a
    run is interrupted goes on by itself, and its results are kept.

    Args:
        address: Of the scheduler, such as ``tcp://10.0.0.1:8786``.
        gpus: How much of a worker's resource ``GPU`` a job takes; workers have it by ``--resources GPU=1``.
        cores: Threads of each job; 0 leaves it to the workers.
        patience: Seconds in which the scheduler must answer.
    """

    name: str = "dask"
    address: str = ""
    gpus: NonNegativeInt = 0
    cores: NonNegativeInt = 1
    patience: PositiveFloat = 10.0

    @property
    def threads(self) -> int | None:
        return self.cores or None

    @contextmanager
    def connected(self, folder: Path) -> Iterator[Submit]:
        if not self.address:
            raise UserError("dask: expected the address of a scheduler: dask[address=tcp://10.0.0.1:8786]")
        try:
            from distributed import Client
        except ImportError:
            raise UserError(NO_DISTRIBUTED) from None
        try:
            client = Client(self.address, timeout=self.patience, set_as_default=False)
        except (OSError, ValueError, TypeError) as error:
            raise UserError(f"dask: no scheduler answers at {self.address!r}: {error}") from None
        resources = {"GPU": self.gpus} if self.gpus else None

        def submit(work: Callable[[Any], Any], tasks: Sequence[Any]) -> list[Handle]:
            return [_Handle(client.submit(work, task, pure=False, resources=resources)) for task in tasks]

        with client:
            yield submit


class _Handle:
    def __init__(self, future: Any) -> None:
        self.future = future

    def done(self) -> bool:
        return self.future.done()

    def result(self) -> Any:
        from distributed import CancelledError, KilledWorker

        try:
            return self.future.result()
        except KilledWorker as error:
            times, last = error.allowed_failures + 1, error.last_worker.address
            raise Died(f"every dask worker that was at it has died ({times}), at last {last}", times=times) from None
        except CancelledError as error:
            raise UserError(f"dask: the scheduler has given up a job: {error}") from None
        except ImportError as error:
            raise UserError(f"dask: a worker cannot import what it was given: {error}") from None

    def cancel(self) -> None:
        self.future.cancel()


@hookimpl
def harness_executors() -> list[Dask]:
    return [Dask()]

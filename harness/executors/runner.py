"""What has tasks worked on, somewhere, and passes on what is told of the work."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from harness.stopping import Stop

T = TypeVar("T")
Task = TypeVar("Task", contravariant=True)

Heard = Callable[..., None]
"""Told the number of the worker (0, 1, ...), an event's name and its facts."""


@dataclass(frozen=True)
class End:
    """How a worker has died.

    Args:
        status: ``killed``, or ``timeout`` if that was because its time was up.
        reason: In words.
        output: The last that it has printed.
        times: How many have died so.
    """

    status: str
    reason: str
    output: str = ""
    times: int = 1


class Died(Protocol[T]):
    """Told the number of a worker that has died, its task and how it has ended; gives what is to be worked on yet."""

    def __call__(self, worker: int, task: T, end: End, /) -> Sequence[T]: ...


class Boss(Protocol):
    """Whom work is done for, as those see it who do it."""

    @property
    def stop(self) -> Stop:
        """When to end before the work is done."""
        ...

    def tell(self, event: str, *facts: Any) -> None:
        """Say how the work goes on."""
        ...

    def piece_begins(self, times: int = 1) -> None:
        """Say that a piece of the work begins, which may take so many times as long as the limit of a piece."""
        ...


class Prepare(Protocol[Task]):
    """Called once wherever there is to be work, before the first task; gives what is called with each task."""

    def __call__(self, boss: Boss, /) -> Callable[[Task], None]: ...


class Runner(ABC):
    """A place where tasks are worked on."""

    @abstractmethod
    def run(self, prepare: Prepare[T], tasks: Iterable[T], heard: Heard, died: Died[T], stop: Stop) -> None:
        """Have every task worked on.

        Args:
            heard: Told what the work tells its boss; called in this thread.
            died: Told of a task whose worker has died; the other tasks go on.

        Raises:
            UserError: If the work cannot be sent to where it is to be done.
            Stopped: If the run has ended before its work was done.
        """

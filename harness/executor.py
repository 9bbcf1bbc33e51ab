"""Executors: plugins that have jobs worked on elsewhere, by an engine that is there already.

An executor knows nothing of jobs. It calls a function with each of several tasks, wherever its engine sends them, and
hands back what the function returns; all that a job leaves behind goes into the store, on a filesystem that is shared.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, ClassVar, Protocol

from harness.options import Configurable


class Died(Exception):
    """Nobody works on a task any more: the process or the machine that did is gone.

    Args:
        reason: What has happened to it, as a clause with its subject.
        output: The last that it has printed, if that is known.
        status: ``killed``, or ``timeout`` if its time was up.
        times: How many have died of that task, if the engine has tried it again by itself.
    """

    def __init__(self, reason: str, output: str = "", status: str = "killed", times: int = 1) -> None:
        super().__init__(reason)
        self.reason, self.output, self.status, self.times = reason, output, status, times


class Handle(Protocol):
    """A task that has been handed in."""

    def done(self) -> bool:
        """Whether there is a result, of whatever kind. Asked a few times a second: it must not wait."""
        ...

    def result(self) -> Any:
        """What the function has returned; called once, when that is done.

        Raises:
            Died: If there will be no result.
            UserError: If the engine says that something must be mended first; the run ends.
        """
        ...

    def cancel(self) -> None:
        """Nobody waits for it any more. It must not raise if the task is done or gone."""
        ...


Submit = Callable[[Callable[[Any], Any], Sequence[Any]], Sequence[Handle]]
"""Hands in tasks for a function; function, tasks and results can be pickled."""


class Executor(Configurable, ABC):
    """Where jobs run: a plugin is a frozen dataclass that derives from this; its fields are its options."""

    supervised: ClassVar[bool] = False
    """Whether a task starts a worker process for its work and watches it: if that dies, it is known of what. What it is
    sent to may be ended by a signal then; a fit keeps a checkpoint. Else the work is done in the process itself."""

    @property
    def threads(self) -> int | None:
        """Of each job; None leaves it to where it runs."""
        return None

    @property
    def apart(self) -> bool:
        """Whether nothing runs beside a job on its machine, so that its seconds can be compared."""
        return False

    @abstractmethod
    def connected(self, folder: Path) -> AbstractContextManager[Submit]:
        """A connection to the engine, for as long as the run goes on.

        Args:
            folder: Of the results; what the engine writes itself may go into one below it.

        Raises:
            UserError: If the engine is not there, or an option that it needs is missing.
        """

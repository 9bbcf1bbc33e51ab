"""In this process, one task after another: nothing disturbs the clock, and a debugger can be attached."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

from harness.executors.runner import Boss, Died, Heard, Prepare, Runner, T
from harness.stopping import Stop


@dataclass(frozen=True)
class LocalExecutor(Runner):
    """Runs jobs in this process, one after another."""

    def run(self, prepare: Prepare[T], tasks: Iterable[T], heard: Heard, died: Died[T], stop: Stop) -> None:
        work = prepare(_Here(partial(heard, 0), stop))
        for task in tasks:
            work(task)


@dataclass(frozen=True)
class _Here(Boss):
    heard: Callable[..., None]
    of_run: Stop

    @property
    def stop(self) -> Stop:
        return self.of_run

    def tell(self, event: str, *facts: Any) -> None:
        self.heard(event, *facts)

    def piece_begins(self, times: int = 1) -> None: ...

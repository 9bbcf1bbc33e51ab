"""In this process, one job after another: nothing disturbs the clock, and a debugger can be attached."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import ClassVar, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class LocalExecutor:
    """Runs jobs in this process, one after another."""

    name: ClassVar[str] = "local"

    def run(self, work: Callable[[T], None], tasks: Iterable[T]) -> None:
        for task in tasks:
            work(task)

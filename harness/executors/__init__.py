"""Where jobs run."""

from __future__ import annotations

from harness.executors.executor import Boss, End, Executor
from harness.executors.local import LocalExecutor
from harness.executors.process import NO_LIMITS, Limits
from harness.executors.workers import WorkerProcesses

__all__ = ["EXECUTORS", "NO_LIMITS", "Boss", "End", "Executor", "Limits", "LocalExecutor", "WorkerProcesses"]

EXECUTORS: dict[str, Executor] = {executor.name: executor for executor in (LocalExecutor(), WorkerProcesses())}

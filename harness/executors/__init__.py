"""Where jobs run."""

from __future__ import annotations

from harness.executors.executor import Boss, Executor
from harness.executors.local import LocalExecutor
from harness.executors.workers import WorkerProcesses

__all__ = ["EXECUTORS", "Boss", "Executor", "LocalExecutor", "WorkerProcesses"]

EXECUTORS: dict[str, Executor] = {executor.name: executor for executor in (LocalExecutor(), WorkerProcesses())}

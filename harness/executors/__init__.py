"""Where jobs run."""

from __future__ import annotations

from harness.executors.elsewhere import Elsewhere
from harness.executors.local import LocalExecutor
from harness.executors.process import NO_LIMITS, Limits
from harness.executors.runner import Boss, End, Runner
from harness.executors.workers import WorkerProcesses

__all__ = ["NO_LIMITS", "Boss", "Elsewhere", "End", "Limits", "LocalExecutor", "Runner", "WorkerProcesses"]

"""Where jobs run."""

from __future__ import annotations

from harness.executors.local import LocalExecutor

__all__ = ["EXECUTORS", "LocalExecutor"]

EXECUTORS = {LocalExecutor.name: LocalExecutor()}

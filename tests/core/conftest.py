"""Mutants: modules with a piece of their source replaced, to see that tests would notice. Memory, measured. Disks."""

from __future__ import annotations

import inspect
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch


@pytest.fixture
def mutated(monkeypatch: pytest.MonkeyPatch) -> Callable[..., ModuleType]:
    """Make a fresh module from the source of another, in which a piece of text that occurs once is another one.

    What it imports from a module that was mutated before comes from that mutant; without a text nothing else changes.
    """

    def mutate(module: ModuleType, text: str = "", by: str = "") -> ModuleType:
        source = inspect.getsource(module)
        assert not text or source.count(text) == 1, f"{text!r} occurs {source.count(text)} times in {module.__name__}"
        fresh = ModuleType(module.__name__)
        monkeypatch.setitem(sys.modules, module.__name__, fresh)
        exec(
            compile(source.replace(text, by) if text else source, f"<mutant of {module.__name__}>", "exec"),
            fresh.__dict__,
        )
        return fresh

    return mutate


@pytest.fixture
def peak() -> Callable[[Callable[[], object]], int]:
    """Most bytes that are allocated at once, above what there was before: every allocation and release is recorded."""

    def measure(compute: Callable[[], object]) -> int:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
            compute()
        events: list[Any] = profiler.profiler.kineto_results.events()  # type: ignore[union-attr]
        changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
        assert len(changes) > 10
        return int(np.cumsum([nbytes for _, nbytes in changes]).max())

    return measure


@pytest.fixture
def tmpfs(tmp_path: Path) -> Iterator[Callable[[], Path]]:
    """Mounts a small disk in memory, and returns its folder; skips the test where that is not allowed."""
    folders: list[Path] = []

    def mount() -> Path:
        folder = tmp_path / f"disk{len(folders)}"
        folder.mkdir()
        words = ["mount", "-t", "tmpfs", "-o", "size=16m", "none", str(folder)]
        try:
            subprocess.run(words, check=True, capture_output=True, text=True)
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"no tmpfs can be mounted: {getattr(error, 'stderr', '') or error}")
        folders.append(folder)
        return folder

    yield mount
    for folder in folders:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)

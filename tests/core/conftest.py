"""Mutants: modules with one piece of their source replaced, to see that the tests would notice."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from types import ModuleType

import pytest


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

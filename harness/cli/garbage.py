"""Python's look for cycles among objects: it takes long while modules are imported and tables made, and finds none."""

from __future__ import annotations

import atexit
import gc
from collections.abc import Generator
from contextlib import contextmanager

RARELY = (100_000, 50, 100)
"""Thresholds of `gc`: figures, which are cycles of megabytes, still do not pile up."""

atexit.register(gc.freeze)
"""The process ends without a last look at all that torch consists of, which would take half a second."""


@contextmanager
def rarely_collected() -> Generator[None]:
    """What is done inside makes many objects that stay."""
    usual = gc.get_threshold()
    gc.set_threshold(*RARELY)
    try:
        yield
    finally:
        gc.set_threshold(*usual)

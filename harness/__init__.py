"""A benchmark harness that compares inference methods for latent-variable models.

Public names are resolved on first use, so that ``harness --help`` does not import torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from harness.hookspecs import hookimpl

if TYPE_CHECKING:
    from harness.comparison import compare, data, evaluate, fit, load
    from harness.reproduction import reproduce

__all__ = ["compare", "data", "evaluate", "fit", "hookimpl", "load", "reproduce"]

_LAZY = {
    "compare": "harness.comparison",
    "data": "harness.comparison",
    "evaluate": "harness.comparison",
    "fit": "harness.comparison",
    "load": "harness.comparison",
    "reproduce": "harness.reproduction",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

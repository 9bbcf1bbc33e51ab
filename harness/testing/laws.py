"""What holds for plugins of every kind: options are plain data, and process-wide state is left alone."""

from __future__ import annotations

import dataclasses
import json
import pickle
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from harness.loading import PluginError, check_prototype
from harness.options import Configurable, configure
from harness.sources import source_hash

STANDARD_ERRORS = 5
"""Streams are fixed, so a check either always passes or always fails; with five standard errors a right plugin fails
once in a million checks."""


class ConformanceError(AssertionError):
    """A law that does not hold; the message says which, what came, and the remedy."""


def require(law: bool, message: str) -> None:
    if not law:
        raise ConformanceError(message)


def require_shape(tensor: Tensor, shape: tuple[int, ...], what: str) -> None:
    """Shape, and that all elements are finite."""
    require(tuple(tensor.shape) == shape, f"{what}: expected shape {shape}, got {tuple(tensor.shape)}")
    require(bool(tensor.isfinite().all()), f"{what}: not finite")


def require_equal(a: Tensor, b: Tensor, what: str) -> None:
    """Equality bit for bit."""
    require(a.shape == b.shape and bool((a == b).all()), f"{what}: expected the same numbers bit for bit")


def require_close(a: Tensor, b: Tensor, what: str) -> None:
    """Equality up to rounding in float64."""
    worst = float((a - b).detach().abs().max()) if a.shape == b.shape else float("inf")
    scale = 1 + float(b.detach().abs().max())
    require(worst <= 1e-8 * scale, f"{what}: differ by up to {worst:.3g}")


def require_mean(draws: Tensor, expected: Tensor | float, what: str) -> None:
    """The mean over the first axis agrees with its expectation within `STANDARD_ERRORS`, for every column.

    Args:
        draws: Independent over the first axis, shape (S, N).
        expected: Shape (N,).
    """
    stderr = draws.std(0) / len(draws) ** 0.5 + 1e-9
    worst = float(((draws.mean(0) - expected).abs() / stderr).max())
    require(worst <= STANDARD_ERRORS, f"{what}: off by {worst:.1f} standard errors")


@contextmanager
def in_single_precision(what: str) -> Iterator[None]:
    """What runs in float64 runs in float32 too: an error of torch's is that of a number that has another precision."""
    try:
        yield
    except (RuntimeError, TypeError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise ConformanceError(
            f"{what} in float32, as runs are unless another precision is asked for: {reason}"
        ) from error


def require_single(tensor: Tensor, shape: tuple[int, ...], what: str) -> None:
    """Shape, float32, and that all elements are finite."""
    single = f"{what}: expected float32 in a run in float32, got {tensor.dtype}; is there a constant of that precision?"
    require(tensor.dtype == torch.float32, single)
    require_shape(tensor, shape, f"{what} in float32")


@contextmanager
def untouched(what: str) -> Iterator[None]:
    """Process-wide generators and settings are the same afterwards."""
    pyro = sys.modules.get("pyro")

    def state() -> dict[str, object]:
        return {
            "torch's global generator": torch.get_rng_state().numpy().tobytes(),
            "numpy's global generator": repr(np.random.get_state()),
            "random's global generator": random.getstate(),
            "torch's default dtype": torch.get_default_dtype(),
            "torch's gradient mode": torch.is_grad_enabled(),
            "Pyro's parameters": _pyro_parameters(),
            "Pyro's settings": repr(pyro.settings.get()) if pyro else "",  # none to compare with if imported meanwhile
        }

    before = state()
    yield
    after = state()
    changed = [name for name in before if before[name] != after[name]]
    require(not changed, f"{what} changes {', '.join(changed)}; draw from the noise or the generator that is handed in")


def _pyro_parameters() -> dict[str, bytes]:
    """What Pyro's own store holds; nothing before Pyro is imported."""
    pyro = sys.modules.get("pyro")
    stored = pyro.get_param_store().named_parameters() if pyro else ()
    return {name: value.detach().cpu().numpy().tobytes() for name, value in stored}


def check_options(thing: Configurable, base: type[Configurable] = Configurable) -> None:
    """Options are plain data: frozen, hashable, picklable, and the same after a way through JSON or text.

    Raises:
        ConformanceError: If they are not.
    """
    try:
        check_prototype(thing, base, type(thing).__name__)
    except PluginError as error:
        raise ConformanceError(str(error)) from None
    name = type(thing).__name__
    stored: Any = json.loads(json.dumps(thing.config))
    anything: Any = thing
    require(dataclasses.replace(anything, **stored) == thing, f"{name}: options differ after a way through JSON")
    texts = {
        key: value if isinstance(value, str) else json.dumps(value)
        for key, value in thing.config.items()
        if isinstance(value, str | bool | int | float)
    }
    require(configure(thing, texts) == thing, f"{name}: options differ when they are given as text")
    require(pickle.loads(pickle.dumps(thing)) == thing, f"{name}: differs after pickling")
    require(bool(source_hash(type(thing))), f"{name}: has no source file")

"""What a computation allocates, so that work can be cut into blocks of bounded memory; what the process keeps of it."""

from __future__ import annotations

import ctypes
import math
import os
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

CHANNEL_BLOCK = 16

KEPT_BLOCK, KEPT = 32 * 2**20, 2**30
"""Bytes: the largest block that is kept when it is freed (more is not allowed), and of how many in all."""
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of malloc.h

_REARRANGED = (torch.ops.aten.convolution, torch.ops.aten.convolution_backward)


def allocated(compute: Callable[[], object]) -> int:
    """Bytes of all tensors that ``compute`` makes, never mind what it frees: at least what it takes at its peak.

    Libraries rearrange what they convolve in memory of their own, by blocks of channels: so operands count once more.
    """
    with _Allocations() as allocations:
        compute()
    return allocations.total


def in_pieces(compute: Callable[[Tensor], Tensor], size: int, rows: Tensor) -> Tensor:
    """A function that takes each row by itself, worked on at most ``size`` rows at a time: (R, ...) -> (R, ...)."""
    return joined([compute(piece) for piece in rows.split(size)])


def joined(pieces: Sequence[Tensor], dim: int = 0) -> Tensor:
    """Pieces along an axis as one tensor, without a copy where there is one only."""
    return pieces[0] if len(pieces) == 1 else torch.cat(list(pieces), dim)


@cache
def keep_freed() -> None:
    """Let this process keep what tensors on the CPU have freed for the next ones.

    By default glibc hands most of it back to the system, and at every step of training memory is mapped and filled with
    zeros again, page by page: for small networks that takes as long as the mathematics. Other C libraries, and whoever
    has set `MALLOC_` variables or tunables of glibc's malloc, are left alone.
    """
    tuned = "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", "")
    if tuned or any(name.startswith("MALLOC_") for name in os.environ):
        return
    if malloc_option := _libc("mallopt"):
        malloc_option(_MMAP_THRESHOLD, KEPT_BLOCK)
        malloc_option(_TRIM_THRESHOLD, KEPT)


def hand_back_freed() -> None:
    """Hand back to the system what is kept, so that it does not count as taken by what comes next."""
    if trim := _libc("malloc_trim"):
        trim(0)


def _libc(name: str) -> Callable[..., int] | None:
    """A function of this process's C library, if it is one that has it."""
    try:
        return getattr(ctypes.CDLL(None), name)
    except (AttributeError, OSError, TypeError):  # not glibc; Windows
        return None


class _Allocations(TorchDispatchMode):
    """Adds up the memory of all new tensors."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        operands = [a for a in args if isinstance(a, Tensor)]
        known = {a.untyped_storage().data_ptr() for a in operands}
        for made in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(made, Tensor) and made.untyped_storage().data_ptr() not in known:
                self.total += _size(made)
        if func.overloadpacket in _REARRANGED:
            self.total += sum(_rearranged(operand) for operand in operands if operand.ndim > 2)
        return result


def _rearranged(operand: Tensor) -> int:
    """Bytes of a batch of maps (B, C, ...) whose channels are filled up to whole blocks."""
    channels = operand.shape[1]
    return _size(operand) // channels * math.ceil(channels / CHANNEL_BLOCK) * CHANNEL_BLOCK


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()

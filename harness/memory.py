"""What a computation allocates, so that work can be cut into blocks of bounded memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

CHANNEL_BLOCK = 16

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

"""What a computation allocates, so that work can be cut into blocks of bounded memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


def allocated(compute: Callable[[], object]) -> int:
    """Bytes of all tensors that ``compute`` makes, never mind what it frees: at least what it takes at its peak."""
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
        known = {a.untyped_storage().data_ptr() for a in args if isinstance(a, Tensor)}
        for made in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(made, Tensor) and made.untyped_storage().data_ptr() not in known:
                self.total += made.numel() * made.element_size()
        return result

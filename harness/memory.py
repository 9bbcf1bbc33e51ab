"""What a computation allocates, so that work can be cut into blocks of bounded memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


def allocated(compute: Callable[[], object]) -> int:
    """Bytes of all tensors that ``compute`` makes, never mind what it frees: at least what it takes at its peak."""
    with _Allocations() as allocations:
        compute()
    return allocations.total


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

"""How precisely a fit computes: the type of its tensors, and that of the products that its networks are made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from harness.options import one_of

Precision = Literal["float32", "bf16", "float64"]
"""In ``bf16`` the layers of networks multiply in bfloat16 while they train; all else, losses, log densities, parameters
and optimisers among it, is in float32, and so is every evaluation."""

LAYERS = frozenset(
    {
        F.linear, F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d, F.bilinear,
        torch.baddbmm,
    }
)  # fmt: skip
"""Of networks; the last is what a layer is in many networks at once."""


def parse_precision(text: str) -> Precision:
    """The precision of that name.

    Raises:
        UserError: If there is none.
    """
    return cast(Precision, one_of("precision", text, get_args(Precision)))


def dtype_of(precision: Precision) -> torch.dtype:
    """Of data, parameters and densities."""
    return torch.float64 if precision == "float64" else torch.float32


def products_of(precision: Precision) -> torch.dtype | None:
    """What layers multiply in while they train; None where that is the type of all else."""
    return torch.bfloat16 if precision == "bf16" else None


class Products(TorchFunctionMode):
    """Within it, layers round what they multiply to ``dtype`` and give back the type that they were given.

    Matrix products that are written out (``a @ b``), as densities have them, are left as they are.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func not in LAYERS:
            return func(*args, **kwargs)
        given: Tensor = args[0] if args else kwargs["input"]
        rounded = {name: self._rounded(value) for name, value in kwargs.items()}
        return func(*map(self._rounded, args), **rounded).to(given.dtype)

    def _rounded(self, value: Any) -> Any:
        return value.to(self.dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

"""Minibatches without end, whose place in the data can be kept and taken up again."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from harness.problem import Split


class Minibatches(Iterator[Tensor]):
    """Minibatches without end, shape (batch_size, *E).

    One permutation of the data after another, cut into batches: every observation is read equally often.

    Args:
        order, binarisation: Streams of the permutations, and of the draws where the data are dynamic.
    """

    def __init__(self, split: Split, batch_size: int, order: torch.Generator, binarisation: torch.Generator) -> None:
        self.split = split
        self.batch_size = batch_size
        self.order = order
        self.binarisation = binarisation
        self.waiting = torch.empty(0, dtype=torch.long, device=order.device)

    def __next__(self) -> Tensor:
        return self.read(self.indices())

    def indices(self) -> Tensor:
        """Which observations the next minibatch has, shape (batch_size,)."""
        if self.waiting.shape[0] < self.batch_size:
            self.waiting = torch.cat([self.waiting, self._permutations()])
        taken, self.waiting = self.waiting[: self.batch_size], self.waiting[self.batch_size :]
        return taken

    def read(self, indices: Tensor) -> Tensor:
        """The minibatch of these observations."""
        return self.split.read(indices, self.binarisation)

    def _permutations(self) -> Tensor:
        """Indices of as many epochs as make 64 batches at least."""
        n = len(self.split)
        epochs = max(1, math.ceil(64 * self.batch_size / n))
        keys = torch.rand(epochs, n, generator=self.order, device=self.order.device, dtype=torch.float64)
        return keys.argsort(dim=1).flatten()

    def state_dict(self) -> dict[str, Tensor]:
        """What decides all batches to come: both streams, and the rest of the permutations."""
        streams = {"order": self.order.get_state(), "binarisation": self.binarisation.get_state()}
        return {**streams, "waiting": self.waiting}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.order.set_state(state["order"])
        self.binarisation.set_state(state["binarisation"])
        self.waiting = state["waiting"].to(self.waiting.device)

"""Whole steps of training as one CUDA graph: the draws, the gradients of all players and their optimisers.

The host then starts one graph a step instead of hundreds of kernels. What is captured are steps that take their
gradients from a recording (`harness.stepping`): without autograd, and never waiting for the device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from harness.replicas import Together
from harness.stepping import Gradients, Recorded

Minibatches = Sequence[Sequence[Tensor]]
"""Indices of the observations in each minibatch of a step, of each replica."""

Updates = Callable[[Minibatches], Tensor]
"""A step of training; returns the objective before it, (R,)."""

CAPTURED = ("cuda",)  # types of devices
WARM_UP_RUNS = 3  # steps, as torch asks for


class CUDAGraph:
    """What a function does on the device, to be done again by one call.

    Args:
        generators: Those that it draws from; each replay goes on in their streams.
    """

    def __init__(self, device: torch.device, generators: Sequence[torch.Generator]) -> None:
        self.side = torch.cuda.Stream(device)
        self.graph = torch.cuda.CUDAGraph()
        for generator in generators:
            self.graph.register_generator_state(generator)

    def warm_up(self, function: Callable[[], Tensor]) -> Tensor:
        """Call it on a stream of its own, as torch asks for before a capture."""
        current = torch.cuda.current_stream(self.side.device)
        self.side.wait_stream(current)
        with torch.cuda.stream(self.side):
            returned = function()
        current.wait_stream(self.side)
        return returned

    def capture(self, function: Callable[[], Tensor]) -> Tensor:
        """Record it, which does nothing of what it does; what it returns is overwritten by every replay."""
        with torch.cuda.graph(self.graph, stream=self.side, capture_error_mode="thread_local"):
            return function()

    def replay(self) -> None:
        self.graph.replay()


class Captured:
    """Steps of training as one CUDA graph, once there are recordings: what is drawn, all players, their optimisers.

    Only the indices of minibatches come from outside; they are put where the graph reads them.
    """

    def __init__(self, updates: Updates, gradients: Recorded, together: Together) -> None:
        self.updates, self.gradients, self.together = updates, gradients, together
        self.warm_ups = WARM_UP_RUNS
        self.graph: CUDAGraph | None = None
        self.places: list[list[Tensor]] = []
        self.objective = torch.empty(0)

    def __call__(self, minibatches: Minibatches) -> Tensor:
        if self.gradients.used == "eager":  # still, or for good
            return self.updates(minibatches)
        self.graph = self.graph or CUDAGraph(minibatches[0][0].device, self.together.generators)
        if self.warm_ups > 0:
            self.warm_ups -= 1
            return self.graph.warm_up(lambda: self.updates(minibatches))
        if not self.places:
            try:
                with self.together.clock.phase_within("compile"):
                    self._capture(self.graph, minibatches)
            except torch.OutOfMemoryError:  # pyright: ignore[reportPrivateImportUsage]
                raise
            except Exception as error:
                self.gradients.give_up(error)
                return self.updates(minibatches)
        for places, indices in zip(self.places, minibatches, strict=True):
            for place, own in zip(places, indices, strict=True):
                place.copy_(own)
        self.graph.replay()
        return self.objective.clone()

    def _capture(self, graph: CUDAGraph, minibatches: Minibatches) -> None:
        places = [[own.clone() for own in indices] for indices in minibatches]
        self.objective = graph.capture(lambda: self.updates(places))
        self.places = places


def whole(updates: Updates, gradients: Gradients, together: Together) -> Updates:
    """Steps by a CUDA graph, where there is CUDA and gradients come from a recording."""
    on = together.replicas[0].run.device.type
    return Captured(updates, gradients, together) if on in CAPTURED and isinstance(gradients, Recorded) else updates

"""Whole steps of training as one CUDA graph: the draws, the gradients of all players and their optimisers.

The host then starts one graph a step instead of hundreds of kernels. What is captured are steps that take their
gradients from a recording (`harness.stepping`): without autograd, and never waiting for the device.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor

from harness import players
from harness.replicas import Together
from harness.stepping import CLOSE, Gradients, Recorded

log = logging.getLogger(__name__)

Indices = Sequence[Sequence[Tensor]]
"""Of the observations in each minibatch of a step, for each replica."""

TakeStep = Callable[[Indices], Tensor]
"""A step of training; returns the objective before it, (R,)."""

WARM_UP_STEPS = 3  # as torch asks for
ALIKE = 0.1  # of what a step changes: sums have no fixed order, and Adam divides by the size of gradients


class Part(Protocol):
    """Some of what a step changes."""

    def state_dict(self) -> Mapping[str, Tensor]: ...

    def load_state_dict(self, state: Mapping[str, Any], /) -> object: ...


class Graph:
    """What a function does on the device, to be done again by one call.

    Args:
        generators: Those that it draws from; each replay goes on in their streams.
    """

    def __init__(self, device: torch.device, generators: Sequence[torch.Generator]) -> None:
        self.side = _side(device)
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
        graph = torch.cuda.graph(self.graph, stream=self.side, capture_error_mode="thread_local")
        with torch.cuda.stream(self.side), graph:  # a capture that fails leaves its own stream the current one
            return function()

    def replay(self) -> None:
        self.graph.replay()


@cache
def _side(device: torch.device) -> torch.cuda.Stream:
    """One for all fits of a process: libraries keep memory for every stream."""
    return torch.cuda.Stream(device)


class Captured:
    """Steps of training by one graph, once there are recordings.

    Only the indices of minibatches come from outside; they are put where the graph reads them.
    """

    def __init__(self, gradients: Recorded, together: Together) -> None:
        self.gradients, self.together = gradients, together
        self.warm_ups = WARM_UP_STEPS
        self.graph: Graph | None = None
        self.places: list[list[Tensor]] = []
        self.objective = torch.empty(0)

    def __call__(self, take_step: TakeStep, indices: Indices) -> Tensor:
        """A step; as it is written from then on if steps turn out not to be capturable."""
        if self.gradients.used == "eager":  # still, or for good
            return take_step(indices)
        self.graph = self.graph or Graph(indices[0][0].device, self.together.generators)
        if self.warm_ups > 0:
            self.warm_ups -= 1
            return self.graph.warm_up(lambda: take_step(indices))
        if not self.places:
            with self.together.clock.phase_within("compile"):
                self._capture(self.graph, take_step, indices)
            if not self.places:
                return take_step(indices)
        for places, own in zip(self.places, indices, strict=True):
            for place, fresh in zip(places, own, strict=True):
                place.copy_(fresh)
        self.graph.replay()
        return self.objective.clone()

    def _capture(self, graph: Graph, take_step: TakeStep, indices: Indices) -> None:
        places = [[own.clone() for own in minibatch] for minibatch in indices]
        try:
            self.objective = graph.capture(lambda: take_step(places))
        except torch.OutOfMemoryError:  # pyright: ignore[reportPrivateImportUsage]
            raise
        except Exception as error:  # nothing of the step has been done
            log.warning("steps are taken as they are written, not by a CUDA graph: %s", error.__context__ or error)
            self.gradients.give_up()
            return
        self.places = places

    def check(self, take_step: TakeStep, parts: Sequence[Part]) -> None:
        """See that the graph still does what a step does, both from here; afterwards all is as it was.

        Args:
            parts: All that a step changes.

        Raises:
            RuntimeError: If it does not.
        """
        if self.graph is None or not self.places:
            return
        before = _states(parts)
        self.graph.replay()
        found, objective = _states(parts), self.objective.clone()
        _restore(parts, before)
        expected_objective = take_step(self.places)
        expected = _states(parts)
        _restore(parts, before)
        close = CLOSE[self.together.low_precision]
        if not torch.allclose(objective, expected_objective, rtol=close, atol=close, equal_nan=True):
            raise RuntimeError(_told("the objective", objective, expected_objective))
        for old, new, wanted in zip(before, found, expected, strict=True):
            for name, tensor in wanted.items():
                if not _alike(old[name], new[name], tensor):
                    raise RuntimeError(_told(name, new[name], tensor))


def captured(gradients: Gradients, together: Together) -> Captured | None:
    """Steps by a graph, where there is CUDA and gradients come from a recording."""
    on = together.replicas[0].run.device.type
    return Captured(gradients, together) if on in players.CAPTURED and isinstance(gradients, Recorded) else None


def _states(parts: Sequence[Part]) -> list[dict[str, Tensor]]:
    return [{name: tensor.clone() for name, tensor in part.state_dict().items()} for part in parts]


def _restore(parts: Sequence[Part], states: Sequence[Mapping[str, Tensor]]) -> None:
    for part, state in zip(parts, states, strict=True):
        part.load_state_dict(state)


def _alike(old: Tensor, new: Tensor, wanted: Tensor) -> bool:
    """Whether a tensor has changed as it should have; others than numbers (states of generators) exactly so."""
    if not wanted.is_floating_point():
        return torch.equal(new, wanted)
    if not wanted.isfinite().all():
        return True  # a fit that diverges, which is told of elsewhere
    rounding = torch.finfo(wanted.dtype).eps * float(wanted.norm())
    return float((new - wanted).norm()) <= ALIKE * float((wanted - old).norm()) + rounding


def _told(what: str, found: Tensor, expected: Tensor) -> str:
    return (
        f"{what} is {_short(expected)} after a step and {_short(found)} by its CUDA graph: what changes from step to "
        "step must be in buffers of the modules; --step eager does without the graph"
    )


def _short(tensor: Tensor) -> str:
    return str(tensor.flatten()[:3].tolist())

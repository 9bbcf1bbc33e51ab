"""What a step of training changes: players with their parameters and optimisers, streams of noise, buffers.

Each part has a state that can be kept and taken up again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from harness.method import Run

Noise = dict[str, Tensor]

ALIGNED_ELEMENTS = 16  # 64 bytes of float32


class Modules(nn.ModuleDict):
    """The networks of a fit by name, each of whatever class the method made it."""

    def __getitem__(self, key: str) -> Any:
        return super().__getitem__(key)


@dataclass(frozen=True)
class Player:
    """Who minimises the loss of the same name.

    Args:
        on: Names of the modules whose parameters the player owns.
        steps: Updates per step of the loop. The first is simultaneous with the other players', from one shared forward
            pass; each further one is this player's alone, on a fresh batch with fresh noise.
    """

    name: str
    on: tuple[str, ...]
    lr: float
    betas: tuple[float, float] = (0.9, 0.999)
    steps: int = 1


class Owned:
    """A player with its parameters, all in one flat vector, and its optimiser.

    The modules' parameters become views of that vector, so that a step of the optimiser is one operation, whatever the
    number of layers. A player whose modules have no parameters (a fixed model) never steps.
    """

    def __init__(self, player: Player, modules: Modules) -> None:
        self.player = player
        self.parameters = [parameter for name in player.on for parameter in modules[name].parameters()]
        if not self.parameters:
            return
        # Zeros behind each tensor make the next one start at an address that suits vector instructions.
        self.paddings = [p.detach().new_zeros(-p.numel() % ALIGNED_ELEMENTS) for p in self.parameters]
        self.flat = self._flattened([parameter.detach() for parameter in self.parameters])
        offset = 0
        for parameter, padding in zip(self.parameters, self.paddings, strict=True):
            parameter.data = self.flat[offset : offset + parameter.numel()].view_as(parameter)
            offset += parameter.numel() + len(padding)
        self.optimiser = torch.optim.Adam([self.flat], lr=player.lr, betas=player.betas, fused=True)

    def _flattened(self, tensors: Sequence[Tensor]) -> Tensor:
        pairs = zip(tensors, self.paddings, strict=True)
        return torch.cat([piece for tensor, padding in pairs for piece in (tensor.reshape(-1), padding)])

    def differentiate(self, loss: Tensor, clip_norm: float, *, keep: bool) -> None:
        """Put the gradient of the player's loss where the optimiser finds it."""
        self.flat.grad = self._flattened(torch.autograd.grad(loss, self.parameters, retain_graph=keep))
        if clip_norm:
            nn.utils.clip_grad_norm_([self.flat], clip_norm)

    def step(self, lr_factor: float) -> None:
        self.optimiser.param_groups[0]["lr"] = self.player.lr * lr_factor
        self.optimiser.step()

    def state_dict(self) -> dict[str, Tensor]:
        """The parameters, flat, and what the optimiser knows of them."""
        return {"flat": self.flat, **self.optimiser.state_dict()["state"][0]} if self.parameters else {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        if self.parameters:
            self.flat.copy_(state["flat"])
            moments = {name: tensor for name, tensor in state.items() if name != "flat"}
            self.optimiser.load_state_dict({**self.optimiser.state_dict(), "state": {0: moments}})


class NoiseStreams:
    """Standard normal noise for one minibatch after another; each kind has its own stream."""

    def __init__(self, run: Run, shapes: Mapping[str, tuple[int, ...]], purpose: str) -> None:
        self.run = run
        self.shapes = shapes
        self.streams = {name: run.generator(f"{purpose}/{name}") for name in shapes}

    def draw(self, n: int) -> Noise:
        """Noise for n observations: each of shape (n, *shape)."""
        place: dict[str, Any] = {"device": self.run.device, "dtype": self.run.dtype}
        return {
            name: torch.randn((n, *self.shapes[name]), generator=stream, **place)
            for name, stream in self.streams.items()
        }

    def state_dict(self) -> dict[str, Tensor]:
        return {name: stream.get_state() for name, stream in self.streams.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        for name, stream in self.streams.items():
            stream.set_state(state[name])


class Buffers:
    """Those tensors of the modules that are no parameters."""

    def __init__(self, modules: Modules) -> None:
        self.modules = modules

    def state_dict(self) -> dict[str, Tensor]:
        return dict(self.modules.named_buffers())

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        for name, buffer in self.modules.named_buffers():
            buffer.copy_(state[name])

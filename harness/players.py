"""What a step of training changes: players with their parameters and optimisers, and streams of noise.

Each part has a state that can be kept and taken up again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from harness.method import Run

Noise = dict[str, Tensor]

ALIGNED_ELEMENTS = 16  # 64 bytes of float32
EPSILON = 1e-8  # of Adam
CAPTURED = ("cuda",)
"""Types of devices where a step may become a graph: what a step reads then stays where it is."""


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


class InPlace:
    """Tensors that steps change in place."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = dict(tensors)

    def state_dict(self) -> dict[str, Tensor]:
        return self.tensors

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        for name, tensor in self.tensors.items():
            tensor.copy_(state[name])


class Owned:
    """A player with its parameters in R replicas, each replica's all in one row of a matrix, and its optimiser.

    The modules' parameters become views of their row. A player whose modules have no parameters (a fixed model) never
    steps.

    Args:
        players: One for each replica: the same but for learning rate and betas.
        modules: Those of each replica.
    """

    def __init__(self, players: Sequence[Player], modules: Sequence[Modules]) -> None:
        self.player = players[0]
        if any(replace(player, lr=self.player.lr, betas=self.player.betas) != self.player for player in players):
            raise ValueError(f"players of replicas may differ in learning rate and betas only, got {list(players)}")
        self.replicas = [dict(_parameters(self.player, own)) for own in modules]
        self.parameters = list(self.replicas[0].values())
        if not self.parameters:
            return
        # Zeros behind each tensor make the next one start at an address that suits vector instructions.
        self.paddings = [p.detach().new_zeros(len(modules), -p.numel() % ALIGNED_ELEMENTS) for p in self.parameters]
        self.sizes = [p.numel() for p in self.parameters]
        self.flat = self._flattened([stacked.detach() for stacked in stacks(self.replicas).values()])
        self.rows = self.flat.unbind()
        self.adam = Adam(self.flat, self._pieces, players)
        for own, row in zip(self.replicas, self.rows, strict=True):
            for parameter, part in zip(own.values(), self._parts(row), strict=True):
                parameter.data = part.view_as(parameter)

    def batched(self) -> dict[str, Tensor]:
        """The parameters of all replicas by name, (R, *shape): views of the same memory, to differentiate with."""
        if not self.parameters:
            return {}
        self.parameters = [
            part.view(len(self.rows), *parameter.shape).detach().requires_grad_()
            for part, parameter in zip(self._parts(self.flat), self.parameters, strict=True)
        ]
        return dict(zip(self.replicas[0], self.parameters, strict=True))

    @property
    def pieces(self) -> int:
        """In how many a gradient comes."""
        return len(self.sizes) if len(self.rows) == 1 else 1

    def gradient(self, loss: Tensor, tensors: Mapping[str, Tensor] | None, *, keep: bool) -> list[Tensor]:
        """The gradient of the player's loss, a scalar or (R,), in the pieces that the optimiser takes, each (R, n).

        Those of a single replica are its parameters, so that nothing is copied; of several there is one, (R, P), so
        that a step of the optimiser is one operation.

        Args:
            tensors: What the loss was computed from, by name, if that is not the parameters themselves.
        """
        parameters = self.parameters if tensors is None else [tensors[name] for name in self.replicas[0]]
        gradients = torch.autograd.grad(loss, parameters, torch.ones_like(loss), retain_graph=keep)
        if self.pieces == 1:
            return [self._flattened(gradients)]
        return [gradient.reshape(1, -1).contiguous() for gradient in gradients]

    def part(self, replica: int) -> InPlace:
        """The parameters of one replica, flat, and what the optimiser knows of them."""
        if not self.parameters:
            return InPlace({})
        return InPlace({"flat": self.rows[replica], **self.adam.part(replica)})

    def _flattened(self, tensors: Sequence[Tensor]) -> Tensor:
        """Tensors (R, *shape), or (*shape) of a single replica, side by side: (R, P)."""
        rows = [tensor.reshape(len(self.paddings[0]), -1) for tensor in tensors]
        return torch.cat([piece for pair in zip(rows, self.paddings, strict=True) for piece in pair], 1)

    def _pieces(self, flat: Tensor) -> list[Tensor]:
        return self._parts(flat) if self.pieces > 1 else [flat]

    def _parts(self, flat: Tensor) -> list[Tensor]:
        """What `_flattened` has put together, of all replicas (R, P) or one (P,): each of (R, n) or (n,)."""
        paddings = [padding.shape[1] for padding in self.paddings]
        sizes = [size for pair in zip(self.sizes, paddings, strict=True) for size in pair]
        return list(flat.split(sizes, dim=-1))[::2]


class Adam:
    """Steps of Adam on the rows of a matrix (R, P), each with its player's learning rate and decay rates.

    Kingma and Ba 2015, algorithm 1, https://arxiv.org/abs/1412.6980. Rows that share these are given to the fused
    kernel together. Torch's own class loads torch's compiler at its first step, which takes a second.

    Args:
        pieces: Cuts such a matrix into what gradients come in, each (R, n).
    """

    def __init__(self, flat: Tensor, pieces: Callable[[Tensor], list[Tensor]], players: Sequence[Player]) -> None:
        self.moments = {name: torch.zeros_like(flat) for name in ("exp_avg", "exp_avg_sq")}
        in_place = flat.device.type in CAPTURED
        self.factor: float | Tensor = torch.ones((), dtype=torch.float32, device=flat.device) if in_place else 1.0
        self.settings = [(player.lr, player.betas) for player in players]
        alike = len({*self.settings}) == 1
        blocks = [slice(None)] if alike else [slice(row, row + 1) for row in range(len(players))]
        counts = [torch.zeros((), dtype=torch.float32, device=flat.device) for _ in blocks]
        self.counts = counts * len(players) if alike else counts
        cut = [pieces(matrix) for matrix in (flat, *self.moments.values())]
        self.blocks = [
            (*setting, block, count, [[piece[block] for piece in matrix] for matrix in cut])
            for setting, block, count in zip(self.settings[: len(blocks)], blocks, counts, strict=True)
        ]

    def rescale(self, factor: float) -> None:
        """From now on every learning rate is that many times its player's."""
        if isinstance(self.factor, Tensor):  # a CUDA graph reads it where it is
            self.factor.fill_(factor)
        else:
            self.factor = factor

    def step(self, gradients: Sequence[Tensor], clip_norm: float) -> None:
        """Along a gradient in pieces (R, n), each row's cut to that norm first, unless it is 0."""
        if clip_norm:  # as `torch.nn.utils.clip_grad_norm_` does
            norms = torch.stack([torch.linalg.vector_norm(piece, dim=1, keepdim=True) for piece in gradients])
            factors = (clip_norm / (torch.linalg.vector_norm(norms, dim=0) + 1e-6)).clamp(max=1.0)
            gradients = [piece * factors for piece in gradients]  # not in place: two may be one tensor
        for lr, (beta1, beta2), block, count, (parameters, first, second) in self.blocks:
            count += 1
            own = [piece[block] for piece in gradients] if len(self.blocks) > 1 else [*gradients]
            torch._fused_adam_(  # pyright: ignore[reportPrivateImportUsage]
                parameters, own, first, second, [], [count] * len(own), lr=lr * self.factor, beta1=beta1, beta2=beta2,
                weight_decay=0.0, eps=EPSILON, amsgrad=False, maximize=False,
            )  # fmt: skip

    def part(self, row: int) -> dict[str, Tensor]:
        return {"step": self.counts[row], **{name: moment[row] for name, moment in self.moments.items()}}


def _parameters(player: Player, modules: Modules) -> Iterator[tuple[str, nn.Parameter]]:
    for on in player.on:
        for name, parameter in modules[on].named_parameters():
            yield f"{on}.{name}", parameter


def stacks(replicas: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Tensors of the same names, stacked: each (R, *shape)."""
    return {name: torch.stack([own[name] for own in replicas]) for name in replicas[0]}


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

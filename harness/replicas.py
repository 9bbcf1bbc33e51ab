"""Fits that are trained at once: each has its own seed, minibatches, noise and weights; they take their steps together.

A single fit is one replica. The losses of several are one batched program, mapped over whatever is each one's own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from harness.method import CurvePoint, Diverged, Run
from harness.players import Modules, Noise, NoiseStreams, Owned, stacks
from harness.precision import Products
from harness.problem import TrainingView

Losses = Callable[[Modules, Tensor, Noise], dict[str, Tensor]]
"""Of modules, a minibatch and noise: the loss of each player, by name."""

FURTHER = "further minibatches"  # of a player's own steps: the first step's stay the same for all methods
VALIDATION_BATCH = 1000


@dataclass(eq=False)
class Replica:
    """One fit: its modules, its streams, and how it goes.

    Args:
        objective: The player whose loss the training curve shows.
        shapes: Shape, per observation, of each noise.
        diverged: Set when it is no longer of interest; its steps go on only because those of the others do.
    """

    view: TrainingView
    run: Run
    modules: Modules
    losses: Losses
    objective: str
    shapes: Mapping[str, tuple[int, ...]]
    batch_size: int
    diverged: Diverged | None = None

    def __post_init__(self) -> None:
        self.batches = self.run.batches(self.view.train, self.batch_size)
        self.further_batches = self.run.batches(self.view.train, self.batch_size, FURTHER)
        self.noise = NoiseStreams(self.run, self.shapes, "noise")

    @property
    def streams(self) -> dict[str, Any]:
        """What decides all minibatches and noise to come, by name."""
        return {"minibatches": self.batches, FURTHER: self.further_batches, "noise": self.noise}

    def draw(self, *, further: bool) -> tuple[Tensor, Noise]:
        """The next minibatch (N, *E), and noise for it."""
        return next(self.further_batches if further else self.batches), self.noise.draw(self.batch_size)

    def log(self, step: int, fraction: float, seconds: float, objective: float, *, check: bool) -> None:
        """A point of the training curve; with the objective on the validation split, if that is to be checked."""
        validation = self._validate() if check else None
        try:
            self.run.log(CurvePoint(step, seconds, objective, validation), fraction)
        except Diverged as error:
            self.diverged = error

    def _validate(self) -> float:
        """The objective on the validation split, with the same noise at every check; off the fit clock."""
        noise = NoiseStreams(self.run, self.shapes, "validation")
        observations = self.view.validation
        copies = max(1, VALIDATION_BATCH // len(observations))  # more noise where there are few observations
        total, n = 0.0, copies * len(observations)
        with self.run.clock.paused(), torch.no_grad():
            self.modules.eval()
            for x in observations.repeat(copies, *[1] * (observations.ndim - 1)).split(VALIDATION_BATCH):
                losses = self.losses(self.modules, x, noise.draw(len(x)))
                total += float(losses[self.objective]) * len(x)
            self.modules.train()
        return total / n


class Together:
    """The losses of R replicas: of a single one as they are, of several as one batched program.

    That needs losses that are the same function for all, in which nothing depends on values but by tensor operations.
    Buffers become views of one tensor for all replicas, like the parameters of ``owned``.
    """

    def __init__(self, replicas: Sequence[Replica], owned: Sequence[Owned]) -> None:
        self.replicas = replicas
        products = replicas[0].run.products
        self.products = Products(products) if products else nullcontext()
        self.single = len(replicas) == 1
        if self.single:
            return
        self.program = _Program(replicas[0])
        buffers = [dict(replica.modules.named_buffers()) for replica in replicas]
        self.tensors = stacks(buffers)
        for name, stacked in self.tensors.items():
            for own, row in zip(buffers, stacked, strict=True):
                own[name].data = row
        for player in owned:
            self.tensors |= player.batched()

    def losses(self, *, further: bool = False) -> dict[str, Tensor]:
        """Each player's loss for the next minibatch: a scalar of a single replica, else (R,)."""
        drawn = [replica.draw(further=further) for replica in self.replicas]
        with self.products:
            return self._losses(drawn)

    def _losses(self, drawn: Sequence[tuple[Tensor, Noise]]) -> dict[str, Tensor]:
        if self.single:
            [replica], [(x, noise)] = self.replicas, drawn
            return replica.losses(replica.modules, x, noise)
        x = torch.stack([x for x, _ in drawn])
        noise = stacks([noise for _, noise in drawn])
        try:
            return vmap(self._of_one)(self.tensors, x, noise)
        except (torch.OutOfMemoryError, torch.linalg.LinAlgError):  # pyright: ignore[reportPrivateImportUsage]
            raise
        except RuntimeError as error:
            raise RuntimeError(
                f"its losses, or the problem's model, are no batched program ({error}); fit the seeds one by one, and "
                "let the method's one_by_one() say so if it is the method"
            ) from error

    def _of_one(self, tensors: dict[str, Tensor], x: Tensor, noise: Noise) -> dict[str, Tensor]:
        return functional_call(self.program, {f"own.{name}": value for name, value in tensors.items()}, (x, noise))


class _Program(nn.Module):
    """Losses as the forward pass of the modules, whose tensors can then be replaced."""

    def __init__(self, replica: Replica) -> None:
        super().__init__()
        self.own, self.losses = replica.modules, replica.losses

    def forward(self, x: Tensor, noise: Noise) -> dict[str, Tensor]:
        return self.losses(self.own, x, noise)

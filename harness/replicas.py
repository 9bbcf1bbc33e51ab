"""Fits that are trained at once: each has its own seed, minibatches, noise and weights; they take their steps together.

A single fit is one replica. The losses of several are one batched program, mapped over whatever is each one's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.func import functional_call, vmap

from harness.method import CurvePoint, Diverged, Run
from harness.minibatches import Minibatches
from harness.players import Modules, Noise, NoiseStreams, Owned, stacks
from harness.precision import Products
from harness.problem import TrainingView

Losses = Callable[[Modules, Tensor, Noise], dict[str, Tensor]]
"""Of modules, a minibatch and noise: the loss of each player, by name."""

Drawn = tuple[Tensor, Noise]
"""A minibatch (N, *E) and noise for it; of several replicas (R, N, *E)."""

FURTHER = "further minibatches"  # of a player's own steps: the first step's stay the same for all methods
VALIDATION_BATCH = 1000


@dataclass(eq=False)
class Replica:
    """One fit: its modules, its streams, and how it goes.

    Args:
        method: Its name, for what is told of it.
        objective: The player whose loss the training curve shows.
        shapes: Shape, per observation, of each noise.
        diverged: Set when it is no longer of interest; its steps go on only because those of the others do.
    """

    method: str
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

    def minibatches(self, *, further: bool) -> Minibatches:
        return self.further_batches if further else self.batches

    def draw(self, indices: Tensor, *, further: bool) -> Drawn:
        """The minibatch of these observations, (N,) -> (N, *E), and noise for it."""
        return self.minibatches(further=further).read(indices), self.noise.draw(self.batch_size)

    @property
    def generators(self) -> list[torch.Generator]:
        """Those that `draw` draws from."""
        return [self.batches.binarisation, self.further_batches.binarisation, *self.noise.streams.values()]

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
        with self.run.clock.paused(), torch.no_grad(), unvalidated():
            self.modules.eval()
            for x in observations.repeat(copies, *[1] * (observations.ndim - 1)).split(VALIDATION_BATCH):
                losses = self.losses(self.modules, x, noise.draw(len(x)))
                total += float(losses[self.objective]) * len(x)
            self.modules.train()
        return total / n


class Together:
    """R replicas as one: what they draw, all their tensors, and each player's loss as a function of these.

    Of a single one the losses are as they are, of several one batched program. That needs losses that are the same
    function for all, in which nothing depends on values but by tensor operations.

    Args:
        tensors: All parameters and buffers by name; of several replicas (R, *shape), which buffers become views of,
            like the parameters of ``owned``.
        buffers: The latter alone.
        objective: The player whose loss the training curve shows.
    """

    def __init__(self, replicas: Sequence[Replica], owned: Sequence[Owned]) -> None:
        self.replicas = replicas
        self.single = len(replicas) == 1
        self.objective, self.clock = replicas[0].objective, replicas[0].run.clock
        products = replicas[0].run.products
        self.low_precision = products is not None
        self.products = Products(products) if products else nullcontext()
        self.program = _Program(replicas[0])
        self.players = {player.player.name: bool(player.parameters) for player in owned}
        self.unseen = True
        modules = replicas[0].modules
        if self.single:
            self.buffers: dict[str, Tensor] = dict(modules.named_buffers())
            self.tensors: dict[str, Tensor] = {**self.buffers, **dict(modules.named_parameters())}
            return
        buffers = [dict(replica.modules.named_buffers()) for replica in replicas]
        self.buffers = stacks(buffers)
        for name, stacked in self.buffers.items():
            for own, row in zip(buffers, stacked, strict=True):
                own[name].data = row
        self.tensors = {name: tensor for player in owned for name, tensor in player.batched().items()} | self.buffers

    def indices(self, *, further: bool = False) -> list[Tensor]:
        """Which observations the next minibatch of each replica has: R times (N,)."""
        return [replica.minibatches(further=further).indices() for replica in self.replicas]

    def draw(self, indices: Sequence[Tensor], *, further: bool = False) -> Drawn:
        """The minibatch of these observations of each replica, and noise for it; of several replicas stacked."""
        drawn = [replica.draw(own, further=further) for replica, own in zip(self.replicas, indices, strict=True)]
        if self.single:
            return drawn[0]
        return torch.stack([x for x, _ in drawn]), stacks([noise for _, noise in drawn])

    @property
    def generators(self) -> list[torch.Generator]:
        """Those that `draw` draws from."""
        return [generator for replica in self.replicas for generator in replica.generators]

    @contextmanager
    def buffers_kept(self) -> Iterator[None]:
        """Afterwards buffers are what they were, should losses have changed them."""
        before = {name: tensor.clone() for name, tensor in self.buffers.items()}
        try:
            yield
        finally:
            for name, tensor in before.items():
                self.buffers[name].copy_(tensor)

    def losses(self, drawn: Drawn) -> dict[str, Tensor]:
        """Each player's loss: a scalar of a single replica, else (R,).

        Raises:
            ValueError: If the first ones are not what the method is to return.
        """
        if not self.single:
            return self.losses_at(self.tensors, drawn)
        with self.products, unvalidated():
            losses = self.replicas[0].losses(self.replicas[0].modules, *drawn)
        if self.unseen:
            self._check_form(losses)
            self._check_gradients(losses)
        return losses

    def losses_at(self, tensors: Mapping[str, Tensor], drawn: Drawn) -> dict[str, Tensor]:
        """The losses as they would be if ``tensors`` were those of the replicas."""
        with self.products, unvalidated():
            losses = self._of_one(tensors, *drawn) if self.single else self._of_several(tensors, drawn)
        if self.unseen:
            self._check_gradients(losses)
        return losses

    def _of_several(self, tensors: Mapping[str, Tensor], drawn: Drawn) -> dict[str, Tensor]:
        try:
            return vmap(self._of_one)(tensors, *drawn)
        except (torch.OutOfMemoryError, torch.linalg.LinAlgError):  # pyright: ignore[reportPrivateImportUsage]
            raise
        except RuntimeError as error:
            raise RuntimeError(
                f"its losses, or the problem's model, are no batched program ({error}); fit the seeds one by one, "
                "and let the method's one_by_one() say so if it is the method"
            ) from error

    def _of_one(self, tensors: Mapping[str, Tensor], x: Tensor, noise: Noise) -> dict[str, Tensor]:
        losses = functional_call(self.program, {f"own.{name}": value for name, value in tensors.items()}, (x, noise))
        if self.unseen:
            self._check_form(losses)
        return losses

    def _check_form(self, losses: object) -> None:
        """See that the losses of one replica are those of the players, each a scalar."""
        method, dtype, players = self.replicas[0].method, self.replicas[0].run.dtype, ", ".join(self.players)
        if not isinstance(losses, dict):
            kind = type(losses).__name__
            raise ValueError(
                f"{method}: losses must return a dict with a loss for each player ({players}), got a {kind}"
            )
        found = cast(dict[str, object], losses)
        if self.players.keys() != found.keys():
            got = ", ".join(map(str, found)) or "none"
            raise ValueError(f"{method}: losses must return one loss for each player ({players}), got {got}")
        for name in self.players:
            form = _form(found[name])
            if form != _form(torch.empty((), dtype=dtype)):
                raise ValueError(f"{method}: loss {name!r} must be a scalar tensor of {dtype}, a mean; got {form}")

    def _check_gradients(self, losses: Mapping[str, Tensor]) -> None:
        """See that losses of players that move have gradients, which cannot be told of what is mapped, from inside."""
        for name, moves in self.players.items():
            if moves and not losses[name].requires_grad:
                raise ValueError(
                    f"{self.replicas[0].method}: loss {name!r} has no gradient: it must require grad, as what is "
                    "computed from the parameters of its player does, without detach() or no_grad()"
                )
        self.unseen = False


def _form(loss: object) -> str:
    return f"{loss.dtype} of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"


@contextmanager
def unvalidated() -> Iterator[None]:
    """Distributions do not look at their values: that waits for the device, and is no part of a recording or a batch.

    What is not finite is found by the loop.
    """
    before = Distribution._validate_args  # pyright: ignore[reportPrivateUsage]
    Distribution.set_default_validate_args(False)
    try:
        yield
    finally:
        Distribution.set_default_validate_args(before)


class _Program(nn.Module):
    """Losses as the forward pass of the modules, whose tensors can then be replaced."""

    def __init__(self, replica: Replica) -> None:
        super().__init__()
        self.own, self.losses = replica.modules, replica.losses

    def forward(self, x: Tensor, noise: Noise) -> dict[str, Tensor]:
        return self.losses(self.own, x, noise)

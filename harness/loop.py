"""The training loop of all gradient methods: steps until a budget is spent, on a clock, from and to checkpoints.

The loop draws the noise, differentiates each loss with respect to its own player's parameters only, updates all players
at once from one shared forward pass, and never waits for the device in between. All that decides the steps to come is
explicit state: an interrupted fit goes on from a checkpoint bit for bit.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from harness.cuda_graph import Indices, captured
from harness.method import Diverged, State
from harness.players import Adam, InPlace, Owned, Player
from harness.replicas import Drawn, Replica, Together
from harness.stepping import gradients_by
from harness.stopping import Stopped

if TYPE_CHECKING:
    from harness.training import GradientMethod

log = logging.getLogger(__name__)

LOG_EVERY = 100
CLOCK_EVERY = 10
VALIDATION_CHECKS = 20
CONVERGENCE_CHECK_STEPS = 500


@dataclass
class Loop:
    """The steps of one or several replicas; budget, clock and checkpoints are those of the first one's run."""

    methods: Sequence[GradientMethod]
    replicas: Sequence[Replica]
    pending: list[Tensor] = field(default_factory=list)
    steps: int = 0
    fraction: float = 0.0
    lr_factor: float = 1.0

    def __post_init__(self) -> None:
        self.method, self.run = self.methods[0], self.replicas[0].run
        modules = [replica.modules for replica in self.replicas]
        players = zip(*(method.players() for method in self.methods), strict=True)
        self.owned = [Owned(same, modules) for same in players]
        self.movers = [owned for owned in self.owned if owned.parameters]
        self.further = [owned for owned in self.movers for _ in range(owned.player.steps - 1)]
        self.together = Together(self.replicas, self.owned)
        self.gradients = gradients_by("eager" if self.method.one_by_one() else self.run.step, self.together)
        self.captured = captured(self.gradients, self.together)
        on_host = self.run.device.type == "cpu"
        self.clock_every = 1 if on_host else CLOCK_EVERY  # reading the clock waits for the device
        self.check_every = (
            math.ceil(self.run.budget.amount / VALIDATION_CHECKS)
            if self.run.budget.unit == "steps"
            else CONVERGENCE_CHECK_STEPS
        )

    def train(self) -> Iterator[None]:
        """Train until the budget is spent, one step after another."""
        for replica in self.replicas:
            replica.modules.train()
        by_clock = self.run.budget.unit == "seconds"
        batches_per_step = 1 + len(self.further)
        done = False
        start, untouched = self.steps, torch.random.get_rng_state()
        while not done:
            if self.run.budget.unit != "converged":
                for method, replica in zip(self.methods, self.replicas, strict=True):
                    method.schedule(replica.modules, self.fraction)
            self.steps += 1
            self.step()
            if self.steps == start + 1:
                self._tell_of_draws(untouched)
            if not by_clock or self.steps % self.clock_every == 0:
                self.fraction = self.run.fraction(self.steps, self.method.batch_size * batches_per_step)
                self._rescale(self.method.lr_decay ** max(0.0, (self.fraction - 0.4) / 0.6))
            done = self.fraction >= 1
            check = done or self.steps % self.check_every == 0
            if check or self.steps % LOG_EVERY == 0:
                self._log(check)
                if check:
                    with self.run.clock.paused():
                        self._check()
                done = done or self.run.converged() or all(replica.diverged for replica in self.replicas)
            if not done and self.run.checkpoint.due():
                self._save()
            yield
        for replica in self.replicas:
            if not all(bool(parameter.isfinite().all()) for parameter in replica.modules.parameters()):
                replica.diverged = replica.diverged or Diverged(f"parameters are not finite after step {self.steps}")

    def step(self) -> None:
        """All players at once from one shared forward pass, then the further steps of those that take more."""
        further = [self.together.indices(further=True) for _ in self.further]
        indices = [self.together.indices(), *further]
        self.pending.append(self.captured(self._updates, indices) if self.captured else self._updates(indices))

    def _updates(self, indices: Indices) -> Tensor:
        """A step on these minibatches; the objective before it, (R,)."""
        first, *further = indices
        objective = self._move(self.movers, self.together.draw(first))
        for owned, own in zip(self.further, further, strict=True):
            self._move([owned], self.together.draw(own, further=True))
        return objective

    def _move(self, movers: Sequence[Owned], drawn: Drawn) -> Tensor:
        """Update players at once; the objective before that, (R,)."""
        objective, gradients = self.gradients(movers, drawn)
        for owned, gradient in zip(movers, gradients, strict=True):
            owned.adam.step(gradient, self.method.clip_norm)
        return objective

    def _rescale(self, lr_factor: float) -> None:
        """All learning rates, from the next step on."""
        if lr_factor != self.lr_factor:
            self.lr_factor = lr_factor
            for owned in self.movers:
                owned.adam.rescale(lr_factor)

    def _tell_of_draws(self, before: Tensor) -> None:
        """After the first step, of those that no checkpoint knows of, by the state of torch's generator before it."""
        if self.gradients.used != "compile" and not torch.equal(torch.random.get_rng_state(), before):
            log.warning("%s: losses draw from torch's global generator: steps are taken as they are written, and a fit "
                        "that is interrupted does not go on as it would have; state draws in noise()",
                        self.method.name)  # fmt: skip
            self.gradients.give_up()

    def _check(self) -> None:
        """See that steps are what the losses and players say, however they are taken.

        Raises:
            RuntimeError: If they are not.
        """
        self.gradients.check()
        if self.captured:
            parts = [self._parts(number) for number in range(len(self.replicas))]
            self.captured.check(self._updates, [part for own in parts for part in own.values()])

    def _parts(self, number: int) -> dict[str, Any]:
        """Everything with tensors that a step changes of one replica, by name."""
        replica = self.replicas[number]
        players = {f"player {owned.player.name}": owned.part(number) for owned in self.owned}
        return {**players, **replica.streams, "buffers": InPlace(dict(replica.modules.named_buffers()))}

    def state(self, number: int) -> State:
        """All that decides the steps of one replica to come, besides what its run keeps itself."""
        tensors = {
            f"{part}/{name}": tensor
            for part, thing in self._parts(number).items()
            for name, tensor in thing.state_dict().items()
        }
        diverged = self.replicas[number].diverged
        facts = {
            "steps": self.steps,
            "fraction": self.fraction,
            "lr_factor": self.lr_factor,
            "diverged": str(diverged) if diverged else "",
        }
        return State({**tensors, "pending": self._objectives()[:, number]}, facts)

    def _objectives(self) -> Tensor:
        """The objectives that are not in the training curves yet: one row for each step, a column for each replica."""
        none = torch.empty(0, len(self.replicas), device=self.run.device, dtype=self.run.dtype)
        return torch.stack(self.pending) if self.pending else none

    def _save(self) -> None:
        """Keep the states of all replicas, also if the run is to end here.

        Raises:
            Stopped: If it is.
        """
        stopped: Stopped | None = None
        for number, replica in enumerate(self.replicas):
            try:
                replica.run.checkpoint.save(self.state(number), self.steps, self.fraction)
            except Stopped as end:
                stopped = end
        if stopped is not None:
            raise stopped

    def resume(self) -> None:
        """Go on from where an earlier run stopped, if there is such a place.

        Raises:
            ValueError: If it belongs to other modules, or if replicas have not come equally far.
        """
        found = [replica.run.checkpoint.load() for replica in self.replicas]
        states = [state for state in found if state is not None]
        if not states:
            return
        reached = [state and state.facts["steps"] for state in found]
        if len(set(reached)) != 1:
            raise ValueError(
                f"{self.method.name}: fits that are trained together have stopped at the steps {reached}; tried again, "
                "each goes on from there"
            )
        for number, (replica, state) in enumerate(zip(self.replicas, states, strict=True)):
            self._take_up(number, state)
            replica.diverged = Diverged(state.facts["diverged"]) if state.facts["diverged"] else None
        pending = [state.tensors["pending"].to(self.run.device) for state in states]
        self.pending = list(torch.stack(pending, dim=1))
        facts = states[0].facts
        self.steps, self.fraction = facts["steps"], facts["fraction"]
        self._rescale(facts["lr_factor"])

    def _take_up(self, number: int, state: State) -> None:
        try:
            for part, thing in self._parts(number).items():
                own = {name: tensor for name, tensor in state.tensors.items() if name.startswith(f"{part}/")}
                thing.load_state_dict({name.removeprefix(f"{part}/"): tensor for name, tensor in own.items()})
        except (KeyError, RuntimeError) as error:
            raise ValueError(
                f"{self.method.name}: the checkpoint does not fit the modules that build() returns now ({error}); "
                "delete it from the folder 'checkpoints' to fit anew"
            ) from error

    def _log(self, check: bool) -> None:
        means = self._objectives().mean(0).tolist()
        self.pending.clear()
        seconds = self.run.clock.elapsed()
        for replica, mean in zip(self.replicas, means, strict=True):
            if not replica.diverged:
                replica.log(self.steps, self.fraction, seconds, mean, check=check)


@cache
def warm_up(device: torch.device, dtype: torch.dtype) -> None:
    """Pay once per process for what the first step of any loop would pay: lazy imports, library and kernel set-up."""
    layer = nn.Linear(2, 8, device=device, dtype=dtype)
    stream = torch.Generator(device=device)
    x = torch.randn(2, 2, generator=stream, device=device, dtype=dtype)
    weight = layer.weight.detach().view(1, -1)
    loss = layer(x).sum()
    [gradient] = torch.autograd.grad(loss, [layer.weight], torch.ones_like(loss))  # as a step does: it imports more
    Adam(weight, lambda flat: [flat], [Player("", (), lr=1e-3)]).step([gradient.view(1, -1)], 1.0)

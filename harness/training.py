"""The training loop of all gradient methods.

A method states its modules, its *players* (who owns which parameters and how they are updated), the shapes of its noise
and its losses as a pure function; the loop draws the noise, differentiates each loss with respect to its own player's
parameters only, updates all players at once from one shared forward pass, and never waits for the device in between.
All that decides the steps to come is explicit state: an interrupted fit goes on from a checkpoint bit for bit.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor, nn

from harness.method import CurvePoint, Diverged, Fit, Method, Run, State
from harness.nn import count_parameters
from harness.players import Buffers, Modules, Noise, NoiseStreams, Owned, Player
from harness.posterior import Posterior
from harness.problem import TrainingView

FURTHER = "further minibatches"  # of a player's own steps: the first step's stay the same for all methods
LOG_EVERY = 100
CLOCK_EVERY = 10
VALIDATION_CHECKS = 20
CONVERGENCE_CHECK_STEPS = 500
VALIDATION_BATCH = 1000


@dataclass(frozen=True, kw_only=True)
class GradientMethod(Method):
    """A method that is trained by stochastic gradients: a subclass writes only the mathematics.

    Args:
        batch_size: Observations in a minibatch.
        lr_decay: Factor by which every learning rate falls over the last 60 % of the budget, geometrically; 1 for none.
            Without effect where convergence decides.
        clip_norm: Largest norm of a player's gradient; 0 for no clipping, as in the released code of the AVB paper.
    """

    batch_size: PositiveInt = 128
    lr_decay: PositiveFloat = 0.1
    clip_norm: NonNegativeFloat = 0.0

    @abstractmethod
    def build(self, view: TrainingView) -> Modules:
        """All modules by name, among them ``model``: the view's model, never another one."""

    @abstractmethod
    def players(self) -> list[Player]:
        """Who minimises what; the first player's loss is the objective of the training curve."""

    @abstractmethod
    def noise(self, view: TrainingView) -> dict[str, tuple[int, ...]]:
        """Shape, per observation, of each standard normal noise that `losses` uses."""

    @abstractmethod
    def losses(self, modules: Modules, x: Tensor, noise: Noise) -> dict[str, Tensor]:
        """The loss of each player: a pure function of its arguments.

        Args:
            x: Minibatch, shape (N, *E).
            noise: Standard normal draws, each of shape (N, *shape) with the shapes of `noise`.

        Returns:
            A scalar for each player, a mean over observations in nats.
        """

    @abstractmethod
    def posterior(self, modules: Modules) -> Posterior:
        """q(z|x) of the trained modules."""

    def schedule(self, modules: Modules, fraction: float) -> None:
        """Set what changes with the part of the budget that is spent, in [0, 1]: called before every step.

        What `losses` should know of it is put into buffers of the modules. Never called while convergence decides,
        where that part is not known.
        """

    def fit(self, view: TrainingView, run: Run) -> Fit:
        modules = _built(self, view)
        loop = _Loop(self, view, run, modules)
        loop.resume()
        step = loop.train()
        evaluations = step * sum(player.steps for player in self.players())
        return self._fit(view, modules, step, evaluations)

    def restore(self, view: TrainingView, state: Mapping[str, Tensor]) -> Fit:
        modules = _built(self, view)
        modules.load_state_dict(state)
        return self._fit(view, modules, 0, 0)

    def _fit(self, view: TrainingView, modules: Modules, steps: int, gradient_evaluations: int) -> Fit:
        modules.eval().requires_grad_(False)
        state = {name: tensor.detach() for name, tensor in modules.state_dict().items()}
        parameters = count_parameters(modules) - count_parameters(view.model)
        return Fit(view.model, self.posterior(modules), state, parameters, steps, gradient_evaluations)


def stepper(method: GradientMethod, view: TrainingView, run: Run) -> Callable[[], None]:
    """A function that takes one step of a fit: to time it, or to look on while a method trains."""
    return _Loop(method, view, run, _built(method, view)).step


def _built(method: GradientMethod, view: TrainingView) -> Modules:
    modules = method.build(view)
    if modules["model"] is not view.model:
        raise ValueError(f"{method.name}: build() must return the view's model under 'model'")
    owned = [name for player in method.players() for name in player.on]
    if sorted(owned) != sorted(modules):
        raise ValueError(f"{method.name}: players own {sorted(owned)}, build() returned {sorted(modules)}")
    return modules.to(device=view.validation.device, dtype=view.validation.dtype)


@dataclass
class _Loop:
    method: GradientMethod
    view: TrainingView
    run: Run
    modules: Modules
    pending: list[Tensor] = field(default_factory=list)
    steps: int = 0
    fraction: float = 0.0
    lr_factor: float = 1.0

    def __post_init__(self) -> None:
        self.owned = [Owned(player, self.modules) for player in self.method.players()]
        self.objective = self.owned[0].player.name
        self.shapes = self.method.noise(self.view)
        self.batches = self.run.batches(self.view.train, self.method.batch_size)
        self.further_batches = self.run.batches(self.view.train, self.method.batch_size, FURTHER)
        self.noise = NoiseStreams(self.run, self.shapes, "noise")
        self.check_every = (
            math.ceil(self.run.budget.amount / VALIDATION_CHECKS)
            if self.run.budget.unit == "steps"
            else CONVERGENCE_CHECK_STEPS
        )

    def train(self) -> int:
        """Train until the budget is spent; returns the number of steps."""
        self.modules.train()
        by_clock = self.run.budget.unit == "seconds"
        batches_per_step = 1 + sum(owned.player.steps - 1 for owned in self.owned if owned.parameters)
        done = False
        while not done:
            if self.run.budget.unit != "converged":
                self.method.schedule(self.modules, self.fraction)
            self.steps += 1
            self.step()
            if not by_clock or self.steps % CLOCK_EVERY == 0:  # reading the clock waits for the device
                self.fraction = self.run.fraction(self.steps, self.method.batch_size * batches_per_step)
                self.lr_factor = self.method.lr_decay ** max(0.0, (self.fraction - 0.4) / 0.6)
            done = self.fraction >= 1
            check = done or self.steps % self.check_every == 0
            if check or self.steps % LOG_EVERY == 0:
                self._log(check)
                done = done or self.run.converged()
            if not done and self.run.checkpoint.due():
                self.run.checkpoint.save(self.state(), self.steps, self.fraction)
        if not all(bool(parameter.isfinite().all()) for parameter in self.modules.parameters()):
            raise Diverged(f"parameters are not finite after step {self.steps}")
        return self.steps

    def step(self) -> None:
        """All players at once from one shared forward pass, then the further steps of those that take more."""
        size = self.method.batch_size
        losses = self.method.losses(self.modules, next(self.batches), self.noise.draw(size))
        self.pending.append(losses[self.objective].detach())
        movers = [owned for owned in self.owned if owned.parameters]
        clip_norm = self.method.clip_norm
        for i, owned in enumerate(movers):
            owned.differentiate(losses[owned.player.name], clip_norm, keep=i < len(movers) - 1)
        for owned in movers:
            owned.step(self.lr_factor)
        for owned in movers:
            for _ in range(owned.player.steps - 1):
                losses = self.method.losses(self.modules, next(self.further_batches), self.noise.draw(size))
                owned.differentiate(losses[owned.player.name], clip_norm, keep=False)
                owned.step(self.lr_factor)

    def _parts(self) -> dict[str, Any]:
        """Everything with tensors that a step changes, by name."""
        players = {f"player {owned.player.name}": owned for owned in self.owned}
        batches = {"minibatches": self.batches, FURTHER: self.further_batches}
        return {**players, **batches, "noise": self.noise, "buffers": Buffers(self.modules)}

    def state(self) -> State:
        """All that decides the steps to come, besides what the run keeps itself."""
        tensors = {
            f"{part}/{name}": tensor
            for part, thing in self._parts().items()
            for name, tensor in thing.state_dict().items()
        }
        pending = torch.stack(self.pending) if self.pending else torch.empty(0, dtype=self.run.dtype)
        facts = {"steps": self.steps, "fraction": self.fraction, "lr_factor": self.lr_factor}
        return State({**tensors, "pending": pending}, facts)

    def resume(self) -> None:
        """Go on from where an earlier run stopped, if there is such a place.

        Raises:
            ValueError: If it belongs to other modules.
        """
        state = self.run.checkpoint.load()
        if state is None:
            return
        try:
            for part, thing in self._parts().items():
                own = {name: tensor for name, tensor in state.tensors.items() if name.startswith(f"{part}/")}
                thing.load_state_dict({name.removeprefix(f"{part}/"): tensor for name, tensor in own.items()})
        except (KeyError, RuntimeError) as error:
            raise ValueError(
                f"{self.method.name}: the checkpoint does not fit the modules that build() returns now ({error}); "
                "delete it from the folder 'checkpoints' to fit anew"
            ) from error
        self.pending = list(state.tensors["pending"].to(self.run.device))
        self.steps, self.fraction = state.facts["steps"], state.facts["fraction"]
        self.lr_factor = state.facts["lr_factor"]

    def _log(self, check: bool) -> None:
        mean = float(torch.stack(self.pending).mean())
        self.pending.clear()
        seconds = self.run.clock.elapsed()
        validation = self._validate() if check else None
        self.run.log(CurvePoint(self.steps, seconds, mean, validation), self.fraction)

    def _validate(self) -> float:
        """The objective on the validation split, with the same noise at every check; off the fit clock."""
        noise = NoiseStreams(self.run, self.shapes, "validation")
        observations = self.view.validation
        copies = max(1, VALIDATION_BATCH // len(observations))  # more noise where there are few observations
        total, n = 0.0, copies * len(observations)
        with self.run.clock.paused(), torch.no_grad():
            self.modules.eval()
            for x in observations.repeat(copies, *[1] * (observations.ndim - 1)).split(VALIDATION_BATCH):
                losses = self.method.losses(self.modules, x, noise.draw(len(x)))
                total += float(losses[self.objective]) * len(x)
            self.modules.train()
        return total / n


@cache
def warm_up(device: torch.device, dtype: torch.dtype) -> None:
    """Pay once per process for what the first step of any loop would pay: lazy imports, library and kernel set-up."""
    layer = nn.Linear(2, 2, device=device, dtype=dtype)
    optimiser = torch.optim.Adam(layer.parameters(), fused=True)
    stream = torch.Generator(device=device)
    x = torch.randn(2, 2, generator=stream, device=device, dtype=dtype)
    for parameter, gradient in zip(
        layer.parameters(), torch.autograd.grad(layer(x).sum(), list(layer.parameters())), strict=True
    ):
        parameter.grad = gradient
    optimiser.step()

"""The training loop of all gradient methods.

A method states its modules, its *players* (who owns which parameters and how they are updated), the shapes of its noise
and its losses as a pure function; the loop draws the noise, differentiates each loss with respect to its own player's
parameters only, updates all players at once from one shared forward pass, and never waits for the device in between.
All that decides the steps to come is explicit state: an interrupted fit goes on from a checkpoint bit for bit.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor, nn

from harness.method import CurvePoint, Diverged, Fit, Method, Run, State
from harness.nn import count_parameters
from harness.posterior import Posterior
from harness.problem import TrainingView

Noise = dict[str, Tensor]

FURTHER = "further minibatches"  # of a player's own steps: the first step's stay the same for all methods
LOG_EVERY = 100
ALIGNED_ELEMENTS = 16  # 64 bytes of float32
CLOCK_EVERY = 10
VALIDATION_CHECKS = 20
CONVERGENCE_CHECK_STEPS = 500
VALIDATION_BATCH = 1000


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


class _Owned:
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


class _NoiseStreams:
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


class _Buffers:
    """Those tensors of the modules that are no parameters."""

    def __init__(self, modules: Modules) -> None:
        self.modules = modules

    def state_dict(self) -> dict[str, Tensor]:
        return dict(self.modules.named_buffers())

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        for name, buffer in self.modules.named_buffers():
            buffer.copy_(state[name])


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
        self.owned = [_Owned(player, self.modules) for player in self.method.players()]
        self.objective = self.owned[0].player.name
        self.shapes = self.method.noise(self.view)
        self.batches = self.run.batches(self.view.train, self.method.batch_size)
        self.further_batches = self.run.batches(self.view.train, self.method.batch_size, FURTHER)
        self.noise = _NoiseStreams(self.run, self.shapes, "noise")
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
        return {**players, **batches, "noise": self.noise, "buffers": _Buffers(self.modules)}

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
        noise = _NoiseStreams(self.run, self.shapes, "validation")
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

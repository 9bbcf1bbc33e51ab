"""The training loop of all gradient methods.

A method states its modules, its *players* (who owns which parameters and how they are updated), the shapes of its noise
and its losses as a pure function; the loop draws the noise, differentiates each loss with respect to its own player's
parameters only, updates all players at once from one shared forward pass, and never waits for the device in between.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor, nn

from harness.method import CurvePoint, Diverged, Fit, Method, Run
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
        step = _Loop(self, view, run, modules).train()
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


@dataclass
class _Loop:
    method: GradientMethod
    view: TrainingView
    run: Run
    modules: Modules
    pending: list[Tensor] = field(default_factory=list)
    lr_factor: float = 1.0

    def __post_init__(self) -> None:
        self.owned = [_Owned(player, self.modules) for player in self.method.players()]
        self.objective = self.owned[0].player.name
        self.shapes = self.method.noise(self.view)
        self.batches = self.run.batches(self.view.train, self.method.batch_size)
        self.further_batches = self.run.batches(self.view.train, self.method.batch_size, FURTHER)
        self.noise = self._noise_stream("noise")
        self.check_every = (
            math.ceil(self.run.budget.amount / VALIDATION_CHECKS)
            if self.run.budget.unit == "steps"
            else CONVERGENCE_CHECK_STEPS
        )

    def _noise_stream(self, purpose: str) -> Iterator[Noise]:
        """Noise for one minibatch after another; each kind has its own stream."""
        streams = {name: self.run.generator(f"{purpose}/{name}") for name in self.shapes}
        while True:
            yield {name: self._draw(self.method.batch_size, name, stream) for name, stream in streams.items()}

    def _draw(self, n: int, name: str, stream: torch.Generator) -> Tensor:
        shape = (n, *self.shapes[name])
        return torch.randn(shape, generator=stream, device=self.run.device, dtype=self.run.dtype)

    def train(self) -> int:
        """Train until the budget is spent; returns the number of steps."""
        self.modules.train()
        fraction, by_clock = 0.0, self.run.budget.unit == "seconds"
        batches_per_step = 1 + sum(owned.player.steps - 1 for owned in self.owned if owned.parameters)
        step, done = 0, False
        while not done:
            if self.run.budget.unit != "converged":
                self.method.schedule(self.modules, fraction)
            step += 1
            self.step()
            if not by_clock or step % CLOCK_EVERY == 0:  # reading the clock waits for the device
                fraction = self.run.fraction(step, self.method.batch_size * batches_per_step)
                self.lr_factor = self.method.lr_decay ** max(0.0, (fraction - 0.4) / 0.6)
            done = fraction >= 1
            check = done or step % self.check_every == 0
            if check or step % LOG_EVERY == 0:
                self._log(step, fraction, check)
                done = done or self.run.converged()
        if not all(bool(parameter.isfinite().all()) for parameter in self.modules.parameters()):
            raise Diverged(f"parameters are not finite after step {step}")
        return step

    def step(self) -> None:
        """All players at once from one shared forward pass, then the further steps of those that take more."""
        losses = self.method.losses(self.modules, next(self.batches), next(self.noise))
        self.pending.append(losses[self.objective].detach())
        movers = [owned for owned in self.owned if owned.parameters]
        clip_norm = self.method.clip_norm
        for i, owned in enumerate(movers):
            owned.differentiate(losses[owned.player.name], clip_norm, keep=i < len(movers) - 1)
        for owned in movers:
            owned.step(self.lr_factor)
        for owned in movers:
            for _ in range(owned.player.steps - 1):
                losses = self.method.losses(self.modules, next(self.further_batches), next(self.noise))
                owned.differentiate(losses[owned.player.name], clip_norm, keep=False)
                owned.step(self.lr_factor)

    def _log(self, step: int, fraction: float, check: bool) -> None:
        mean = float(torch.stack(self.pending).mean())
        self.pending.clear()
        seconds = self.run.clock.elapsed()
        validation = self._validate() if check else None
        self.run.log(CurvePoint(step, seconds, mean, validation), fraction)

    def _validate(self) -> float:
        """The objective on the validation split, with the same noise at every check; off the fit clock."""
        streams = {name: self.run.generator(f"validation/{name}") for name in self.shapes}
        observations = self.view.validation
        copies = max(1, VALIDATION_BATCH // len(observations))  # more noise where there are few observations
        total, n = 0.0, copies * len(observations)
        with self.run.clock.paused(), torch.no_grad():
            self.modules.eval()
            for x in observations.repeat(copies, *[1] * (observations.ndim - 1)).split(VALIDATION_BATCH):
                noise = {name: self._draw(len(x), name, stream) for name, stream in streams.items()}
                total += float(self.method.losses(self.modules, x, noise)[self.objective]) * len(x)
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

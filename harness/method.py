"""Methods, what they are handed (`Run`), and what they give back (`Fit`)."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from harness.clock import Clock
from harness.minibatches import Minibatches
from harness.model import LatentModel
from harness.options import Configurable, UserError
from harness.posterior import Posterior
from harness.problem import Split, TrainingView
from harness.seeding import Streams

LEAST_IMPROVEMENT = 1e-3  # nats; less is no progress, or a fit would creep on for ever
BudgetUnit = Literal["steps", "seconds", "examples", "converged"]


class Diverged(Exception):
    """A fit whose objective or parameters are no longer finite."""


@dataclass(frozen=True)
class Budget:
    """How long a fit may go on.

    ``steps``: parameter updates. ``seconds``: time on the fit clock. ``examples``: observations read.
    ``converged``: until the validation objective has not improved by 0.001 nats at that many checks in a row.
    """

    unit: BudgetUnit
    amount: float

    @staticmethod
    def parse(text: str) -> Budget:
        """From ``steps=5000``, ``seconds=60``, ``examples=1e6`` or ``converged=10``.

        Raises:
            UserError: If the unit is unknown or the amount is not a positive number (whole, unless it is seconds).
        """
        form = "expected steps=N, seconds=S, examples=N or converged=CHECKS"
        if not isinstance(text, str):
            raise UserError(f"budget {text!r}: {form}")
        unit, equals, amount = text.strip().partition("=")
        if unit not in get_args(BudgetUnit) or not equals:
            raise UserError(f"budget {text!r}: {form}")
        try:
            value = float(amount)
        except ValueError:
            raise UserError(f"budget {text!r}: {amount!r} is not a number; {form}") from None
        if not (math.isfinite(value) and value > 0):
            raise UserError(f"budget {text!r}: must be positive and finite; {form}")
        if unit != "seconds" and value != int(value):
            raise UserError(f"budget {text!r}: must be a whole number; {form}")
        return Budget(unit, value)  # type: ignore[arg-type]

    def __str__(self) -> str:
        amount = int(self.amount) if self.amount == int(self.amount) else self.amount
        return f"{self.unit}={amount}"


@dataclass(frozen=True)
class CurvePoint:
    """One point of a training curve.

    Args:
        seconds: On the fit clock.
        objective: Mean training objective of the first player since the last point, nats per observation.
        validation: The same objective on the validation split; None between checks.
    """

    step: int
    seconds: float
    objective: float
    validation: float | None = None


@dataclass(frozen=True)
class State:
    """All that a method needs to go on with a fit, bit for bit.

    Args:
        tensors: Parameters, the optimiser's state, states of random streams and so on. On any device when they are
            saved, on the CPU when they are loaded.
        facts: Whatever JSON can hold.
    """

    tensors: Mapping[str, Tensor]
    facts: Mapping[str, Any]


class Checkpoint(ABC):
    """How far a fit has come, kept for a later run of the same job.

    The training curve, the seconds on the fit clock and peak memory are kept along with the method's state. A method
    that keeps nothing starts anew when it has been interrupted.
    """

    @abstractmethod
    def load(self) -> State | None:
        """The state that an earlier run has kept, or None; curve and clock go on from there."""

    @abstractmethod
    def due(self) -> bool:
        """Whether a state is to be saved now; cheap enough to be asked at every step."""

    @abstractmethod
    def save(self, state: State, step: int, fraction: float) -> None:
        """Keep a state, off the fit clock; it replaces the one before.

        Args:
            fraction: The part of the budget that is spent, in [0, 1]; 0 where it is not known.

        Raises:
            Stopped: If the run is to end here.
        """


class NothingKept(Checkpoint):
    """That of a fit in memory."""

    def load(self) -> State | None:
        return None

    def due(self) -> bool:
        return False

    def save(self, state: State, step: int, fraction: float) -> None: ...


@dataclass
class Run:
    """What a fit is handed besides the problem: where, how precisely, how long, and from which random streams.

    Args:
        products: What the layers of networks multiply in while they train (`harness.precision`); None for ``dtype``.
        step: How the training loop computes its gradients (`harness.stepping`).
    """

    device: torch.device
    dtype: torch.dtype
    budget: Budget
    streams: Streams
    clock: Clock
    on_progress: Callable[[float, CurvePoint], None] = lambda fraction, point: None
    curve: list[CurvePoint] = field(default_factory=list)
    checkpoint: Checkpoint = field(default_factory=NothingKept)
    products: torch.dtype | None = None
    step: str = "auto"

    def generator(self, name: str) -> torch.Generator:
        """A stream of the method's own."""
        return self.streams.own(name)

    def batches(self, split: Split, batch_size: int, purpose: str = "minibatches") -> Minibatches:
        """Minibatches without end, shape (batch_size, *E); the same for all methods of a comparison.

        Args:
            purpose: Names the stream. What not every method reads has a stream of its own.
        """
        binarisation = "binarisation" if purpose == "minibatches" else f"binarisation/{purpose}"
        return Minibatches(split, batch_size, self.streams.shared(purpose), self.streams.shared(binarisation))

    def fraction(self, step: int, examples_per_step: int) -> float:
        """The part of the budget that is spent after ``step`` steps, in [0, 1]; 0 while convergence decides."""
        spent = {
            "steps": step,
            "examples": step * examples_per_step,
            "seconds": self.clock.elapsed() if self.budget.unit == "seconds" else 0.0,
            "converged": 0.0,
        }[self.budget.unit]
        return min(1.0, spent / self.budget.amount)

    def log(self, point: CurvePoint, fraction: float) -> None:
        """Keep a point of the training curve and show progress.

        Raises:
            Diverged: If the objective is not finite.
        """
        self.curve.append(point)
        if not math.isfinite(point.objective):
            raise Diverged(f"objective is {point.objective} at or before step {point.step}")
        if point.validation is not None and not math.isfinite(point.validation):
            raise Diverged(f"validation objective is {point.validation} at step {point.step}")
        self.on_progress(fraction, point)

    def converged(self) -> bool:
        """Whether the validation objective has stopped improving, for budgets that ask for it."""
        if self.budget.unit != "converged":
            return False
        best, in_vain = math.inf, 0
        for checked in (point.validation for point in self.curve if point.validation is not None):
            better = checked < best - LEAST_IMPROVEMENT
            best, in_vain = (checked, 0) if better else (best, in_vain + 1)
        return in_vain >= self.budget.amount


@dataclass(frozen=True)
class Fit:
    """A fitted model and posterior.

    Args:
        state: Tensors from which `Method.restore` rebuilds model and posterior.
        parameters: Trainable parameters that the method brought besides the model's.
        gradient_evaluations: One for each update of a player, whatever it draws, or for each step along a chain's
            trajectory.
        step_used: How the steps of the training loop were taken (`harness.stepping`); empty without that loop.
        seconds, curve: Time on the fit clock and training curve; filled in by the job. Empty in a restored fit.
    """

    model: LatentModel
    posterior: Posterior
    state: Mapping[str, Tensor]
    parameters: int = 0
    steps: int = 0
    gradient_evaluations: int = 0
    step_used: str = ""
    seconds: float = 0.0
    curve: tuple[CurvePoint, ...] = ()


def unfit_for_one_posterior(view: TrainingView) -> str | None:
    """Why a method that approximates the posterior of one observation cannot be used on a problem, or None."""
    if len(view.train) != 1:
        return f"approximates a single posterior, and this problem has {len(view.train):,} observations"
    names = [name for name, _ in view.model.named_parameters()]
    return f"takes the model as given, and this one has parameters to learn: {', '.join(names)}" if names else None


class Method(Configurable, ABC):
    """An inference method: a plugin is a frozen dataclass that derives from this; its fields are its options."""

    modules: ClassVar[tuple[ModuleType, ...]] = ()
    """Modules, besides those of its base classes, whose source defines its fits: an edit there makes them stale."""
    libraries: ClassVar[tuple[str, ...]] = ()
    """Modules that its fits import when they need them: imported before the clock of a fit starts."""

    def unfit(self, view: TrainingView) -> str | None:
        """Why this method cannot be used on a problem, or None. The job is then ``skipped`` with that reason."""
        return None

    def one_by_one(self) -> str | None:
        """Why fits from several seeds cannot be one batched program, nor their steps be recorded, or None."""
        return "it has no steps that could be batched"

    def full_precision_only(self) -> str | None:
        """Why layers of networks cannot multiply in lower precision while they train, or None."""
        return "it trains no networks"

    @abstractmethod
    def fit(self, view: TrainingView, run: Run) -> Fit:
        """Fit ``view.model`` and a posterior within ``run.budget``.

        Raises:
            Diverged: If numbers are no longer finite.
        """

    @abstractmethod
    def restore(self, view: TrainingView, state: Mapping[str, Tensor]) -> Fit:
        """Rebuild a stored fit; nothing is trained."""

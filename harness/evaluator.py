"""Evaluators and measurements: every number with its kind, what it bounds, its errors and its settings."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, ClassVar, Literal, TypeVar, get_args

import numpy as np
import torch
from torch import Tensor

from harness.method import Fit
from harness.options import Configurable
from harness.problem import DeviceData, Problem
from harness.seeding import derive

Kind = Literal[
    "exact",
    "unbiased",
    "lower bound",
    "stochastic lower bound",
    "stochastic upper bound",
    "consistent",
    "density ratio",
]

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Measurement:
    """One metric of one fit, as a mean over observations.

    Args:
        metric: `log_likelihood`, `elbo`, `adversarial_elbo`, `reconstruction`, `kl_to_prior` ...
        values: Per observation, shape (N,), float64; at least one.
        stderrs: The estimator's standard error per observation, shape (N,); zeros where the value is exact.
        kind: What the number is, as a statement about its own metric.
        indices: Indices of the observations in their split, shape (N,).
        bounds: Another quantity that the number bounds, e.g. `lower bound on log_likelihood`.
        exhaustive: The observations are the whole population: no test-set error.
        split: Where the observations are from: `test`, `validation` or `simulated`.
        settings: The estimator's settings and diagnostics, JSON-compatible.
        traces: Arrays of diagnostics for figures, of any shape, by name; nan where unknown, infinity for what is beyond
            all measure (a k-hat where one weight is everything).
        warning: Why the fit, or all that is measured of it, is not to be believed; empty if it is. Reports mark it.

    Raises:
        ValueError: If the kind is unknown, the metric has no name, an error is negative or an observation there twice,
            or the arrays are not of one shape (N,), N > 0: no table could hold them.
        ArithmeticError: If a value or an error is not finite: that is a failure, never a value.
    """

    metric: str
    values: np.ndarray
    stderrs: np.ndarray
    kind: Kind
    indices: np.ndarray
    bounds: str = ""
    unit: str = "nats"
    exhaustive: bool = False
    split: str = "test"
    settings: Mapping[str, Any] = field(default_factory=dict)
    traces: Mapping[str, np.ndarray] = field(default_factory=dict)
    warning: str = ""

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ValueError(f"{self.metric}: unknown kind {self.kind!r}; expected one of {', '.join(get_args(Kind))}")
        shapes = [np.shape(array) for array in (self.values, self.stderrs, self.indices)]
        if len({*shapes}) > 1 or len(shapes[0]) != 1 or shapes[0] == (0,):
            raise ValueError(
                f"{self.metric}: values, stderrs and indices must be of one shape (N,) with at least one observation; "
                f"got {', '.join(map(str, shapes))}"
            )
        if not self.metric:
            raise ValueError("a measurement needs the name of its metric")
        if (np.asarray(self.stderrs) < 0).any():
            raise ValueError(f"{self.metric}: stderrs has negative elements")
        if len(np.unique(self.indices)) < len(self.indices) or np.min(self.indices) < 0:
            raise ValueError(f"{self.metric}: indices must be those of as many different observations in their split")
        bad = int((~np.isfinite(self.values + self.stderrs)).sum())
        if bad:
            raise ArithmeticError(f"{self.metric} is not finite for {bad} of {len(self.values)} observations")

    @property
    def value(self) -> float:
        return float(self.values.mean())

    @property
    def stderr(self) -> float:
        """Standard error of `value` from the estimator's own randomness, independent over observations."""
        return float(np.sqrt(np.square(self.stderrs).sum()) / len(self.stderrs))

    @property
    def stderr_test(self) -> float:
        """Standard error of `value` from the choice of test observations; nan where all values are the same one."""
        if self.exhaustive:
            return 0.0
        n = len(self.values)
        return float(self.values.std(ddof=1) / np.sqrt(n)) if np.ptp(self.values) > 0 else float("nan")


@dataclass(frozen=True, eq=False)
class EvaluationRun:
    """What an evaluator is handed besides the fit: the data, where, and its random streams.

    The streams have no method in their name: all methods are scored with the same noise, which makes their
    differences more precise.

    Args:
        progress: Told how much of the measuring is done, in [0, 1], and the facts that are worth showing meanwhile.
        found: What evaluators of this fit have computed together, see `once`.
    """

    data: DeviceData
    problem: Problem
    device: torch.device
    dtype: torch.dtype
    seed: int
    progress: Callable[[float, str], None] = lambda fraction, facts: None
    found: dict[Hashable, Any] = field(default_factory=dict)

    def once(self, key: Hashable, compute: Callable[[], T]) -> T:
        """What ``compute`` returns, computed at most once for a fit, whichever of its evaluators asks first.

        ``compute`` must depend on the fit and on ``key`` alone, so that it does not matter who asked.
        """
        if key not in self.found:
            self.found[key] = compute()
        return self.found[key]

    def generator(self, evaluator: str, purpose: str) -> torch.Generator:
        stream = torch.Generator(device=self.device)
        stream.manual_seed(derive("evaluator", self.seed, self.problem.stream_name, evaluator, purpose))
        return stream

    def measurement(
        self, metric: str, values: Tensor, stderrs: Tensor, kind: Kind, indices: Tensor, **extra: Any
    ) -> Measurement:
        """A measurement from tensors, on whatever device."""
        of_test = extra.get("split", "test") == "test"
        whole = of_test and self.data.spec.exhaustive and values.shape == self.data.test.shape[:1]
        return Measurement(
            metric,
            values.detach().double().cpu().numpy(),
            stderrs.detach().double().cpu().numpy(),
            kind,
            indices.cpu().numpy(),
            exhaustive=whole,
            **extra,
        )


class Evaluator(Configurable, ABC):
    """Measures fits: a plugin is a frozen dataclass that derives from this; its fields are its settings."""

    by_default: ClassVar[bool] = True
    """Whether a comparison that names no evaluators uses this one."""

    modules: ClassVar[tuple[ModuleType, ...]] = ()
    """Modules, besides those of its base classes, whose source defines its numbers: an edit there makes them stale."""

    def undefined(self, fit: Fit, problem: Problem) -> str | None:
        """Why this evaluator says nothing about this fit, or None. It then gives a ``skipped`` row."""
        return None

    @abstractmethod
    def measure(self, fit: Fit, problem: Problem, run: EvaluationRun) -> list[Measurement]:
        """Measure a fit on test data; called under ``torch.no_grad``."""

r"""Numbers over seeds with their errors, paired differences and agreement: what may be ranked.

A paired difference is the mean of :math:`d_{si}`, the log p(x_i) of one method less that of another, over S seeds and
N test observations. With :math:`d_{si} = \mu + a_s + b_i + e_{si}`, where e holds the interaction and the estimator's
noise,

.. math:: se^2 = \underbrace{\operatorname{Var}_s(\bar d_{s\cdot}) / S}_{\sigma_a^2/S + \sigma_e^2/(SN)}
               + \underbrace{\operatorname{Var}_i(\bar d_{\cdot i}) / N}_{\sigma_b^2/N + \sigma_e^2/(SN)},

which counts e twice and is therefore conservative. The estimator's noise is inside both parts where it is independent
over seeds and observations, so it is not added again. Where the test split is the whole population, b has no sampling
error and the second part is replaced by the estimator's own standard error (taken as common to all seeds).

"Beyond the noise" means by more than two standard errors, each part with what Student's t makes of two for the number
of values that it was estimated from:

.. math:: m^2 = (t_{S-1} \, se_{seeds})^2 + (t_{N-1} \, se_{test})^2, \quad
          t_\nu = F_\nu^{-1}(\Phi(2)): \; t_1 = 14, \; t_2 = 4.5, \; t_4 = 2.9, \; t_\infty = 2.

In simulations this covers at least the nominal 95.45 % for any ratio of the parts; degrees of freedom pooled as by
Satterthwaite (1946, https://doi.org/10.2307/3002019) cover as little as 88 % with two seeds.

Two estimators of one quantity of the same fits are compared by their own errors alone, on the observations that both
scored: neither the choice of the seeds nor that of the observations can part them.
"""

# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false, reportUnknownVariableType=false
from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Row = Mapping[str, Any]
"""One record; what is missing is None."""

DENSITY_RATIO = "density ratio"
KINDS = (
    "exact", "unbiased", "lower bound", "stochastic lower bound", "stochastic upper bound", "consistent", DENSITY_RATIO,
)  # fmt: skip
UPPER_BOUND = "stochastic upper bound"
LOWER_BOUNDS = ("lower bound", "stochastic lower bound")
SIMULATED = "simulated"
"""The split of measurements on observations that were simulated from the fitted model."""
SECOND_OPINIONS = ("implicit",)
"""Evaluators that check what a method or another evaluator says: shown for it only where there is nothing else."""
FLOOR = "_floor"
"""What the name of a metric ends with where exact draws have the place of a posterior's (`harness.distances`)."""
STANDARD_ERRORS = 2.0
DISAGREEMENT = 3.0
"""Combined standard errors beyond which two estimators of the same quantity disagree."""


@dataclass(frozen=True, kw_only=True)
class Spread:
    """A number over seeds: its mean and its standard deviation (nan for one seed)."""

    value: float
    spread: float
    seeds: int


def spread(values: Sequence[float]) -> Spread:
    """Of one value a seed, at least one."""
    deviation = float(np.std(values, ddof=1)) if len(values) > 1 else math.nan
    return Spread(value=float(np.mean(values)), spread=deviation, seeds=len(values))


@dataclass(frozen=True, kw_only=True)
class Estimate(Spread):
    """A metric over seeds.

    Args:
        stderr: The estimator's standard error of the mean over seeds (independent over seeds).
        stderr_test: The standard error from the choice of observations; seeds share those of the test split, so it does
            not shrink with their number, unless they are simulated. 0 where the test split is the whole population; nan
            where unknown.
        n_observations: The numbers of observations that the seeds' values are means of; usually one number.
        settings: JSON texts, one a seed.
        split: What the observations are from: `test`, `simulated` ...
    """

    metric: str
    evaluator: str
    kind: str
    bounds: str
    unit: str
    stderr: float
    stderr_test: float
    n_observations: tuple[int, ...]
    settings: tuple[str, ...] = ()
    bits_per_dim: float = math.nan
    split: str = ""

    @property
    def exhaustive(self) -> bool:
        return self.stderr_test == 0


@dataclass(frozen=True, eq=False)
class Values:
    """A metric per observation: index in the test split (ascending, unique), value and estimator's standard error."""

    index: NDArray[np.int64]
    value: Array
    stderr: Array

    def at(self, index: NDArray[np.int64]) -> Values:
        """The values of some of the observations."""
        where = np.searchsorted(self.index, index)
        return Values(index, self.value[where], self.stderr[where])


@dataclass(frozen=True, kw_only=True)
class Difference:
    """A paired difference, in nats per observation; see the module's docstring.

    Args:
        stderr_seeds: nan for one seed: the spread over seeds is then unknown and not in `stderr`.
        stderr_test: 0 where the test split is the whole population.
        stderr_estimator: From the estimator's own errors, with no credit for the number of seeds.
        per_seed: The mean difference of each seed that both have.
    """

    value: float
    stderr_seeds: float
    stderr_test: float
    stderr_estimator: float
    per_seed: Mapping[int, float] = field(default_factory=dict[int, float])
    n_observations: int = 0

    @property
    def stderr(self) -> float:
        return math.hypot(0.0 if self.one_seed else self.stderr_seeds, self.stderr_test or self.stderr_estimator)

    @property
    def one_seed(self) -> bool:
        return len(self.per_seed) == 1

    @property
    def margin(self) -> float:
        """What the difference has to exceed: two standard errors, more for few seeds; infinite for one of either."""
        test = (
            student(self.n_observations) * self.stderr_test
            if self.stderr_test
            else STANDARD_ERRORS * self.stderr_estimator
        )
        if self.one_seed or math.isnan(test):  # one observation has no spread
            return math.inf
        return math.hypot(student(len(self.per_seed)) * self.stderr_seeds, test)

    @property
    def beyond_noise(self) -> bool:
        """Never for a single seed."""
        return abs(self.value) > self.margin


def paired_difference(
    first: Mapping[int, Values], second: Mapping[int, Values], *, exhaustive: bool = False
) -> Difference | None:
    """The first method less the second, over the seeds and observations that both have; None if there are none.

    Args:
        first, second: Values per observation of each seed.
        exhaustive: The test split is the whole population.
    """
    paired = _paired(first, second)
    if paired is None:
        return None
    seeds, index, differences, variances = paired
    by_seed = differences.mean(axis=1)
    return Difference(
        value=float(differences.mean()),
        stderr_seeds=standard_error(by_seed),
        stderr_test=0.0 if exhaustive else standard_error(differences.mean(axis=0)),
        stderr_estimator=float(np.sqrt(variances.mean(axis=0).sum()) / len(index)),
        per_seed=dict(zip(seeds, by_seed.tolist(), strict=True)),
        n_observations=len(index),
    )


def _paired(
    first: Mapping[int, Values], second: Mapping[int, Values]
) -> tuple[list[int], NDArray[np.int64], Array, Array] | None:
    """Seeds (S,) and observations (N,) that both have; differences and their estimators' variances, shape (S, N)."""
    seeds = sorted(first.keys() & second.keys())
    if not seeds:
        return None
    index = functools.reduce(np.intersect1d, [values[seed].index for seed in seeds for values in (first, second)])
    if len(index) == 0:
        return None
    pairs = [(first[seed].at(index), second[seed].at(index)) for seed in seeds]
    differences = np.stack([a.value - b.value for a, b in pairs])
    return seeds, index, differences, np.stack([a.stderr**2 + b.stderr**2 for a, b in pairs])


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """One estimator less another of the same fits and observations, in nats per observation.

    Args:
        stderr: Of both estimators together, independent over seeds and observations.
        rounding: What float32 sums may be off by.
    """

    value: float
    stderr: float
    rounding: float
    seeds: int
    n_observations: int

    @property
    def disagree(self) -> bool:
        """Whether they differ by more than three combined errors."""
        return abs(self.value) > DISAGREEMENT * self.stderr + self.rounding

    @property
    def above(self) -> bool:
        """Whether the first is larger than the second, by more than three combined errors."""
        return self.disagree and self.value > 0


def agreement(first: Mapping[int, Values], second: Mapping[int, Values]) -> Agreement | None:
    """The first estimator less the second, over the seeds and observations that both have; None if there are none.

    Args:
        first, second: Values per observation of each seed.
    """
    paired = _paired(first, second)
    if paired is None:
        return None
    seeds, index, differences, variances = paired
    size = max(float(np.abs(second[seed].at(index).value).mean()) for seed in seeds)
    return Agreement(
        value=float(differences.mean()),
        stderr=math.sqrt(float(variances.sum())) / differences.size,
        rounding=_rounding(size),
        seeds=len(seeds),
        n_observations=len(index),
    )


def _rounding(size: float) -> float:
    """Error of sums in float32 of numbers of that size, where both estimators' errors are zero."""
    return 1e-5 * max(1.0, size)


@functools.cache
def student(n: int) -> float:
    """What two standard errors are worth where they were estimated from ``n`` values; infinite for one."""
    from scipy import special  # slow to import

    return float(special.stdtrit(n - 1, special.ndtr(STANDARD_ERRORS))) if n > 1 else math.inf


def standard_error(values: Array) -> float:
    """Of the mean of independent values; nan for one."""
    return float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.nan


def excess(upper: Values, lower: Values) -> bool:
    """Whether ``upper`` is above ``lower`` by more than two combined estimator errors, on the observations of both.

    For a bound and what it bounds: the inequality holds for every observation, so the test set's noise does not matter.
    """
    index = np.intersect1d(upper.index, lower.index)
    if len(index) == 0:
        return False
    a, b = upper.at(index), lower.at(index)
    stderr = math.sqrt(float((a.stderr**2 + b.stderr**2).sum())) / len(index)
    return float((a.value - b.value).mean()) > STANDARD_ERRORS * stderr + _rounding(float(np.abs(b.value).mean()))

"""Which estimates of log p(x) can be trusted: certificates of their error, agreement with each other, ranking.

An estimator that anneals is certified by bidirectional Monte Carlo with the same settings of chains and kernels, on
observations simulated from the fitted model (Grosse, Ghahramani, Adams 2015, https://arxiv.org/abs/1511.02543). Its
bias is then between 0 and the gap of the two bounds, so that of a difference between methods at most the larger of
their gaps. The leader has to be ahead by its margin of noise and that gap added up, the gap with two of its standard
errors: of the readings of "no difference smaller than the gap is ranked" the most cautious. What is exact needs no
certificate.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from harness import readings, statistics
from harness.report.tables import ANNEALS, SOURCES, Certificate, MethodRow, Table
from harness.statistics import (
    DENSITY_RATIO,
    LOWER_BOUNDS,
    SIMULATED,
    Agreement,
    Difference,
    Estimate,
    Row,
    Values,
    student,
)

LOG_LIKELIHOOD, GAP = "log_likelihood", "bdmc_gap"
KERNELS = (
    "chains", "temperatures", "leapfrog", "schedule", "start", "widening", "moment_samples", "target_acceptance",
)  # fmt: skip
"""Settings that a certificate must have in common with what it certifies."""
PRECISION = "force_precision"
"""One more, where both records have it."""
K_HAT, MOST = "k_hat_above_0.7", 0.5
"""The setting that holds the share of observations whose weights' k-hat is too large; what is too many of them."""
WARNING = "warning"
"""The setting that holds the warning of a measurement."""

ValuesOf = Mapping[tuple[str, str, str], Values]
"""Values per observation by job, evaluator and metric."""


@functools.lru_cache(maxsize=50_000)
def settings(text: str) -> Mapping[str, Any]:
    """Of a measurement; they are looked at for one thing after another."""
    return json.loads(text or "{}")


def of_seeds(jobs: Mapping[int, str], estimate: Estimate | None, values: ValuesOf) -> dict[int, Values]:
    """Values per observation of each seed of an estimate; ``jobs`` are their job ids."""
    if estimate is None:
        return {}
    keys = {seed: (job_id, estimate.evaluator, estimate.metric) for seed, job_id in jobs.items()}
    return {seed: values[key] for seed, key in keys.items() if key in values}


def evidence(estimates: Sequence[Estimate]) -> dict[str, Estimate]:
    """log p(x) of test observations by evaluator: exact ones first, then those that anneal, then by name."""
    found = [estimate for estimate in estimates if estimate.metric == LOG_LIKELIHOOD and estimate.split != SIMULATED]
    found.sort(key=lambda estimate: (estimate.kind != "exact", not anneals(estimate), estimate.evaluator))
    return {estimate.evaluator: estimate for estimate in found}


def anneals(estimate: Estimate) -> bool:
    return ANNEALS in settings(estimate.settings[0])


# Certificates


def certificates(rows: Sequence[Row]) -> dict[str, Certificate]:
    """From the records of one method: evaluators whose settings bidirectional bounds were measured with too."""
    measured = sorted(readings.measured(rows), key=readings.precision)
    gaps = [row for row in measured if row["metric"] == GAP]
    estimates: dict[str, dict[int, Row]] = {}
    for row in measured:
        if row["split"] != SIMULATED:
            estimates.setdefault(row["evaluator"], {}).setdefault(int(row["seed"]), row)
    found = {evaluator: _certificate(mine, gaps) for evaluator, mine in estimates.items()}
    return {evaluator: certificate for evaluator, certificate in found.items() if certificate}


def _certificate(estimates: Mapping[int, Row], gaps: Sequence[Row]) -> Certificate | None:
    """Of one evaluator, from its records by seed."""
    matching: dict[int, Row] = {}
    for gap in gaps:
        seed = int(gap["seed"])
        if seed in estimates and not differing(estimates[seed]["settings"], gap["settings"]):
            matching.setdefault(seed, gap)
    if not matching:
        return None
    missing = sorted(estimates.keys() - matching.keys())
    seeds = sorted(matching)
    gap = readings.over_seeds([matching[seed] for seed in seeds])
    return Certificate(
        gap=gap,
        gaps={seed: float(matching[seed]["value"]) for seed in seeds},
        thresholds={seed: settings(matching[seed]["settings"]).get("threshold", math.inf) for seed in seeds},
        missing=missing,
        reach=math.inf if missing else max(0.0, gap.value) + student(gap.n_observations[0]) * gap_error(gap),
    )


def differing(estimated: str, certified: str) -> dict[str, tuple[Any, Any]]:
    """Settings (JSON) that forbid a certificate: name -> of the estimator and of the bidirectional bounds."""
    first, second = settings(estimated), settings(certified)
    if ANNEALS not in first:
        return {ANNEALS: (None, second.get(ANNEALS))}
    names = [*KERNELS, *([PRECISION] if PRECISION in first and PRECISION in second else [])]
    return {name: (first.get(name), second.get(name)) for name in names if first.get(name) != second.get(name)}


def gap_error(gap: Estimate) -> float:
    """The spread over simulated observations contains the chains' noise; infinite where either is unknown."""
    known = [error for error in (gap.stderr, gap.stderr_test) if math.isfinite(error)]
    return max(known) if len(known) == 2 else math.inf


# Agreement, and which estimator is shown


def agreements(
    estimates: Mapping[str, Estimate], jobs: Mapping[int, str], values: ValuesOf
) -> dict[tuple[str, str], Agreement]:
    """Of every two estimators of log p(x) of one method, in their order, the first less the second.

    What is exact is always the second: the difference says how far off the other is.
    """
    scores = {evaluator: of_seeds(jobs, estimate, values) for evaluator, estimate in estimates.items()}
    pairs = [(b, a) if estimates[a].kind == "exact" else (a, b) for a, b in itertools.combinations(estimates, 2)]
    found = {(a, b): statistics.agreement(scores[a], scores[b]) for a, b in pairs}
    return {pair: agreement for pair, agreement in found.items() if agreement}


def chosen(rows: Sequence[MethodRow]) -> str:
    """The evaluator whose log-likelihood is shown for all methods; empty if there is none."""
    gaps: dict[str, float] = {}
    for evaluator in {evaluator for row in rows for evaluator in row.evidence}:
        mine = [row.certificates.get(evaluator) for row in rows if evaluator in row.evidence]
        known = [certificate.gap.value for certificate in mine if certificate and not certificate.missing]
        if len(known) == len(mine):
            gaps[evaluator] = max(known)
    looser = {pair for row in rows for pair in _looser(row)}
    return readings.log_likelihood_estimator([list(row.evidence.values()) for row in rows], gaps, looser) or ""


def _looser(row: MethodRow) -> set[str]:
    """Lower bounds that are below another one on the same observations."""
    bounds = {evaluator for evaluator, estimate in row.evidence.items() if estimate.kind in LOWER_BOUNDS}
    return {
        second if agreement.value > 0 else first
        for (first, second), agreement in row.agreements.items()
        if {first, second} <= bounds and agreement.disagree
    }


# Warnings


def warnings(rows: Sequence[Row]) -> dict[tuple[str, str], dict[int, str]]:
    """The warnings that measurements of one method carry, by evaluator and metric, for each seed."""
    found: dict[tuple[str, str], dict[int, str]] = {}
    for row in sorted(readings.measured(rows), key=lambda row: int(row["seed"])):
        text = settings(row["settings"]).get(WARNING)
        if text:
            found.setdefault((row["evaluator"], row["metric"]), {}).setdefault(int(row["seed"]), text)
    return found


# Ranking


def few_weights(row: MethodRow) -> bool:
    """Whether Pareto k-hat tells not to believe the log-likelihood that is shown, for most of the observations."""
    shares = [found[K_HAT] for found in map(settings, row.shown[LOG_LIKELIHOOD].settings) if K_HAT in found]
    return bool(shares) and sum(shares) / len(shares) > MOST


def best(table: Table, difference: Callable[[MethodRow, MethodRow], Difference | None]) -> MethodRow | None:
    """The row whose log-likelihood is ahead of every other's beyond the noise and the gaps, if there is one.

    There is none where the model is fixed, so that log p(x) is one number, where kinds differ or are density ratios,
    where a row is untrusted or its weights are not to be believed, where a pair shares one seed only, where the seeds
    of a row were fitted by different sources, and where the leader has a seed that did not end well, as the rest would
    flatter it, carries a warning or has taken more than its budget.
    """
    ranked = {row.label: row.shown[LOG_LIKELIHOOD] for row in table.rows if LOG_LIKELIHOOD in row.shown}
    kinds = {estimate.kind for estimate in ranked.values()}
    rows = [row for row in table.rows if row.label in ranked]
    if len(ranked) < 2 or len(kinds) > 1 or DENSITY_RATIO in kinds or any(row.untrusted for row in rows):
        return None
    if SOURCES in table.mixed or table.fixed or any(few_weights(row) for row in rows):
        return None
    leader = max(rows, key=lambda row: ranked[row.label].value)
    if ranked[leader.label].seeds != len(leader.statuses) or leader.warnings or leader.beyond:
        return None
    for row in rows:
        ahead = difference(leader, row)
        if row is not leader and (ahead is None or ahead.value <= ahead.margin + table.reach(leader, row)):
            return None
    return leader

"""What records say: estimates over seeds from their rows, and which of them stands for a log-likelihood."""

# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false, reportUnknownVariableType=false
from __future__ import annotations

import functools
import itertools
import math
import operator
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any, cast

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from harness.statistics import (
    DENSITY_RATIO,
    KINDS,
    SECOND_OPINIONS,
    SIMULATED,
    UPPER_BOUND,
    Estimate,
    Row,
    Values,
    spread,
    standard_error,
)


def rows(records: pd.DataFrame) -> list[Row]:
    """The records one by one, with None for whatever way pandas has to say missing."""
    names = list(records.columns)  # as texts: an index of pandas makes them anew for each record
    columns = [_present(records[name]) for name in names]
    return [dict(zip(names, line, strict=True)) for line in zip(*columns, strict=True)]


def _present(column: pd.Series) -> list[Any]:
    """Column by column: row by row pandas takes a second for ten thousand records. Equal texts are one object."""
    if isinstance(column.dtype, pd.StringDtype):
        codes, texts = pd.factorize(column)  # -1 where it is missing
        return np.array([*texts, None], dtype=object)[codes].tolist()
    values = column.to_numpy(dtype=object, copy=True)
    values[column.isna().to_numpy()] = None
    return values.tolist()


_IDENTITY = ("problem", "method", "config", "seed", "budget", "precision", "step_mode", "device")
_identity = operator.itemgetter(*_IDENTITY)


def identity(row: Row) -> tuple[Any, ...]:
    """What a job is to a reader, whatever version of the sources it ran with."""
    return _identity(row)


def latest(records: Sequence[Row]) -> tuple[list[Row], dict[tuple[Any, ...], int]]:
    """The newest job of each identity, and how many older ones of it were left out."""
    jobs: dict[tuple[Any, ...], dict[str, str]] = {}
    for row in records:
        jobs.setdefault(identity(row), {})[row["job_id"]] = row["started_at"] or ""
    newest = {key: max(found, key=lambda job: (found[job], job)) for key, found in jobs.items()}
    older = {key: len(found) - 1 for key, found in jobs.items() if len(found) > 1}
    return [row for row in records if row["job_id"] == newest[identity(row)]], older


def measured(records: Sequence[Row]) -> list[Row]:
    """The records that hold a finite number."""
    return [row for row in records if row["status"] == "ok" and row["metric"] and math.isfinite(_number(row, "value"))]


def _number(row: Row, column: str) -> float:
    return math.nan if row[column] is None else float(row[column])


def over_seeds(records: Sequence[Row]) -> Estimate:
    """One metric of one method by one evaluator, from the records of its seeds (at least one)."""
    first, n = records[0], len(records)
    errors = np.array([_number(row, "stderr_test") for row in records])
    simulated = first["split"] == SIMULATED  # from each seed's own model: then seeds do not share observations
    basic = spread([_number(row, "value") for row in records])
    return Estimate(
        value=basic.value,
        spread=basic.spread,
        seeds=n,
        metric=first["metric"],
        evaluator=first["evaluator"],
        kind=first["kind"] or "",
        bounds=first["bounds"] or "",
        unit=first["unit"] or "",
        stderr=math.sqrt(sum(_number(row, "stderr") ** 2 for row in records)) / n,
        stderr_test=math.sqrt(float(np.square(errors).sum())) / n if simulated else float(errors.mean()),
        n_observations=tuple(sorted({int(row["n_observations"] or 0) for row in records})),
        settings=tuple(row["settings"] or "{}" for row in records),
        bits_per_dim=float(np.mean([_number(row, "bits_per_dim") for row in records])),
        split=first["split"] or "",
    )


def common(estimates: Sequence[Mapping[int, Values]]) -> tuple[list[int], NDArray[np.int64]]:
    """Seeds and observations that all of the estimates have; either may be empty."""
    seeds = sorted(set[int].intersection(*(set(values) for values in estimates)))
    scored = [values[seed].index for values in estimates for seed in seeds]
    return seeds, functools.reduce(np.intersect1d, scored) if scored else np.array([], dtype=np.int64)


def restricted(
    estimate: Estimate, values: Mapping[int, Values], seeds: Sequence[int], index: NDArray[np.int64]
) -> Estimate:
    """The estimate from some of its seeds and observations, at least one of either."""
    kept = [values[seed].at(index) for seed in seeds]
    errors = [standard_error(each.value) for each in kept]
    basic = spread([float(each.value.mean()) for each in kept])
    return replace(
        estimate,
        value=basic.value,
        spread=basic.spread,
        seeds=basic.seeds,
        stderr=math.sqrt(sum(float(np.square(each.stderr).sum()) for each in kept)) / (len(kept) * len(index)),
        stderr_test=0.0 if estimate.exhaustive else float(np.mean(errors)),
        n_observations=(len(index),),
    )


def estimates(records: Sequence[Row]) -> list[Estimate]:
    """Every metric of one method, by evaluator, kind and split; at most one record of a seed counts in each."""
    groups: dict[tuple[str, str, str, str], dict[int, Row]] = {}
    for row in sorted(measured(records), key=precision):
        key = row["metric"], row["evaluator"], row["kind"], row["split"] or ""
        groups.setdefault(key, {}).setdefault(int(row["seed"]), row)
    return [over_seeds([group[seed] for seed in sorted(group)]) for _, group in sorted(groups.items())]


def precision(row: Row) -> tuple[Any, ...]:
    """Sorts repeated measurements of one thing: most observations first, then the smallest error."""
    return (-int(row["n_observations"] or 0), row["stderr"] or 0.0, row["settings"] or "")


def choose(candidates: Sequence[Estimate], metrics: Sequence[str], preference: Sequence[str] = ()) -> Estimate | None:
    """What to show for a quantity that has several names: no density ratio if anything else is there.

    Never an upper bound on an ELBO: above log p(x) it would look like a scandal and is none. A second opinion only
    where nobody else has one, whatever its kind: it is told beside the first.

    Args:
        preference: Evaluators, the best first, for what is else alike.
    """
    rank = {evaluator: i for i, evaluator in enumerate(preference)}

    def merit(found: Estimate) -> tuple[Any, ...]:
        ratio, second = found.kind == DENSITY_RATIO, stem(found.evaluator) in SECOND_OPINIONS
        known = rank.get(found.evaluator, len(rank))
        return second, ratio, metrics.index(found.metric), -found.seeds, _rank(found.kind), known, found.evaluator

    shown = [found for found in candidates if found.metric in metrics and found.split != SIMULATED]
    return min(
        (found for found in shown if (found.metric, found.kind) != ("elbo", UPPER_BOUND)), key=merit, default=None
    )


def preference(methods: Sequence[Sequence[Estimate]], metrics: Collection[str]) -> list[str]:
    """Evaluators of these metrics: those of most methods first, so that a column is by one of them; then the precise.

    Args:
        methods: The estimates of each.
    """
    errors: dict[str, list[float]] = {}
    for found in itertools.chain(*methods):
        if found.metric in metrics:
            errors.setdefault(found.evaluator, []).append(found.stderr)
    return sorted(errors, key=lambda evaluator: (-len(errors[evaluator]), fmean(errors[evaluator]), evaluator))


def stem(label: str) -> str:
    """The name of an evaluator without its options."""
    return label.partition("[")[0]


def _rank(kind: str) -> int:
    return KINDS.index(kind) if kind in KINDS else len(KINDS)


def log_likelihood_estimator(
    methods: Sequence[Sequence[Estimate]], gaps: Mapping[str, float] | None = None, looser: Collection[str] = ()
) -> str | None:
    """The one evaluator whose log-likelihood is shown for all methods: the tightest that can be trusted.

    The one that has measured most methods; among those an exact one, then the one with most seeds; then one whose
    error is certified, the smaller the gap the better, even where another has scored ten times as many observations:
    more of them make the noise of a difference smaller, which the table states, but not the bias, which it cannot
    state without a certificate. Of lower bounds without one the higher is the closer; then come most observations and
    the smallest error.

    Args:
        methods: The estimates of each method.
        gaps: Evaluators that a certificate bounds the error of, for all methods, with the largest of their gaps. One
            that is too large keeps its place: what has no certificate at all is not better for it.
        looser: Evaluators that are below another lower bound on the same observations, beyond the errors.
    """
    known: Mapping[str, float] = gaps or {}
    found: dict[str, list[Estimate]] = {}
    covered: dict[str, set[int]] = {}
    for i, method in enumerate(methods):
        for estimate in method:
            if estimate.metric == "log_likelihood" and estimate.split != SIMULATED:
                found.setdefault(estimate.evaluator, []).append(estimate)
                covered.setdefault(estimate.evaluator, set()).add(i)

    def merit(evaluator: str) -> tuple[Any, ...]:
        mine = found[evaluator]
        return (
            -len(covered[evaluator]),
            max(_rank(estimate.kind) for estimate in mine),
            -sum(estimate.seeds for estimate in mine),
            known.get(evaluator, math.inf),
            evaluator in looser,
            -min(estimate.n_observations[0] for estimate in mine),
            sum(estimate.stderr for estimate in mine),
            evaluator,
        )

    return min(found, key=merit, default=None)


def values_per_observation(examples: pd.DataFrame) -> dict[tuple[str, str, str], Values]:
    """Values by (job_id, evaluator, metric); left out are those that hold an observation twice: no pairing is right."""
    if examples.empty:
        return {}
    names = ["job_id", "evaluator", "metric"]
    groups = np.asarray(examples.groupby(names, sort=False).ngroup())  # all at once: there may be ten thousand
    index: NDArray[np.int64] = np.asarray(cast(Any, examples["index"]), dtype=np.int64)
    order = np.lexsort((index, groups))
    index, groups = index[order], groups[order]
    columns = (np.asarray(cast(Any, examples[column]), dtype=np.float64) for column in ("value", "stderr"))
    value, stderr = (column[order] for column in columns)
    first = np.diff(groups, prepend=-2) != 0
    starts = np.flatnonzero(first)
    stops = np.append(starts[1:], len(order))
    twice = set(groups[~first & (np.diff(index, prepend=index[0]) == 0)].tolist())
    keys = zip(*(_present(examples[name].iloc[order[starts]]) for name in names), strict=True)
    found: dict[tuple[str, str, str], Values] = {}
    for key, start, stop, group in zip(keys, starts, stops, groups[starts].tolist(), strict=True):
        if group not in twice:
            job_id, evaluator, metric = key
            found[job_id, evaluator, metric] = Values(index[start:stop], value[start:stop], stderr[start:stop])
    return found

"""What an independent look at a posterior says beside the method's own numbers: bounds on its ELBO, a fresh ratio."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from harness import readings, statistics
from harness.readings import stem
from harness.report.tables import Checks, MethodRow
from harness.report.trust import ValuesOf, of_seeds, settings
from harness.statistics import DENSITY_RATIO, LOWER_BOUNDS, SECOND_OPINIONS, UPPER_BOUND, Agreement, Estimate


def checked(row: MethodRow, values: ValuesOf) -> Checks | None:
    """The checks of one method's posterior; None if there are none."""
    second = [found for found in row.estimates if stem(found.evaluator) in SECOND_OPINIONS]
    if not second:
        return None
    own = row.shown.get("elbo")
    smoothed = _first(second, "smoothed_elbo", LOWER_BOUNDS)
    found = Checks(
        own=None if own in second else own,
        fresh=_first(second, "adversarial_elbo", (DENSITY_RATIO,)),
        upper=_first(second, "elbo", (UPPER_BOUND,)),
        smoothed=smoothed,
        truth=row.shown.get("log_likelihood"),
        vacuous=smoothed is not None and any(settings(text).get("vacuous") for text in smoothed.settings),
    )
    return dataclasses.replace(
        found,
        **_side_by_side(row, found, values),
        exceeds=_exceeds(row, found, values),
        own_less_upper=_less(row, found.own, found.upper, values),
        smoothed_less_own=_less(row, smoothed, found.own, values),
        smoothed_less_upper=_less(row, smoothed, found.upper, values),
    )


def _side_by_side(row: MethodRow, found: Checks, values: ValuesOf) -> dict[str, Estimate]:
    """The estimates over the seeds and observations that all have scored: others do not stand beside each other.

    As they are where they have nothing in common.
    """
    named = {name: getattr(found, name) for name in ("own", "fresh", "upper", "smoothed", "truth")}
    estimates = {name: (estimate, of_seeds(row.jobs, estimate, values)) for name, estimate in named.items() if estimate}
    seeds, index = readings.common([scored for _, scored in estimates.values()])
    if not len(index):
        return {}
    return {name: readings.restricted(estimate, scored, seeds, index) for name, (estimate, scored) in estimates.items()}


def _first(found: Sequence[Estimate], metric: str, kinds: Sequence[str]) -> Estimate | None:
    return next((estimate for estimate in found if estimate.metric == metric and estimate.kind in kinds), None)


def _exceeds(row: MethodRow, checks: Checks, values: ValuesOf) -> Mapping[str, list[int]]:
    truth = of_seeds(row.jobs, checks.truth, values)
    found: dict[str, list[int]] = {}
    for name in ("own", "fresh", "smoothed"):
        bounds = of_seeds(row.jobs, getattr(checks, name), values)
        found[name] = [s for s, bound in bounds.items() if s in truth and statistics.excess(bound, truth[s])]
    return {name: seeds for name, seeds in found.items() if seeds}


def _less(row: MethodRow, first: Estimate | None, second: Estimate | None, values: ValuesOf) -> Agreement | None:
    return statistics.agreement(of_seeds(row.jobs, first, values), of_seeds(row.jobs, second, values))

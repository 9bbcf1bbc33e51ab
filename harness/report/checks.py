"""What an independent look at a posterior says beside the method's own numbers: bounds on its ELBO, a fresh ratio."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from harness import statistics
from harness.report.tables import COLUMNS, Checks, MethodRow
from harness.report.trust import ValuesOf, of_seeds, settings
from harness.statistics import DENSITY_RATIO, LOWER_BOUNDS, SECOND_OPINIONS, UPPER_BOUND, Agreement, Estimate, stem


def checked(row: MethodRow, values: ValuesOf) -> Checks | None:
    """The checks of one method's posterior; None if there are none."""
    second = [found for found in row.estimates if stem(found.evaluator) in SECOND_OPINIONS]
    own = [found for found in row.estimates if found not in second]
    if not second:
        return None
    smoothed = _first(second, "smoothed_elbo", LOWER_BOUNDS)
    checks = Checks(
        own=statistics.choose(own, COLUMNS["elbo"]),
        fresh=_first(second, "adversarial_elbo", (DENSITY_RATIO,)),
        upper=_first(second, "elbo", (UPPER_BOUND,)),
        smoothed=smoothed,
        vacuous=smoothed is not None and any(settings(text).get("vacuous") for text in smoothed.settings),
    )
    return dataclasses.replace(
        checks,
        exceeds=_exceeds(row, checks, values),
        own_less_upper=_less(row, checks.own, checks.upper, values),
        smoothed_less_own=_less(row, smoothed, checks.own, values),
        smoothed_less_upper=_less(row, smoothed, checks.upper, values),
    )


def _first(found: Sequence[Estimate], metric: str, kinds: Sequence[str]) -> Estimate | None:
    return next((estimate for estimate in found if estimate.metric == metric and estimate.kind in kinds), None)


def _exceeds(row: MethodRow, checks: Checks, values: ValuesOf) -> Mapping[str, list[int]]:
    truth = of_seeds(row.jobs, row.shown.get("log_likelihood"), values)
    found: dict[str, list[int]] = {}
    for name in ("own", "fresh", "smoothed"):
        bounds = of_seeds(row.jobs, getattr(checks, name), values)
        found[name] = [s for s, bound in bounds.items() if s in truth and statistics.excess(bound, truth[s])]
    return {name: seeds for name, seeds in found.items() if seeds}


def _less(row: MethodRow, first: Estimate | None, second: Estimate | None, values: ValuesOf) -> Agreement | None:
    return statistics.agreement(of_seeds(row.jobs, first, values), of_seeds(row.jobs, second, values))

"""How far posteriors are from the exact one, which of them is closest, and what exact draws say in their place.

Each metric of a distance has a floor, which is what as many exact draws give (`harness.distances`). No difference below
it is ranked: a value under the floor counts as the floor, and of two rows one is ahead where the other exceeds it by
more than the margin of `harness.statistics`, in which the floor's own error is added where the floor takes part.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator, Sequence

from harness import statistics
from harness.report.cells import decimals, one_line
from harness.report.entries import AT_FLOOR, CLOSEST, Entry, Panel, entry
from harness.report.tables import Closeness, MethodRow, Table
from harness.report.trust import ValuesOf, of_seeds, settings
from harness.statistics import DENSITY_RATIO, DISAGREEMENT, FLOOR, LOWER_BOUNDS, STANDARD_ERRORS, Estimate

Key = tuple[str, str]
"""Evaluator and metric."""

WITHOUT_FLOOR = ("k_hat",)
"""Metrics that are shown though exact draws give nothing in the place of others: the weights would not vary."""
SHARES, ERRORS_OF = "shares", "errors"
"""Settings that hold numbers by name: of the draws in each mode, and of each quantity's moments."""

FINEST = 7  # decimals; squared distances are small
WIDTH = 11  # of a heading
FLOOR_LABEL = "floor: exact draws"

ABOUT_DISTANCES = (
    "distance to the exact posterior: draws of q against as many exact ones; floor: exact draws in their place, below "
    "which nothing can be told; no floor: from densities, k-hat being that of q's own weights (below 0.7: of use)"
)
ABOUT_CLOSEST = (
    "closest: below every other row by more than two standard errors (Student's t for few seeds), where what is below "
    "the floor counts as the floor; at floor: within three errors of it; neither is said of a row with a warning"
)


def judged(rows: Sequence[MethodRow], values: ValuesOf) -> dict[Key, Closeness]:
    """By evaluator and metric: which row is closest, and which are no further than exact draws."""
    return {
        key: Closeness(
            closest=_closest(rows, key, values),
            at_floor=[row.label for row in rows if _is_at_floor(row, key, values)],
        )
        for key in _keys(rows)
    }


def _keys(rows: Sequence[MethodRow]) -> list[Key]:
    """What is shown: metrics that have a floor, by whichever evaluator, numbers by name, and a few without either."""
    found = {(each.metric, each.evaluator): each for row in rows for each in row.estimates}
    floored = {metric.removesuffix(FLOOR) for metric, _ in found if metric.endswith(FLOOR)}
    return [
        (evaluator, metric)
        for (metric, evaluator), each in sorted(found.items())
        if metric in floored
        or metric in WITHOUT_FLOOR
        or (not metric.endswith(FLOOR) and (has(each, SHARES) or has(each, ERRORS_OF)))
    ]


def has(estimate: Estimate, name: str) -> bool:
    """Whether the settings of every seed hold something under that name."""
    return all(name in settings(text) for text in estimate.settings)


def estimate_of(row: MethodRow, key: Key) -> Estimate | None:
    return next((found for found in row.estimates if (found.evaluator, found.metric) == key), None)


def floor_of(row: MethodRow, key: Key) -> Estimate | None:
    evaluator, metric = key
    return estimate_of(row, (evaluator, metric + FLOOR))


def _is_at_floor(row: MethodRow, key: Key, values: ValuesOf) -> bool:
    value, floor = (of_seeds(row.jobs, find(row, key), values) for find in (estimate_of, floor_of))
    found = statistics.agreement(value, floor)
    return found is not None and not found.above and not row.warnings


def _closest(rows: Sequence[MethodRow], key: Key, values: ValuesOf) -> str:
    """There is none where kinds differ, nor where the leader has a lost seed or a warning.

    Nor by density ratios or lower bounds: of these the looser one would look closer. Nor by k-hat, which is below zero
    for whatever is wide enough.
    """
    found = [(row, estimate) for row in rows if (estimate := estimate_of(row, key))]
    kinds = {estimate.kind for _, estimate in found}
    if key[1] in WITHOUT_FLOOR or len(found) < 2 or len(kinds) > 1 or kinds & {DENSITY_RATIO, *LOWER_BOUNDS}:
        return ""
    leader, best = min(found, key=lambda pair: pair[1].value)
    ahead = all(_ahead(leader, best, row, key, values) for row, _ in found if row is not leader)
    return leader.label if ahead and best.seeds == len(leader.statuses) and not leader.warnings else ""


def _ahead(leader: MethodRow, best: Estimate, other: MethodRow, key: Key, values: ValuesOf) -> bool:
    floors = [floor for row in (leader, other) if (floor := floor_of(row, key))]
    mine, theirs = (of_seeds(row.jobs, estimate_of(row, key), values) for row in (leader, other))
    difference = statistics.paired_difference(theirs, mine, exhaustive=best.exhaustive)
    if difference is None or len(difference.per_seed) < best.seeds:  # else the means are over other seeds
        return False
    floor = max(floors, key=lambda each: each.value, default=None)
    if floor is None or floor.value <= best.value:
        return difference.value > difference.margin
    margin = math.hypot(difference.margin, STANDARD_ERRORS * floor.stderr)
    return difference.value - (floor.value - best.value) > margin


# The table


def distances(table: Table) -> Panel | None:
    """The rows, and below them the floor; None if nobody measured a distance."""
    keys = list(table.closeness)
    rows = [row for row in table.rows if any(estimate_of(row, key) for key in keys)]
    if not rows:
        return None
    columns = [_column(table, rows, key) for key in keys]
    floored = any(floor_of(row, key) for row in rows for key in keys)
    labels = [*(row.label for row in rows), *([FLOOR_LABEL] if floored else [])]
    found = [estimate for row in rows for key in keys if (estimate := estimate_of(row, key))]
    return Panel(
        title="Distance to the exact posterior",
        columns=[heading(rows, key) for key in keys],
        lines=[(label, [column[i] for column in columns]) for i, label in enumerate(labels)],
        about=[ABOUT_DISTANCES, ABOUT_CLOSEST],
        notes=[note for row in rows for key in keys for note in _notes(row, key)],
        kinds=frozenset(estimate.kind for estimate in found),
    )


def _column(table: Table, rows: Sequence[MethodRow], key: Key) -> list[Entry]:
    """The entries of all rows and that of the floor: the largest, where models differ and so do their floors."""
    found = [estimate_of(row, key) for row in rows]
    floors = [(floor, row) for row in rows if (floor := floor_of(row, key))]
    places = decimals([each.stderr or each.spread for each in found if each], FINEST)
    entries = [entry(row, each, places, _flags(table, row, key)) for row, each in zip(rows, found, strict=True)]
    if not floors:
        return [*entries, Entry()]
    floor, row = max(floors, key=lambda pair: pair[0].value)
    return [*entries, entry(row, floor, places)]


def _flags(table: Table, row: MethodRow, key: Key) -> list[str]:
    found = table.closeness[key]
    closest = [CLOSEST] if found.closest == row.label else []
    return [*closest, *([AT_FLOOR] if row.label in found.at_floor else [])]


def heading(rows: Sequence[MethodRow], key: Key) -> str:
    evaluator, metric = key
    unit = next(estimate.unit for row in rows if (estimate := estimate_of(row, key)))
    by = one_line(evaluator, 2 * WIDTH) + (f" [{unit}]" if unit else "")
    return "\n".join([*textwrap.wrap(words(metric), WIDTH), by])


def words(metric: str) -> str:
    return metric.removesuffix(FLOOR).replace("_", " ")


def _notes(row: MethodRow, key: Key) -> Iterator[str]:
    """Estimates that still move with the number of draws, and chains that stayed where they were."""
    estimate = estimate_of(row, key)
    if estimate is None:
        return
    told = f"{one_line(row.label)}: {words(estimate.metric)} by {one_line(estimate.evaluator)}"
    if has(estimate, "at_fewer_draws"):
        found = [settings(text) for text in estimate.settings]
        few = statistics.spread([each["at_fewer_draws"] for each in found]).value
        if abs(few - estimate.value) > DISAGREEMENT * estimate.stderr:
            fewer, many = (f"{found[0][name]:,.0f}" for name in ("fewer_draws", "samples"))
            moves = f"{few:.3g} with {fewer} draws, {estimate.value:.3g} with {many}"
            yield f"{told} has not settled ({moves}): it is biased, and may be so by as much again"
    if has(estimate, "distinct_draws"):
        parts = [settings(text)["distinct_draws"] / settings(text)["samples"] for text in estimate.settings]
        if min(parts) < 1:
            yield f"{told}: only {100 * min(parts):.3g} % of the draws are distinct"

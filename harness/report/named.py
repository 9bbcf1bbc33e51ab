"""Tables of numbers that settings hold by name: shares of the modes, and errors of the moments of named quantities."""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Mapping, Sequence

from harness import statistics
from harness.report.cells import MISSING, mark, one_line
from harness.report.distances import ERRORS_OF, FLOOR_LABEL, SHARES, WIDTH, Key, estimate_of, floor_of, has, words
from harness.report.entries import Entry, Panel, error_text
from harness.report.tables import MethodRow, Table
from harness.report.trust import settings
from harness.statistics import Estimate

EXACT_LABEL = "exact posterior"

Named = Mapping[str, tuple[float, float, float]]
"""Mean over seeds, standard deviation over seeds (nan for one), standard error of the mean (nan where unknown)."""


def modes(table: Table) -> Panel | None:
    """The share of each row's draws in each mode; None if there are no modes."""
    holding = [(row, key, each) for row in table.rows for key, each in _holding(row, table, SHARES)]
    if not holding:
        return None
    by = _evaluators([key for _, key, _ in holding])
    found = {row.label + by[key]: each for row, key, each in holding}
    exact = {name: value for each in found.values() for name, (value, *_) in _by_name(each, "exact_shares").items()}
    names = sorted(exact, key=_natural)
    shares = {label: _by_name(each, SHARES, "share_stderrs") for label, each in found.items()}
    lines = [(label, [_entry(line, name, ".3f") for name in names]) for label, line in shares.items()]
    return Panel(
        title="Share of the draws in each mode of the exact posterior",
        columns=_headings(names),
        lines=[*lines, (EXACT_LABEL, [Entry(f"{exact[name]:.3f}", mark("exact")) for name in names])],
        about=(),
        notes=(),
        kinds=frozenset({"exact"}),
    )


def moments(table: Table) -> Panel | None:
    """A line for each row and each metric that has errors by name, and below them the floors; None without any."""
    measured = [(row, key, each) for row in table.rows for key, each in _holding(row, table, ERRORS_OF)]
    if not measured:
        return None
    floors: dict[Key, Estimate] = {}
    for row, key, _ in measured:
        if floor := floor_of(row, key):
            floors[key] = max(floor, floors.get(key, floor), key=lambda each: each.value)
    found = [
        *((row.label, key, each) for row, key, each in measured),
        *((FLOOR_LABEL, key, each) for key, each in floors.items()),
    ]
    by = _evaluators([key for _, key, _ in found])
    lines = [(f"{label}, {words(key[1])}{by[key]}", _by_name(each, ERRORS_OF, "mcse")) for label, key, each in found]
    names = sorted({name for _, line in lines for name in line}, key=_natural)
    return Panel(
        title="Errors of means and standard deviations, in exact standard deviations",
        columns=_headings(names),
        lines=[(label, [_entry(line, name, "+.3f") for name in names]) for label, line in lines],
        about=(),
        notes=(),
        kinds=frozenset(),
    )


def _evaluators(keys: Sequence[Key]) -> dict[Key, str]:
    """What tells the evaluators of a metric apart; nothing where there is one."""
    several = {metric for _, metric in keys if len({by for by, of in keys if of == metric}) > 1}
    return {(by, metric): f", by {by}" if metric in several else "" for by, metric in keys}


def _holding(row: MethodRow, table: Table, name: str) -> list[tuple[Key, Estimate]]:
    """The row's estimates whose settings hold numbers under that name."""
    found = [(key, estimate_of(row, key)) for key in table.closeness]
    return [(key, each) for key, each in found if each and has(each, name)]


def _by_name(estimate: Estimate, name: str, stderr: str = "") -> Named:
    found = [settings(text) for text in estimate.settings]
    named: dict[str, tuple[float, float, float]] = {}
    for key in found[0][name]:
        spread = statistics.spread([float(each[name][key]) for each in found])
        errors = [float(each[stderr][key]) if stderr else math.nan for each in found]
        named[key] = spread.value, spread.spread, math.hypot(*errors) / len(errors)
    return named


def _entry(line: Named, name: str, form: str) -> Entry:
    if name not in line:
        return Entry(MISSING)
    value, spread, stderr = line[name]
    return Entry(format(value, form), "", (error_text(spread), error_text(stderr), ""))


def _headings(names: Sequence[str]) -> list[str]:
    return ["\n".join(textwrap.wrap(one_line(name), WIDTH)) for name in names]


def _natural(name: str) -> list[tuple[int, str]]:
    """Sorts numbers inside of names by their size."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]

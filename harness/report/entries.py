"""What the tables below the main one are made of: plain texts that terminal and Markdown lay out in their own ways."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from harness.report import doubts
from harness.report.cells import MISSING, decimals, fixed, mark
from harness.report.tables import MethodRow
from harness.statistics import Estimate

UNTRUSTED, VACUOUS, EXCEEDS, WARNING = "untrusted", "vacuous", "exceeds", "warning"
CLOSEST, AT_FLOOR = "closest", "at floor"
FLAGS = {
    UNTRUSTED: "untrusted",
    VACUOUS: "vacuous",
    EXCEEDS: "exceeds log p(x)",
    WARNING: "warning",
    CLOSEST: "closest",
    AT_FLOOR: "at the floor",
}
"""Short, as in a narrow column -> in full."""
PRAISE = (CLOSEST, AT_FLOOR)
"""Flags that are no reason for doubt."""
ERRORS = ("± over seeds", "± estimator", "± over x")
"""Standard deviation over seeds, the estimator's standard error, and that from the choice of observations."""


class Entry(NamedTuple):
    """A number with its mark, its three errors (empty where unknown) and its flags."""

    number: str = MISSING
    mark: str = ""
    errors: tuple[str, str, str] = ("", "", "")
    flags: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Panel:
    """A table of texts.

    Args:
        columns: Headings; lines are parted by line feeds.
        lines: Label of a method and its entries.
        about: What its columns are, the same for all tables of this title.
        notes: What a reader has to know before believing it.
        kinds: Of the estimates in it, for the legend.
    """

    title: str
    columns: Sequence[str]
    lines: Sequence[tuple[str, Sequence[Entry]]]
    about: Sequence[str]
    notes: Sequence[str]
    kinds: frozenset[str]


def entry(row: MethodRow, estimate: Estimate | None, places: int, flags: Iterable[str] = ()) -> Entry:
    if estimate is None:
        return Entry()
    flags = [*flags, UNTRUSTED] if doubts.doubted(row, estimate) else flags
    known = (error_text(estimate.spread), error_text(estimate.stderr), error_text(estimate.stderr_test))
    return Entry(fixed(estimate.value, places), mark(estimate.kind), known, tuple(flags))


def error_text(error: float) -> str:
    """Empty where it is unknown."""
    return f"{error:.2g}" if math.isfinite(error) else ""


def places_of(estimates: Iterable[Estimate | None]) -> int:
    """Decimals that fit the estimators' errors, or what seeds differ by where there are none."""
    return decimals([estimate.stderr or estimate.spread for estimate in estimates if estimate])

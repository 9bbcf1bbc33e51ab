"""The text of a table's title and cells, shared by terminal and Markdown."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from harness.report.tables import MethodRow, Table
from harness.statistics import DENSITY_RATIO, Spread

MARKS = {
    "exact": "=",
    "unbiased": "≈",
    "lower bound": "≥",
    "stochastic lower bound": "≳",
    "stochastic upper bound": "≲",
    "consistent": "→",
    DENSITY_RATIO: "~",
}
"""Read before a number, so that "≥ -91.2" says what it is."""

BEST, EXCEEDS, DOUBTED, WARNED, ONE_SEED, MISSING = "*", "!", "†", "‡", "°", "-"
HEADINGS = {
    "log_likelihood": "log p(x)",
    "elbo": "ELBO",
    "kl_to_prior": "KL to prior",
    "reconstruction": "reconstruction",
}
LONGEST_REASON = 300


def one_line(text: str, longest: int = LONGEST_REASON) -> str:
    """Text from elsewhere (names, reasons) without line breaks and control characters, cut where it is too long."""
    printable = "".join(character if character.isprintable() else " " for character in text)
    line = " ".join(printable.split())
    return line if len(line) <= longest else line[: longest - 1] + "…"


def mark(kind: str) -> str:
    return MARKS.get(kind, "?")


def decimals(errors: Iterable[float], most: int = 4) -> int:
    """Decimals for a column: two significant digits for the median error, one or more for the smallest; 1 to most."""
    known = sorted(error for error in errors if math.isfinite(error) and error > 0)
    if not known:
        return 3
    median, smallest = (-math.floor(math.log10(error)) for error in (known[len(known) // 2], known[0]))
    return min(most, max(1, median + 1, smallest))


def column_decimals(table: Table, column: str) -> int:
    """Decimals of a column of the table; log-likelihoods and their differences have the same."""
    shown = [row.shown[column] for row in table.rows if column in row.shown]
    differences = [row.difference.stderr for row in table.rows if row.difference and column == "log_likelihood"]
    return decimals([*(estimate.spread for estimate in shown), *differences])


def fixed(number: float, places: int) -> str:
    return f"{number:.{places}f}" if math.isfinite(number) else MISSING


def significant(number: float) -> int:
    """Decimals with which a number shows three significant digits."""
    return max(0, 2 - math.floor(math.log10(abs(number)))) if math.isfinite(number) and number != 0 else 0


class Cell(NamedTuple):
    """A number as texts.

    Args:
        mark: Of its kind, or a sign; empty for timings.
        error: Spread over seeds or standard error; empty if unknown.
        flag: Points to a note or to the legend.
    """

    number: str
    mark: str = ""
    error: str = ""
    flag: str = ""


def _error(error: float, places: int) -> str:
    return f"{error:.{places}f}" if math.isfinite(error) else ""


def estimate_cell(row: MethodRow, column: str, places: int) -> Cell:
    estimate = row.shown.get(column)
    if estimate is None:
        return Cell(MISSING)
    flag = EXCEEDS if column == "elbo" and row.exceeds else ""
    flag = DOUBTED if column == "log_likelihood" and row.untrusted else flag
    return Cell(fixed(estimate.value, places), mark(estimate.kind), _error(estimate.spread, places), flag)


def difference_cell(table: Table, row: MethodRow, places: int) -> Cell:
    difference = row.difference
    if difference is None:
        return Cell("first" if row is table.rows[0] else MISSING)
    flag = (DOUBTED if row.untrusted or table.rows[0].untrusted else "") + (ONE_SEED if difference.one_seed else "")
    return Cell(f"{difference.value:+.{places}f}", "", _error(difference.stderr, places), flag)


def timing_cell(spread: Spread | None) -> Cell:
    if spread is None:
        return Cell(MISSING)
    places = significant(spread.value)
    return Cell(fixed(spread.value, places), "", _error(spread.spread, places))


def seeds(row: MethodRow) -> str:
    """How many seeds ended well: ``3 seeds``, ``2 of 3 ok``, ``failed``."""
    n, ok = len(row.statuses), len(row.jobs)
    if ok == n:
        return "1 seed" if n == 1 else f"{n} seeds"
    return f"{ok} of {n} ok" if ok else "/".join(sorted(set(row.statuses.values())))


def title(table: Table) -> str:
    """What all rows have in common, the problem's name apart."""
    key = table.key
    binarisation = "" if key.binarisation in ("", "none") else f"{key.binarisation} binarisation"
    mode = " ".join(word for word in key.step_mode.split() if word != "auto")
    estimator = f"log p(x) by {one_line(table.evaluator)}" if table.evaluator else ""
    facts = [key.budget, binarisation, observations(table), estimator, key.device, key.precision, mode]
    return " · ".join(filter(None, facts))


def observations(table: Table) -> str:
    counts = sorted({n for row in table.rows for n in scored(row)})
    if not counts:
        return ""
    if counts == [1]:
        return "the one observation" if table.exhaustive else f"1 {table.key.split} observation"
    number = f"{counts[0]:,}" if len(counts) == 1 else f"{counts[0]:,} to {counts[-1]:,}"
    return f"{number} {table.key.split} observations" + (" (all there are)" if table.exhaustive else "")


def scored(row: MethodRow) -> Sequence[int]:
    """The numbers of observations that the row's log p(x) is a mean over."""
    return row.shown["log_likelihood"].n_observations if "log_likelihood" in row.shown else ()


def label_flags(row: MethodRow) -> list[str]:
    """Beside a method's name."""
    return [flag for flag, applies in ((BEST, row.best), (WARNED, row.warnings)) if applies]


def seed_list(seeds: Sequence[int]) -> str:
    return ("seed " if len(seeds) == 1 else "seeds ") + ", ".join(str(seed) for seed in sorted(seeds))

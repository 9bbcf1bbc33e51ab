"""The text of a table's cells, notes and legends, shared by terminal and Markdown."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from harness.report import tables
from harness.report.tables import Issue, MethodRow, Table
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

BEST, EXCEEDS, ONE_SEED, MISSING = "*", "!", "°", "-"
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


def decimals(errors: Iterable[float]) -> int:
    """Decimals for a column: two significant digits for the median error, at least one for the smallest; 1 to 4."""
    known = sorted(error for error in errors if math.isfinite(error) and error > 0)
    if not known:
        return 3
    median, smallest = (-math.floor(math.log10(error)) for error in (known[len(known) // 2], known[0]))
    return min(4, max(1, median + 1, smallest))


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
    return Cell(fixed(estimate.value, places), mark(estimate.kind), _error(estimate.spread, places), flag)


def difference_cell(table: Table, row: MethodRow, places: int) -> Cell:
    difference = row.difference
    if difference is None:
        return Cell("first" if row is table.rows[0] else MISSING)
    flag = ONE_SEED if difference.one_seed else ""
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
    mode = "" if key.step_mode in ("", "eager") else key.step_mode
    estimator = f"log p(x) by {one_line(table.evaluator)}" if table.evaluator else ""
    facts = [key.budget, binarisation, observations(table), estimator, key.device, key.precision, mode]
    return " · ".join(filter(None, facts))


def observations(table: Table) -> str:
    counts = sorted({n for row in table.rows for n in _scored(row)})
    if not counts:
        return ""
    number = f"{counts[0]:,}" if len(counts) == 1 else f"{counts[0]:,} to {counts[-1]:,}"
    return f"{number} {table.key.split} observations" + (" (all there are)" if table.exhaustive else "")


def _scored(row: MethodRow) -> Sequence[int]:
    return row.shown["log_likelihood"].n_observations if "log_likelihood" in row.shown else ()


def legend(built: Sequence[Table]) -> list[str]:
    """Explains the marks that occur, and only those."""
    rows = [row for table in built for row in table.rows]
    kinds = {estimate.kind for row in rows for estimate in row.shown.values()}
    known = [f"{MARKS[kind]} {kind}" for kind in MARKS if kind in kinds]
    known += [f"? {kind}" for kind in sorted(kinds - MARKS.keys())]
    lines = ["nats per observation; ± standard deviation over seeds"]
    if any(row.difference for row in rows):
        lines[0] += "; Δ: paired difference to the first row, ± its standard error"
    if known:
        lines.append("kinds: " + "   ".join(known) + (" (no bound, never ranked)" if DENSITY_RATIO in kinds else ""))
    if any(row.best for row in rows):
        lines.append(f"{BEST} ahead of every other row by more than two standard errors (Student's t for few seeds)")
    if any(row.difference and row.difference.one_seed for row in rows):
        lines.append(f"{ONE_SEED} one seed: the spread over seeds is unknown, not in the error, and nothing is ranked")
    return lines


def notes(table: Table) -> list[str]:
    """What a reader has to know before trusting the table, most important first."""
    return [
        *_issue_notes(table),
        *(_excess_note(table, row) for row in table.rows if row.exceeds),
        *_pairing_notes(table),
        *(_mixed_note(column, values) for column, values in table.mixed.items()),
        *_definition_notes(table),
        *([f"left out: older fits of the same runs ({table.left_out})"] if table.left_out else []),
    ]


def issues(table: Table) -> list[tuple[Issue, str]]:
    """What gave no number, each once with the seeds that it happened to."""
    grouped: dict[Issue, list[int]] = {}
    for issue in (issue for row in table.rows for issue in row.issues):
        grouped.setdefault(dataclasses.replace(issue, seed=0), []).append(issue.seed)
    return [(issue, _seed_list(found)) for issue, found in grouped.items()]


def _issue_notes(table: Table) -> list[str]:
    """Skips of evaluators are told only where they leave a hole in the table."""
    whole = {row.label for row in table.rows if row.shown.keys() >= tables.COLUMNS.keys()}
    told: list[str] = []
    for issue, found in issues(table):
        if not (issue.evaluator and issue.status == "skipped" and issue.label in whole):
            what = f"{one_line(issue.label)}, {issue.evaluator}" if issue.evaluator else one_line(issue.label)
            told.append(f"{what}: {issue.status} ({found}): {one_line(issue.reason)}")
    return told


def _seed_list(seeds: Sequence[int]) -> str:
    return ("seed " if len(seeds) == 1 else "seeds ") + ", ".join(str(seed) for seed in sorted(seeds))


def _excess_note(table: Table, row: MethodRow) -> str:
    elbo, truth = row.shown["elbo"], row.shown["log_likelihood"]
    what = "exceeds log p(x)" if truth.kind == "exact" else f"exceeds log p(x) as estimated by {table.evaluator}"
    bound = "no bound" if elbo.kind == DENSITY_RATIO else "check both estimators"
    return f"{EXCEEDS} {one_line(row.label)}: ELBO ({elbo.kind}: {bound}) {what} ({_seed_list(row.exceeds)})"


def _pairing_notes(table: Table) -> list[str]:
    """Rows whose difference to the first is unknown though both have a log-likelihood; unequal observations."""
    first, *others = table.rows
    scored = [row for row in others if "log_likelihood" in row.shown]
    unpaired = [one_line(row.label) for row in scored if row.difference is None]
    found: list[str] = []
    if unpaired and "log_likelihood" in first.shown:
        why = "no seed and observation in common"
        found.append(f"no paired difference for {', '.join(unpaired)}: {why}")
    if len({_scored(row) for row in table.rows if _scored(row)}) > 1:
        found.append("log p(x) is over different numbers of observations: compare only the paired differences")
    return found


def _definition_notes(table: Table) -> list[str]:
    if table.definitions == 1:
        return []
    mine = table.key.spec_hash[:7]
    return [f"this problem has {table.definitions} definitions among these records: compare within this one ({mine})"]


def _mixed_note(column: str, values: Mapping[str, Sequence[str]]) -> str:
    shorten = 9 if column == "git_commit" else 80
    told = [f"{one_line(value)[:shorten] or 'unknown'} ({', '.join(map(one_line, values[value]))})" for value in values]
    return f"mixed {column.replace('_', ' ')}: " + "; ".join(told)

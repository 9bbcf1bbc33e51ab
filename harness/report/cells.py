"""The text of a table's cells, notes and legends, shared by terminal and Markdown."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from harness.report.tables import MethodRow, Table
from harness.statistics import DENSITY_RATIO, Difference, Spread

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


def plus_minus(error: float, places: int) -> str:
    return f"±{error:.{places}f}" if math.isfinite(error) else ""


def estimate_cell(row: MethodRow, column: str, places: int) -> tuple[str, str]:
    """Number with the mark of its kind, and its spread over seeds."""
    estimate = row.shown.get(column)
    if estimate is None:
        return MISSING, ""
    flag = EXCEEDS if column == "elbo" and row.exceeds else ""
    return mark(estimate.kind) + fixed(estimate.value, places), plus_minus(estimate.spread, places) + flag


def difference_cell(difference: Difference | None, places: int) -> tuple[str, str]:
    """Signed difference, and its standard error."""
    if difference is None:
        return MISSING, ""
    return f"{difference.value:+.{places}f}", plus_minus(difference.stderr, places) + ONE_SEED * difference.one_seed


def spread_cell(spread: Spread | None) -> tuple[str, str]:
    """A timing and its spread over seeds."""
    if spread is None:
        return MISSING, ""
    places = significant(spread.value)
    return fixed(spread.value, places), plus_minus(spread.spread, places)


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


def legend(tables: Sequence[Table]) -> list[str]:
    """Explains the marks that occur, and only those."""
    rows = [row for table in tables for row in table.rows]
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
        *([f"left out: {table.left_out} older fits of the same runs"] if table.left_out else []),
    ]


def _issue_notes(table: Table) -> list[str]:
    """Fits and evaluators that gave no number. Skips of evaluators are told where they leave a hole in the table."""
    grouped: dict[tuple[str, str, str, str], list[int]] = {}
    for row in table.rows:
        whole = len(row.shown) == len(HEADINGS)
        for issue in row.issues:
            if not (issue.evaluator and issue.status == "skipped" and whole):
                grouped.setdefault((issue.label, issue.evaluator, issue.status, issue.reason), []).append(issue.seed)
    return [_issue_note(*key, seeds=found) for key, found in grouped.items()]


def _issue_note(label: str, evaluator: str, status: str, reason: str, *, seeds: Sequence[int]) -> str:
    what = f"{one_line(label)}, {evaluator}" if evaluator else one_line(label)
    return f"{what}: {status} ({_seed_list(seeds)}): {one_line(reason)}"


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
        why = "no seed and observation in common, or measured with several settings"
        found.append(f"no paired difference for {', '.join(unpaired)}: {why}")
    if len({_scored(row) for row in table.rows if _scored(row)}) > 1:
        found.append("log p(x) is over different numbers of observations: compare only the paired differences")
    return found


def _mixed_note(column: str, values: Mapping[str, Sequence[str]]) -> str:
    shorten = 9 if column == "git_commit" else 80
    told = [f"{one_line(value)[:shorten] or 'unknown'} ({', '.join(map(one_line, values[value]))})" for value in values]
    return f"mixed {column.replace('_', ' ')}: " + "; ".join(told)

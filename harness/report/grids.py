"""The tables of an experiment's report as plain texts, for terminal and Markdown, and its numbers for a summary."""

# pyright: reportMissingTypeStubs=false
from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from harness.experiment import Column, Line, Reported, Tabulated
from harness.report import cells, doubts, notes
from harness.report.build import mixed
from harness.report.panels import UNTRUSTED
from harness.report.reproduced import Measured, Outcome, Results, measure, outcome
from harness.statistics import DENSITY_RATIO, SIMULATED, Estimate

COSTS = ("seeds", "fit, s")
REPORTED = "as reported"


@dataclass(frozen=True, kw_only=True)
class Grid:
    """A table of texts.

    Args:
        apart: Which lines are figures of others.
        words: Columns of words, the first apart; the others are numbers.
        notes: What is said below it.
    """

    title: str
    header: Sequence[str]
    lines: Sequence[Sequence[str]]
    apart: frozenset[int] = frozenset()
    words: frozenset[int] = frozenset()
    notes: Sequence[str] = ()


Summary = dict[str, Any]
"""A line of summary.csv: what is not known of it is left out."""


def grids(results: Results) -> list[Grid]:
    """All tables of a report that hold numbers, in its order."""
    found = [tabulated(spec, results) for spec in results.contents.tables]
    found += contrasted([outcome(contrast, results) for contrast in results.contents.contrasts])
    return [grid for grid in [*found, issues(results)] if grid.lines]


# Tables of quantities


def tabulated(spec: Tabulated, results: Results) -> Grid:
    """Means ± standard deviations over seeds, with the figures of others as they were printed."""
    measured = measure(_ours(spec), results)
    places = {column.heading: _places(spec, column, measured) for column in spec.columns}
    return Grid(
        title=spec.title,
        header=["", *(column.heading for column in spec.columns), *COSTS],
        lines=[
            _reported(spec, line) if isinstance(line, Reported) else _line(spec, line, measured, places)
            for line in spec.lines
        ],
        apart=frozenset(i for i, line in enumerate(spec.lines) if isinstance(line, Reported)),
        notes=[*filter(None, [spec.about]), *_notes(spec, measured, results)],
    )


def _ours(spec: Tabulated) -> list[Line]:
    return [line for line in spec.lines if isinstance(line, Line)]


def _places(spec: Tabulated, column: Column, measured: Measured) -> int:
    estimates = [measured.estimate(line.label, column) for line in _ours(spec)]
    return cells.decimals([found.spread if found.seeds > 1 else found.stderr for found in estimates if found])


def _reported(spec: Tabulated, line: Reported) -> list[str]:
    return [line.label, *(line.figures.get(column.heading, "") for column in spec.columns), *("" for _ in COSTS)]


def _line(spec: Tabulated, line: Line, measured: Measured, places: Mapping[str, int]) -> list[str]:
    row = measured.rows.get(line.label)
    if row is None:
        return [line.label, *(cells.MISSING for _ in spec.columns), "not run", cells.MISSING]
    shown = [_number(measured, line.label, column, places[column.heading]) for column in spec.columns]
    label = f"{line.label} {cells.WARNED}" if row.warnings else line.label
    return [label, *shown, cells.seeds(row), _joined(cells.timing_cell(row.fit_seconds))]


def _number(measured: Measured, label: str, column: Column, places: int) -> str:
    estimate, row = measured.estimate(label, column), measured.rows[label]
    if estimate is None:
        return cells.MISSING
    error = f"{estimate.spread:.{places}f}" if math.isfinite(estimate.spread) else ""
    flags = [cells.EXCEEDS] if row.exceeds and estimate is row.shown.get("elbo") else []
    flags += [f"({UNTRUSTED})"] if doubts.doubted(row, estimate) else []
    return " ".join(
        [_joined(cells.Cell(cells.fixed(estimate.value, places), cells.mark(estimate.kind), error)), *flags]
    )


def _joined(cell: cells.Cell) -> str:
    error = f"± {cell.error}" if cell.error else ""
    return " ".join(filter(None, (cell.mark, cell.number, error)))


def _notes(spec: Tabulated, measured: Measured, results: Results) -> list[str]:
    """Which estimators these are, what is not to be believed, and where the figures of others are from."""
    rows = measured.rows.values()
    found = {line.label: results.records_of(line) for line in _ours(spec)}
    sources = dict.fromkeys(f"{line.label}: {line.source}" for line in spec.lines if isinstance(line, Reported))
    return [
        *_kinds(spec, measured),
        *(notes.excess_note(measured.evaluator, row) for row in rows if row.exceeds),
        *(note for row in rows for note in doubts.of_certificate(row, measured.evaluator)),
        *(note for row in rows for note in doubts.of_warnings(row)),
        *notes.timing_notes(list(rows)),
        *(notes.mixed_note(*item) for item in mixed({label: rows for label, rows in found.items() if rows}).items()),
        *sources,
    ]


def _kinds(spec: Tabulated, measured: Measured) -> list[str]:
    """Each quantity's estimators and kinds."""
    told: list[str] = []
    for column in spec.columns:
        estimates = [measured.estimate(line.label, column) for line in _ours(spec)]
        facts = dict.fromkeys(_kind(found) for found in estimates if found)
        told += [f"{column.heading}: {'; '.join(facts)}"] if facts else []
    return told


def _kind(estimate: Estimate) -> str:
    counts = " or ".join(f"{n:,}" for n in estimate.n_observations)
    where = "simulated observations" if estimate.split == SIMULATED else "observations"
    scored = f"all {counts} {where} there are" if estimate.exhaustive else f"{counts} {where}"
    scored = "the one observation" if estimate.n_observations == (1,) else scored
    ratio = ", no bound" if estimate.kind == DENSITY_RATIO else ""
    return f"{cells.mark(estimate.kind)} {estimate.kind}{ratio} by {cells.one_line(estimate.evaluator)}, {scored}"


# Contrasts


ABOUT_CONTRASTS = (
    "difference: mean over the seeds and observations that both have, paired, ± its standard error; a statement is "
    "observed if it is above zero by more than the margin: two standard errors (more for few seeds) and the certified "
    "gap of log p(x) by annealing, or the floor of an estimator that has one; each is judged by itself: where there is "
    "no difference, about one in 22 is observed, or its opposite, by chance"
)


def contrasted(outcomes: Sequence[Outcome]) -> list[Grid]:
    """A table of paired differences for each group."""
    groups = list(dict.fromkeys(found.contrast.group for found in outcomes))
    return [
        Grid(
            title=f"Paired differences{f': {group}' if group else ''}",
            header=["statement", "difference", "margin", "seeds", "result"],
            lines=[_contrast(found) for found in outcomes if found.contrast.group == group],
            words=frozenset([4]),
            notes=[ABOUT_CONTRASTS] if group == groups[-1] else [],
        )
        for group in groups
    ]


def _contrast(found: Outcome) -> list[str]:
    difference = found.difference
    if difference is None:
        return [found.contrast.statement, cells.MISSING, cells.MISSING, cells.MISSING, found.verdict]
    places = cells.decimals([difference.stderr])
    margin = difference.margin + found.reach
    error = "" if difference.one_seed else f" ± {cells.fixed(difference.stderr, places)}"
    return [
        found.contrast.statement,
        f"{difference.value:+.{places}f}{error}",
        cells.fixed(margin, places),
        str(len(difference.per_seed)),
        found.verdict,
    ]


def sentence(found: Outcome) -> str:
    """A contrast in words and numbers, behind the name of its group."""
    statement = (
        f"{found.contrast.group}: {found.contrast.statement}" if found.contrast.group else found.contrast.statement
    )
    if found.difference is None:
        return f"{statement}: {found.verdict}"
    _, numbers, margin, seeds, verdict = _contrast(found)
    what = f"{numbers} {found.unit}, margin {margin}; {seeds} seed{'s' if seeds != '1' else ''}"
    return f"{statement}: {verdict} ({what})"


# What gave no number


def issues(results: Results) -> Grid:
    """Fits and evaluations without a number, with their reasons; not those of evaluators that do not apply."""
    lines: list[list[str]] = []
    for ran in results.ran.values():
        labels = [Line(label=run, suite=ran.suite.name, run=run) for run in ran.suite.methods]
        for issue, seeds in notes.issues(list(measure(labels, results).rows.values())):
            if not (issue.evaluator and issue.status == "skipped"):
                what = issue.evaluator or "the fit"
                lines.append([ran.suite.name, issue.label, seeds, what, issue.status, cells.one_line(issue.reason)])
    header = ["suite", "run", "seeds", "of", "status", "reason"]
    return Grid(title="What did not end well", header=header, lines=lines, words=frozenset(range(1, 6)))


# Numbers for machines


def summary(results: Results) -> list[Summary]:
    """Every number of the report, a line each: ours with kind and errors, others' as texts."""
    lines = [line for spec in results.contents.tables for line in _summarised(spec, results)]
    outcomes = [outcome(contrast, results) for contrast in results.contents.contrasts]
    return lines + [_summarised_contrast(found) for found in outcomes]


def _summarised(spec: Tabulated, results: Results) -> list[Summary]:
    measured = measure(_ours(spec), results)
    lines: list[Summary] = []
    for line in spec.lines:
        for column in spec.columns:
            common = {"part": spec.title, "line": line.label, "quantity": column.heading}
            if isinstance(line, Reported):
                if column.heading in line.figures:
                    lines.append({**common, "reported": line.figures[column.heading], "source": line.source})
            elif found := measured.estimate(line.label, column):
                lines.append({**common, **_columns(found)})
    return lines


def _columns(found: Estimate) -> Summary:
    return {
        "metric": found.metric, "evaluator": found.evaluator, "kind": found.kind, "value": found.value,
        "sd_over_seeds": found.spread, "stderr": found.stderr, "stderr_test": found.stderr_test, "seeds": found.seeds,
        "observations": " ".join(map(str, found.n_observations)),
    }  # fmt: skip


def _summarised_contrast(found: Outcome) -> Summary:
    common = {"part": "paired differences", "line": found.contrast.statement, "result": found.verdict}
    difference = found.difference
    if difference is None:
        return common
    return {
        **common, "quantity": found.contrast.group, "metric": found.metric, "value": difference.value,
        "stderr": difference.stderr, "margin": difference.margin + found.reach, "seeds": len(difference.per_seed),
        "observations": difference.n_observations,
    }  # fmt: skip

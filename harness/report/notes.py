"""What is said below a table and below all of them, shared by terminal and Markdown."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from harness.report import doubts, tables
from harness.report.cells import BEST, DOUBTED, EXCEEDS, MARKS, ONE_SEED, WARNED, one_line, scored, seed_list
from harness.report.panels import panels
from harness.report.tables import Issue, MethodRow, Table
from harness.statistics import DENSITY_RATIO


def legend(built: Sequence[Table]) -> list[str]:
    """Explains the marks that occur, and only those."""
    rows = [row for table in built for row in table.rows]
    kinds = {estimate.kind for row in rows for estimate in row.shown.values()}
    below = [panel for table in built for panel in panels(table)]
    kinds |= {kind for panel in below for kind in panel.kinds}
    known = [f"{MARKS[kind]} {kind}" for kind in MARKS if kind in kinds]
    known += [f"? {kind}" for kind in sorted(kinds - MARKS.keys())]
    lines = ["nats per observation; ± standard deviation over seeds"]
    if any(row.difference for row in rows):
        lines[0] += "; Δ: paired difference to the first row, ± its standard error"
    if known:
        lines.append("kinds: " + "   ".join(known) + (" (no bound, never ranked)" if DENSITY_RATIO in kinds else ""))
    if any(row.best for row in rows):
        certified = any(table.evaluator in row.certificates for table in built for row in table.rows)
        gap = ", and by the BDMC gap on top of them where there is one" if certified else ""
        lines.append(
            f"{BEST} ahead of every other row by more than two standard errors (Student's t for few seeds){gap}"
        )
    if any(row.difference and row.difference.one_seed for row in rows):
        lines.append(f"{ONE_SEED} one seed: the spread over seeds is unknown, not in the error, and nothing is ranked")
    if any(any(entry.errors) for panel in below for _, entries in panel.lines for entry in entries):
        lines.append(
            "tables below the first: ± over seeds (standard deviation) / of the estimator / over x, the observations "
            "(standard errors)"
        )
    lines += dict.fromkeys(line for panel in below for line in panel.about)
    if any(row.untrusted for row in rows):
        lines.append(f"{DOUBTED} untrusted: the BDMC gap is over its threshold; never ranked")
    if any(row.warnings for row in rows):
        lines.append(f"{WARNED} one of the fit's measurements carries a warning; never ahead of the others")
    return lines


def notes(table: Table) -> list[str]:
    """What a reader has to know before trusting the table, most important first."""
    return [
        *_issue_notes(table),
        *(note for row in table.rows for note in doubts.of_warnings(row)),
        *_fixed_notes(table),
        *(excess_note(table.evaluator, row) for row in table.rows if row.exceeds),
        *(note for row in table.rows for note in doubts.of_certificate(row, table.evaluator)),
        *doubts.of_ranking(table),
        *_pairing_notes(table),
        *(mixed_note(column, values) for column, values in table.mixed.items()),
        *_definition_notes(table),
        *(
            f"{one_line(row.label)}: fitted at once with others, on one clock: {sum(row.together):.3g} s for all"
            for row in table.rows
            if row.together
        ),
        *(
            f"{one_line(row.label)}: took {row.beyond}, more than its budget: not ranked"
            for row in table.rows
            if row.beyond
        ),
        *timing_notes(table.rows),
        *([f"left out: older fits of the same runs ({table.left_out})"] if table.left_out else []),
    ]


def timing_notes(rows: Sequence[MethodRow]) -> list[str]:
    """Whose seconds are not shown, and why, and whose are of a machine that had other work to do."""
    disturbed = [row for row in rows if row.untimed]
    named = [
        one_line(row.label) + (f" ({seed_list(row.untimed)})" if len(row.untimed) < len(row.jobs) else "")
        for row in disturbed
    ]
    why = "others ran beside their fits, or these went on under other conditions"
    told = [f"no seconds of {', '.join(named)}: {why}"] if disturbed else []
    busy = [f"{one_line(row.label)} {100 * max(row.busy.values()):.0f} %" for row in rows if row.busy]
    share = "part of the cores' time that other programs had during fits, whose seconds may be long for that"
    return told + ([f"{share}: {', '.join(busy)}"] if busy else [])


def issues(rows: Sequence[MethodRow]) -> list[tuple[Issue, str]]:
    """What gave no number, each once with the seeds that it happened to."""
    grouped: dict[Issue, list[int]] = {}
    for issue in (issue for row in rows for issue in row.issues):
        grouped.setdefault(dataclasses.replace(issue, seed=0), []).append(issue.seed)
    return [(issue, seed_list(found)) for issue, found in grouped.items()]


def _issue_notes(table: Table) -> list[str]:
    """Skips of evaluators are told only where they leave a hole in the table."""
    whole = {row.label for row in table.rows if row.shown.keys() >= tables.COLUMNS.keys()}
    told: list[str] = []
    for issue, found in issues(table.rows):
        if not (issue.evaluator and issue.status == "skipped" and issue.label in whole):
            what = f"{one_line(issue.label)}, {issue.evaluator}" if issue.evaluator else one_line(issue.label)
            told.append(f"{what}: {issue.status} ({found}): {one_line(issue.reason)}")
    return told


def _fixed_notes(table: Table) -> list[str]:
    if not table.fixed or len(table.rows) == 1:
        return []
    alone = "log p(x) is the same for all methods, which differ in their posteriors alone"
    return [f"the model has nothing to learn: {alone}; where its estimates differ, it is by how loose they are"]


def excess_note(evaluator: str, row: MethodRow) -> str:
    """That a row's ELBO exceeds log p(x) by ``evaluator``, and what kind of number it is."""
    elbo, truth = row.shown["elbo"], row.shown["log_likelihood"]
    what = "exceeds log p(x)" if truth.kind == "exact" else f"exceeds log p(x) as estimated by {evaluator}"
    bound = "no bound" if elbo.kind == DENSITY_RATIO else "check both estimators"
    return f"{EXCEEDS} {one_line(row.label)}: ELBO ({elbo.kind}: {bound}) {what} ({seed_list(row.exceeds)})"


def _pairing_notes(table: Table) -> list[str]:
    """Rows whose difference to the first is unknown though both have a log-likelihood; unequal observations."""
    first, *others = table.rows
    unpaired = [one_line(row.label) for row in others if scored(row) and row.difference is None]
    found: list[str] = []
    if unpaired and "log_likelihood" in first.shown:
        why = "no seed and observation in common"
        found.append(f"no paired difference for {', '.join(unpaired)}: {why}")
    if len({scored(row) for row in table.rows if scored(row)}) > 1:
        found.append("log p(x) is over different numbers of observations: compare only the paired differences")
    return found


def _definition_notes(table: Table) -> list[str]:
    if table.definitions == 1:
        return []
    mine = table.key.spec_hash[:7]
    return [f"this problem has {table.definitions} definitions among these records: compare within this one ({mine})"]


def mixed_note(column: str, values: Mapping[str, Sequence[str]]) -> str:
    shorten = 9 if column == "git_commit" else 80
    told = [f"{one_line(value)[:shorten] or 'unknown'} ({', '.join(map(one_line, values[value]))})" for value in values]
    return f"mixed {column.replace('_', ' ')}: " + "; ".join(told)

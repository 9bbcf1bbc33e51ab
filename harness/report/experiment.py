"""The report of an experiment: Markdown, figures and a summary. A pure function of its results, without a date."""

# pyright: reportMissingTypeStubs=false
from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from harness import statistics
from harness.experiment import Suite
from harness.files import Folder
from harness.report import cells
from harness.report.grids import REPORTED, Grid, grids, sentence, summary
from harness.report.markdown import assignments, bullets, environment, escape, grid
from harness.report.reproduced import Results, outcome

SUMMARY = (
    "part line quantity metric evaluator kind value sd_over_seeds stderr stderr_test margin seeds observations result "
    "reported source"
).split()

LONGEST = 2000  # characters of a remark


def write(results: Results, folder: Path) -> Path:
    """Write ``folder/report.md``, its figures under ``folder/figures`` and ``folder/summary.csv``.

    Returns:
        The path of the Markdown file.
    """
    pictures = _pictures(results, folder)
    sections = [
        f"# {escape(results.title)}",
        *_findings(results),
        *(line for each in grids(results) for line in _section(each)),
        *pictures,
        *_remarks(results),
        *_runs(results),
        *environment([row for ran in results.ran.values() for row in ran.rows]),
        *_versions(results),
        *["", "To repeat:", "", f"    {cells.one_line(results.repeat, 10_000)}"],
    ]
    table = pd.DataFrame(summary(results), columns=SUMMARY)
    Folder(folder).write_text("report.md", "\n".join(sections) + "\n")
    Folder(folder).write_text("summary.csv", table.to_csv(index=False, float_format="%.8g"))
    return folder / "report.md"


def _findings(results: Results) -> list[str]:
    """Each contrast in a sentence."""
    found = [sentence(outcome(contrast, results)) for contrast in results.contents.contrasts]
    return ["", "## What is observed", *bullets(found)] if found else []


def _section(each: Grid) -> list[str]:
    lines = [_cells(line, apart=i in each.apart) for i, line in enumerate(each.lines)]
    numeric_from = 1 if not each.words else len(each.header)
    return [
        "",
        f"## {escape(each.title)}",
        *grid(list(map(escape, each.header)), lines, numeric_from),
        *bullets(each.notes, LONGEST),
    ]


def _cells(line: Sequence[str], *, apart: bool) -> list[str]:
    """Figures of others in italics, so that nobody takes them for ours."""
    shown = [escape(text) for text in line]
    if not apart:
        return shown
    return [f"*{text}*" if text else "" for text in [f"{shown[0]} ({REPORTED})", *shown[1:]]]


def _pictures(results: Results, folder: Path) -> list[str]:
    """Draw what there is to draw; returns the lines that show it."""
    from harness.report import figures, pictures  # matplotlib, slow to import

    lines: list[str] = []
    for picture in results.contents.pictures:
        figure = pictures.draw(picture, results)
        if figure:
            figures.save(figure, folder / "figures" / f"{picture.name}.png")
            lines += ["", f"![{picture.name}](figures/{picture.name}.png)", "", escape(picture.caption, LONGEST)]
    return ["", "## Figures", *lines] if lines else []


def _remarks(results: Results) -> list[str]:
    kinds = "   ".join(f"{mark} {kind}" for kind, mark in cells.MARKS.items())
    legend = [f"kinds: {kinds}", "± standard deviation over seeds, unless another error is named"]
    return ["", "## How to read it", *bullets([*results.contents.remarks, *_unrun(results), *legend], LONGEST)]


def _unrun(results: Results) -> list[str]:
    """Suites that lines speak of and that were left out."""
    lines = [line for spec in results.contents.tables for line in spec.lines]
    named = dict.fromkeys(suite for line in lines if (suite := getattr(line, "suite", "")))
    return [
        f"suite {name} is not here: it needs a result that is not there, or the run was stopped before its end"
        for name in named
        if name not in results.ran
    ]


def _runs(results: Results) -> list[str]:
    """Every run with its problem, budget, seeds and all of its options."""
    lines = [_run(ran.suite, run, rows) for ran in results.ran.values() for run, rows in _by_run(ran.rows).items()]
    header = ["suite", "run", "problem", "budget", "seeds", "method", "all options"]
    return ["", "## Runs", *grid(header, [[escape(text, LONGEST) for text in line] for line in lines], len(header))]


def _by_run(rows: Sequence[statistics.Row]) -> dict[str, list[statistics.Row]]:
    found: dict[str, list[statistics.Row]] = {}
    for row in rows:
        found.setdefault(row["run"], []).append(row)
    return found


def _run(suite: Suite, run: str, rows: Sequence[statistics.Row]) -> list[str]:
    seeds = ", ".join(map(str, sorted({int(row["seed"]) for row in rows})))
    first = rows[0]
    options = assignments(first["config"] or "{}")
    return [suite.name, run, first["problem"], first["budget"], seeds, first["method"], options]


def _versions(results: Results) -> list[str]:
    lines = [[escape(name), escape("; ".join(found))] for name, found in results.versions.items()]
    return grid(["library", "version"], lines, 2) if lines else []

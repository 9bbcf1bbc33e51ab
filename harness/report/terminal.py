"""The tables of a comparison in a terminal: readable at 100 columns, usable at 80."""

# pyright: reportMissingTypeStubs=false
from __future__ import annotations

from collections.abc import Mapping, Sequence

import pandas as pd
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.padding import Padding
from rich.table import Table as RichTable
from rich.text import Text

from harness.report import cells, tables
from harness.report.build import tables_of
from harness.report.tables import MethodRow, Table
from harness.statistics import DENSITY_RATIO

_ASCII = str.maketrans(
    {"±": "+-", "≈": "u", "≥": ">", "≳": "s>", "≲": "s<", "→": "c", "Δ": "diff", "·": "|", "…": "...", "°": "'"}
)
_HEADINGS = {"elbo": "ELBO", "kl_to_prior": "KL to\nprior", "reconstruction": "recon-\nstruction"}


def print_tables(
    records: pd.DataFrame, examples: pd.DataFrame, console: Console, job_order: Sequence[str] = ()
) -> None:
    """Print a table per problem, the notes below it, and one legend at the end.

    Args:
        records, examples: As `harness.store.Store.records` and `examples` give them.
        job_order: Job ids as planned: the first method there is the one that the others are compared with. Without it,
            the one that was started first.
    """
    write = _Writer(console.options.ascii_only)
    built = tables_of(records, examples, job_order)
    for table in built:
        console.print(write(cells.one_line(table.key.problem), "bold"), write(cells.title(table)), sep="  ")
        console.print(_rich(table, write))
        for note in cells.notes(table):
            console.print(Padding(write(note, "yellow"), (0, 0, 0, 2), expand=False))
        console.print()
    for line in cells.legend(built):
        console.print(write(line, "dim"))


class _Writer:
    """Makes text that is printed as it is (brackets are no markup), in ASCII where the terminal has nothing else."""

    def __init__(self, ascii_only: bool) -> None:
        self.ascii_only = ascii_only

    def __call__(self, text: str, style: str = "") -> Text:
        plain = text.translate(_ASCII).encode("ascii", "replace").decode() if self.ascii_only else text
        return Text(plain, style=style)


def _rich(table: Table, write: _Writer) -> RichTable:
    rich = RichTable(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), show_edge=False, header_style="bold")
    rich.add_column(write("method"), overflow="fold", min_width=9)
    headings = [
        f"log p(x)\n{cells.one_line(table.evaluator.partition('[')[0], 11)}",
        "Δ log p\nto first",
        *_HEADINGS.values(),
    ]
    for heading in (*headings, "fit\nseconds", "steps\n/s"):
        rich.add_column(write(heading), justify="right", no_wrap=True)
    places = {column: cells.column_decimals(table, column) for column in tables.COLUMNS}
    for row in table.rows:
        rich.add_row(*_cells(table, row, places, write))
    return rich


def _cells(table: Table, row: MethodRow, places: Mapping[str, int], write: _Writer) -> list[Text]:
    """Each cell has two lines: the number, and below it its spread or error."""
    failed = len(row.jobs) < len(row.statuses)
    name = write(cells.one_line(row.label) + (f" {cells.BEST}" if row.best else ""), "bold" if row.best else "")
    name.append_text(write(f"\n{cells.seeds(row)}", "red" if failed else "dim"))
    scores = {column: _two_lines(write, cells.estimate_cell(row, column, places[column])) for column in tables.COLUMNS}
    for column, text in scores.items():
        if column in row.shown and row.shown[column].kind == DENSITY_RATIO:
            text.stylize("yellow")
    if row.best:
        scores["log_likelihood"].stylize("bold")
    difference = cells.difference_cell(table, row, places["log_likelihood"])
    timings = [cells.timing_cell(spread) for spread in (row.fit_seconds, row.steps_per_second)]
    score, *others = scores.values()
    return [name, score, _two_lines(write, difference), *others, *(_two_lines(write, timing) for timing in timings)]


def _two_lines(write: _Writer, cell: cells.Cell) -> Text:
    error = f"±{cell.error}" if cell.error else ""
    return write(cell.mark + cell.number).append_text(write(f"\n{error}{cell.flag}", "dim"))

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

from harness.report import cells, notes, tables
from harness.report.build import tables_of
from harness.report.entries import ERRORS, PRAISE, Entry, Panel
from harness.report.grids import REPORTED, Grid
from harness.report.panels import panels
from harness.report.tables import MethodRow, Table
from harness.statistics import DENSITY_RATIO

_ASCII = str.maketrans(
    {"±": "+-", "≈": "u", "≥": ">", "≳": "s>", "≲": "s<", "→": "c", "Δ": "diff", "·": "|", "…": "...", "°": "'"}
    | {"†": "#", "‡": "##"}
)
_DOUBTS = (cells.EXCEEDS, cells.DOUBTED, cells.WARNED, "mixed")
"""What notes begin with that speak of numbers which are not to be believed."""
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
    print_built(tables_of(records, examples, job_order), console)


def print_built(built: Sequence[Table], console: Console) -> None:
    """As `print_tables`, of tables that are built already."""
    write = _Writer(console.options.ascii_only)
    for table in built:
        console.print(write(cells.one_line(table.key.problem), "bold"), write(cells.title(table)), sep="  ")
        console.print(_rich(table, write))
        _print_lines(console, write, notes.notes(table), "yellow")
        for panel in panels(table):
            _print_panel(console, write, panel)
        console.print()
    for line in notes.legend(built):
        console.print(write(line, "dim"))


def _print_lines(console: Console, write: _Writer, lines: Sequence[str], style: str) -> None:
    for line in lines:
        console.print(Padding(write(line, style), (0, 0, 0, 2), expand=False))


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
    flags = "".join(f" {flag}" for flag in cells.label_flags(row))
    name = write(cells.one_line(row.label) + flags, "bold" if row.best else "")
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


# Tables below


def _print_panel(console: Console, write: _Writer, panel: Panel) -> None:
    console.print()
    console.print(write(panel.title, "bold"))
    for part in _parts(panel, console.width, write):
        console.print(_rich_panel(panel, part, write))
    _print_lines(console, write, panel.notes, "yellow")


def _parts(panel: Panel, width: int, write: _Writer) -> list[range]:
    """The columns of as many tables, one below the other, as the terminal's width asks for."""
    widths = [max(len(line) for line in _column_lines(panel, i, write)) + GUTTER for i in range(len(panel.columns))]
    available = width - _name_width(panel)
    parts: list[range] = []
    start = used = 0
    for i, needed in enumerate(widths):
        if i > start and used + needed > available:
            parts.append(range(start, i))
            start, used = i, 0
        used += needed
    return [*parts, range(start, len(widths))]


LONGEST_NAME, GUTTER = 26, 2


def _name_width(panel: Panel) -> int:
    """Of the first column, which names methods and errors."""
    names = [min(LONGEST_NAME, len(cells.one_line(label))) for label, _ in panel.lines]
    return max(*names, *map(len, ERRORS))


def _column_lines(panel: Panel, i: int, write: _Writer) -> list[str]:
    entries = [line for _, line in panel.lines]
    texts = [*panel.columns[i].split("\n"), *(text for line in entries for text in _entry_lines(line[i]))]
    return [write(text).plain for text in texts]


def _entry_lines(entry: Entry) -> list[str]:
    return [entry.mark + entry.number, *entry.errors, *entry.flags]


def _rich_panel(panel: Panel, part: range, write: _Writer) -> RichTable:
    """A line for the numbers of a method, one for each of its flags, and one for each kind of error that is known."""
    rich = RichTable(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), show_edge=False, header_style="bold")
    width = _name_width(panel)
    rich.add_column(write("method"), overflow="fold", min_width=width, max_width=width)
    for i in part:
        rich.add_column(write(panel.columns[i]), justify="right", no_wrap=True)
    for label, line in panel.lines:
        entries = [line[i] for i in part]
        rich.add_row(write(cells.one_line(label)), *(write(e.mark + e.number) for e in entries))
        for k in range(max(len(e.flags) for e in entries)):
            flags = ["".join(e.flags[k : k + 1]) for e in entries]
            rich.add_row("", *(write(flag, "green" if flag in PRAISE else "red") for flag in flags))
        for k, name in enumerate(ERRORS):
            if any(e.errors[k] not in ("", "0") for e in entries):
                rich.add_row(write(name, "dim"), *(write(e.errors[k], "dim") for e in entries))
    return rich


# Tables of an experiment


def print_grids(shown: Sequence[Grid], console: Console) -> None:
    """Print tables of texts one below the other, each with its notes; figures of others are dim and say so."""
    write = _Writer(console.options.ascii_only)
    for each in shown:
        console.print(write(each.title, "bold"))
        console.print(_rich_grid(each, write))
        for note in each.notes:
            _print_lines(console, write, [note], "yellow" if note.startswith(_DOUBTS) else "dim")
        console.print()


def _rich_grid(each: Grid, write: _Writer) -> RichTable:
    rich = RichTable(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), show_edge=False, header_style="bold")
    for i, heading in enumerate(each.header):
        numeric = i > 0 and i not in each.words
        rich.add_column(write(heading), justify="right" if numeric else "left", overflow="fold")
    for i, line in enumerate(each.lines):
        apart = i in each.apart
        texts = [f"{line[0]} ({REPORTED})" if apart else line[0], *line[1:]]
        rich.add_row(*(write(text, "dim" if apart else "") for text in texts))
    return rich

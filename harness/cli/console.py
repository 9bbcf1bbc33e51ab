"""Where to print: tables to stdout, progress to stderr."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Sequence
from typing import NoReturn

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

WIDE = 160
MANY = 1000
"""Rows beyond which a table is not fitted to the terminal: that would take seconds."""
SHORT = 24
"""Cells up to this length stay in one line on a narrow terminal; longer ones give way."""


class _Console(Console):
    def on_broken_pipe(self) -> NoReturn:
        raise BrokenPipeError


def output() -> Console:
    """Stdout; where it is no terminal, wide enough for tables not to be cut."""
    wide = not sys.stdout.isatty() and "COLUMNS" not in os.environ
    return _Console(file=sys.stdout, width=WIDE if wide else None)


def progress_output() -> Console:
    """Stderr."""
    return _Console(file=sys.stderr)


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]], title: str = "") -> None:
    """Print texts as they are (brackets are no markup); columns that are empty in every row are left out."""
    filled = [list(row) for row in rows]
    kept = [i for i in range(len(columns)) if any(row[i] for row in filled)]
    if len(filled) > MANY:
        _print_plainly([columns[i] for i in kept], [[row[i] for i in kept] for row in filled], title)
        return
    table = Table(box=None, pad_edge=False, title=title or None, title_justify="left", header_style="bold")
    for i in kept:
        short = max(len(row[i]) for row in filled) <= SHORT
        table.add_column(columns[i], overflow="fold", no_wrap=short)
    for row in filled:
        table.add_row(*[Text(row[i]) for i in kept])
    output().print(table)


def _print_plainly(columns: Sequence[str], rows: Sequence[Sequence[str]], title: str) -> None:
    """In columns as wide as their longest cell."""
    widths = [max(map(len, cells)) for cells in zip(columns, *rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in (columns, *rows)]
    click.echo("\n".join(line.rstrip() for line in ([title] if title else []) + lines))

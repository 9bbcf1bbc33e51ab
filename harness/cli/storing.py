"""The commands that look after folders of results."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from harness.cli.parsing import StrictCommand

if TYPE_CHECKING:
    from harness.merging import Merged


@click.command(cls=StrictCommand)
@click.argument("into", metavar="INTO")
@click.argument("others", metavar="FROM...", nargs=-1, required=True)
def merge(into: str, others: tuple[str, ...]) -> int:
    """Bring the results of the folders FROM into the folder INTO.

    Jobs, fits and measurements are copied; FROM stays as it is. What both have stays as INTO has it, unless it has not
    ended well there and has in FROM. Checkpoints are not taken. Interrupted, the same command goes on; typed again, it
    changes nothing.
    """
    from harness.merging import merge

    click.echo(f"{into}: {_told(merge(into, others))}")
    click.echo(f"records: {into.rstrip('/')}/records.csv")
    return 0


def _told(merged: Merged) -> str:
    took = [_counted(merged.jobs, "job"), _counted(merged.fits, "fit"), _counted(merged.measurements, "measurement")]
    text = f"took {', '.join(took)}; had {_counted(merged.had, 'job')} already"
    if merged.of_other_fits:
        text += (
            f"; left {_counted(merged.of_other_fits, 'measurement')} of jobs whose fits here have other bits: "
            f"`harness evaluate` makes them here"
        )
    return text


def _counted(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"

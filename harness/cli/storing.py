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


@click.command(cls=StrictCommand)
@click.argument("folder", metavar="DIR")
@click.option("--keep", metavar="SIZE", help="Drop the oldest trained fits beyond that size (2GiB).  [default: keep them]")
@click.option("--yes", is_flag=True, help="Drop it; without this, it is only told.")
def gc(folder: str, keep: str | None, yes: bool) -> int:
    """Tell what DIR can do without, and drop it with --yes.

    That is: stored fits without a job that is ok, checkpoints of jobs that are done, files of writes that were killed,
    damaged files that have been computed anew; with --keep the oldest trained fits, too. No record is dropped, nor
    what was written within the last hour. `evaluate` leaves out jobs whose fits are gone; `compare` fits them anew when
    they are to be measured.
    """
    from harness.cli.console import print_table
    from harness.options import parse_bytes
    from harness.pruning import drop, surplus
    from harness.store import Store

    store = Store.open(folder)
    found = surplus(store, None if keep is None else parse_bytes("keep", keep))
    if not found:
        click.echo("nothing to drop")
        return 0
    rows = [(str(each.path.relative_to(store.path)), _bytes(each.size), each.reason) for each in found]
    print_table(("file or folder", "size", "why"), rows)
    total = f"{_bytes(sum(each.size for each in found))} in {_counted(len(found), 'place')}"
    if yes:
        drop(found)
    click.echo(f"dropped: {total}" if yes else f"{total}; nothing has been dropped, --yes drops it")
    return 0


def _bytes(size: int) -> str:
    for unit, factor in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if size >= factor:
            return f"{size / factor:.1f} {unit}"
    return f"{size} B"


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

"""The commands that look after folders of results."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from harness.cli.parsing import StrictCommand, one_line
from harness.cli.suite import plugin_option

if TYPE_CHECKING:
    from collections.abc import Sequence

    from harness.differences import Difference
    from harness.files import Facts
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
@click.option("--keep", metavar="SIZE", help="Drop the oldest trained fits beyond that (2GiB).  [default: keep all]")
@click.option("--yes", is_flag=True, help="Drop it; without this, it is only told.")
def gc(folder: str, keep: str | None, yes: bool) -> int:
    """Tell what DIR can do without, and drop it with --yes.

    That is: stored fits without a job that is ok, checkpoints of jobs that are done, files of writes that were
    killed, damaged files that have been computed anew; none of it if it was written within the last hour. With
    --keep the oldest trained fits, too, whatever their age. No record is dropped. `evaluate` leaves out jobs whose
    fits are gone; `compare` fits them anew when they are to be measured.
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


@click.command(cls=StrictCommand)
@click.argument("folder", metavar="DIR")
@click.argument("job", metavar="JOB")
@plugin_option
def why(folder: str, job: str, plugin: tuple[str, ...]) -> int:
    """Tell why JOB of DIR is not the same as another.

    Prints what has changed since it was computed, if it would be another job now, and in what it differs from the
    nearest other job: configuration, plugin version, sources, data, library versions, machine. JOB is its id as `plan`
    and records have it, or the beginning of it.
    """
    from harness import differences

    found = differences.why(folder, job, plugin)
    job_id = str(found.job["job_id"])
    click.echo(f"job {_named(found.job)}")
    if not found.now:
        click.echo(f"it cannot be computed now: {one_line(found.reason)}")
    elif found.now == job_id:
        click.echo("it is what would be computed now")
    else:
        click.echo(f"stale: in its place job {found.now} would be computed now")
        _print_differences(found.since, job_id, "now")
        if "sources" not in found.job:
            click.echo(
                "which sources have changed cannot be told: it was computed by a version that kept no note of them"
            )
    if found.nearest:
        click.echo(f"nearest other job: {_named(found.nearest)}")
        _print_differences(found.apart, job_id, str(found.nearest["job_id"]))
    return 0


def _named(facts: Facts) -> str:
    label = f"{facts['method']} on {facts['problem']}, seed {facts['seed']}"
    return f"{facts['job_id']} ({label}): {facts['status']}, begun {facts.get('started_at', 'nobody knows when')}"


def _print_differences(found: Sequence[Difference], first: str, second: str) -> None:
    from harness.cli.console import print_table

    if found:
        rows = [(each.aspect, each.what, each.first, each.second) for each in found]
        print_table(("what differs", "", first, second), rows)
    else:
        click.echo("nothing differs that is known of both")


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

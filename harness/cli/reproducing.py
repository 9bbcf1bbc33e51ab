"""`harness reproduce`: an experiment of a paper, with the reported figures beside ours."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from harness.cli.comparing import told_failures
from harness.cli.parsing import StrictCommand
from harness.cli.suite import plugin_option, step_option, stop_option, worker_options

if TYPE_CHECKING:
    from harness.reproduction import Reproduction


@click.command(cls=StrictCommand)
@click.argument("name")
@click.option("--seeds", metavar="N|LIST", help="How many (3) or which (0,1,2).  [default: the experiment's own]")
@click.option("--scale", metavar="NAME", default="laptop", help="smoke, laptop or paper.  [default: laptop]")
@click.option("--device", metavar="NAME", default="auto", help="auto, cpu or cuda.  [default: auto]")
@step_option
@click.option("--out", metavar="DIR", help="Folder of results; what it has is not done again.  [default: results/NAME]")
@click.option("--retry", metavar="STATUSES", help="Try again what ended so: failed,diverged.")
@stop_option
@worker_options
@plugin_option
def reproduce(
    name: str,
    seeds: str | None,
    scale: str,
    device: str,
    step: str | None,
    out: str | None,
    retry: str | None,
    stop_after: str | None,
    jobs: str | None,
    executor: str | None,
    time_limit: str | None,
    memory_limit: str | None,
    plugin: tuple[str, ...],
) -> int:
    """Run an experiment of a paper; print its tables, write a report.

    NAME may have options: 'avb-decoders[problem=mnist]'; `harness list experiments` shows what there is. Each suite of
    the experiment has a folder below DIR; the report, its figures and a summary are in DIR. The default
    NAME names the scale too, if it is not laptop.
    """
    from harness import reproduction
    from harness.cli.progress import shown

    made = reproduction.run(
        name,
        seeds=seeds,
        scale=scale,
        device=device,
        step=step or "auto",
        out=out,
        plugins=plugin,
        retry=retry or (),
        stop_after=stop_after,
        jobs=jobs or 1,
        executor=executor,
        time_limit=time_limit,
        memory_limit=memory_limit,
        progress=shown(),
    )
    return _conclude(made)


def _conclude(made: Reproduction) -> int:
    from harness.cli.console import output
    from harness.report.grids import grids
    from harness.report.terminal import print_grids
    from harness.store import Store

    print_grids(grids(made.results), output())
    click.echo(f"report:  {made.report}")
    click.echo(f"summary: {made.folder / 'summary.csv'}")
    return told_failures(made.records, "`harness reproduce`", lambda row: Store(made.folder / row["suite"]))

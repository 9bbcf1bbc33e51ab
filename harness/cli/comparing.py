"""The commands that run, measure and report comparisons."""

from __future__ import annotations

import dataclasses
import itertools
import json
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from harness.cli.garbage import rarely_collected
from harness.cli.parsing import StrictCommand, one_line
from harness.cli.suite import (
    Arguments,
    comparison_options,
    limit_options,
    plugin_option,
    retry_option,
    stop_option,
)

if TYPE_CHECKING:
    import pandas as pd

    from harness.planning import PlannedJob
    from harness.statistics import Row
    from harness.store import Store


OF_EXEC = ("stop_after", "time_limit", "memory_limit")
"""Options of `plan` that `exec` has too."""


@click.command(cls=StrictCommand)
@comparison_options
def compare(asked: Arguments) -> int:
    """Fit and measure methods on problems; print a table.

    Every method is fitted to every problem from every seed, and all fits are measured alike. What the folder of results
    has already is not done again.
    """
    with rarely_collected():
        from harness import comparison
        from harness.cli.progress import shown
        from harness.store import Store

    records = comparison.compare(**asked, progress=shown())
    store = Store(asked.get("out", comparison.DEFAULT_OUT))
    return _conclude(records, store, "`harness compare`", records["job_id"].tolist())


@click.command(cls=StrictCommand)
@comparison_options
@click.option("--json", "as_json", is_flag=True, help="For machines.")
@click.option(
    "--format",
    "form",
    metavar="FORM",
    help="For other schedulers, what is not done yet: jsonl, an order a line, or sh, a command a line.",
)
@rarely_collected()
def plan(asked: Arguments, as_json: bool, form: str | None) -> int:
    """Show every job of a comparison; run none.

    Takes the options of `compare`, and tells what is done already and which measurements are missing. With --format an
    order for each job that is not done; `harness exec` carries one out, wherever there are the same folders, and
    `harness report DIR` shows what has come of all.
    """
    from harness import comparison
    from harness.options import UserError

    if form is not None and as_json:
        raise UserError("--json or --format, not both: orders are JSON already")
    if form is not None:
        _print_orders(asked, form)
        return 0
    jobs = comparison.plan(**asked)
    if as_json:
        click.echo(json.dumps([_as_json(job) for job in jobs], indent=1))
    else:
        _print_plan(jobs)
    return 0


@click.command("exec", cls=StrictCommand)
@click.argument("order", metavar="JOB.json")
@stop_option
@limit_options
@click.option("--apart", is_flag=True, help="Nothing else runs on this machine meanwhile: seconds are comparable.")
def execute(order: str, stop_after: str | None, time_limit: str | None, memory_limit: str | None, apart: bool) -> int:
    """Carry out an order of `plan --format jsonl`.

    JOB.json is a file with it, or - for standard input. What is done already is not done again. Any number of orders
    can be carried out at once; the tables of the folder of results are left to `report`.
    """
    from harness import orders
    from harness.cli.progress import shown
    from harness.store import Store

    limits = {"time_limit": time_limit, "memory_limit": memory_limit}
    given = orders.parsed(sys.stdin.buffer.read() if order == "-" else Path(order).read_bytes())
    records = orders.carry_out(given, stop_after=stop_after, **limits, apart=apart, progress=shown())
    return told_failures(records, "an order of `harness plan`", lambda _: Store(given["out"]))


@click.command(cls=StrictCommand)
@click.argument("folder", metavar="DIR")
@click.option("--evaluators", metavar="NAMES", required=True, help="Evaluators: 'importance[samples=10000],elbo'.")
@click.option("--device", metavar="NAME", default="auto", help="auto, cpu or cuda.  [default: auto]")
@retry_option
@stop_option
@plugin_option
def evaluate(
    folder: str,
    evaluators: str,
    device: str,
    retry: str | None,
    stop_after: str | None,
    plugin: tuple[str, ...],
) -> int:
    """Measure the stored fits of DIR; train nothing."""
    from harness import comparison
    from harness.cli.progress import shown
    from harness.options import UserError
    from harness.store import Store

    records = comparison.evaluate(
        folder,
        evaluators,
        device=device,
        plugins=plugin,
        retry=retry or (),
        stop_after=stop_after,
        progress=shown(),
    )
    if records.empty:
        raise UserError(
            f"{folder!r} has no stored fit that can be measured; `harness compare --out {folder}` makes them"
        )
    return _conclude(records, Store(folder), "`harness evaluate`")


@click.command(cls=StrictCommand)
@click.argument("folder", metavar="DIR")
@click.option("--against", metavar="ROW", help="Row that the others are held against.  [default: the first]")
@rarely_collected()
def report(folder: str, against: str | None) -> int:
    """Print the tables of DIR, write figures.

    The report goes to DIR/report; no fit and no measurement is computed anew.
    """
    from harness.cli.console import output
    from harness.options import UserError
    from harness.report.build import jobs_of, tables_of
    from harness.report.markdown import write_built
    from harness.report.terminal import print_built
    from harness.store import Store

    store = Store.open(folder)
    records, examples = store.tables()
    if records.empty:
        raise UserError(f"{folder!r} has no results yet; `harness compare --out {folder}` makes them")
    built = tables_of(records, examples, () if against is None else jobs_of(records, against))
    print_built(built, output())
    click.echo(f"report: {write_built(store, records, built, store.path / 'report')}")
    return 0


def _conclude(records: pd.DataFrame, store: Store, command: str, job_order: Sequence[str] = ()) -> int:
    """Print the tables, where everything is, and what failed in ``command``; returns the exit code."""
    from harness.cli.console import output
    from harness.report.terminal import print_tables

    print_tables(records, store.examples(), output(), job_order)
    click.echo(f"records: {store.path / 'records.csv'}")
    click.echo(f"report:  harness report {shlex.quote(str(store.path))}")
    return told_failures(records, command, lambda _: store)


def told_failures(records: pd.DataFrame, command: str, store: Callable[[Row], Store]) -> int:
    """Tell what failed, where to read on, and how to try it again; returns the exit code.

    Args:
        store: In which a record's job is.
    """
    from harness import readings

    failed = [row for row in readings.rows(records) if row["status"] not in ("ok", "skipped")]
    for row in failed:
        by = f", evaluator {row['evaluator']}" if row["evaluator"] else ""
        what = f"{row['method']} on {row['problem']}, seed {row['seed']}{by} (job {row['job_id']})"
        left = store(row).left_behind(row["job_id"], row["evaluator"])
        more = f"; see {left}" if left else ""
        click.echo(f"harness: {row['status']}: {what}: {one_line(str(row['reason']))}{more}", err=True)
    if failed:
        statuses = ",".join(sorted({row["status"] for row in failed}))
        click.echo(f"harness: {command} with --retry {statuses} tries these again", err=True)
    return 1 if failed else 0


def _print_orders(asked: Arguments, form: str) -> None:
    from harness import comparison
    from harness.options import one_of
    from harness.orders import orders_of
    from harness.store import Store

    one_of("format", form, ["jsonl", "sh"])
    found = comparison.planned(**asked, here=False)
    options = [(f"--{name.replace('_', '-')}", str(value)) for name, value in asked.items() if name in OF_EXEC]
    if options and form == "jsonl":
        names = ", ".join(name for name, _ in options)
        click.echo(f"harness: orders do not hold {names}; give it to `harness exec`", err=True)
    command = ["harness", "exec", *itertools.chain(*options), "-"]
    for order in orders_of(found, Store(asked.get("out", comparison.DEFAULT_OUT)), asked.get("plugins", ())):
        text = json.dumps(order)
        click.echo(text if form == "jsonl" else f"printf %s {shlex.quote(text)} | {shlex.join(command)}")


def _as_json(job: PlannedJob) -> dict[str, object]:
    facts = {field.name: getattr(job, field.name) for field in dataclasses.fields(job) if field.name != "waiting"}
    return {**facts, "missing": list(job.missing), "done": job.done}


def _print_plan(jobs: list[PlannedJob]) -> None:
    from harness.cli.console import print_table

    rows = [
        (job.problem, job.label, str(job.seed), job.budget, _state(job), ", ".join(job.missing), job.job_id)
        for job in jobs
    ]
    print_table(("problem", "method", "seed", "budget", "state", "not measured by", "job"), rows)
    to_fit = sum(not job.status for job in jobs)
    done = sum(job.done for job in jobs)
    click.echo(f"{len(jobs)} jobs: {done} done, {to_fit} to fit, {len(jobs) - done - to_fit} to measure")


def _state(job: PlannedJob) -> str:
    if not job.status:
        reached = f"{job.fraction:.0%} done" if job.fraction >= 0.01 else f"stopped at step {job.step}"
        return f"to fit, {reached}" if job.step else "to fit"
    if not job.done:
        return "to measure"
    return "done" if job.status == "ok" else f"done ({job.status})"

"""A comparison is carried out: what is not done yet is worked on, here or in worker processes, and kept."""

from __future__ import annotations

import dataclasses
import json
import math
from contextlib import ExitStack, nullcontext
from functools import partial
from typing import TYPE_CHECKING

from harness import environment
from harness.audience import Audience, Progress
from harness.bundling import Task, bundles
from harness.executor import Executor
from harness.executors import Elsewhere, End, Limits, LocalExecutor, Runner, WorkerProcesses
from harness.options import parse_bytes, parse_seconds
from harness.planning import Comparison
from harness.stopping import Stop
from harness.store import Store
from harness.working import Bundle, Deaths, Work, WorkElsewhere, machine, threads_limited

if TYPE_CHECKING:
    import pandas as pd


def execute(
    comparison: Comparison,
    store: Store,
    progress: Progress,
    stop: Stop,
    elsewhere: WorkElsewhere | None = None,
    executor: Executor | None = None,
    derive: bool = True,
    beside: int = 1,
) -> pd.DataFrame:
    """Work on what is not done yet; the store's tables are derived whatever happens.

    Args:
        elsewhere: How workers do it; in this process, one bundle of jobs after another, unless given.
        executor: Who has them do it; worker processes of this machine unless given.
        derive: Leave the tables as they are if not.
        beside: How many runs are at work on a machine at a time, as far as is known.
    """

    def records() -> pd.DataFrame:
        return records_of(
            comparison, store.derive() if derive else store.records(job.job_id for job in comparison.jobs)
        )

    tasks = [Task(job, entry) for job in comparison.jobs if not (entry := comparison.planned(job, store)).done]
    if not tasks:
        return records_of(comparison, store.records()) if derive and store.is_derived() else records()
    facts = machine(comparison) | ({"threads": elsewhere.threads} if elsewhere and elsewhere.threads else {})
    facts |= {"hardware": ""} if executor else {}  # what dies elsewhere cannot tell of its machine
    store.write_text("environment.json", json.dumps({**environment.versions(), **facts}, indent=1))
    audience = Audience(comparison.registry, {task.entry.job_id: task for task in tasks}, progress)
    deaths = Deaths(comparison, store, facts, audience.lost)

    def died(worker: int, bundle: Bundle, end: End) -> list[Bundle]:
        return deaths.of(bundle, *audience.left(worker, bundle), end)

    together, alone = list[Bundle](), list[Bundle]()
    for bundle in bundles(tasks):
        to_fit = not bundle[0].entry.status
        timed = to_fit and bundle[0].job.budget.unit == "seconds" and not (executor and executor.apart)
        (alone if timed or not elsewhere else together).append(Bundle(tuple(task.job.job_id for task in bundle)))
    progress.started(len(tasks))
    with store.derived_anyway() if derive else nullcontext(), ExitStack() as at_end:
        at_end.callback(progress.finished)
        if elsewhere and together:
            _runner(elsewhere, executor).run(elsewhere, together, audience.heard, died, stop)
        if elsewhere and alone and (executor or elsewhere.limits.any):
            one = dataclasses.replace(elsewhere, beside=beside)
            _runner(one, executor, one_at_a_time=True).run(one, alone, audience.heard, died, stop)
        elif alone:
            with threads_limited(elsewhere.threads) if elsewhere and elsewhere.threads else nullcontext():
                LocalExecutor().run(partial(Work, comparison, store, beside=beside), alone, audience.heard, died, stop)
    return records()


def _runner(elsewhere: WorkElsewhere, executor: Executor | None, *, one_at_a_time: bool = False) -> Runner:
    if executor is None:
        return WorkerProcesses(elsewhere.beside, elsewhere.limits)
    return Elsewhere(executor, elsewhere.out, elsewhere.limits, one_at_a_time)


def stopping(after: float | str | Stop | None) -> Stop:
    """The stop that is asked for as on the command line.

    Raises:
        UserError: If it is no positive number of seconds.
    """
    if isinstance(after, Stop):
        return after
    return Stop() if after is None else Stop(parse_seconds("stop-after", after))


def limited(seconds: float | str | None, memory: float | str | None) -> Limits:
    """The limits that are asked for as on the command line.

    Raises:
        UserError: If they are no positive number of seconds, or of bytes.
    """
    return Limits(
        math.inf if seconds is None else parse_seconds("time-limit", seconds),
        math.inf if memory is None else parse_bytes("memory-limit", memory),
    )


def records_of(comparison: Comparison, records: pd.DataFrame) -> pd.DataFrame:
    """The records that speak of a comparison, in the order of its jobs."""
    order = {job.job_id: i for i, job in enumerate(comparison.jobs)}
    labels = {by.label for by in comparison.evaluators}
    mine = records[records["job_id"].isin(order) & (records["evaluator"].isin(labels) | records["evaluator"].isna())]
    return mine.sort_values("job_id", key=lambda ids: ids.map(order), kind="stable").reset_index(drop=True)

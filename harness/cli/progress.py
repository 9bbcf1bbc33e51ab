"""Progress of a comparison on stderr: live bars on a terminal, plain lines elsewhere."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

import click
from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from harness.audience import Progress
from harness.cli.console import progress_output
from harness.cli.parsing import one_line
from harness.planning import PlannedJob

PLAIN_SECONDS = 10.0
"""Seconds between two lines about the same fit."""
NARROW, WIDE = 80, 100
"""Columns below which there is no room for the speed, and from which on there is room for bars."""


@dataclass
class Whole:
    """All jobs: how many are done, and how long the others will take if it goes on so."""

    now: Callable[[], float] = time.monotonic
    jobs: int = 0
    finished: int = 0
    before: float = 0.0
    began: float = 0.0
    tallies: list[Tally] = field(default_factory=list["Tally"])

    def start(self, jobs: int) -> None:
        self.jobs, self.finished, self.before, self.began = jobs, 0, 0.0, self.now()

    @property
    def done(self) -> float:
        """Jobs, the current ones in part."""
        return self.finished + sum(tally.fraction * tally.together for tally in self.tallies)

    def left(self) -> str:
        """Remaining time, by what has been done since the start."""
        done = self.done - self.before
        return clock((self.now() - self.began) * (self.jobs - self.done) / done if done > 0 else math.nan)


@dataclass
class Tally:
    """Where the work stands that one worker does."""

    now: Callable[[], float] = time.monotonic
    whole: Whole = field(default_factory=Whole)
    job: str = ""
    together: int = 1
    fraction: float = 0.0
    step: int = 0
    objective: float = math.nan
    seconds: float = 0.0
    evaluator: str = ""
    measured: float = 0.0
    facts: str = ""
    job_began: float = 0.0

    def __post_init__(self) -> None:
        self.whole.now = self.now
        self.whole.tallies.append(self)

    def beside(self) -> Tally:
        """That of another worker on the same jobs."""
        return Tally(self.now, self.whole)

    def start_job(self, job: PlannedJob, together: int = 1) -> None:
        self.job = named(job) + (f" and {together - 1} more at once" if together > 1 else "")
        self.together, self.evaluator, self.job_began = together, "", self.now()
        self.fraction, self.step, self.objective, self.seconds = 0.0, 0, math.nan, 0.0

    def resume(self, fraction: float, step: int) -> None:
        self.fraction, self.step = fraction, step
        self.whole.before += fraction * self.together

    def advance(self, fraction: float, step: int, objective: float, seconds: float) -> None:
        self.fraction, self.step, self.objective, self.seconds = fraction, step, objective, seconds

    def measure(self, evaluator: str) -> None:
        self.evaluator, self.measured, self.facts = evaluator, 0.0, ""

    def measure_further(self, fraction: float, facts: str) -> None:
        self.measured, self.facts = fraction, facts

    def finish_job(self) -> None:
        self.whole.finished, self.fraction, self.job = self.whole.finished + 1, 0.0, ""

    def job_left(self) -> str:
        """Remaining time of the current fit."""
        return clock(self.seconds * (1 - self.fraction) / self.fraction if self.fraction else math.nan)

    def job_seconds(self) -> str:
        return clock(self.now() - self.job_began)

    def fit_facts(self) -> list[str]:
        """What there is to say of the current fit, the most important first."""
        if self.evaluator:
            part = f" {self.measured:.0%}" if self.measured else ""
            return [f"measuring: {self.evaluator}{part}", *([self.facts] if self.facts else [])]
        if math.isnan(self.objective):
            return ["starting"]
        speed = f"{self.step / self.seconds:,.0f} steps/s" if self.seconds else ""
        facts = [f"{self.fraction:.0%}", f"objective {self.objective:.3f}", f"{self.job_left()} left", speed]
        return [fact for fact in facts if fact]


def named(job: PlannedJob) -> str:
    return f"{job.label} on {job.problem}, seed {job.seed}"


def resumption(fraction: float, step: int) -> str:
    return f"resumed at step {step}" + (f", {fraction:.0%}" if fraction else "")


def clock(seconds: float) -> str:
    """``0:07``, ``12:34`` or ``1:02:03``; ``?`` when it cannot be told."""
    if not math.isfinite(seconds):
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


@dataclass
class PlainProgress(Progress):
    """A line when a job starts, one when it ends, and in between one every ten seconds at most."""

    tally: Tally = field(default_factory=Tally)
    spoke: float = 0.0
    lanes: dict[int, PlainProgress] = field(default_factory=dict[int, "PlainProgress"])

    def lane(self, number: int) -> PlainProgress:
        if number and number not in self.lanes:
            self.lanes[number] = PlainProgress(self.tally.beside())
        return self.lanes[number] if number else self

    def started(self, jobs: int) -> None:
        self.tally.whole.start(jobs)

    def job_started(self, job: PlannedJob, together: int = 1) -> None:
        self.tally.start_job(job, together)
        self._say("started")

    def resumed(self, fraction: float, step: int) -> None:
        self.tally.resume(fraction, step)
        self._say(resumption(fraction, step))

    def step(self, fraction: float, step: int, objective: float, seconds: float) -> None:
        self.tally.advance(fraction, step, objective, seconds)
        if self.tally.now() - self.spoke >= PLAIN_SECONDS:
            self._say(f"step {step}", *self.tally.fit_facts(), f"all jobs: {self.tally.whole.left()} left")

    def measuring(self, evaluator: str) -> None:
        self.tally.measure(evaluator)
        if self.tally.now() - self.spoke >= PLAIN_SECONDS:
            self._say(*self.tally.fit_facts())

    def measured(self, fraction: float, facts: str) -> None:
        self.tally.measure_further(fraction, facts)
        if self.tally.now() - self.spoke >= PLAIN_SECONDS:
            self._say(*self.tally.fit_facts())

    def job_finished(self, job: PlannedJob, status: str, reason: str) -> None:
        self.tally.job = named(job)
        self._say(f"{status} after {self.tally.job_seconds()}" + (f": {one_line(reason)}" if reason else ""))
        self.tally.finish_job()

    def finished(self) -> None:
        pass

    def _say(self, *facts: str) -> None:
        self.spoke = self.tally.now()
        place = f"[{self.tally.whole.finished + 1}/{self.tally.whole.jobs}]"
        with suppress(OSError):  # a log on a full disk must not decide how a job ends
            click.echo(f"{place} {self.tally.job}: {', '.join(facts)}", err=True)


class LiveProgress(Progress):
    """A line for each worker and one for all jobs, redrawn. What is resumed or not ok is told of above them."""

    def __init__(self, console: Console, tally: Tally | None = None, first: LiveProgress | None = None) -> None:
        self.console = console
        self.tally = tally or Tally()
        self.lanes: dict[int, LiveProgress] = {}
        self.live = first.live if first else Live(
            console=console, get_renderable=self.drawn, refresh_per_second=4, transient=True
        )  # fmt: skip

    def lane(self, number: int) -> LiveProgress:
        if number and number not in self.lanes:
            self.lanes[number] = LiveProgress(self.console, self.tally.beside(), self)
        return self.lanes[number] if number else self

    def started(self, jobs: int) -> None:
        self.tally.whole.start(jobs)
        self.live.start()

    def job_started(self, job: PlannedJob, together: int = 1) -> None:
        self.tally.start_job(job, together)

    def resumed(self, fraction: float, step: int) -> None:
        self.tally.resume(fraction, step)
        self.console.print(Text(f"{self.tally.job}: {resumption(fraction, step)}"))

    def step(self, fraction: float, step: int, objective: float, seconds: float) -> None:
        self.tally.advance(fraction, step, objective, seconds)

    def measuring(self, evaluator: str) -> None:
        self.tally.measure(evaluator)

    def measured(self, fraction: float, facts: str) -> None:
        self.tally.measure_further(fraction, facts)

    def job_finished(self, job: PlannedJob, status: str, reason: str) -> None:
        if status != "ok":
            self.console.print(Text(f"{named(job)}: {status}: {one_line(reason)}", style="yellow"))
        self.tally.finish_job()

    def finished(self) -> None:
        self.live.stop()

    def drawn(self) -> Table:
        """The lines, cut where the terminal is narrow."""
        whole, wide = self.tally.whole, self.console.width >= WIDE
        table = Table.grid(padding=(0, 2), expand=True)
        table.add_column(no_wrap=True, overflow="ellipsis", ratio=1)
        if wide:
            table.add_column(width=24)
        table.add_column(no_wrap=True, overflow="ellipsis")
        for tally in [tally for tally in whole.tallies if tally.job] or whole.tallies[:1]:
            facts = tally.fit_facts()[: 3 if self.console.width < NARROW else None]
            table.add_row(Text(tally.job), *([ProgressBar(1, tally.fraction)] if wide else []), Text("  ".join(facts)))
        overall = f"{whole.finished} of {whole.jobs} jobs, {whole.left()} left"
        table.add_row(Text("all jobs"), *([ProgressBar(whole.jobs, whole.done)] if wide else []), Text(overall))
        return table


def shown() -> Progress:
    """Progress as this stderr can show it."""
    console = progress_output()
    return LiveProgress(console) if console.is_terminal and not console.is_dumb_terminal else PlainProgress()

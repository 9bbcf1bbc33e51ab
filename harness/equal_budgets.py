"""Methods on one problem at equal steps and again at equal seconds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from harness.experiment import Column, Contrast, Done, Line, Suite, Tabulated, seconds_budget
from harness.trials import Trials

Unit = Literal["steps", "seconds"]

EQUAL_SECONDS = (
    "At equal seconds every method has the seconds that a fit took at equal steps, averaged over the methods: the same "
    "time in all, shared equally. They are seconds of the fit clock of this machine: another machine, or other work "
    "beside the fits, gives other numbers of steps."
)
"""A remark for reports."""


@dataclass(frozen=True, kw_only=True)
class EqualBudgets:
    """A comparison that is read twice: at equal steps, and with the time that these fits took shared equally.

    Args:
        name: What the names of its suites begin with; these are NAME-trials, NAME-equal-steps and NAME-equal-seconds.
        title: What the titles of its tables and the group of its contrasts begin with.
        labels: Method -> its label for readers; the others are held against the first.
        settings: Method -> run, or the trials that find it.
        budget: Of the fits at equal steps.
        columns: Of the tables; of trials only the first is shown.
        most_timed_seeds: At equal seconds only that many seeds, the first; 0 for all.

    Raises:
        ValueError: If labels and settings are not of the same methods.
    """

    name: str
    title: str
    labels: Mapping[str, str]
    problem: str
    settings: Mapping[str, str] | Trials
    evaluators: str
    budget: str
    columns: Sequence[Column]
    most_timed_seeds: int = 0

    def __post_init__(self) -> None:
        runs = self.settings.settings if isinstance(self.settings, Trials) else self.settings
        if set(runs) != set(self.labels):
            raise ValueError(f"labels are of {sorted(self.labels)}, settings of {sorted(runs)}")

    def suites(self, done: Done) -> list[Suite]:
        """Those that can be named: the second reading depends on the first, and both on the trials."""
        trials = [trials.suite for trials in self._trials]
        methods = self.settings.best(done) if isinstance(self.settings, Trials) else self.settings
        if not methods:
            return trials
        steps = self._suite("steps", methods, self.budget)
        budget = seconds_budget(done[steps.name]) if steps.name in done else ""
        return [*trials, steps, *([self._suite("seconds", methods, budget)] if budget else [])]

    @property
    def _trials(self) -> list[Trials]:
        return [self.settings] if isinstance(self.settings, Trials) else []

    def _suite(self, unit: Unit, methods: Mapping[str, str], budget: str) -> Suite:
        return Suite(
            name=self._named(unit),
            problem=self.problem,
            methods=methods,
            evaluators=self.evaluators,
            budget=budget,
            most_seeds=self.most_timed_seeds if unit == "seconds" else 0,
        )

    def _named(self, unit: Unit) -> str:
        return f"{self.name}-equal-{unit}"

    def lines(self, unit: Unit) -> list[Line]:
        return [Line(label=label, suite=self._named(unit), run=run) for run, label in self.labels.items()]

    def table(self, unit: Unit) -> Tabulated:
        return Tabulated(title=f"{self.title}, equal {unit}", columns=self.columns, lines=self.lines(unit))

    @property
    def trials_tables(self) -> list[Tabulated]:
        """What was tried: one table, or none."""
        return [trials.table(self.columns[:1], f"{self.title}, trials") for trials in self._trials]

    @property
    def contrasts(self) -> list[Contrast]:
        """Each of the others against the first, in both readings."""
        return [
            Contrast(
                statement=f"{line.label} has the higher log p(x) than {first.label}",
                first=line,
                second=first,
                group=f"{self.title}, equal {unit}",
            )
            for unit in ("steps", "seconds")
            for first, *others in [self.lines(unit)]
            for line in others
        ]

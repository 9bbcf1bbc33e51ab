"""Methods on one problem at equal steps and again at equal seconds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from harness.experiment import Column, Contrast, Done, Line, Suite, Tabulated, seconds_budget
from harness.trials import Trials

Unit = Literal["steps", "seconds"]


@dataclass(frozen=True, kw_only=True)
class Speed:
    """How long fits take is known from short ones, which run one at a time.

    Args:
        seconds: Of each of the short fits.
        seed: Theirs, one that the comparison itself does not use.
        evaluators: Something that is quick; it is not shown.
    """

    seconds: float
    seed: int
    evaluators: str

    @property
    def remark(self) -> str:
        return (
            "At equal seconds every method has the seconds that the equal steps take, averaged over the methods, at "
            f"the speed of fits of {self.seconds:g} seconds; these and the fits at equal seconds run one at a time, "
            "whatever runs beside each other at equal steps. They are seconds of the fit clock of this machine: "
            "another machine, or other work beside the fits, gives other numbers of steps."
        )


@dataclass(frozen=True, kw_only=True)
class EqualBudgets:
    """A comparison that is read twice: at equal steps, and with the time that so many steps take shared equally.

    Args:
        name: What the names of its suites begin with; these are NAME-trials, NAME-equal-steps,
            NAME-speed and NAME-equal-seconds.
        title: What the titles of its tables and the group of its contrasts begin with.
        labels: Method -> its label for readers; the others are held against the first.
        settings: Method -> run, or the trials that find it.
        steps: Of each fit at equal steps.
        columns: Of the tables; of trials only the first is shown.
        speed: How long a fit takes.

    Raises:
        ValueError: If labels and settings are not of the same methods.
    """

    name: str
    title: str
    labels: Mapping[str, str]
    problem: str
    settings: Mapping[str, str] | Trials
    evaluators: str
    steps: int
    columns: Sequence[Column]
    speed: Speed

    def __post_init__(self) -> None:
        runs = self.settings.settings if isinstance(self.settings, Trials) else self.settings
        if set(runs) != set(self.labels):
            raise ValueError(f"labels are of {sorted(self.labels)}, settings of {sorted(runs)}")

    def suites(self, done: Done) -> list[Suite]:
        """Those that can be named: the second reading depends on how fast fits are, and both on the trials."""
        trials = [trials.suite for trials in self._trials]
        methods = self.settings.best(done) if isinstance(self.settings, Trials) else self.settings
        if not methods:
            return trials
        steps, timed = self._suite("steps", methods, f"steps={self.steps}"), self._timed(methods)
        budget = seconds_budget(done[timed.name], self.steps) if timed.name in done else ""
        return [*trials, steps, timed, *([self._suite("seconds", methods, budget)] if budget else [])]

    @property
    def _trials(self) -> list[Trials]:
        return [self.settings] if isinstance(self.settings, Trials) else []

    def _timed(self, methods: Mapping[str, str]) -> Suite:
        return Suite(
            name=f"{self.name}-speed",
            problem=self.problem,
            methods=methods,
            evaluators=self.speed.evaluators,
            budget=f"seconds={self.speed.seconds:g}",
            seeds=(self.speed.seed,),
        )

    def _suite(self, unit: Unit, methods: Mapping[str, str], budget: str) -> Suite:
        return Suite(
            name=self._named(unit),
            problem=self.problem,
            methods=methods,
            evaluators=self.evaluators,
            budget=budget,
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

"""What the results of an experiment say: its lines as rows of numbers, and its contrasts with a verdict each.

A verdict is computed from the interval of a paired difference (`harness.statistics`) and the certified gaps, never
written down beforehand. Figures of others are texts and take no part in it.
"""

# pyright: reportMissingTypeStubs=false
from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import pandas as pd

from harness import readings, statistics
from harness.experiment import Column, Contents, Contrast, Line, Suite
from harness.report.build import exceeding, method_rows, mixed
from harness.report.tables import MethodRow, asks_for_certificates, certified_reach
from harness.report.trust import LOG_LIKELIHOOD, ValuesOf, of_seeds
from harness.statistics import DENSITY_RATIO, LOWER_BOUNDS, SIMULATED, STANDARD_ERRORS, Difference, Estimate, Row

if TYPE_CHECKING:
    from harness.report.figures import Source


@dataclass(frozen=True, kw_only=True, eq=False)
class Ran:
    """A suite that has been run.

    Args:
        records: Of its own jobs only, with the column ``run``.
    """

    suite: Suite
    records: pd.DataFrame
    store: Source

    @cached_property
    def rows(self) -> list[Row]:
        return readings.rows(self.records)

    @cached_property
    def values(self) -> ValuesOf:
        return readings.values_per_observation(self.store.examples())


@dataclass(frozen=True, kw_only=True, eq=False)
class Results:
    """The results of an experiment.

    Args:
        title: The experiment with its options.
        repeat: The command that made them.
        ran: By the name of the suite, in the order in which they were run.
        versions: Of Python and the libraries; where runs had different ones, all of them.
    """

    title: str
    repeat: str
    contents: Contents
    ran: Mapping[str, Ran]
    versions: Mapping[str, Sequence[str]]

    def records_of(self, line: Line) -> list[Row]:
        """The records of a line; empty if its suite was not run."""
        ran = self.ran.get(line.suite)
        return [row for row in ran.rows if row["run"] == line.run] if ran else []

    def values_of(self, lines: Sequence[Line]) -> ValuesOf:
        """Values per observation of the suites of some lines."""
        suites = dict.fromkeys(line.suite for line in lines if line.suite in self.ran)
        return {key: values for name in suites for key, values in self.ran[name].values.items()}


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Some lines with what was measured of them.

    Args:
        evaluator: Whose log p(x) is shown, the same for all of them.
        rows: By label, without the lines that were not run.
    """

    evaluator: str
    rows: Mapping[str, MethodRow]

    def estimate(self, label: str, asked: Column | Contrast) -> Estimate | None:
        """What a line says of a quantity: by one evaluator for all where it is log p(x), no density ratio if it can."""
        row, metrics = self.rows.get(label), asked.metrics
        if row is None:
            return None
        known = [e for e in row.estimates if e.metric != LOG_LIKELIHOOD or e.evaluator == self.evaluator]
        known = [e for e in known if asked.evaluator in ("", readings.stem(e.evaluator))]
        shown = readings.choose(known, metrics)
        simulated = [e for e in known if e.metric in metrics and e.split == SIMULATED]
        return shown or next(iter(simulated), None)


def measure(lines: Sequence[Line], results: Results) -> Measured:
    """Rows of the lines that were run."""
    found = {line.label: results.records_of(line) for line in lines}
    values = results.values_of(lines)
    evaluator, rows = method_rows({label: records for label, records in found.items() if records}, values)
    rows = [dataclasses.replace(row, exceeds=exceeding(row, values)) for row in rows]
    return Measured(evaluator=evaluator, rows={row.label: row for row in rows})


# Contrasts


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What was found of a contrast.

    Args:
        reach: What the difference must exceed besides the noise: of log p(x) the certified gap with its error, of
            other metrics the floor of their estimator, if it has one.
        obstacle: Why nothing can be concluded; empty if something can.
    """

    contrast: Contrast
    difference: Difference | None = None
    reach: float = 0.0
    obstacle: str = ""
    metric: str = ""
    unit: str = ""

    @property
    def verdict(self) -> str:
        """In words; it follows from the numbers."""
        if self.obstacle or self.difference is None:
            return f"undecided: {self.obstacle}"
        if math.isinf(self.reach):
            return "undecided: how far the estimator may be off is not known"
        if abs(self.difference.value) > self.difference.margin + self.reach:
            return "observed" if self.difference.value > 0 else "the opposite is observed"
        limit = "the certified gap" if self.metric == LOG_LIKELIHOOD else "the estimator's floor"
        return f"not observed at this scale, within {limit if self.difference.beyond_noise else 'the noise'}"


def outcome(contrast: Contrast, results: Results) -> Outcome:
    """The difference of a contrast, and whether it is beyond the noise and what else it must exceed."""
    # Labels belong to tables; within a contrast two lines may share one.
    lines = [
        dataclasses.replace(line, label=f"{line.run} ({line.suite})") for line in (contrast.first, contrast.second)
    ]
    measured = measure(lines, results)
    estimates = [measured.estimate(line.label, contrast) for line in lines]
    missing = [line.label for line in lines if line.label not in measured.rows]
    unmeasured = [line.label for line, found in zip(lines, estimates, strict=True) if found is None]
    if missing or unmeasured:
        why = f"{' and '.join(missing)} not run" if missing else f"no number for {' and '.join(unmeasured)}"
        return Outcome(contrast=contrast, obstacle=why)
    a, b = (found for found in estimates if found)
    first, second = (measured.rows[line.label] for line in lines)
    values = results.values_of(lines)
    difference = statistics.paired_difference(
        of_seeds(first.jobs, a, values), of_seeds(second.jobs, b, values), exhaustive=a.exhaustive and b.exhaustive
    )
    return Outcome(
        contrast=contrast,
        difference=difference,
        reach=_reach(contrast, measured),
        obstacle=_obstacle((first, second), (a, b), difference) or _of_clocks(lines, (first, second), results),
        metric=a.metric,
        unit=a.unit,
    )


def _of_clocks(lines: Sequence[Line], rows: Sequence[MethodRow], results: Results) -> str:
    """What forbids to compare fits whose budget is a time: there these are no equal budgets."""
    if not any(results.ran[line.suite].suite.budget.startswith("seconds=") for line in lines):
        return ""
    disturbed = [row.label for row in rows if row.untimed]
    if disturbed:
        return f"not every fit of {' and '.join(disturbed)} had its seconds for itself, on one machine"
    records = {line.label: results.records_of(line) for line in lines}
    differing = [column for column in ("hardware", "threads") if column in mixed(records)]
    return f"fits of so many seconds have other {' and '.join(differing)}" if differing else ""


def _reach(contrast: Contrast, measured: Measured) -> float:
    """Of the two rows that a contrast is about."""
    if contrast.floor:
        floor = dataclasses.replace(contrast, metrics=(contrast.floor,))
        found = [measured.estimate(label, floor) for label in measured.rows]
        return max((max(0.0, each.value + STANDARD_ERRORS * each.stderr) for each in found if each), default=math.inf)
    first, second = measured.rows.values()
    certified = asks_for_certificates(measured.evaluator, (first, second))
    of_log_p = LOG_LIKELIHOOD in contrast.metrics
    return certified_reach(measured.evaluator, first, second) if of_log_p and certified else 0.0


def _obstacle(
    rows: tuple[MethodRow, MethodRow], estimates: tuple[Estimate, Estimate], difference: Difference | None
) -> str:
    kinds = sorted({estimate.kind for estimate in estimates})
    if len(kinds) > 1 or DENSITY_RATIO in kinds or estimates[0].metric != estimates[1].metric:
        return f"numbers of kind {' and '.join(kinds)} are not compared"
    if kinds[0] in LOWER_BOUNDS and estimates[0].metric not in (LOG_LIKELIHOOD, "elbo"):
        return f"each is a {kinds[0]}, of which the looser one looks better"
    if difference is None:
        return "no seed and observation in common"
    doubted = [row.label for row in rows if estimates[0].metric == LOG_LIKELIHOOD and row.untrusted]
    if doubted:
        return f"log p(x) of {' and '.join(doubted)} is untrusted"
    lost = [row.label for row, found in zip(rows, estimates, strict=True) if found.seeds < len(row.statuses)]
    if lost:
        return f"not every seed of {' and '.join(lost)} has a number, and the others may flatter it"
    warned = [row.label for row in rows if row.warnings]
    if warned:
        return f"a measurement of {' and '.join(warned)} carries a warning"
    return "one seed" if difference.one_seed else ""

"""Trials of settings: as many for each method, on seeds that the comparison itself does not use."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from harness.experiment import Column, Done, Line, Suite, Tabulated

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, kw_only=True)
class Trials:
    """A suite that finds the best setting of each method.

    Args:
        settings: Method -> the runs that are tried; as many for each method.
        evaluators: Of these only one may measure the metric.
        metric: What settings are chosen by, its mean over the seeds; the highest is the best, unless ``lowest``.

    Raises:
        ValueError: If more is tried for one method than for another.
    """

    problem: str
    settings: Mapping[str, Sequence[str]]
    evaluators: str
    budget: str
    seeds: tuple[int, ...]
    name: str = "trials"
    metric: str = "log_likelihood"
    lowest: bool = False

    def __post_init__(self) -> None:
        numbers = {method: len(runs) for method, runs in self.settings.items()}
        if len(set(numbers.values())) != 1:
            raise ValueError(f"each method must have as many trials, got {numbers}")

    @property
    def suite(self) -> Suite:
        return Suite(
            name=self.name,
            problem=self.problem,
            methods={text: text for texts in self.settings.values() for text in texts},
            evaluators=self.evaluators,
            budget=self.budget,
            seeds=self.seeds,
        )

    def best(self, done: Done) -> dict[str, str]:
        """Method -> its best run, of those of which no seed failed; without the methods that have none."""
        if self.name not in done:
            return {}
        found = {method: self._best(done[self.name], runs) for method, runs in self.settings.items()}
        return {method: run for method, run in found.items() if run}

    def _best(self, records: pd.DataFrame, runs: Sequence[str]) -> str:
        means: dict[str, float] = {}
        for run in runs:
            mine = records[records["run"] == run]
            values = mine.loc[(mine["metric"] == self.metric) & (mine["status"] == "ok"), "value"]
            if 0 < len(values) == mine["seed"].nunique():
                means[run] = float(values.mean())
        return (min if self.lowest else max)(means, key=lambda run: means[run], default="")

    def table(self, columns: Sequence[Column], title: str = "Trials") -> Tabulated:
        """Everything that was tried."""
        highest = "lowest" if self.lowest else "highest"
        return Tabulated(
            title=title,
            columns=columns,
            lines=[Line(label=text, suite=self.name, run=text) for text in self.suite.methods],
            about=f"What was tried: as many settings for each method, {self.budget}, with seeds that the other tables "
            f"do not use. The setting of each method with the {highest} mean in the first column, of those of which no "
            "seed failed, is in these; a method that has none is not.",
        )


def at_rates(method: str, rates: Sequence[str], options: str = "", *, adversary: float = 0.0) -> list[str]:
    """Runs of a method at several learning rates, with further options; an adversary's rate is a multiple of it."""
    further = f",{options}" if options else ""
    ratio = {rate: f",adversary_lr={adversary * float(rate):g}" if adversary else "" for rate in rates}
    return [f"{method}[lr={rate}{ratio[rate]}{further}]" for rate in rates]

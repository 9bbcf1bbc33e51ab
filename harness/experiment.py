"""Experiments: what is compared, what others have reported of it, and what is to be shown; all of it plain data.

The core runs the comparisons, computes every number and draws; an experiment names no number of ours.
"""

# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false
from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from harness.options import Configurable

if TYPE_CHECKING:
    import pandas as pd

Done = Mapping[str, "pd.DataFrame"]
"""Records of each suite that has been run, by its name; their column ``run`` has the label of the method."""

Scale = Literal["smoke", "laptop", "paper"]
"""Seconds to minutes, to see that it works; hours on two cores; what the paper did."""


@dataclass(frozen=True, kw_only=True)
class Suite:
    """One comparison on one problem, in a folder of its own: arguments of `harness.compare`.

    Args:
        name: Of the folder: lower-case words joined by hyphens.
        methods: Label of each run -> the run as on the command line, ``{"VAE, tuned": "vae[lr=1e-2]"}``.
        budget: The problem's own unless given.
        seeds: Which; those of the whole run unless given.
    """

    name: str
    problem: str
    methods: Mapping[str, str]
    evaluators: str
    budget: str = ""
    seeds: tuple[int, ...] = ()
    precision: str = "float32"


# What is shown


@dataclass(frozen=True, kw_only=True)
class Line:
    """The fits of one run of a suite, from all seeds, under a label for readers."""

    label: str
    suite: str
    run: str


@dataclass(frozen=True, kw_only=True)
class Reported:
    """Figures of others: shown as they were printed, never computed with; hence texts.

    Args:
        figures: Heading of a column -> figure.
        source: Where they are from, and whether they were read there or recalled.
    """

    label: str
    figures: Mapping[str, str]
    source: str


@dataclass(frozen=True, kw_only=True)
class Column:
    """A quantity of a table.

    Args:
        metrics: Names that it has in the records; of those that a line has, the first that is no density ratio.
        evaluator: Name of the evaluator, where several measure it; any unless given.
    """

    heading: str
    metrics: tuple[str, ...]
    evaluator: str = ""


@dataclass(frozen=True, kw_only=True)
class Tabulated:
    """A table: means and spreads over seeds of our lines, and the figures of others as lines of their own.

    Args:
        about: What a reader has to know to read it.
    """

    title: str
    columns: Sequence[Column]
    lines: Sequence[Line | Reported]
    about: str = ""


@dataclass(frozen=True, kw_only=True)
class Contrast:
    """The paired difference of two lines, the first less the second; whether it is beyond the noise is computed.

    Args:
        statement: What is the case if the difference is above zero.
        group: Contrasts of one group stand together in tables and figures.
        metrics, evaluator: As in `Column`.
        floor: Metric of the value that a perfect fit would give by the same estimator, if there is one: a difference
            has to be larger than that too.
    """

    statement: str
    first: Line
    second: Line
    group: str = ""
    metrics: tuple[str, ...] = ("log_likelihood",)
    evaluator: str = ""
    floor: str = ""


@dataclass(frozen=True, kw_only=True)
class LatentPlanes:
    """Draws of the aggregate posterior in a latent space of two dimensions: a panel per line, of its first seed."""

    name: str
    caption: str
    lines: Sequence[Line]


@dataclass(frozen=True, kw_only=True)
class ModelSamples:
    """E[x|z] for draws of z from the prior: a panel per line, of its first seed."""

    name: str
    caption: str
    lines: Sequence[Line]


@dataclass(frozen=True, kw_only=True)
class Progression:
    """A quantity against training steps and against seconds, from separate fits: each point is a line.

    Args:
        curves: Label -> lines in the order of their budgets.
        levels: Lines whose fits take no such steps, as level lines.
        metric, evaluator: What is drawn; as in `Column`.
        floor: Metric of the value that a perfect fit would give by the same estimator; empty if there is none.
        axis: What the metric is, with its unit.
    """

    name: str
    caption: str
    curves: Mapping[str, Sequence[Line]]
    levels: Sequence[Line]
    metric: str
    axis: str
    evaluator: str = ""
    floor: str = ""


@dataclass(frozen=True, kw_only=True)
class Marginals:
    """Draws of each line's posterior in planes of two quantities, over the exact density: a panel per line and plane.

    Args:
        planes: Pairs of names of quantities.
    """

    name: str
    caption: str
    planes: Sequence[tuple[str, str]]
    lines: Sequence[Line]


@dataclass(frozen=True, kw_only=True)
class Differences:
    """All contrasts of some groups with their standard errors and margins of noise: a panel per group."""

    name: str
    caption: str
    groups: Sequence[str]


Picture = LatentPlanes | ModelSamples | Progression | Marginals | Differences


@dataclass(frozen=True, kw_only=True)
class Contents:
    """What a report shows.

    Args:
        remarks: What is true whatever the results are: how the runs were set up, what the numbers are not.
    """

    tables: Sequence[Tabulated]
    contrasts: Sequence[Contrast] = ()
    pictures: Sequence[Picture] = ()
    remarks: Sequence[str] = ()


class Experiment(Configurable, ABC):
    """An experiment of a paper: a plugin is a frozen dataclass that derives from this; its fields are its options."""

    @abstractmethod
    def seeds(self, scale: Scale) -> int:
        """How many repetitions, unless it is said otherwise."""

    @abstractmethod
    def suites(self, scale: Scale, done: Done) -> list[Suite]:
        """The suites that can be named, given what those that have been run have found.

        It is asked again after each suite, so that a later one may depend on an earlier one. Those that it has named
        stay as they are; one that needs a result which is not there is left out.
        """

    @abstractmethod
    def contents(self, scale: Scale) -> Contents:
        """What is shown. Lines may speak of a suite that was left out, and are then shown as not run."""


# What a suite may need of an earlier one


def seconds_budget(records: pd.DataFrame, steps: int = 0) -> str:
    """Budget of the seconds that a fit took, averaged over the runs, ``seconds=41.3``.

    So the fits of all runs together take as long as they did, and the time is shared equally. A run of which no seed
    ended well has none. It is empty if there is no other, or if the time of a fit that ended well is not valid.

    Args:
        steps: Of a fit of that many steps, at the speed of these; as many as it had, unless given.
    """
    fitted = records["status"].eq("skipped") & records["fit_seconds"].gt(0)  # and an evaluator is not for it
    ended = records[records["status"].eq("ok") | fitted].drop_duplicates("job_id")
    if ended.empty or not ended["timing_valid"].eq(True).all() or (steps and not ended["fit_steps"].gt(0).all()):
        return ""
    seconds = ended["fit_seconds"] * (steps / ended["fit_steps"] if steps else 1.0)
    mean = seconds.groupby(ended["run"]).mean().mean()
    return f"seconds={float(f'{mean:.3g}'):g}"

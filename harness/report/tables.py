"""Tables of a comparison as data: per problem a row per method. `harness.report.build` makes them from records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from harness.statistics import DENSITY_RATIO, Difference, Estimate, Spread

COLUMNS: Mapping[str, tuple[str, ...]] = {
    "log_likelihood": ("log_likelihood",),
    "elbo": ("elbo", "adversarial_elbo"),
    "kl_to_prior": ("kl_to_prior",),
    "reconstruction": ("reconstruction",),
}
"""Column of the table -> the metrics that can fill it, best first."""


@dataclass(frozen=True, order=True, kw_only=True)
class TableKey:
    """What all rows of one table have in common: only such rows are compared."""

    problem: str
    spec_hash: str
    binarisation: str
    split: str
    budget: str
    precision: str
    step_mode: str
    device: str


@dataclass(frozen=True, kw_only=True)
class Issue:
    """Something that gave no number, and why. ``evaluator`` is empty where the fit itself did not end well."""

    label: str
    seed: int
    evaluator: str
    status: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class MethodRow:
    """A method with its configuration on one problem.

    Args:
        statuses: How each seed's job ended.
        jobs: Job of each seed that ended well.
        estimates: Every metric by every evaluator; ``shown`` are those in the table's columns.
        difference: Paired log-likelihood less that of the table's first row; None for that row and where unknown.
        exceeds: Seeds whose ELBO is above log p(x) by more than the combined error.
        best: Ahead of every other row beyond the noise.
    """

    label: str
    method: str
    config: str
    plugin: str
    parameters: str
    statuses: Mapping[int, str]
    jobs: Mapping[int, str]
    estimates: Sequence[Estimate]
    shown: Mapping[str, Estimate]
    fit_seconds: Spread | None
    steps_per_second: Spread | None
    issues: Sequence[Issue]
    difference: Difference | None = None
    exceeds: Sequence[int] = ()
    best: bool = False

    @property
    def density_ratio(self) -> bool:
        """Whether all that is known of its bound is a density ratio: then its training objective is none either."""
        return "elbo" in self.shown and self.shown["elbo"].kind == DENSITY_RATIO


@dataclass(frozen=True, kw_only=True)
class Table:
    """The rows that may be compared with each other.

    Args:
        evaluator: Whose log-likelihood is shown, the same for all rows; empty if there is none.
        left_out: Number of older fits of the same runs.
        decoder_parameters: Trainable parameters of the generative model, which all rows share.
        mixed: Column -> its values with the labels of the rows that have them, where they differ.
        definitions: Number of definitions (hashes) of this problem among all records; other ones have other tables.
    """

    key: TableKey
    rows: Sequence[MethodRow]
    evaluator: str
    decoder_parameters: str
    left_out: int
    mixed: Mapping[str, Mapping[str, Sequence[str]]]
    definitions: int = 1

    @property
    def exhaustive(self) -> bool:
        """Whether the test split is the whole population."""
        shown = [row.shown["log_likelihood"] for row in self.rows if "log_likelihood" in row.shown]
        return bool(shown) and all(estimate.exhaustive for estimate in shown)

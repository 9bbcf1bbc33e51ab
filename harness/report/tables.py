"""Tables of a comparison as data: per problem a row per method. `harness.report.build` makes them from records."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from harness.statistics import DENSITY_RATIO, Agreement, Difference, Estimate, Spread

COLUMNS: Mapping[str, tuple[str, ...]] = {
    "log_likelihood": ("log_likelihood",),
    "elbo": ("elbo", "adversarial_elbo"),
    "kl_to_prior": ("kl_to_prior",),
    "reconstruction": ("reconstruction",),
}
"""Column of the table -> the metrics that can fill it, best first."""

ANNEALS = "temperatures"
"""The setting that only estimators that anneal have."""

SOURCES = "sources"
"""What is mixed in a row whose seeds were fitted by different versions of the sources; never ranked."""


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
class Certificate:
    """What bidirectional bounds say of one estimator of one method: how far it may be from log p(x).

    Measured with the same settings on observations that were simulated from the fitted model, so it speaks of those.

    Args:
        gap: Upper less lower bound, over the seeds that are certified.
        gaps, thresholds: Of each of these seeds; thresholds are infinite where none is stated.
        missing: Seeds that have an estimate and no certificate.
        reach: The gap and two of its standard errors (more for few observations), at least those two; infinite where
            unknown. No difference below it is ranked.
    """

    gap: Estimate
    gaps: Mapping[int, float]
    thresholds: Mapping[int, float]
    missing: Sequence[int]
    reach: float

    @property
    def untrusted(self) -> list[int]:
        """Seeds whose gap is over the threshold. One is enough: the mean over seeds contains it."""
        return [seed for seed, gap in self.gaps.items() if gap > self.thresholds[seed]]


@dataclass(frozen=True, kw_only=True)
class Checks:
    """What was found out about a posterior by others than its method, over what all of them have scored.

    Args:
        own: ELBO as the method or its density gives it.
        fresh: ELBO with the density ratio of a discriminator that was trained after the fit.
        upper: Upper bound on the ELBO.
        smoothed: Lower bound on the ELBO of the posterior smoothed by noise, and thereby on log p(x).
        truth: log p(x) as in the main table.
        vacuous: The lower bound is too loose to tell anything.
        exceeds: Which of `own`, `fresh` and `smoothed` are above log p(x), and for which seeds.
        own_less_upper, smoothed_less_own, smoothed_less_upper: None where one of the two is missing.
    """

    own: Estimate | None = None
    fresh: Estimate | None = None
    upper: Estimate | None = None
    smoothed: Estimate | None = None
    truth: Estimate | None = None
    vacuous: bool = False
    exceeds: Mapping[str, Sequence[int]] = field(default_factory=dict[str, Sequence[int]])
    own_less_upper: Agreement | None = None
    smoothed_less_own: Agreement | None = None
    smoothed_less_upper: Agreement | None = None


@dataclass(frozen=True, kw_only=True)
class MethodRow:
    """A method with its configuration on one problem.

    Args:
        statuses: How each seed's job ended.
        jobs: Job of each seed that ended well.
        estimates: Every metric by every evaluator; ``shown`` are those in the table's columns.
        together: Seconds of each batched program that fitted some of the seeds, and others, on one clock.
        untimed: Seeds whose fit ended well, but was disturbed: others ran beside it, or it went on elsewhere.
        busy: Part of the cores' time that other programs had during the fit, of timed seeds where that is much.
        beyond: What fits took of a budget that was smaller, such as "333,021 steps"; empty if they kept to it.
        difference: Paired log-likelihood less that of the table's first row; None for that row and where unknown.
        exceeds: Seeds whose ELBO is above log p(x) by more than the combined error.
        best: Ahead of every other row beyond the noise and the certificates' gaps.
        evidence: log p(x) by every evaluator that measured it on test observations.
        certificates: By evaluator, of these and others; one that bidirectional bounds say nothing about is not in it.
        agreements: Of every two of them the first less the second, by their names.
        checks: None where nobody checked the posterior.
        warnings: Why the fit is not to be believed, as its measurements say: by evaluator and metric, for each seed.
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
    together: Sequence[float] = ()
    untimed: Sequence[int] = ()
    busy: Mapping[int, float] = field(default_factory=dict[int, float])
    beyond: str = ""
    difference: Difference | None = None
    exceeds: Sequence[int] = ()
    best: bool = False
    evidence: Mapping[str, Estimate] = field(default_factory=dict[str, Estimate])
    certificates: Mapping[str, Certificate] = field(default_factory=dict[str, Certificate])
    agreements: Mapping[tuple[str, str], Agreement] = field(default_factory=dict[tuple[str, str], Agreement])
    checks: Checks | None = None
    warnings: Mapping[tuple[str, str], Mapping[int, str]] = field(
        default_factory=dict[tuple[str, str], Mapping[int, str]]
    )

    def distrusts(self, evaluator: str) -> bool:
        """Whether what that evaluator says of log p(x) is marked as untrusted."""
        return evaluator in self.certificates and bool(self.certificates[evaluator].untrusted)

    @property
    def untrusted(self) -> bool:
        """Whether the log-likelihood that is shown is."""
        return "log_likelihood" in self.shown and self.distrusts(self.shown["log_likelihood"].evaluator)

    @property
    def density_ratio(self) -> bool:
        """Whether all that is known of its bound is a density ratio: then its training objective is none either."""
        return "elbo" in self.shown and self.shown["elbo"].kind == DENSITY_RATIO


@dataclass(frozen=True, kw_only=True)
class Closeness:
    """What may be said of the rows' distances to the exact posterior, by one metric of one evaluator.

    Args:
        closest: Label of the row that is ahead of all others beyond the errors and the floor; empty if none is.
        at_floor: Labels of the rows that are no further than as many exact draws, within the errors.
    """

    closest: str
    at_floor: Sequence[str]


@dataclass(frozen=True, kw_only=True)
class Table:
    """The rows that may be compared with each other.

    Args:
        evaluator: Whose log-likelihood is shown, the same for all rows; empty if there is none.
        left_out: Number of older fits of the same runs.
        decoder_parameters: Trainable parameters of the generative model, which all rows share.
        mixed: Column -> its values with the labels of the rows that have them, where they differ.
        definitions: Number of definitions (hashes) of this problem among all records; other ones have other tables.
        closeness: By evaluator and metric, of those that have a floor and of others of the same metrics.
    """

    key: TableKey
    rows: Sequence[MethodRow]
    evaluator: str
    decoder_parameters: str
    left_out: int
    mixed: Mapping[str, Mapping[str, Sequence[str]]]
    definitions: int = 1
    closeness: Mapping[tuple[str, str], Closeness] = field(default_factory=dict[tuple[str, str], Closeness])

    @property
    def fixed(self) -> bool:
        """Whether the model has nothing to learn."""
        return self.decoder_parameters == "0"

    @property
    def exhaustive(self) -> bool:
        """Whether the test split is the whole population."""
        shown = [row.shown["log_likelihood"] for row in self.rows if "log_likelihood" in row.shown]
        return bool(shown) and all(estimate.exhaustive for estimate in shown)

    def reach(self, first: MethodRow, second: MethodRow) -> float:
        """What their difference must exceed besides the noise: the larger of the two certified gaps, with its error.

        0 where nobody asked for a certificate of the estimator that is shown; infinite where one of the two has none.
        """
        return (
            certified_reach(self.evaluator, first, second) if asks_for_certificates(self.evaluator, self.rows) else 0.0
        )


def asks_for_certificates(evaluator: str, rows: Sequence[MethodRow]) -> bool:
    """Whether a row has one, or should have one and failed to get it; only estimates by annealing can."""
    failed = [issue.evaluator for row in rows for issue in row.issues if issue.status != "skipped"]
    estimates = [row.evidence[evaluator] for row in rows if evaluator in row.evidence]
    annealed = any(ANNEALS in json.loads(text or "{}") for each in estimates for text in each.settings)
    lost = annealed and any(by.startswith("bdmc") for by in failed)
    return lost or any(evaluator in row.certificates for row in rows)


def certified_reach(evaluator: str, first: MethodRow, second: MethodRow) -> float:
    """The larger of the certified gaps of two rows, with its error; infinite where one of them has no certificate."""
    known = [row.certificates[evaluator] for row in (first, second) if evaluator in row.certificates]
    return max(certificate.reach for certificate in known) if len(known) == 2 else math.inf

"""Which posterior a report calls closest to the exact one, which are at the floor, and what it shows of them.

Values are made, not drawn, so that every margin is known. The rippled row differs from the other, over S = 3 seeds and
N = 5 observations, by a constant and r (s + i), s in -1..1 and i in -2..2: the standard errors are r / sqrt(3) over
seeds and r / sqrt(2) over observations, Student's t makes of two errors 4.5265 and 2.8693 (2 and 4 degrees of freedom).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import pytest

from harness.record import COLUMNS, row
from harness.report.build import tables_of
from harness.report.entries import Entry, Panel
from harness.report.panels import panels
from harness.report.tables import Closeness, Table

S, N = 3, 5
RIPPLE = 0.1
"""Makes a margin of hypot(4.5265 / sqrt(3), 2.8693 / sqrt(2)) * 0.1 = 0.3308, of the seeds alone 0.2613."""
DIFFICULTY = np.array([3.0, -1.0, -4.0, 0.0, 2.0])
"""Of the observations, for all rows: it would make a margin ten times that, if differences were not paired."""
FLOOR = "floor: exact draws"


@dataclass
class Records:
    """A store made of numbers: fits of three seeds each, and how far they are from the exact posterior."""

    facts: list[dict[str, Any]] = field(default_factory=list)
    tables: list[pd.DataFrame] = field(default_factory=list)

    def add(self, method: str, seed: int, measurement: Mapping[str, Any], **columns: Any) -> None:
        job = {
            "job_id": f"{method}-{seed}", "problem": "eight", "split": "test", "method": method, "config": "{}",
            "seed": seed, "status": "ok", "timing_valid": True, "started_at": f"2025-01-01T00:00:0{seed}+00:00",
        }  # fmt: skip
        self.facts.append(row({**job, **columns}, measurement))

    def measure(
        self, method: str, metric: str, level: float, *, evaluator: str = "knn", ripple: float = 0.0,
        stderr: float = 0.0, settings: Sequence[Mapping[str, Any]] = ({},) * S, **columns: Any,
    ) -> None:  # fmt: skip
        """A metric of all seeds; ``stderr`` is the estimator's of the mean over them, ``settings`` are one a seed."""
        for seed, mine in enumerate(settings):
            values = level + DIFFICULTY + ripple * (seed - 1 + np.arange(N) - 2)
            measurement = {
                "evaluator": evaluator, "metric": metric, "value": float(values.mean()), "kind": "consistent",
                "bounds": "", "unit": "nats", "stderr": stderr * np.sqrt(S), "n_observations": N,
                "stderr_test": float(values.std(ddof=1) / np.sqrt(N)), "settings": json.dumps(dict(mine)), **columns,
            }  # fmt: skip
            self.add(method, seed, measurement)
            ids = {"job_id": f"{method}-{seed}", "evaluator": evaluator, "metric": metric, "index": np.arange(N)}
            self.tables.append(pd.DataFrame({**ids, "value": values, "stderr": stderr * np.sqrt(S * N)}))

    def distance(
        self, method: str, level: float, floor: float = 0.0, floor_stderr: float = 0.0, **columns: Any
    ) -> Records:
        self.measure(method, "kl_to_posterior", level, **columns)
        self.measure(method, "kl_to_posterior_floor", floor, stderr=floor_stderr)
        return self

    @property
    def table(self) -> Table:
        [table] = tables_of(pd.DataFrame(self.facts, columns=COLUMNS), pd.concat(self.tables, ignore_index=True))
        return table

    def judged(self, evaluator: str = "knn") -> Closeness:
        return self.table.closeness[evaluator, "kl_to_posterior"]

    def panel(self, title: str = "Distance") -> Panel:
        [found] = [each for each in panels(self.table) if each.title.startswith(title)]
        return found


def two(avb: float, vae: float, *floor: float, **columns: Any) -> Records:
    """Two rows, of which the second is rippled, with a floor and its error."""
    return Records().distance("avb", avb, *floor, **columns).distance("vae", vae, *floor, ripple=RIPPLE, **columns)


# Closest


@pytest.mark.parametrize(
    ("vae", "columns", "closest"),
    [(1.34, {}, "avb"), (1.32, {}, ""), (0.68, {}, ""), (0.66, {}, "vae"),
     (1.27, {"stderr_test": 0.0}, "avb"), (1.25, {"stderr_test": 0.0}, "")],
)  # fmt: skip
def test_the_lower_is_closest_beyond_the_margin_only(vae: float, columns: Mapping[str, Any], closest: str) -> None:
    """The choice of observations has a part in it unless they are all there are; the floor has none, below both."""
    records = two(1.0, vae, 0.0, 0.5, **columns)
    for method, level, ripple in (("avb", 1.0, 0.0), ("vae", vae, RIPPLE)):
        records.measure(method, "kl_to_posterior", level, evaluator="gaps", ripple=ripple, **columns)
    assert records.judged().closest == closest
    assert records.judged("gaps").closest == closest  # has no floor of its own


def test_closest_is_ahead_of_every_other_row_and_of_one_at_least() -> None:
    assert Records().distance("avb", 1.0).judged().closest == ""
    assert two(1.0, 3.0).judged().closest == "avb"
    assert two(1.0, 3.0).distance("iaf", 1.1, ripple=RIPPLE).judged().closest == ""
    unpaired = two(1.0, 3.0)
    del unpaired.tables[2 * S :]  # the second row's values per observation
    assert unpaired.judged().closest == ""


@pytest.mark.parametrize(
    ("avb", "vae", "closest"),
    [("consistent", "consistent", "avb"), ("unbiased", "consistent", ""), ("density ratio", "density ratio", ""),
     ("stochastic lower bound", "stochastic lower bound", ""), ("lower bound", "lower bound", "")],
)  # fmt: skip
def test_neither_kinds_that_differ_nor_ratios_nor_lower_bounds_are_ranked(avb: str, vae: str, closest: str) -> None:
    records = Records().distance("avb", 1.0, kind=avb).distance("vae", 2.0, kind=vae)
    assert records.judged().closest == closest


def test_the_smallest_k_hat_is_not_the_closest() -> None:
    """That of a posterior which is much too wide is below zero."""
    records = Records()
    for method, k_hat in (("avb", 0.05), ("vae", -1.7)):
        records.measure(method, "k_hat", k_hat, evaluator="psis", ripple=RIPPLE)
    assert records.table.closeness["psis", "k_hat"].closest == ""


@pytest.mark.parametrize(("lost", "closest"), [("avb", ""), ("vae", "avb")])
@pytest.mark.parametrize("evaluator", [None, "knn"])
def test_a_leader_with_a_lost_seed_is_not_closest(lost: str, evaluator: str | None, closest: str) -> None:
    """Whether it is the fit that did not end well or its measurement: the other seeds flatter it. Others may lose."""
    records = two(1.0, 2.0)
    records.add(lost, S, {"evaluator": evaluator}, status="diverged", reason="nan")
    assert records.judged().closest == closest


@pytest.mark.parametrize(("warned", "closest"), [("avb", ""), ("vae", "avb")])
@pytest.mark.parametrize(("evaluator", "metric"), [("chains", "r_hat_max"), ("knn", "kl_from_posterior")])
def test_a_leader_with_a_warning_is_not_closest(evaluator: str, metric: str, warned: str, closest: str) -> None:
    """On any of its measurements, of one seed; what others are warned of takes nothing from it."""
    records = two(1.0, 2.0)
    records.measure(warned, metric, 1.2, evaluator=evaluator, settings=[{}, {"warning": "R-hat is 1.2"}, {}])
    assert records.judged().closest == closest


# The floor


def test_two_rows_below_the_floor_are_not_ranked() -> None:
    """They differ by more than the margin; both are at the floor, though much further below than its error."""
    assert two(0.5, 0.9).judged() == Closeness(closest="avb", at_floor=[])
    assert two(0.5, 0.9, 1.0).judged() == Closeness(closest="", at_floor=["avb", "vae"])


@pytest.mark.parametrize(("excess", "closest"), [(0.53, "avb"), (0.51, "")])
def test_a_leader_below_the_floor_counts_as_the_floor(excess: float, closest: str) -> None:
    """What others have to exceed it by is hypot(0.3308, 2 * 0.2) = 0.519, however far below it the leader is."""
    for leader in (0.9, -2.0):
        assert two(leader, 1.0 + excess, 1.0, 0.2).judged().closest == closest


def test_the_larger_of_two_floors_counts_for_both() -> None:
    assert Records().distance("avb", 1.0, 0.1).distance("vae", 1.5, 0.1).judged().closest == "avb"
    assert Records().distance("avb", 1.0, 0.1).distance("vae", 1.5, 1.5).judged().closest == ""


def test_a_row_that_has_not_all_of_the_leaders_seeds_is_not_behind_it() -> None:
    """Means would be over other seeds: here the second row is below the first on the only one that both have not."""
    records = Records().distance("avb", 1.0).distance("vae", 2.0)
    assert records.judged().closest == "avb"
    for rows in (records.facts, records.tables):
        del rows[-1], rows[-S]  # the last seed of the floor, and of the metric
    assert records.judged().closest == ""


def test_a_row_with_a_warning_is_not_at_the_floor() -> None:
    records = two(1.0, 1.0, 1.0, 0.1)
    assert records.judged().at_floor == ["avb", "vae"]
    records.measure("vae", "r_hat_max", 1.2, evaluator="chains", settings=[{}, {"warning": "R-hat is 1.2"}, {}])
    assert records.judged().at_floor == ["avb"]


@pytest.mark.parametrize(("excess", "at_floor"), [(0.14, ["avb"]), (0.16, []), (-0.16, ["avb"])])
def test_at_the_floor_is_what_is_within_three_errors_or_below(excess: float, at_floor: Sequence[str]) -> None:
    """The error is hypot(0.03, 0.04) = 0.05."""
    records = Records().distance("avb", 1.0 + excess, 1.0, 0.04, stderr=0.03)
    records.measure("avb", "kl_to_posterior", -1.0, evaluator="gaps")
    assert records.judged().at_floor == at_floor
    assert records.judged("gaps").at_floor == []  # has none


# The panel


def test_the_floor_line_is_the_largest_floor_and_flags_are_where_they_belong() -> None:
    """The floor has its own error, and decimals enough for distances that are squared."""
    records = Records()
    for method, level, floor, stderr in (("avb", 2, 2, 3), ("iaf", 30, 6, 4), ("vae", 40, 4, 5)):
        records.distance(method, 1e-5 * level, 1e-5 * floor, 1e-6 * stderr, stderr=3e-6)
    lines = {label: (entry.number, entry.errors[1], entry.flags) for label, [entry] in records.panel().lines}
    assert lines == {
        "avb": ("0.0000200", "3e-06", ("closest", "at floor")), "iaf": ("0.0003000", "3e-06", ()),
        "vae": ("0.0004000", "3e-06", ()), FLOOR: ("0.0000600", "4e-06", ()),
    }  # fmt: skip


def test_columns_are_metrics_with_a_floor_by_any_evaluator_and_numbers_by_name() -> None:
    records = Records()
    for evaluator, metric in (("gaps", "kl_to_posterior"), ("gaps", "approximation_gap"), ("exact", "log_likelihood")):
        records.measure("avb", metric, 1.0, evaluator=evaluator)
    records.measure("avb", "mode_error", 1.0, evaluator="modes", settings=[{"shares": {}, "exact_shares": {}}] * S)
    assert list(records.table.closeness) == [("modes", "mode_error")]
    records.distance("vae", 1.0)
    for metric in ("mean_error", "mean_error_floor"):
        records.measure("vae", metric, 1.0, evaluator="moments", unit="", settings=[{"errors": {}, "mcse": {}}] * S)
    panel = records.panel()
    kl = "kl to\nposterior\n"
    assert panel.columns == [f"{kl}gaps [nats]", f"{kl}knn [nats]", "mean error\nmoments", "mode error\nmodes [nats]"]
    shown = {label: "".join(".x"[entry != Entry()] for entry in line) for label, line in panel.lines}
    assert shown == {"avb": "x..x", "vae": ".xx.", FLOOR: ".xx."}


@pytest.mark.parametrize(("fewer", "stderr", "told"), [(1.2, 0.06, True), (1.2, 0.07, False), (0.8, 0.06, True)])
def test_what_moves_with_the_number_of_draws_has_not_settled(fewer: float, stderr: float, told: bool) -> None:
    """By more than three errors, whichever way, in the mean over seeds: single ones are 0.2 off that."""
    settings = [{"samples": 5000, "fewer_draws": 250, "at_fewer_draws": fewer + off} for off in (-0.2, 0.0, 0.2)]
    notes = Records().distance("avb", 1.0, stderr=stderr, settings=settings).panel().notes
    expected = f"avb: kl to posterior by knn has not settled ({fewer} with 250 draws, 1 with 5,000): it is"
    assert [note.partition(" biased")[0] for note in notes] == [expected] * told


@pytest.mark.parametrize(("distinct", "told"), [((50, 40, 45), "80 %"), ((50, 50, 50), ""), ((40, None, 40), "")])
def test_draws_that_repeat_are_told_of_for_the_worst_seed(distinct: Sequence[int | None], told: str) -> None:
    settings = [{"samples": 50, **({"distinct_draws": n} if n else {})} for n in distinct]
    notes = Records().distance("avb", 1.0, settings=settings).panel().notes
    assert notes == [f"avb: kl to posterior by knn: only {told} of the draws are distinct"] * bool(told)


# Numbers by name

OF_SEEDS = (0.2, 0.03), (0.3, 0.04), (0.4, 0.12)
"""Values, 0.3 in the mean, with a deviation of 0.1; errors, of the mean hypot(0.03, 0.04, 0.12) / 3 = 0.0433."""


def test_shares_of_modes_are_shown_beside_the_exact_ones() -> None:
    """Of the rows that have them; numbers in names are sorted by their size."""
    records = two(1.0, 2.0)
    settings = [
        {"shares": {"mode 10": 1 - share, "mode 2": share}, "exact_shares": {"mode 10": 0.75, "mode 2": 0.25},
         "share_stderrs": {"mode 10": 2 * error, "mode 2": error}} for share, error in OF_SEEDS
    ]  # fmt: skip
    records.measure("avb", "mode_error", 0.05, evaluator="modes", settings=settings)
    panel = records.panel("Share of the draws")
    assert panel.columns == ["mode 2", "mode 10"]
    assert panel.lines == [
        ("avb", [Entry("0.300", "", ("0.1", "0.043", "")), Entry("0.700", "", ("0.1", "0.087", ""))]),
        ("exact posterior", [Entry("0.250", "="), Entry("0.750", "=")]),
    ]


def test_errors_of_moments_are_shown_with_their_signs_and_floors() -> None:
    records = two(1.0, 2.0)
    assert [panel.title for panel in panels(records.table)] == ["Distance to the exact posterior"]
    settings = [
        {"errors": {"tau": error, "mu": -2 * error}, "mcse": {"tau": mcse, "mu": 2 * mcse}} for error, mcse in OF_SEEDS
    ]
    floors = [{"errors": {"tau": -0.01}, "mcse": {"tau": 0.03}}] * S
    records.measure("avb", "mean_error", 0.4, evaluator="moments", settings=settings)
    records.measure("avb", "mean_error_floor", 0.01, evaluator="moments", settings=floors)
    panel = records.panel("Errors of means")
    assert panel.columns == ["mu", "tau"]
    assert panel.lines == [
        ("avb, mean error", [Entry("-0.600", "", ("0.2", "0.087", "")), Entry("+0.300", "", ("0.1", "0.043", ""))]),
        (f"{FLOOR}, mean error", [Entry("-"), Entry("-0.010", "", ("0", "0.017", ""))]),
    ]


def test_configurations_of_one_evaluator_are_told_apart() -> None:
    records = two(1.0, 2.0)
    for by, error in (("moments", 0.1), ("moments[samples=50]", 0.9)):
        settings = [{"errors": {"mu": error}, "mcse": {"mu": 0.0}}] * S
        records.measure("avb", "mean_error", error, evaluator=by, settings=settings)
    for by, share in (("modes", 0.5), ("modes[samples=50]", 0.9)):
        settings = [{"shares": {"up": share}, "exact_shares": {"up": 0.5}, "share_stderrs": {"up": 0.0}}] * S
        records.measure("avb", "mode_error", share, evaluator=by, settings=settings)
    of_moments = {label: entries[0].number for label, entries in records.panel("Errors of means").lines}
    assert of_moments == {"avb, mean error, by moments": "+0.100", "avb, mean error, by moments[samples=50]": "+0.900"}
    of_modes = {label: entries[0].number for label, entries in records.panel("Share of the draws").lines}
    assert of_modes == {"avb, by modes": "0.500", "avb, by modes[samples=50]": "0.900", "exact posterior": "0.500"}


def test_the_floor_of_moments_is_the_largest_too() -> None:
    records = Records()
    for method, floor in (("avb", 0.5), ("iaf", 0.7), ("vae", 0.1)):
        for suffix, error in (("", 1.0), ("_floor", floor)):
            named = {"errors": {"mu": error}, "mcse": {"mu": 0.1}}
            records.measure(method, f"mean_error{suffix}", error, evaluator="moments", settings=[named] * S)
    label, [entry] = records.panel("Errors of means").lines[-1]
    assert (label, entry.number) == (f"{FLOOR}, mean error", "+0.700")

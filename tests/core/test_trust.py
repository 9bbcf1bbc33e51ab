"""What may be believed of log p(x) and of posteriors: certificates, ranking, agreement, checks, and how they are shown.

From synthetic records whose effects are known: observations differ by 8 nats in difficulty, methods by far less.
"""

from __future__ import annotations

import dataclasses
import io
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from rich.console import Console

from harness.record import COLUMNS, row
from harness.report import convergence, doubts, figures
from harness.report.build import tables_of
from harness.report.entries import Entry, Panel
from harness.report.markdown import write_report
from harness.report.panels import panels
from harness.report.tables import MethodRow, Table
from harness.report.terminal import print_tables

N = 200
KERNELS = {"chains": 16, "temperatures": 1000, "leapfrog": 10, "schedule": "sigmoid", "start": "moments",
           "widening": 1.2, "moment_samples": 512, "target_acceptance": 0.65}  # fmt: skip
LOWER, UPPER, RATIO = "stochastic lower bound", "stochastic upper bound", "density ratio"


@dataclass
class Records:
    """A store made of numbers: fits, and whatever has been measured of them."""

    facts: list[dict[str, Any]] = field(default_factory=list)
    tables: list[pd.DataFrame] = field(default_factory=list)
    arrays: dict[tuple[str, str, str], dict[str, np.ndarray]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.random = np.random.default_rng(0)
        self.difficulty = self.random.normal(-90, 8, N)

    def records(self) -> pd.DataFrame:
        return pd.DataFrame(self.facts, columns=COLUMNS)

    def examples(self) -> pd.DataFrame:
        return pd.concat(self.tables, ignore_index=True)

    def curve(self, job_id: str) -> pd.DataFrame:
        raise FileNotFoundError(job_id)

    def gallery(self, job_id: str) -> dict[str, np.ndarray]:
        raise FileNotFoundError(job_id)

    def traces(self, job_id: str, evaluator: str, metric: str) -> Mapping[str, np.ndarray]:
        return self.arrays.get((job_id, evaluator, metric), {})

    def add(self, method: str, seed: int, measurement: Mapping[str, Any]) -> None:
        job = {
            "schema": 1, "job_id": f"{method}-{seed}", "problem": "digits", "split": "test", "spec_hash": "5" * 64,
            "method": method, "config": "{}", "seed": seed, "status": "ok", "reason": "", "device": "cpu",
            "precision": "float32", "started_at": f"2025-01-01T00:00:0{seed}+00:00", "budget": "steps=9",
            "timing_valid": True, "plugin": "p", "plugin_version": "1",
        }  # fmt: skip
        self.facts.append(row(job, measurement))

    def measure(
        self,
        method: str,
        seed: int,
        evaluator: str,
        metric: str,
        values: np.ndarray,
        *,
        kind: str = LOWER,
        stderr: float = 0.01,
        index: Sequence[int] | None = None,
        settings: Mapping[str, Any] | None = None,
        **columns: Any,
    ) -> None:
        n = len(values)
        measurement = {
            "evaluator": evaluator, "metric": metric, "value": float(values.mean()), "kind": kind, "bounds": "",
            "unit": "nats", "stderr": stderr / np.sqrt(n), "stderr_test": float(values.std(ddof=1) / np.sqrt(n)),
            "n_observations": n, "settings": json.dumps(dict(settings or {}), sort_keys=True), **columns,
        }  # fmt: skip
        self.add(method, seed, measurement)
        ids = {"job_id": f"{method}-{seed}", "evaluator": evaluator, "metric": metric}
        where = np.arange(n) if index is None else np.asarray(index)
        self.tables.append(pd.DataFrame({**ids, "index": where, "value": values, "stderr": stderr}))

    def truth(self, method: str, seed: int, level: float) -> np.ndarray:
        """log p(x) of a fit: the observations' difficulty, the method's level, and what the fit makes of each."""
        random = np.random.default_rng([seed, *method.encode()])
        return self.difficulty + level + 0.01 * seed + random.normal(0, 0.2, N)

    def gap(self, method: str, seed: int, gap: float, spread: float = 0.0, n: int = 100, **settings: Any) -> None:
        """A certificate whose error is ``spread`` over the root of n."""
        values = gap + spread * np.tile([1.0, -1.0], n // 2) * np.sqrt((n - 1) / n)
        settings = {**KERNELS, "threshold": 1.0, "acceptance": 0.6, **settings}
        common: dict[str, Any] = {"settings": settings, "split": "simulated", "stderr": min(0.01, spread)}
        self.measure(method, seed, "bdmc", "bdmc_gap", values, kind=UPPER, **common)
        self.measure(method, seed, "bdmc", "simulated_log_likelihood", values - 90, kind=LOWER, **common)
        self.measure(method, seed, "bdmc", "simulated_log_likelihood_upper", values - 80, kind=UPPER, **common)


def annealed(
    levels: Mapping[str, float], gaps: Mapping[str, float], *, spread: float = 0.0, seeds: int = 3, **other: Any
) -> Records:
    """Methods scored by `ais`, those with a gap certified; ``other`` are settings of the certificate alone."""
    store = Records()
    for seed in range(seeds):
        for method, level in levels.items():
            store.measure(method, seed, "ais", "log_likelihood", store.truth(method, seed, level), settings=KERNELS)
            if method in gaps:
                store.gap(method, seed, gaps[method], spread, **other)
    return store


def table_of(store: Records) -> Table:
    [table] = tables_of(store.records(), store.examples())
    return table


def row_of(store: Records, method: str) -> MethodRow:
    return next(row for row in table_of(store).rows if row.label == method)


def panel_of(store: Records, title: str) -> Panel:
    return next(panel for panel in panels(table_of(store)) if title in panel.title)


def cells_of(panel: Panel, method: str) -> dict[str, Entry]:
    """Entries of a method by heading."""
    entries = dict(panel.lines)[method]
    return dict(zip((column.replace("-\n", "").replace("\n", " ") for column in panel.columns), entries, strict=True))


def printed(store: Records, width: int = 100, encoding: str = "utf-8") -> str:
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    print_tables(store.records(), store.examples(), Console(file=stream, width=width))
    stream.seek(0)
    return stream.read()


def said(store: Records) -> str:
    """All that is printed, without line breaks."""
    return " ".join(printed(store, width=1000).split())


def best_of(store: Records) -> list[str]:
    return [row.label for row in table_of(store).rows if row.best]


# Ranking


def test_lead_has_to_exceed_the_gap() -> None:
    """By 0.5 nats with an error of about 0.02, so that noise alone forbids nothing."""
    levels = {"avb": 0.0, "vae": -0.5}
    assert best_of(annealed(levels, {})) == ["avb"]
    assert best_of(annealed(levels, {"avb": 0.05, "vae": 0.05})) == ["avb"]
    close = annealed(levels, {"avb": 0.6, "vae": 0.6})
    assert best_of(close) == []
    assert "vae: the difference to avb is beyond the noise, but not beyond it and the BDMC gap with its error" in said(
        close
    )
    assert "beyond the noise, but" not in said(annealed(levels, {"avb": 0.05, "vae": 0.05}))


def test_of_a_fixed_model_no_log_likelihood_is_ahead() -> None:
    """There is one only: a lead is that of the tighter bound."""
    store = annealed({"avb": 0.0, "vae": -0.5}, {})
    for facts in store.facts:
        facts["decoder_parameters"] = 0
    assert best_of(store) == []
    assert "log p(x) is the same for all methods" in said(store)
    assert "where its estimates differ, it is by how loose they are" in said(store)


@pytest.mark.parametrize(("shares", "ranked"), [((0.4, 0.4), ["avb"]), ((0.4, 0.6), []), ((0.6, 0.4), [])])
def test_weights_that_are_no_evidence_rank_nothing(shares: tuple[float, float], ranked: list[str]) -> None:
    store = Records()
    for seed in range(3):
        for (method, level), share in zip((("avb", 0.0), ("vae", -0.5)), shares, strict=True):
            settings = {"samples": 1000, "k_hat_above_0.7": share}
            values = store.truth(method, seed, level)
            store.measure(method, seed, "importance", "log_likelihood", values, settings=settings)
    assert best_of(store) == ranked
    assert ("k-hat of importance is above 0.7 for most observations: not ranked" in said(store)) == (not ranked)


@pytest.mark.parametrize("gap", [0.05, 0.6])
def test_a_gap_certifies_estimates_on_every_split(gap: float) -> None:
    store = annealed({"avb": 0.0, "vae": -0.5}, {"avb": gap, "vae": gap})
    for seed in range(3):
        for method, level in (("avb", 0.0), ("vae", -0.5)):
            values, by = store.truth(method, seed, level), "ais[split=validation]"
            store.measure(method, seed, by, "log_likelihood", values, settings=KERNELS, split="validation")
    tables = tables_of(store.records(), store.examples())
    assert {table.key.split for table in tables} == {"test", "validation"}
    for table in tables:
        assert [row.label for row in table.rows if row.best] == (["avb"] if gap < 0.5 else [])
        assert all(row.certificates[table.evaluator].gap.value == pytest.approx(gap) for row in table.rows)


@pytest.mark.parametrize(
    ("forces", "certified"),
    [(("bfloat16", "float32"), False), (("float32", "float32"), True), ((None, "float32"), True)],
)
def test_a_gap_of_other_forces_certifies_nothing(forces: tuple[str | None, str], certified: bool) -> None:
    store = Records()
    used = {"force_precision": forces[0]} if forces[0] else {}
    store.measure("avb", 0, "ais", "log_likelihood", store.truth("avb", 0, 0.0), settings={**KERNELS, **used})
    store.gap("avb", 0, 0.1, force_precision=forces[1])
    assert ("ais" in row_of(store, "avb").certificates) == certified


@pytest.mark.parametrize("gaps", [{"avb": 0.6, "vae": 0.0}, {"avb": 0.0, "vae": 0.6}])
def test_larger_of_two_gaps_counts(gaps: dict[str, float]) -> None:
    assert best_of(annealed({"avb": 0.0, "vae": -0.5}, gaps)) == []
    assert best_of(annealed({"avb": 0.0, "vae": -0.8}, gaps)) == ["avb"]


def test_noise_and_gap_add_up() -> None:
    """A lead of 0.5 is beyond its margin and beyond a gap of 0.45, but not beyond both together."""
    store = annealed({"avb": 0.0, "vae": -0.5}, {"avb": 0.45, "vae": 0.45})
    [difference] = [row.difference for row in table_of(store).rows if row.difference]
    assert 0.05 < difference.margin < 0.45 < abs(difference.value) < 0.45 + difference.margin
    assert best_of(store) == []


@pytest.mark.parametrize(("spread", "ranked"), [(0.0, ["avb"]), (3.0, []), (0.3, ["avb"])])
def test_error_of_the_gap_counts(spread: float, ranked: list[str]) -> None:
    """Gap 0.2 in three seeds of 100 simulated observations: its error is spread / 10 / root 3."""
    store = annealed({"avb": 0.0, "vae": -0.5}, {"avb": 0.2, "vae": 0.2}, spread=spread)
    certificate = row_of(store, "avb").certificates["ais"]
    assert certificate.reach == pytest.approx(0.2 + 2.03 * spread / 10 / np.sqrt(3), rel=0.01)  # 2.03: Student, 99
    assert best_of(store) == ranked


def test_negative_gap_is_read_as_none() -> None:
    certificate = row_of(annealed({"avb": 0.0}, {"avb": -0.3}, spread=1.0), "avb").certificates["ais"]
    assert certificate.reach == pytest.approx(2.03 * 0.1 / np.sqrt(3), rel=0.01)


def test_gap_with_an_unknown_error_ranks_nothing() -> None:
    store = annealed({"avb": 0.0, "vae": -0.5}, {"avb": 0.01, "vae": 0.01})
    for fact in store.facts:
        if fact["metric"] == "bdmc_gap" and fact["method"] == "vae":
            fact["stderr_test"] = None
    assert best_of(store) == []


def test_row_without_the_certificate_that_others_have_is_not_ranked() -> None:
    store = annealed({"avb": 0.0, "vae": -0.5}, {"avb": 0.01})
    assert best_of(store) == []
    assert "vae: ais is not certified, no BDMC gap was measured" in said(store)
    incomplete = annealed({"avb": 0.0, "vae": -0.5}, {"avb": 0.01, "vae": 0.01})
    incomplete.facts = [f for f in incomplete.facts if not (f["evaluator"] == "bdmc" and f["job_id"] == "vae-1")]
    assert best_of(incomplete) == []
    assert "vae: ais is not certified for seed 1" in said(incomplete)


def test_reason_of_a_missing_certificate_is_told() -> None:
    store = annealed({"avb": 0.0, "vae": -0.5}, {})
    store.add("vae", 0, {"evaluator": "bdmc", "status": "skipped", "reason": "model cannot simulate observations"})
    assert "vae: ais is not certified, no BDMC gap was measured (skipped: model cannot simulate" in said(store)


def test_certificates_that_failed_for_all_leave_nothing_to_rank_by() -> None:
    store = annealed({"avb": 0.0, "vae": -0.5}, {})
    assert best_of(store) == ["avb"]  # nobody asked for one
    for method in ("avb", "vae"):
        store.add(method, 0, {"evaluator": "bdmc", "status": "failed", "reason": "out of memory"})
    assert best_of(store) == []
    for fact in store.facts:  # what is exact needs no certificate
        if fact["metric"] == "log_likelihood":
            fact["kind"], fact["settings"] = "exact", "{}"
    assert best_of(store) == ["avb"]


@pytest.mark.parametrize("name", sorted(KERNELS))
def test_other_settings_certify_nothing(name: str) -> None:
    """Neither does a small gap help, nor a large one harm, and it is told which settings differ."""
    other: dict[str, Any] = {name: "else" if isinstance(KERNELS[name], str) else 7}
    store = annealed({"avb": 0.0, "vae": -0.5}, {"avb": 5.0, "vae": 5.0}, **other)
    avb = row_of(store, "avb")
    assert (avb.certificates, avb.untrusted, avb.best) == ({}, False, True)
    assert f"avb: ais is not certified, the settings differ: bdmc has {name} {other[name]}, not" in said(store)
    assert row_of(annealed({"avb": 0.0}, {"avb": 0.1}, observations=7), "avb").certificates.keys() == {"ais"}


def test_importance_is_not_certified_by_the_gap_of_annealing() -> None:
    store = annealed({"avb": 0.0}, {"avb": 5.0})
    store.measure("avb", 0, "importance", "log_likelihood", store.truth("avb", 0, -0.1), settings={"widening": 1.2})
    assert row_of(store, "avb").certificates.keys() == {"ais"}


# Untrusted


def untrusted() -> Records:
    """A gap of 1.5 nats for the first method, beside estimates and checks of every kind."""
    store = annealed({"avb": 0.0, "vae": -5.0}, {"avb": 1.5, "vae": 0.1}, spread=0.5)
    for seed in range(3):
        values = store.truth("avb", seed, 0.0)
        store.measure("avb", seed, "implicit", "smoothed_elbo", values - 1)
        for metric in ("approximation_gap", "amortisation_gap", "kl_to_posterior"):
            store.measure("avb", seed, "gaps", metric, 0 * values + 0.5, kind="consistent", settings=KERNELS)
    return store


def test_gap_over_the_threshold_marks_every_table(tmp_path: Path) -> None:
    store = untrusted()
    assert best_of(store) == []
    assert [row.untrusted for row in table_of(store).rows] == [True, False]
    assert "† avb: log p(x) by ais is untrusted and not ranked: BDMC gap 1.500 ± 0.029 nats" in said(store)
    assert "over the threshold of 1 (seeds 0, 1, 2)" in said(store)
    assert len(re.findall(r"±\d\.\d+†", printed(store))) == 2  # log p(x), and the difference that is made of it
    trust, checks, gaps = panels(table_of(store))
    flagged = {
        (heading, label)
        for panel in (trust, checks, gaps)
        for label, _ in panel.lines
        for heading, entry in cells_of(panel, label).items()
        if "untrusted" in entry.flags
    }
    where = ("log p(x) ais", "BDMC gap, simulated", "approximation gap", "their sum: KL to p(z|x)")
    assert flagged == {(heading, "avb") for heading in where}
    assert cells_of(checks, "avb")["log p(x) ais"].flags == ("untrusted",)
    text = write_report(store, tmp_path).read_text(encoding="utf-8")
    numbers = [line for line in text.splitlines() if re.match(r"\| avb \|.*\| nats|.* nats", line)]
    doubted = {line.split(" | ")[1] for line in numbers if "(untrusted)" in line}
    assert {"log\\_likelihood", "bdmc\\_gap", "kl\\_to\\_posterior", "approximation\\_gap"} <= doubted
    assert "amortisation\\_gap" not in doubted
    assert "**" not in text


def test_one_seed_over_the_threshold_is_enough() -> None:
    store = annealed({"avb": 0.0, "vae": -9.0}, {"avb": 0.1, "vae": 0.1})
    store.facts = [f for f in store.facts if not (f["evaluator"] == "bdmc" and f["job_id"] == "vae-1")]
    store.gap("vae", 1, 1.2)
    assert row_of(store, "vae").certificates["ais"].gap.value < 0.5
    assert row_of(store, "vae").untrusted
    assert best_of(store) == []  # though the other one is far ahead: of an untrusted estimate nobody is ahead
    assert "over the threshold of 1 (seed 1)" in said(store)


def test_threshold_is_the_one_that_was_set() -> None:
    store = annealed({"avb": 0.0, "vae": -5.0}, {"avb": 1.5, "vae": 1.5}, threshold=2.0)
    assert not any(row.untrusted for row in table_of(store).rows)
    assert best_of(store) == ["avb"]
    strict = annealed({"avb": 0.0}, {"avb": 0.5}, threshold=0.4)
    assert row_of(strict, "avb").untrusted


def test_exact_needs_no_certificate() -> None:
    store = annealed({"avb": 0.0, "vae": -0.5}, {"avb": 5.0, "vae": 5.0})
    for seed in range(3):
        for method, level in (("avb", 0.0), ("vae", -0.5)):
            values = store.truth(method, seed, level)
            store.measure(method, seed, "exact", "log_likelihood", values, kind="exact", stderr=0.0)
    assert table_of(store).evaluator == "exact"
    assert best_of(store) == ["avb"]
    assert not any(row.untrusted for row in table_of(store).rows)
    entries = cells_of(panel_of(store, "trusted"), "avb")
    assert entries["log p(x) exact"].flags == ()
    assert entries["log p(x) ais"].flags == entries["ais less exact"].flags == ("untrusted",)
    assert "avb: log p(x) by ais is untrusted" in said(store)


# log p(x) by several estimators


def several() -> Records:
    """`ais` on the 50 hardest of 200 observations, 0.3 nats above `importance`, which scored them all."""
    store = Records()
    hard = np.argsort(store.difficulty)[:50]
    for seed in range(2):
        for method, level in (("avb", 0.0), ("vae", -0.5)):
            truth = store.truth(method, seed, level)
            shares = {"k_hat_above_0.7": 0.1 if method == "avb" else 0.0}
            store.measure(method, seed, "ais", "log_likelihood", truth[hard], index=hard.tolist(), settings=KERNELS)
            store.measure(method, seed, "importance", "log_likelihood", truth - 0.3, settings=shares)
            store.gap(method, seed, 0.02, 0.1)
    return store


def test_estimators_are_compared_on_what_both_scored() -> None:
    """The means over different observations differ by about -9 nats, the paired difference is 0.3."""
    table = table_of(several())
    avb = table.rows[0]
    assert avb.evidence["ais"].value - avb.evidence["importance"].value < -5
    found = avb.agreements["ais", "importance"]
    assert (found.n_observations, found.seeds) == (50, 2)
    assert found.value == pytest.approx(0.3, abs=1e-9)
    assert found.stderr == pytest.approx(np.hypot(0.01, 0.01) / np.sqrt(100))
    entries = cells_of(panel_of(several(), "trusted"), "avb")
    assert (entries["ais less importance"].number, entries["ais less importance"].errors[1]) == ("+0.3000", "0.0014")
    text = said(several())
    assert "observations scored: ais 50, importance 200; differences are over those in common: 50" in text
    assert "avb: importance is 0.3000 ± 0.0014 nats below ais, beyond 3 errors: of two lower bounds the higher" in text


def test_certified_estimator_is_shown_though_another_scored_more() -> None:
    assert table_of(several()).evaluator == "ais"
    uncertified = several()
    uncertified.facts = [fact for fact in uncertified.facts if fact["evaluator"] != "bdmc"]
    assert table_of(uncertified).evaluator == "ais"  # the higher of two lower bounds
    equal = several()
    equal.facts = uncertified.facts
    for table in equal.tables:
        table.loc[table["evaluator"] == "importance", "value"] += 0.3
    assert table_of(equal).evaluator == "importance"


def test_trust_table_has_every_estimator_with_its_errors() -> None:
    entries = cells_of(panel_of(several(), "trusted"), "avb")
    assert list(entries) == [
        "log p(x) ais", "log p(x) importance", "ais less importance", "BDMC gap, simulated", "k-hat > 0.7",
    ]  # fmt: skip
    row = row_of(several(), "avb")
    for name in ("ais", "importance"):
        estimate, entry = row.evidence[name], entries[f"log p(x) {name}"]
        assert (entry.mark, float(entry.number)) == ("≳", pytest.approx(estimate.value, abs=1e-3))
        errors = (estimate.spread, estimate.stderr, estimate.stderr_test)
        assert [float(error) for error in entry.errors] == pytest.approx(errors, rel=0.1)
    gap = entries["BDMC gap, simulated"]
    assert (gap.mark, gap.number, gap.errors[2]) == ("≲", "0.0200", "0.0071")
    assert "on observations simulated from the fitted model, not on the real ones" in said(several())


def test_heavy_tails_are_told() -> None:
    panel = panel_of(several(), "trusted")
    assert [cells_of(panel, label)["k-hat > 0.7"].number for label in ("avb", "vae")] == ["10 %", "0 %"]
    told = [note for note in panel.notes if "k-hat" in note]
    assert len(told) == 1
    assert "(avb 10 %): the standard errors of importance are not to be believed there" in told[0]
    assert not any("k-hat" in note for note in panel_of(annealed({"avb": 0.0}, {"avb": 0.1}), "trusted").notes)


@pytest.mark.parametrize(
    ("offset", "kind", "told"),
    [
        (0.1, LOWER, "! avb: exact is 0.1000 ± 0.0010 nats below ais: a lower bound cannot exceed log p(x)"),
        (-0.1, LOWER, "avb: ais is 0.1000 ± 0.0010 nats below exact, which is exact: the bound is loose by that much"),
        (0.1, "consistent", "avb: exact is 0.1000 ± 0.0010 nats below ais, beyond 3 errors: they disagree"),
        (0.002, LOWER, ""),
        (-0.002, LOWER, ""),
    ],
)
def test_disagreement_with_the_truth(offset: float, kind: str, told: str) -> None:
    """The error of the mean is 0.01 / root 100 = 0.001."""
    store = Records()
    truth = store.truth("avb", 0, 0.0)[:100]
    store.measure("avb", 0, "exact", "log_likelihood", truth, kind="exact", stderr=0.0)
    store.measure("avb", 0, "ais", "log_likelihood", truth + offset, kind=kind)
    notes = panel_of(store, "trusted").notes
    assert len(notes) == bool(told)
    assert all(note.startswith(told) for note in notes)


def test_upper_below_lower_bound_is_a_fault() -> None:
    assert "avb: the upper bound of bdmc is below its lower bound: a fault" in said(
        annealed({"avb": 0.0}, {"avb": -0.5})
    )
    assert "a fault" not in said(annealed({"avb": 0.0}, {"avb": -0.05}, spread=0.5))


def test_nothing_to_distrust_no_table() -> None:
    store = Records()
    store.measure("vae", 0, "exact", "log_likelihood", store.truth("vae", 0, 0.0), kind="exact", stderr=0.0)
    store.measure("vae", 0, "elbo", "elbo", store.truth("vae", 0, -1.0), kind="unbiased")
    assert panels(table_of(store)) == []


# Rows that are not for the main table


def everything() -> Records:
    """Rows by all evaluators; the posterior of `avb` is implicit, that of `vae` explicit."""
    store = several()
    for seed in range(2):
        for method, level in (("avb", 0.0), ("vae", -0.5)):
            truth = store.truth(method, seed, level)
            own = ("adversary", "adversarial_elbo", RATIO) if method == "avb" else ("elbo", "elbo", "unbiased")
            store.measure(method, seed, own[0], own[1], truth - 0.5, kind=own[2])
            store.measure(
                method, seed, own[0], "kl_to_prior", 0 * truth + 5, kind=RATIO if method == "avb" else "exact"
            )
            store.measure(method, seed, "reconstruction", "reconstruction", truth + 4, kind="unbiased")
    return store


def check(store: Records, method: str, level: float, seed: int = 0, **offsets: float) -> None:
    """What `implicit` has to say, relative to log p(x)."""
    truth = store.truth(method, seed, level)
    values = {name: truth + offsets.get(name, -0.5) for name in ("fresh", "upper", "smoothed")}
    store.measure(method, seed, "implicit", "adversarial_elbo", values["fresh"], kind=RATIO)
    store.measure(method, seed, "implicit", "elbo", values["upper"], kind=UPPER)
    store.measure(method, seed, "implicit", "kl_to_prior", 0 * truth + 4, kind=LOWER)
    vacuous = {"vacuous": bool(values["smoothed"].mean() < values["upper"].mean() - 5)}
    store.measure(method, seed, "implicit", "smoothed_elbo", values["smoothed"], kind=LOWER, settings=vacuous)


def test_checks_change_nothing_in_the_main_table() -> None:
    """Though an upper bound on the ELBO is above log p(x), and an NWJ bound on KL is a bound where the own is none."""
    store = everything()
    before = [repr(row.shown) + repr(row.exceeds) for row in table_of(store).rows]
    for seed in range(2):
        for method, level in (("avb", 0.0), ("vae", -0.5)):
            check(store, method, level, seed, upper=+3.0)
            truth = store.truth(method, seed, level)
            for metric in ("approximation_gap", "kl_to_posterior"):
                store.measure(method, seed, "gaps", metric, 0 * truth + 0.2, kind="consistent", settings=KERNELS)
    store.add("avb", 0, {"evaluator": "gaps", "status": "skipped", "reason": "posterior has no density"})
    assert [repr(row.shown) + repr(row.exceeds) for row in table_of(store).rows] == before
    assert [row.shown["kl_to_prior"].evaluator for row in table_of(store).rows] == ["adversary", "elbo"]


def test_check_fills_in_where_there_is_nothing_else() -> None:
    store = Records()
    check(store, "sampler", 0.0)
    shown = row_of(store, "sampler").shown
    assert shown.keys() == {"elbo", "kl_to_prior"}
    assert (shown["elbo"].kind, shown["kl_to_prior"].kind) == (RATIO, LOWER)


@pytest.mark.parametrize("order", ["as measured", "reversed", "shuffled"])
def test_simulated_observations_have_no_table_of_their_own(order: str) -> None:
    store = several()
    records = store.records()
    if order == "reversed":
        records = records[::-1]
    if order == "shuffled":
        records = records.sample(frac=1, random_state=0)
    [table] = tables_of(records, store.examples())
    assert table.key.split == "test"
    assert [row.label for row in table.rows] == ["avb", "vae"]
    assert repr(table) == repr(table_of(store))


def test_jobs_with_simulated_observations_only() -> None:
    """Alone they are told about; beside others they are rows of the same table."""
    store = Records()
    store.gap("avb", 0, 0.3, 0.1)
    table = table_of(store)
    assert (table.key.split, table.evaluator) == ("test", "")
    assert cells_of(panel_of(store, "trusted"), "avb")["BDMC gap, simulated"].number == "0.300"
    assert "-90" not in printed(store)
    store.measure("vae", 0, "ais", "log_likelihood", store.truth("vae", 0, 0.0), settings=KERNELS)
    assert [row.label for row in table_of(store).rows] == ["avb", "vae"]


def test_simulated_log_likelihood_is_not_shown_for_the_real_one() -> None:
    store = several()
    values = store.truth("avb", 0, 50.0)
    store.measure("avb", 0, "other", "log_likelihood", values, kind="exact", split="simulated")
    assert "other" not in row_of(store, "avb").evidence
    assert table_of(store).evaluator == "ais"


# Checks of posteriors


def test_checks_show_the_five_numbers() -> None:
    store = everything()
    check(store, "avb", 0.0, fresh=-0.7, upper=-0.4, smoothed=-1.5)
    check(store, "vae", -0.5, smoothed=-9.0)
    panel = panel_of(store, "Checks")
    avb, vae = (cells_of(panel, label) for label in ("avb", "vae"))
    assert list(avb) == ["own ELBO", "fresh discriminator", "ELBO at most", "smoothed at least", "log p(x) ais"]
    assert [entry.mark for entry in avb.values()] == ["~", "~", "≲", "≳", "≳"]
    assert vae["own ELBO"].mark == "≈"
    assert (avb["smoothed at least"].flags, vae["smoothed at least"].flags) == ((), ("vacuous",))
    assert not any(entry.flags for entry in avb.values())


def test_checks_stand_beside_each_other_on_the_same_fits_and_observations() -> None:
    """log p(x) is of the 50 hardest observations and of two seeds, the rest of all 200, the checks of one seed."""
    store = everything()
    check(store, "avb", 0.0, fresh=-0.7, upper=-0.4, smoothed=-1.5)
    panel = panel_of(store, "Checks")
    entries = cells_of(panel, "avb")
    truth = store.truth("avb", 0, 0.0)[np.argsort(store.difficulty)[:50]]
    offsets = (-0.5, -0.7, -0.4, -1.5, 0.0)
    found = [float(entry.number) for entry in entries.values()]
    assert found == pytest.approx([truth.mean() + offset for offset in offsets], abs=1e-3)
    assert entries["own ELBO"].errors == ("", "0.0014", f"{truth.std(ddof=1) / np.sqrt(50):.2g}")
    assert panel.notes == [OVER_COMMON]
    plain = Records()
    check(plain, "avb", 0.0)
    plain.measure("avb", 0, "exact", "log_likelihood", plain.truth("avb", 0, 0.0), kind="exact")
    assert panel_of(plain, "Checks").notes == []


OVER_COMMON = "over 50 observations, which all of these have scored"


@pytest.mark.parametrize(
    ("offsets", "heading", "told"),
    [
        ({"fresh": 0.2}, "fresh discriminator", "ELBO of the fresh discriminator exceeds log p(x)"),
        (
            {"smoothed": 0.2, "upper": 0.3},
            "smoothed at least",
            "lower bound of the smoothed posterior exceeds log p(x)",
        ),
    ],
)
def test_what_exceeds_log_likelihood_is_flagged(offsets: dict[str, Any], heading: str, told: str) -> None:
    store = everything()
    check(store, "avb", 0.0, **offsets)
    panel = panel_of(store, "Checks")
    flagged = [name for name, entry in cells_of(panel, "avb").items() if "exceeds" in entry.flags]
    assert flagged == [heading]
    [note] = [note for note in panel.notes if "exceeds" in note]
    assert note.startswith(f"! avb: {told} as estimated by ais (itself a stochastic lower bound) (seed 0)")


def test_own_adversarial_elbo_that_exceeds_log_likelihood_is_flagged() -> None:
    store = Records()
    truth = store.truth("avb", 0, 0.0)
    store.measure("avb", 0, "exact", "log_likelihood", truth, kind="exact", stderr=0.0)
    store.measure("avb", 0, "adversary", "adversarial_elbo", truth + 0.4, kind=RATIO)
    check(store, "avb", 0.0)
    panel = panel_of(store, "Checks")
    assert cells_of(panel, "avb")["own ELBO"].flags == ("exceeds",)
    assert "! avb: own ELBO exceeds log p(x) (seed 0): a density ratio is no bound" in panel.notes
    assert any(
        "own ELBO is 0.9000 ± 0.0010 nats above the upper bound on the ELBO: its adversary was" in n
        for n in panel.notes
    )


@pytest.mark.parametrize(
    ("method", "offsets", "told"),
    [
        ("avb", {"upper": -0.8}, "its adversary was too weak, its KL is too small"),
        ("vae", {"upper": -0.8}, "above the upper bound on the ELBO: a fault in one of them"),
        ("vae", {"smoothed": -0.3, "upper": -0.2}, "below the lower bound of the smoothed posterior"),
        ("avb", {"smoothed": -0.7, "upper": -0.499}, ""),
        ("vae", {"upper": -0.501}, ""),
        ("vae", {"smoothed": -0.499}, ""),
        ("avb", {}, ""),
    ],
)
def test_own_elbo_outside_the_bounds(method: str, offsets: dict[str, Any], told: str) -> None:
    """It is 0.5 below log p(x), an error of a difference is 0.001; the smoothed one is far below unless stated."""
    store = everything()
    check(store, method, 0.0 if method == "avb" else -0.5, **{"smoothed": -2.0, **offsets})
    common, *notes = panel_of(store, "Checks").notes
    assert common == OVER_COMMON
    assert len(notes) == bool(told)
    assert all(told in note for note in notes)


def test_bounds_that_cross_say_that_smoothing_helps() -> None:
    """An implicit posterior that is nearly a point: noise makes it better, and its own adversary does not notice."""
    store = everything()
    check(store, "avb", 0.0, upper=-0.9, smoothed=-0.6)
    _, own, smoothed = panel_of(store, "Checks").notes
    assert own.startswith("! avb: own ELBO is 0.4000 ± 0.0010 nats above the upper bound on the ELBO")
    assert smoothed == "avb: smoothed, the posterior is better than as fitted, by at least 0.3000 ± 0.0010 nats"


def test_gaps_have_a_table_and_say_whose_are_missing() -> None:
    store = everything()
    kinds = {"approximation_gap": "consistent", "amortisation_gap": LOWER, "kl_to_posterior": LOWER}
    for metric, kind in kinds.items():
        store.measure("vae", 0, "gaps", metric, np.full(N, 0.25), kind=kind, settings=KERNELS)
    store.measure("vae", 0, "exact", "kl_to_posterior", np.full(N, 0.75), kind="unbiased")
    store.add("avb", 0, {"evaluator": "gaps", "status": "skipped", "reason": "posterior has no density"})
    panel = panel_of(store, "falls short")
    assert [label for label, _ in panel.lines] == ["vae"]
    assert [(e.mark, float(e.number)) for e in cells_of(panel, "vae").values()] == [
        ("→", 0.25),
        ("≳", 0.25),
        ("≳", 0.25),
    ]
    assert panel.notes == ["avb: skipped: posterior has no density"]


# Warnings


def warned(text: str = "R-hat of mu is 1.230, above 1.01: chains disagree") -> Records:
    """`nuts` is ahead of `vae` by a nat, beyond any noise; two of its three seeds carry a warning."""
    store = Records()
    for seed in range(3):
        for method, level in (("nuts", 1.0), ("vae", 0.0)):
            truth = store.truth(method, seed, level)
            store.measure(method, seed, "exact", "log_likelihood", truth, kind="exact", stderr=0.0)
        settings = {"warning": text} if seed != 1 and text else {}
        columns: dict[str, Any] = {"kind": "exact", "stderr": 0.0, "settings": settings, "unit": ""}
        store.measure("nuts", seed, "chains", "r_hat_max", np.full(2, 1.23), **columns)
        store.measure("nuts", seed, "chains", "ess_bulk_min", np.full(2, 812.0), kind="exact", stderr=0.0)
    return store


def test_a_fit_with_a_warning_is_marked_and_never_ahead(tmp_path: Path) -> None:
    store = warned()
    note = "‡ nuts: r_hat_max by chains: R-hat of mu is 1.230, above 1.01: chains disagree (seeds 0, 2)"
    assert not any(row.best for row in table_of(store).rows)
    printed = text_of(store)
    assert "nuts ‡" in printed
    assert "vae ‡" not in printed
    assert note in " ".join(printed.split())
    assert "‡ one of the fit's measurements carries a warning; never ahead of the others" in printed
    report = write_report(store, tmp_path).read_text()
    assert "| nuts ‡ (warning) |" in report
    assert note.replace("r_hat_max", "r\\_hat\\_max") in report
    [line] = [line for line in report.splitlines() if "r\\_hat\\_max | chains" in line]
    assert "| 1.23 (warning) |" in line


def test_warnings_of_other_seeds_may_have_other_numbers() -> None:
    [row] = [row for row in table_of(warned()).rows if row.label == "nuts"]
    texts = {("chains", "divergences"): {0: "diverged: 1", 1: "diverged: 3", 2: "diverged: 1"}}
    row = dataclasses.replace(row, warnings=texts)
    expected = "‡ nuts: divergences by chains: diverged: 1 (seeds 0, 2; with other numbers seed 1)"
    assert doubts.of_warnings(row) == [expected]


def test_without_a_warning_nothing_is_marked() -> None:
    store = warned(text="")
    assert [row.label for row in table_of(store).rows if row.best] == ["nuts"]
    assert "‡" not in text_of(store)


def test_chains_have_a_table() -> None:
    panel = panel_of(warned(), "Markov chains")
    assert [label for label, _ in panel.lines] == ["nuts"]
    cells = cells_of(panel, "nuts")
    assert {heading: entry.number for heading, entry in cells.items()} == {
        "largest R-hat": "1.230", "bulk, worth draws": "812", "tails, worth draws": "-", "divergences": "-",
    }  # fmt: skip
    assert cells["largest R-hat"].flags == ("warning",)
    assert cells["bulk, worth draws"].flags == ()


def test_what_no_other_table_shows_has_one_of_its_own() -> None:
    """The metrics of a plugin's evaluator, and those of ours that are no distance between draws."""
    store = everything()
    assert not any(panel.title == "Other measurements" for panel in panels(table_of(store)))
    for seed in range(3):
        store.measure("avb", seed, "mine[power=2]", "radius", np.full(N, 1.5 + seed), kind="consistent", unit="")
        store.measure("avb", seed, "exact", "kl_to_posterior", np.full(N, 0.25), kind="unbiased")
    entries = cells_of(panel_of(store, "Other measurements"), "avb")
    assert {heading: entry.number for heading, entry in entries.items()} == {
        "kl to posterior exact [nats]": "0.2500", "radius mine[power=2]": "2.5000"
    }  # fmt: skip
    assert "radius" in said(store)


def test_the_elbo_is_by_who_measured_all_and_another_is_shown_below() -> None:
    """By the more precise where several have; a column is by one of them, as far as that is to be had."""
    store = annealed({"avb": 0.0, "vae": -1.0}, {})
    for seed in range(3):
        store.measure("vae", seed, "mine", "tiny", np.linspace(1e-12, 2e-12, N), stderr=1e-14)
        for method in ("avb", "vae"):
            store.measure(method, seed, "elbo[samples=10]", "elbo", np.full(N, -92.5), stderr=1.0)
            store.measure(method, seed, "elbo[samples=500]", "elbo", np.full(N, -92.6), stderr=0.1)
        store.measure("avb", seed, "elbo[samples=999]", "elbo", np.full(N, -92.7), stderr=0.01)
    table = table_of(store)
    assert {row.shown["elbo"].evaluator for row in table.rows} == {"elbo[samples=500]"}
    entries = cells_of(panel_of(store, "Other measurements"), "avb")
    assert {heading: entry.number for heading, entry in entries.items()} == {
        "tiny mine [nats]": "-", "elbo elbo[samples=10] [nats]": "-92.500", "elbo elbo[samples=999] [nats]": "-92.7000"
    }  # fmt: skip
    assert cells_of(panel_of(store, "Other measurements"), "vae")["tiny mine [nats]"].number == "1.5e-12"


def text_of(store: Records) -> str:
    stream = io.StringIO()
    print_tables(store.records(), store.examples(), Console(file=stream, width=120))
    return stream.getvalue()


# As printed


@pytest.mark.parametrize(("width", "encoding"), [(80, "utf-8"), (100, "utf-8"), (80, "ascii"), (60, "utf-8")])
def test_tables_keep_to_the_width_and_lose_no_number(width: int, encoding: str) -> None:
    store = everything()
    for seed in range(2):
        for method, level in (("avb", 0.0), ("vae", -0.5)):
            truth = store.truth(method, seed, level)
            store.measure(method, seed, "exact", "log_likelihood", truth, kind="exact", stderr=0.0)
            check(store, method, level, seed, smoothed=-9.0)
    text = printed(store, width, encoding)
    below = text[text.index("Can log p(x)") :]
    assert max(map(len, below.splitlines())) <= width
    assert "…" not in below
    for panel in panels(table_of(store)):
        for _, entries in panel.lines:
            for entry in entries:
                for part in (entry.number, *entry.errors, *entry.flags):
                    assert part in below
    headings = [line for line in below.splitlines() if line.startswith("method  ")]
    assert len(headings) == {60: 4, 80: 3, 100: 2}[width]
    assert encoding == "utf-8" or text.isascii()


def test_long_names_of_methods_and_evaluators() -> None:
    store = Records()
    for temperatures in (50, 1000):
        label = f"ais[observations=1000,temperatures={temperatures},start=prior]"
        values = store.truth("m" * 70, 0, 0.0)
        store.measure("m" * 70, 0, label, "log_likelihood", values, settings={**KERNELS, "temperatures": temperatures})
    text = printed(store, 80)
    below = text[text.index("Can log p(x)") :]
    assert max(map(len, below.splitlines())) <= 80


def test_all_numbers_show_splits_and_nested_settings(tmp_path: Path) -> None:
    store = several()
    curve = {"1": -100.123456, "10": -98.123456, "9": -99.123456}
    settings = {"curve": curve, "list": [1.23456789, "a|b"], "long": {str(i): 1.0 for i in range(500)}}
    store.measure("vae", 0, "nested", "other", store.truth("vae", 0, 0.0), settings=settings)
    text = write_report(store, tmp_path).read_text(encoding="utf-8")
    assert "curve={1: -100.1, 9: -99.12, 10: -98.12}" in text
    assert r"list=\[1.235, a\|b\]" in text
    [line] = [line for line in text.splitlines() if "| nested |" in line]
    assert len(line) < 600
    split = [line.split(" | ")[4] for line in text.splitlines() if "| bdmc |" in line]
    assert split == ["simulated"] * 6
    assert len(re.findall(r"(?<!\\)\|", line)) == 14


# Figures


def traced() -> Records:
    """Traces of annealing and of importance draws, with the values that they end at."""
    store = everything()
    betas = np.linspace(0.02, 1, 40)
    for seed in range(2):
        for method, level in (("avb", 0.0), ("vae", -0.5)):
            truth, hard = store.truth(method, seed, level), np.argsort(store.difficulty)[:50]
            store.arrays[f"{method}-{seed}", "ais", "log_likelihood"] = {
                "temperature": betas, "running": betas[:, None] * truth[hard], "acceptance": np.full(999, 0.65),
            }  # fmt: skip
            bound = np.array([-60.0, -6.0, -1.0, -0.3])[:, None] + truth
            store.arrays[f"{method}-{seed}", "importance", "log_likelihood"] = {
                "k": np.array([1, 10, 100, 1000]), "bound": bound, "bound_stderr": np.full((4, N), 0.1),
            }  # fmt: skip
    return store


def drawn(store: Records, figure: str) -> Figure | None:
    table = table_of(store)
    return getattr(convergence, figure)(table, store, figures.colours([table]))


def test_annealing_has_boxes_over_observations_and_acceptance() -> None:
    store = traced()
    figure = drawn(store, "annealing")
    assert figure is not None
    avb, vae, acceptance = figure.axes
    assert [axes.get_title() for axes in figure.axes] == ["avb, seed 0", "vae, seed 0", "acceptance by temperature"]
    assert avb.get_ylim() == vae.get_ylim()
    assert len(avb.patches) == convergence.BOXES
    median = np.median(store.arrays["avb-0", "ais", "log_likelihood"]["running"][-1])
    lines = [np.asarray(line.get_ydata(), dtype=float) for line in avb.get_lines()]
    assert any(len(line) == 2 and np.allclose(line, median) for line in lines)
    assert [len(np.asarray(line.get_ydata())) for line in acceptance.get_lines()] == [999, 999]


def test_importance_curve_is_over_the_observations_of_the_others() -> None:
    """`ais` scored the 50 hardest only, and lies 0.3 above the curve's end on these."""
    store = traced()
    figure = drawn(store, "importance")
    assert figure is not None
    [axes] = figure.axes
    assert axes.get_xscale() == "log"
    by_label = {str(line.get_label()): np.asarray(line.get_ydata(), dtype=float) for line in axes.get_lines()}
    assert by_label["avb: ais"][0] - by_label["avb"][-1] == pytest.approx(0.3)
    hard = np.argsort(store.difficulty)[:50]
    level = np.mean([store.truth("avb", seed, 0.0)[hard].mean() for seed in range(2)])
    assert by_label["avb: ais"] == pytest.approx([level, level])
    low, high = axes.get_ylim()
    assert level - 12 < low < level - 6 < level < high  # the bound of a single draw is 60 nats below


def test_traces_in_another_order_than_the_observations() -> None:
    """Measurements keep their observations in the order in which they were scored, and so do their traces."""
    store = traced()
    expected = drawn(store, "importance")
    order = np.random.default_rng(0).permutation(N)
    for table in store.tables:
        if (table["evaluator"] == "importance").all():
            table[:] = table.iloc[order].to_numpy()
    for (_, evaluator, _), arrays in store.arrays.items():
        if evaluator == "importance":
            arrays["bound"] = arrays["bound"][:, order]
    found = drawn(store, "importance")
    assert expected is not None
    assert found is not None
    for one, other in zip(expected.axes[0].get_lines(), found.axes[0].get_lines(), strict=True):
        assert np.asarray(one.get_ydata()) == pytest.approx(np.asarray(other.get_ydata()))


def test_figures_go_without_what_is_absent_or_does_not_fit(tmp_path: Path) -> None:
    store = traced()
    report = write_report(store, tmp_path).read_text(encoding="utf-8")
    assert re.findall(r"!\[(\w+)\]", report) == ["differences", "annealing", "importance"]
    for arrays in store.arrays.values():
        arrays.pop("acceptance", None)
        if "bound" in arrays:
            arrays["bound"] = arrays["bound"][:, :7]
    assert drawn(store, "annealing") is None
    assert drawn(store, "importance") is None
    assert drawn(several(), "importance") is None


def test_differences_show_the_gap_that_they_have_to_exceed() -> None:
    store = annealed({"avb": 0.0, "vae": -0.5}, {"avb": 0.2, "vae": 0.1})
    table = table_of(store)
    figure = figures.differences(table, figures.colours([table]))
    assert figure is not None
    [axes] = figure.axes
    [band] = axes.collections
    reach = np.abs(np.asarray(band.get_paths()[0].vertices)[:, 0]).max()
    assert reach == pytest.approx(row_of(store, "avb").certificates["ais"].reach)
    plain = table_of(annealed({"avb": 0.0, "vae": -0.5}, {}))
    assert "grey" in axes.get_xlabel()
    unmarked = figures.differences(plain, figures.colours([plain]))
    assert unmarked is not None
    assert "grey" not in unmarked.axes[0].get_xlabel()

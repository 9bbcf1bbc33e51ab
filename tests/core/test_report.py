"""Tables, terminal and report from a synthetic store whose effects and errors are known."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread
from rich.console import Console

from harness.record import COLUMNS, row
from harness.report import figures, images
from harness.report.build import tables_of
from harness.report.markdown import escape, unique_slugs, write_report
from harness.report.tables import Table
from harness.report.terminal import print_tables

EXAMPLE_COLUMNS = ["job_id", "evaluator", "metric", "index", "value", "stderr"]
GAUSSIAN_KINDS = {"log_likelihood": "exact", "elbo": "unbiased", "kl_to_prior": "exact", "reconstruction": "unbiased"}
EVALUATORS = {
    "log_likelihood": "exact", "elbo": "elbo", "kl_to_prior": "elbo", "reconstruction": "reconstruction",
    "adversarial_elbo": "adversary",
}  # fmt: skip


@dataclass
class FakeStore:
    """What a report needs of a store, made of numbers instead of files."""

    seed: int = 0
    facts: list[dict[str, Any]] = field(default_factory=list)
    tables: list[pd.DataFrame] = field(default_factory=list)
    curves: dict[str, pd.DataFrame] = field(default_factory=dict)
    galleries: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.random = np.random.default_rng(self.seed)
        self.difficulty: dict[str, np.ndarray] = {}

    def records(self) -> pd.DataFrame:
        return pd.DataFrame(self.facts, columns=COLUMNS)

    def examples(self) -> pd.DataFrame:
        if not self.tables:
            return pd.DataFrame(columns=EXAMPLE_COLUMNS)
        return pd.concat(self.tables, ignore_index=True)

    def curve(self, job_id: str) -> pd.DataFrame:
        if job_id not in self.curves:
            raise FileNotFoundError(job_id)
        return self.curves[job_id]

    def gallery(self, job_id: str) -> dict[str, np.ndarray]:
        return self.galleries.get(job_id, {})

    def traces(self, job_id: str, evaluator: str, metric: str) -> dict[str, np.ndarray]:
        return {}

    def job(self, method: str, seed: int, config: Mapping[str, Any] | None = None, **columns: Any) -> dict[str, Any]:
        """The facts of a job; nothing is added yet."""
        started = len({fact["job_id"] for fact in self.facts})
        job = {
            "schema": 1, "problem": "digits", "dataset": "digits", "binarisation": "dynamic", "split": "test",
            "model": "MLPSpec(latent_dim=2)", "spec_hash": "5" * 64, "decoder_parameters": 25920, "method": method,
            "config": json.dumps(dict(config or {"lr": 1e-3}), sort_keys=True), "method_parameters": 30000,
            "plugin": "inference-harness", "plugin_version": "0.1.0", "seed": seed, "status": "ok", "reason": "",
            "fit_seconds": 12.0 + self.random.normal(0, 0.5), "fit_steps": 5000,
            "steps_per_second": 400.0 + self.random.normal(0, 9), "timing_valid": True, "shared_clock": False,
            "device": "cpu", "precision": "float32", "step_mode": "eager", "hardware": "A processor, 2 logical cores",
            "threads": 1, "torch_version": "2.13.0", "git_commit": "a" * 40, "git_dirty": False,
            "started_at": f"2025-01-01T00:{started // 60:02d}:{started % 60:02d}+00:00", "budget": "steps=5000",
        }  # fmt: skip
        job |= columns
        job.setdefault("job_id", f"{started:016x}")
        return job

    def add(self, job: Mapping[str, Any], measurement: Mapping[str, Any] | None = None) -> None:
        self.facts.append(row(job, measurement))

    def measure(
        self, job: Mapping[str, Any], metric: str, values: np.ndarray, stderr: float = 0.0, **columns: Any
    ) -> None:
        """Add a measurement with its values per observation."""
        n = len(values)
        evaluator = columns.setdefault("evaluator", EVALUATORS[metric])
        measurement = {
            "metric": metric, "value": float(values.mean()), "kind": GAUSSIAN_KINDS.get(metric, "density ratio"),
            "bounds": "", "unit": "nats", "stderr": stderr / np.sqrt(n),
            "stderr_test": float(values.std(ddof=1) / np.sqrt(n)) if n > 1 else None, "n_observations": n,
            "settings": "{}",
        }  # fmt: skip
        self.add(job, {**measurement, **columns})
        columns_of = {"job_id": job["job_id"], "evaluator": evaluator, "metric": metric}
        self.tables.append(pd.DataFrame({**columns_of, "index": np.arange(n), "value": values, "stderr": stderr}))

    def fit(
        self, method: str, seed: int, log_likelihood: float, *, ratio: bool = False, n: int = 200, noise: float = 0.3,
        **columns: Any,
    ) -> str:  # fmt: skip
        """A fit that is measured in every way; observations differ much in difficulty, methods little."""
        job = self.job(method, seed, columns.pop("config", None), **columns)
        difficulty = self.difficulty.setdefault(job["problem"], self.random.normal(0, 8, n))
        values = log_likelihood + difficulty - difficulty.mean() + self.random.normal(0, noise, n)
        gap = np.full(n, -0.4 if ratio else 0.6)
        self.measure(job, "log_likelihood", values)
        if ratio:
            self.add(job, {"evaluator": "elbo", "status": "skipped", "reason": "the posterior has no density"})
            self.measure(job, "adversarial_elbo", values - gap, 0.05)
            self.measure(job, "kl_to_prior", 5 + 0 * values, 0.05, kind="density ratio", evaluator="adversary")
        else:
            self.measure(job, "elbo", values - gap, 0.05, bounds="stochastic lower bound on log_likelihood")
            self.measure(job, "kl_to_prior", 5.5 + 0 * values)
        self.measure(job, "reconstruction", -values - 5, 0.05)
        self._show(job["job_id"], log_likelihood)
        return job["job_id"]

    def _show(self, job_id: str, log_likelihood: float) -> None:
        steps = np.arange(50, 5001, 50)
        objective = -log_likelihood + 40 * np.exp(-steps / 300) + self.random.normal(0, 0.3, len(steps))
        validation = np.where(steps % 250 == 0, objective - 0.5, np.nan)
        self.curves[job_id] = pd.DataFrame(
            {"step": steps, "seconds": steps / 400, "objective": objective, "validation": validation}
        )
        label = np.repeat(np.arange(10), 100)
        angle = 2 * np.pi * label / 10
        centre = 1.2 * np.stack([np.cos(angle), np.sin(angle)], axis=1)
        images = self.random.random((64, 8, 8))
        self.galleries[job_id] = {
            "latent": centre + self.random.normal(0, 0.3, centre.shape),
            "latent_label": label,
            "samples": images,
            "observed": (images[:10] > 0.5).astype(float),
            "reconstructed": images[:10],
        }


def table_of(store: FakeStore) -> Table:
    [table] = tables_of(store.records(), store.examples())
    return table


def printed(store: FakeStore, width: int = 100, encoding: str = "utf-8") -> str:
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    print_tables(store.records(), store.examples(), Console(file=stream, width=width))
    stream.seek(0)
    return stream.read()


def two_methods(seeds: int = 3, gap: float = 0.5, **columns: Any) -> FakeStore:
    """AVB ahead of the VAE by ``gap`` nats."""
    store = FakeStore()
    for seed in range(seeds):
        store.fit("avb", seed, -22.5 + 0.02 * seed, ratio=True, **columns)
        store.fit("vae", seed, -22.5 - gap + 0.02 * seed, **columns)
    return store


# Tables


def test_injected_effect_is_found_and_marked() -> None:
    """Observations differ by 8 nats, noise per observation is 0.3: the error of the difference is about 0.02."""
    avb, vae = table_of(two_methods(gap=0.5)).rows
    assert vae.difference is not None
    assert vae.difference.value == pytest.approx(-0.5, abs=4 * vae.difference.stderr)
    assert 0.005 < vae.difference.stderr < 0.05
    assert (avb.best, vae.best, avb.difference) == (True, False, None)
    assert [row.best for row in table_of(two_methods(gap=-0.5)).rows] == [False, True]
    assert [row.best for row in table_of(two_methods(gap=0.0)).rows] == [False, False]


def test_order_of_records_does_not_matter() -> None:
    store = two_methods()
    store.fit("avb", 0, -22.9, ratio=True, config={"lr": 1e-4})
    records, examples = store.records(), store.examples()
    expected = repr(tables_of(records, examples))
    for seed in range(3):
        shuffled = tables_of(records.sample(frac=1, random_state=seed), examples.sample(frac=1, random_state=seed))
        assert repr(shuffled) == expected


def test_another_method_changes_no_other_row() -> None:
    """The newcomer is worst, so that it takes no mark away either."""
    store = two_methods()
    before = [repr(row) for row in table_of(store).rows]
    for seed in range(3):
        store.fit("iaf", seed, -25)
    after = table_of(store).rows
    assert [repr(row) for row in after[:2]] == before
    assert after[2].label == "iaf"


def test_plan_decides_which_method_is_first() -> None:
    store = two_methods()
    jobs = {fact["method"]: fact["job_id"] for fact in store.facts}
    [started] = tables_of(store.records(), store.examples())
    [planned] = tables_of(store.records(), store.examples(), [jobs["vae"], jobs["avb"]])
    assert [row.label for row in started.rows] == ["avb", "vae"]
    assert [row.label for row in planned.rows] == ["vae", "avb"]
    assert planned.rows[1].difference is not None
    assert started.rows[1].difference is not None
    assert planned.rows[1].difference.value == pytest.approx(-started.rows[1].difference.value)


def test_labels_show_the_options_that_differ() -> None:
    store = FakeStore()
    store.fit("avb", 0, -22, config={"lr": 1e-3, "noise_dim": 32})
    store.fit("avb", 0, -23, config={"lr": 1e-4, "noise_dim": 32})
    store.fit("vae", 0, -23, config={"lr": 5e-4})
    assert [row.label for row in table_of(store).rows] == ["avb[lr=0.001]", "avb[lr=0.0001]", "vae"]


def test_density_ratio_is_never_best() -> None:
    """Neither as a bound, however large, nor as a log-likelihood."""
    store = FakeStore()
    for seed in range(5):
        for method, value in (("avb", -10.0), ("vae", -20.0)):
            store.measure(store.job(method, seed), "log_likelihood", value + np.arange(50.0), kind="density ratio")
    assert not any(row.best for row in table_of(store).rows)
    worse = two_methods(seeds=5, gap=-0.2)
    avb, vae = table_of(worse).rows
    assert avb.shown["elbo"].value > vae.shown["log_likelihood"].value > vae.shown["elbo"].value
    assert (avb.shown["elbo"].kind, avb.best, vae.best) == ("density ratio", False, True)


@pytest.mark.parametrize(("kind", "ranked"), [("stochastic lower bound", True), ("unbiased", False)])
def test_kinds_that_differ_are_not_ranked(kind: str, ranked: bool) -> None:
    store = FakeStore()
    random = np.random.default_rng(0)
    for seed in range(5):
        for method, value, its_kind in (("avb", -10, "stochastic lower bound"), ("vae", -20, kind)):
            values = value + random.normal(0, 1, 50)
            store.measure(store.job(method, seed), "log_likelihood", values, evaluator="importance", kind=its_kind)
    assert [row.best for row in table_of(store).rows] == [ranked, False]


def test_one_seed_is_flagged_and_not_ranked() -> None:
    store = two_methods(seeds=1, gap=5)
    assert not any(row.best for row in table_of(store).rows)
    text = printed(store)
    assert re.search(r"±0\.\d+°", text)
    assert "° one seed: the spread over seeds is unknown" in text


def test_leader_with_a_failed_seed_is_not_best() -> None:
    store = two_methods(gap=0.5)
    assert table_of(store).rows[0].best
    store.add(store.job("avb", 3, status="diverged", reason="objective is nan"))
    avb, vae = table_of(store).rows
    assert (avb.best, vae.best) == (False, False)
    assert (len(avb.jobs), len(avb.statuses)) == (3, 4)


def test_estimator_is_the_one_that_all_methods_have() -> None:
    store = FakeStore()
    for seed in range(3):
        job = store.job("vae", seed)
        store.measure(job, "log_likelihood", -22 + np.arange(9.0))
        store.measure(
            job, "log_likelihood", -22.1 + np.arange(9.0), evaluator="importance", kind="stochastic lower bound"
        )
        job = store.job("iaf", seed)
        store.add(job, {"evaluator": "exact", "status": "skipped", "reason": "latent space has 8 dimensions"})
        store.measure(
            job, "log_likelihood", -23 + np.arange(9.0), evaluator="importance", kind="stochastic lower bound"
        )
    table = table_of(store)
    assert table.evaluator == "importance"
    assert [row.shown["log_likelihood"].value for row in table.rows] == pytest.approx([-18.1, -19])


def test_method_without_the_estimator_says_why() -> None:
    store = two_methods()
    store.add(store.job("gan", 0), {"evaluator": "exact", "status": "skipped", "reason": "no likelihood at all"})
    text = printed(store)
    assert "gan, exact: skipped (seed 0): no likelihood at all" in text
    assert "log_likelihood" not in table_of(store).rows[2].shown


@pytest.mark.parametrize("column", ["binarisation", "spec_hash", "budget", "precision", "device", "step_mode"])
def test_what_may_not_be_compared_is_in_another_table(column: str) -> None:
    store = two_methods()
    other: dict[str, Any] = {column: "other"}
    for seed in range(3):
        store.fit("iaf", seed, -20, **other)
    first, second = tables_of(store.records(), store.examples())
    assert [[row.label for row in table.rows] for table in (first, second)] == [["avb", "vae"], ["iaf"]]
    assert first.rows[0].best
    assert not second.rows[0].best
    redefined = "this problem has 2 definitions among these records"
    assert (redefined in printed(store, width=200)) == (column == "spec_hash")


def test_timing_comes_from_valid_rows_only() -> None:
    store = FakeStore()
    store.fit("avb", 0, -22, fit_seconds=10.0, steps_per_second=500.0)
    store.fit("avb", 1, -22, fit_seconds=99.0, steps_per_second=5.0, timing_valid=False)
    store.fit("vae", 0, -22, timing_valid=False)
    avb, vae = table_of(store).rows
    assert avb.fit_seconds is not None
    assert (avb.fit_seconds.value, avb.fit_seconds.seeds) == (10.0, 1)
    assert (vae.fit_seconds, vae.steps_per_second) == (None, None)
    said = "no seconds of avb (seed 1), vae: others ran beside their fits, or these went on under other"
    assert said in printed(store, width=200)


def test_other_programs_that_kept_cores_busy_are_told_of() -> None:
    store = FakeStore()
    store.fit("avb", 0, -22, busy_elsewhere=0.31)
    store.fit("avb", 1, -22, busy_elsewhere=0.12)
    store.fit("vae", 0, -22, busy_elsewhere=0.02)
    store.fit("iaf", 0, -22, busy_elsewhere=0.9, timing_valid=False)  # of which no seconds are shown
    avb, vae, iaf = sorted(table_of(store).rows, key=lambda row: ("avb", "vae", "iaf").index(row.label))
    assert (avb.busy, vae.busy, iaf.busy) == ({0: 0.31, 1: 0.12}, {}, {})
    assert "seconds may be long for that: avb 31 %\n" in printed(store, width=200)


def test_fits_that_shared_a_clock_have_no_time_of_their_own() -> None:
    store = FakeStore()
    for seed in (0, 1):
        store.fit("avb", seed, -22, fit_seconds=12.34, timing_valid=False, shared_clock=True)
    store.fit("avb", 2, -22, fit_seconds=5.0, timing_valid=False, shared_clock=True)
    store.fit("vae", 0, -22, fit_seconds=10.0)
    avb, vae = table_of(store).rows
    assert avb.fit_seconds is None
    assert (avb.together, vae.together) == ([5.0, 12.34], [])
    text = printed(store, width=160)
    assert "avb: fitted at once with others, on one clock: 17.3 s for all" in text
    assert text.count("on one clock") == 1


def test_stale_fits_are_left_out_and_mixtures_are_told() -> None:
    store = two_methods(seeds=2)
    store.fit("vae", 0, -99, torch_version="2.14.0", git_commit="b" * 40)
    table = table_of(store)
    assert table.left_out == 1
    assert table.rows[1].shown["log_likelihood"].value < -50  # the newer fit counts, not the better one
    assert [row.label for row in table.rows] == ["avb", "vae"]
    text = printed(store, width=160)
    assert "left out: older fits of the same runs (1)" in text
    assert "mixed torch version: 2.13.0 (avb, vae); 2.14.0 (vae)" in text
    assert "mixed git commit: aaaaaaaaa (avb, vae); bbbbbbbbb (vae)" in text


def test_excess_is_told_seed_by_seed() -> None:
    store = FakeStore()
    for seed, excess in enumerate([0.5, -0.5, 0.5]):
        job = store.job("avb", seed)
        values = -22 + np.arange(100.0)
        store.measure(job, "log_likelihood", values)
        store.measure(job, "adversarial_elbo", values + excess, 0.1)
    assert list(table_of(store).rows[0].exceeds) == [0, 2]
    assert "! avb: ELBO (density ratio: no bound) exceeds log p(x) (seeds 0, 2)" in printed(store)


# Terminal


def failing() -> FakeStore:
    store = two_methods()
    store.add(store.job("avb", 3, status="diverged", reason="objective is nan at or before step 300"))
    for seed in range(3):
        store.add(store.job("nuts", seed, status="failed", reason=f"ValueError: [bold]seed[/bold]\x1b[31m {seed}\nx"))
        store.add(store.job("gan", seed, status="skipped", reason="needs | a pipe <b>"))
    store.add(store.job("slow", 0, status="timeout", reason="longer than 60 seconds"))
    return store


@pytest.mark.parametrize("width", [80, 100])
def test_terminal_shows_every_number_within_the_width(width: int) -> None:
    store = two_methods()
    text = printed(store, width)
    assert max(map(len, text.splitlines())) <= width
    for row_of_table in table_of(store).rows:
        for column in ("log_likelihood", "elbo", "kl_to_prior", "reconstruction"):
            assert f"{row_of_table.shown[column].value:.2f}"[:-1] in text
    for sign in ("= exact", "≈ unbiased", "~ density ratio (no bound, never ranked)", "avb *", "first", "3 seeds"):
        assert sign in text


def test_failures_stay_visible() -> None:
    text = printed(failing(), width=200)
    assert "3 of 4 ok" in text
    assert "avb: diverged (seed 3): objective is nan at or before step 300" in text
    assert "nuts: failed (seed 2): ValueError: [bold]seed[/bold] [31m 2 x" in text
    assert "gan: skipped (seeds 0, 1, 2): needs | a pipe <b>" in text
    assert "slow: timeout (seed 0): longer than 60 seconds" in text
    assert "\x1b" not in text


def test_brackets_are_printed_as_they_are() -> None:
    store = FakeStore()
    for lr in (1e-3, 1e-4):
        store.fit("avb", 0, -22, config={"lr": lr}, problem="digits[latent_dim=2]")
    text = printed(store)
    assert "digits[latent_dim=2]" in text
    assert "avb[lr=0.001]" in text


def test_terminal_without_unicode() -> None:
    text = printed(failing(), encoding="ascii")
    assert text.isascii()
    assert "+-" in text


def test_one_method_only() -> None:
    store = FakeStore()
    store.fit("vae", 0, -22.0)
    text = printed(store)
    assert "-22.0" in text
    assert "paired" not in text


def test_nothing_to_show() -> None:
    assert "nats" in printed(FakeStore())


# Report


def test_report_holds_tables_figures_and_failures(tmp_path: Path) -> None:
    path = write_report(failing(), tmp_path / "report")
    text = path.read_text(encoding="utf-8")
    shown = re.findall(r"!\[\w+\]\((.+?)\)", text)
    assert shown == [
        f"figures/digits-{kind}.png" for kind in ("differences", "curves", "latent", "samples", "reconstructions")
    ]
    for name in shown:
        assert imread(path.parent / name).shape[0] > 100
    for expected in (
        "(exceeds log p(x))", "objective is nan at or before step 300", r"needs \| a pipe &lt;b&gt;",
        "A processor, 2 logical cores", "2.13.0", "a" * 40, "stochastic lower bound on log", "30,000", "25,920",
        "--methods 'avb[lr=0.001],", "--budget steps=5000", "--seeds 0,1,2,3",
    ):  # fmt: skip
        assert expected in text
    assert "**" not in text  # one of the leader's seeds diverged


def test_markdown_tables_keep_their_columns(tmp_path: Path) -> None:
    """Whatever names and reasons hold, each line of a table has as many cells as its header."""
    store = FakeStore()
    for seed in range(2):
        store.fit("a|b*c_<i>", seed, -22, problem="../../etc|x`y`", config={"note": "p|q $x$ [z](http://e)"})
        store.fit("_hidden$", seed, -23, problem="../../etc|x`y`")
        store.add(store.job("bad", seed, problem="../../etc|x`y`", status="failed", reason="a|b\nc \\ | d"))
    path = write_report(store, tmp_path / "report")
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    columns = 0
    for line, after in zip(lines, [*lines[1:], ""], strict=True):
        cells = len(re.findall(r"(?<!\\)(?:\\\\)*\|", line)) - 1
        columns = cells if re.match(r"[| :-]+$", after) else columns
        assert cells == columns, line
    files = [found.relative_to(tmp_path).as_posix() for found in tmp_path.rglob("*") if found.is_file()]
    assert all(re.fullmatch(r"report/(report\.md|figures/[a-z0-9-]+\.png)", name) for name in files)
    assert len(files) == 6


def test_report_goes_without_what_is_absent(tmp_path: Path) -> None:
    store = two_methods()
    store.curves.clear()
    store.galleries.clear()
    text = write_report(store, tmp_path).read_text(encoding="utf-8")
    assert re.findall(r"!\[(\w+)\]", text) == ["differences"]
    assert text == write_report(store, tmp_path).read_text(encoding="utf-8")


def test_names_of_files_are_safe_and_different() -> None:
    names = unique_slugs(["../../x", "x", "X!", "é", "", "digits[latent_dim=2]", "y" * 300, "y" * 301])
    assert names[:6] == ["x", "x-2", "x-3", "problem", "problem-2", "digits-latent-dim-2"]
    assert len(set(names)) == len(names)
    assert max(map(len, names)) < 70


def test_escaped_text_is_one_harmless_line() -> None:
    assert escape("a|b\n<b> *c* `d` [e](f) ~g~ $h$") == (r"a\|b &lt;b&gt; \*c\* \`d\` \[e\](f) \~g\~ \$h\$")


# Figures


def lines_of(figure: Figure, color: str) -> int:
    return sum(line.get_color() == color for axes in figure.axes for line in axes.get_lines())


def test_a_method_has_one_colour_everywhere() -> None:
    store = two_methods()
    store.fit("iaf", 0, -23, problem="four-points")
    store.fit("vae", 0, -23, problem="four-points")
    built = tables_of(store.records(), store.examples())
    colour = figures.colours(built)
    assert len(set(colour.values())) == 3
    first, second = (figures.curves(table, store, colour) for table in built)
    assert first is not None
    assert second is not None
    assert lines_of(first, colour["vae"]) == 2 * (3 + 2)  # two panels: three seeds, their mean and its end
    assert lines_of(second, colour["vae"]) == 2 * 2
    assert lines_of(second, colour["avb"]) == 0


def test_curves_are_readable_despite_their_start_and_spikes() -> None:
    """The first values are 40 nats above the last, and one check is off by 10,000."""
    store = two_methods()
    for curve in store.curves.values():
        curve.loc[curve["step"] == 4000, "validation"] += 1e4
    [table] = tables_of(store.records(), store.examples())
    figure = figures.curves(table, store, figures.colours([table]))
    assert figure is not None
    low, high = figure.axes[0].get_ylim()
    assert 20 < low < 22.5
    assert 23 < high < 40


def test_latent_panels_have_equal_axes() -> None:
    store = two_methods(seeds=1)
    wide = store.galleries[store.facts[0]["job_id"]]
    wide["latent"] = 3 * wide["latent"]
    [table] = tables_of(store.records(), store.examples())
    figure = images.latent(images.galleries(table, store))
    assert figure is not None
    limits = {(*axes.get_xlim(), *axes.get_ylim()) for axes in figure.axes}
    assert len(limits) == 1
    assert [axes.get_aspect() for axes in figure.axes] == [1.0, 1.0]
    assert [axes.get_title() for axes in figure.axes] == ["avb, seed 0", "vae, seed 0"]


def test_neither_torch_nor_pyplot_is_imported() -> None:
    code = (
        "import sys, harness.report.terminal, harness.report.markdown; assert 'matplotlib' not in sys.modules\n"
        "import harness.report.images; assert not {'torch', 'matplotlib.pyplot'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_a_lost_seed_counts_in_the_table_that_it_is_missing_from() -> None:
    """What diverged has no split of its own: measured on validation images, the others would look whole."""
    store = two_methods(split="validation")
    store.add(store.job("avb", 3, status="diverged", reason="objective is nan"))
    store.fit("vae", 3, -23.0, split="validation")
    avb, _ = table_of(store).rows
    assert (avb.statuses[3], avb.best) == ("diverged", False)
    failed = two_methods(split="validation")
    failed.fit("vae", 3, -23.0, split="validation")
    job = failed.job("avb", 3)
    failed.add(job, {"evaluator": "exact", "status": "failed", "reason": "no luck"})
    failed.measure(job, "reconstruction", np.full(200, 20.0))  # on test images
    validation, test = sorted(tables_of(failed.records(), failed.examples()), key=lambda table: -len(table.rows))
    assert (validation.key.split, test.key.split) == ("validation", "test")
    assert [(row.label, row.best) for row in validation.rows] == [("avb", False), ("vae", False)]
    assert [issue.seed for issue in validation.rows[0].issues if issue.status == "failed"] == [3]


def test_seeds_fitted_by_different_sources_are_told_and_not_ranked() -> None:
    store = two_methods(sources={"avb": "1"})
    assert [row.best for row in table_of(store).rows] == [True, False]
    store.fit("avb", 3, -22.5, ratio=True, sources={"avb": "2"})
    store.fit("vae", 3, -23.0, sources={"avb": "1"})
    table = table_of(store)
    assert [row.best for row in table.rows] == [False, False]
    assert table.mixed["sources"] == {"seeds 0, 1, 2": ["avb"], "seed 3": ["avb"]}
    assert "mixed sources: seeds 0, 1, 2 (avb); seed 3 (avb)" in printed(store)


def test_one_observation_decides_nothing() -> None:
    """It has no spread: nobody can be ahead beyond a noise that is not known."""
    assert [row.best for row in table_of(two_methods(gap=50.0, n=1)).rows] == [False, False]


@pytest.mark.parametrize(
    ("columns", "words"),
    [({"step_mode": "compile"}, "--step compile"), ({"step_mode": "vectorised auto"}, "--vectorize-seeds"),
     ({"step_mode": "vectorised eager"}, "--vectorize-seeds --step eager"),
     ({"step_mode": "auto", "plugin": "file mine.py", "plugin_version": ""}, "--plugin mine.py")],
)  # fmt: skip
def test_the_command_that_repeats_asks_for_the_same_jobs(columns: dict[str, Any], words: str, tmp_path: Path) -> None:
    store = two_methods(**columns)
    text = write_report(store, tmp_path).read_text(encoding="utf-8")
    [command] = [line for line in text.splitlines() if line.startswith("    harness compare")]
    assert command.endswith(f" {words}")


def test_labels_that_are_cut_to_the_same_text_are_told_apart_in_figures() -> None:
    long = "avb[" + 70 * "x"
    names = figures.distinct([long + "1]", "vae", long + "2]", long + "3]", "vae"])
    assert list(names.values())[1] == "vae"
    assert len(set(names.values())) == 4
    assert [name.partition("#")[2] for name in names.values()] == ["", "", "2", "3"]


def test_bits_per_dimension_are_of_what_is_discrete() -> None:
    job = {"event_shape": [8, 8], "binarisation": "dynamic"}
    measured = {"metric": "log_likelihood", "value": -64 * np.log(2)}
    assert row(job, measured)["bits_per_dim"] == pytest.approx(1)
    assert row({**job, "binarisation": "none"}, measured)["bits_per_dim"] is None  # it depends on the data's unit

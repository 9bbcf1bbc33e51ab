"""Verdicts, tables, figures and summary of an experiment from made-up results whose effects and errors are known."""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.contour import ContourSet

from harness.experiment import (
    Column,
    Contents,
    Contrast,
    Differences,
    LatentPlanes,
    Line,
    Marginals,
    Progression,
    Reported,
    Suite,
    Tabulated,
)
from harness.record import COLUMNS, row
from harness.report.experiment import SUMMARY, write
from harness.report.grids import Grid, grids, summary
from harness.report.marginals import marginals
from harness.report.progression import points, progression
from harness.report.reproduced import Ran, Results, outcome

N = 50


@dataclasses.dataclass
class Made:
    """A suite with its store, made of numbers."""

    name: str = "steps"
    budget: str = "steps=100"
    runs: dict[str, None] = dataclasses.field(default_factory=dict)
    facts: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    tables: list[pd.DataFrame] = dataclasses.field(default_factory=list)
    galleries: dict[str, dict[str, np.ndarray]] = dataclasses.field(default_factory=dict)

    def job(self, run: str, seed: int, **columns: Any) -> dict[str, Any]:
        self.runs[run] = None
        return {
            "job_id": f"{self.name}-{run}-{seed}", "problem": "digits", "split": "test", "spec_hash": "5",
            "method": run, "config": json.dumps({"lr": 1e-3}), "plugin": "plug-in", "plugin_version": "1", "seed": seed,
            "status": "ok", "reason": "", "fit_seconds": 2.0 + seed, "fit_steps": 100, "timing_valid": True,
            "device": "cpu", "precision": "float32", "step_mode": "eager", "hardware": "A processor", "threads": 1,
            "torch_version": "2.13.0", "git_commit": "a", "started_at": f"2025-01-01T00:00:{seed:02d}",
            "budget": "steps=100", "run": run, "suite": self.name, **columns,
        }  # fmt: skip

    def add(self, job: Mapping[str, Any], measurement: Mapping[str, Any] | None = None) -> None:
        self.facts.append({**row(job, measurement), "run": job["run"], "suite": job["suite"]})

    def measure(
        self, run: str, seed: int, values: np.ndarray, metric: str = "log_likelihood", stderr: float = 0.0,
        job: Mapping[str, Any] | None = None, **columns: Any,
    ) -> None:  # fmt: skip
        job = self.job(run, seed) | dict(job or {})
        n = len(values)
        measurement = {
            "metric": metric, "evaluator": "exact", "value": float(values.mean()), "kind": "exact", "unit": "nats",
            "stderr": stderr / n**0.5, "stderr_test": float(values.std(ddof=1) / n**0.5) if n > 1 else 0.0,
            "n_observations": n, "settings": "{}", "status": "ok", **columns,
        }  # fmt: skip
        self.add(job, measurement)
        keys = {"job_id": job["job_id"], "evaluator": measurement["evaluator"], "metric": metric}
        self.tables.append(pd.DataFrame({**keys, "index": np.arange(n), "value": values, "stderr": stderr}))

    def records(self) -> pd.DataFrame:
        return pd.DataFrame(self.facts, columns=[*COLUMNS, "suite", "run"])

    def examples(self) -> pd.DataFrame:
        return pd.concat(self.tables, ignore_index=True)

    def curve(self, job_id: str) -> pd.DataFrame:
        raise FileNotFoundError(job_id)

    def gallery(self, job_id: str) -> Mapping[str, np.ndarray]:
        return self.galleries[job_id]

    def traces(self, job_id: str, evaluator: str, metric: str) -> Mapping[str, np.ndarray]:
        return {}

    def ran(self) -> Ran:
        methods = {run: run for run in self.runs}
        suite = Suite(name=self.name, problem="digits", methods=methods, evaluators="exact", budget=self.budget)
        return Ran(suite=suite, records=self.records(), store=self)


AVB, VAE = (Line(label=run.upper(), suite="steps", run=run) for run in ("avb", "vae"))
STATEMENT = "AVB has the higher log p(x)"
CONTRAST = Contrast(statement=STATEMENT, first=AVB, second=VAE)


def two_runs(gap: float, seeds: int = 3, **columns: Any) -> Made:
    """log p(x) of two runs, ``gap`` apart; observations differ by 8 nats, seeds by 0.02, and each run's own by 0.3."""
    random, made = np.random.default_rng(0), Made()
    difficulty = random.normal(0, 8, N)
    for seed in range(seeds):
        for run, mean in (("avb", -22.0 + gap), ("vae", -22.0)):
            values = mean + difficulty + random.normal(0, 0.02) + random.normal(0, 0.3, N)
            made.measure(run, seed, values, **columns)
    return made


def results(*made: Made, contents: Contents | None = None) -> Results:
    default = Contents(tables=[TABLE], contrasts=[CONTRAST])
    return Results(
        title="an-experiment",
        repeat="harness reproduce x",
        contents=contents or default,
        ran={each.name: each.ran() for each in made},
        versions={"torch": ["2.13.0"]},
    )


TABLE = Tabulated(
    title="Table 1",
    columns=[
        Column(heading="log p(x)", metrics=("log_likelihood",)),
        Column(heading="ELBO", metrics=("elbo", "adversarial_elbo")),
    ],
    lines=[AVB, Reported(label="AVB", figures={"log p(x)": "-91.2 ± 0.6"}, source="a paper, recalled"), VAE],
)


def verdict(*made: Made, contrast: Contrast = CONTRAST) -> str:
    return outcome(contrast, results(*made)).verdict


def cells(grid: Grid, line: str) -> list[str]:
    [found] = [list(cells) for i, cells in enumerate(grid.lines) if cells[0] == line and i not in grid.apart]
    return found


# Verdicts


@pytest.mark.parametrize(
    ("gap", "expected"),
    [
        (1.0, "observed"),
        (-1.0, "the opposite is observed"),
        (0.0, "not observed at this scale, within the noise"),
    ],
)
def test_a_verdict_follows_from_the_interval(gap: float, expected: str) -> None:
    """The standard error is about 0.06; with t for three seeds the margin stays below 0.3."""
    assert verdict(two_runs(gap)) == expected


def test_the_difference_is_paired_and_its_numbers_are_in_the_sentence_and_the_table() -> None:
    """Unpaired, the images' spread of 8 nats would leave an error of 1.6."""
    found = outcome(CONTRAST, results(two_runs(1.0)))
    assert found.difference is not None
    assert found.difference.value == pytest.approx(1.0, abs=5 * found.difference.stderr)
    assert found.difference.stderr < 0.1
    [_, paired, *_] = grids(results(two_runs(1.0)))
    assert cells(paired, STATEMENT)[-1] == "observed"
    assert float(cells(paired, STATEMENT)[1].split()[0]) == pytest.approx(found.difference.value, abs=0.01)


def test_one_seed_decides_nothing() -> None:
    assert verdict(two_runs(5.0, seeds=1)) == "undecided: one seed"


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({}, ""),
        ({"timing_valid": False}, "not every fit of avb (steps) had its seconds for itself, on one machine"),
        ({"threads": 2}, "fits of so many seconds have other threads"),
        ({"hardware": "Another"}, "fits of so many seconds have other hardware"),
    ],
)
def test_seconds_on_other_clocks_are_no_equal_budget(changed: dict[str, Any], why: str) -> None:
    made = two_runs(1.0)
    for facts in made.facts:
        facts.update(changed if facts["run"] == "avb" else {})
    assert verdict(made) == "observed"  # at equal steps they are
    made.budget = "seconds=10"
    assert verdict(made) == (f"undecided: {why}" if why else "observed")


def test_density_ratios_and_numbers_of_different_kinds_are_not_compared() -> None:
    assert "density ratio are not compared" in verdict(two_runs(5.0, kind="density ratio"))
    made = two_runs(5.0)
    for fact in made.facts:
        fact["kind"] = "exact" if fact["run"] == "avb" else "stochastic lower bound"
    assert "exact and stochastic lower bound are not compared" in verdict(made)


def test_the_looser_of_two_lower_bounds_on_a_divergence_is_not_the_better() -> None:
    contrast = dataclasses.replace(CONTRAST, metrics=("kl_to_posterior",))
    assert verdict(two_runs(5.0, metric="kl_to_posterior", kind="consistent"), contrast=contrast) == "observed"
    made = two_runs(5.0, metric="kl_to_posterior", kind="stochastic lower bound")
    assert "of which the looser one looks better" in verdict(made, contrast=contrast)
    of_elbo = dataclasses.replace(CONTRAST, metrics=("elbo",))
    assert verdict(two_runs(5.0, metric="elbo", kind="stochastic lower bound"), contrast=of_elbo) == "observed"


def annealed(gap: float, bdmc_gap: float) -> Made:
    """log p(x) by annealing, and its certificate on simulated observations, of the same size for both runs."""
    settings = json.dumps({"temperatures": 100, "threshold": 1.0})
    made = two_runs(gap, evaluator="ais", kind="stochastic lower bound", settings=settings)
    for run in ("avb", "vae"):
        for seed in range(3):
            made.measure(
                run, seed, np.full(N, bdmc_gap) + 0.01 * np.arange(N), metric="bdmc_gap", evaluator="bdmc",
                kind="stochastic upper bound", split="simulated", settings=settings,
            )  # fmt: skip
    return made


def test_no_difference_below_the_certified_gap_is_called_observed() -> None:
    assert verdict(annealed(0.8, bdmc_gap=0.1)) == "observed"
    assert verdict(annealed(0.8, bdmc_gap=0.6)) == "not observed at this scale, within the certified gap"
    assert "is untrusted" in verdict(annealed(9.0, bdmc_gap=1.5))


def test_certificates_that_failed_for_both_decide_nothing() -> None:
    settings = json.dumps({"temperatures": 100})
    made = two_runs(5.0, evaluator="ais", kind="stochastic lower bound", settings=settings)
    assert verdict(made) == "observed"  # nobody asked for a certificate
    for run in ("avb", "vae"):
        made.add(made.job(run, 0), {"evaluator": "bdmc", "status": "skipped", "reason": "cannot simulate"})
    assert verdict(made) == "observed"
    for run in ("avb", "vae"):
        made.add(made.job(run, 1), {"evaluator": "bdmc", "status": "failed", "reason": "not finite"})
    assert verdict(made) == "undecided: how far the estimator may be off is not known"


@pytest.mark.parametrize("run", ["avb", "vae"])
def test_a_run_that_lost_a_seed_decides_nothing(run: str) -> None:
    """Whichever it is: the seeds that are left may be the lucky ones."""
    made = two_runs(1.0)
    made.add(made.job(run, 3, status="diverged", reason="objective is nan"))
    assert verdict(made).startswith(f"undecided: not every seed of {run} (steps)")


def test_a_fit_with_a_warning_decides_nothing_and_is_marked() -> None:
    made = two_runs(1.0)
    settings = json.dumps({"warning": "chains disagree"})
    made.measure("vae", 1, np.array([1.7]), metric="r_hat_max", evaluator="chains", settings=settings, unit="")
    assert verdict(made) == "undecided: a measurement of vae (steps) carries a warning"
    [table, *_] = grids(results(made))
    assert "VAE ‡" in [line[0] for line in table.lines]
    assert any("chains disagree" in note for note in table.notes)


def test_no_difference_below_the_floor_of_an_estimator_is_called_observed() -> None:
    def kl(floor: float) -> Made:
        made = Made()
        for seed in range(3):
            for run, value in (("avb", 1.5), ("vae", 1.0)):
                noise = 0.01 * seed * (1 if run == "avb" else -1)
                made.measure(run, seed, np.array([value + noise]), metric="kl_to_posterior", kind="consistent")
                made.measure(run, seed, np.array([floor]), metric="kl_floor", kind="consistent")
        return made

    contrast = dataclasses.replace(CONTRAST, metrics=("kl_to_posterior",), floor="kl_floor")
    assert verdict(kl(0.1), contrast=contrast) == "observed"
    assert verdict(kl(0.6), contrast=contrast) == "not observed at this scale, within the estimator's floor"
    assert verdict(kl(-0.1), contrast=contrast) == "observed"
    unknown = dataclasses.replace(contrast, floor="another_floor")
    assert verdict(kl(0.1), contrast=unknown) == "undecided: how far the estimator may be off is not known"


def test_what_was_not_run_or_not_measured_is_undecided() -> None:
    made = two_runs(1.0)
    later = dataclasses.replace(VAE, suite="seconds")
    assert verdict(made, contrast=dataclasses.replace(CONTRAST, second=later)) == "undecided: vae (seconds) not run"
    assert verdict(made, contrast=dataclasses.replace(CONTRAST, metrics=("elbo",))).startswith("undecided: no number")


def test_fits_of_two_suites_are_paired_by_seed_and_observation() -> None:
    first, second = two_runs(1.0), two_runs(1.0)
    second.name = "seconds"
    for fact in second.facts:
        fact |= {"suite": "seconds", "job_id": f"seconds-{fact['job_id']}"}
    for table in second.tables:
        table["job_id"] = "seconds-" + table["job_id"]
    across = dataclasses.replace(CONTRAST, second=dataclasses.replace(VAE, suite="seconds"))
    within = outcome(CONTRAST, results(first))
    found = outcome(across, results(first, second))
    assert within.difference is not None
    assert found.difference == within.difference


# Tables


def test_a_table_has_our_numbers_and_those_of_others_apart() -> None:
    [table, *_] = grids(results(two_runs(1.0)))
    assert table.apart == {1}
    assert list(table.lines[1]) == ["AVB", "-91.2 ± 0.6", "", "", ""]
    means = [fact["value"] for fact in two_runs(1.0).facts if fact["run"] == "avb"]
    mark, value, _, spread = cells(table, "AVB")[1].split()
    assert (mark, float(value)) == ("=", pytest.approx(np.mean(means), abs=1e-3))
    assert float(spread) == pytest.approx(np.std(means, ddof=1), rel=0.1)
    assert cells(table, "VAE")[2:] == ["-", "3 seeds", "3.00 ± 1.00"]
    assert "AVB: a paper, recalled" in table.notes


def test_figures_of_others_enter_no_number() -> None:
    """Whatever they are, every other line of tables and summary stays as it is."""

    def ours(figure: str) -> tuple[list[Any], list[Any], str]:
        lines = [AVB, Reported(label="AVB", figures={"log p(x)": figure}, source="a paper"), VAE]
        contents = Contents(tables=[dataclasses.replace(TABLE, lines=lines)], contrasts=[CONTRAST])
        found = results(two_runs(1.0), contents=contents)
        shown = [[line for i, line in enumerate(grid.lines) if i not in grid.apart] for grid in grids(found)]
        return shown, [line for line in summary(found) if "reported" not in line], verdict(two_runs(1.0))

    assert ours("-91.2") == ours("1e9") == ours("see the text")


def test_a_quantity_that_several_evaluators_measure_is_that_of_the_one_asked_for() -> None:
    made = two_runs(1.0)
    for seed in range(3):
        for evaluator, value in (("knn[samples=10]", 0.7), ("exact", 1.9)):
            made.measure("vae", seed, np.full(N, value), metric="kl_to_posterior", evaluator=evaluator)
    columns = [
        Column(heading=evaluator, metrics=("kl_to_posterior",), evaluator=evaluator)
        for evaluator in ("knn", "exact", "mmd")
    ]
    table = Tabulated(title="KL", columns=columns, lines=[VAE])
    [grid] = grids(results(made, contents=Contents(tables=[table])))
    assert [text.split()[-3 if "±" in text else -1] for text in cells(grid, "VAE")[1:4]] == ["0.700", "1.900", "-"]


def test_a_failed_job_is_seen_in_table_and_report(tmp_path: Path) -> None:
    made = two_runs(1.0)
    made.add(made.job("vae", 3, status="failed", reason="RuntimeError: out of ideas"))
    made.add(made.job("avb", 0), {"evaluator": "elbo", "status": "failed", "reason": "not finite"})
    made.add(made.job("avb", 0), {"evaluator": "gaps", "status": "skipped", "reason": "has no density"})
    found = results(made)
    [table, _, failed] = grids(found)
    assert cells(table, "VAE")[3] == "3 of 4 ok"
    assert [list(line) for line in failed.lines] == [
        ["steps", "avb", "seed 0", "elbo", "failed", "not finite"],
        ["steps", "vae", "seed 3", "the fit", "failed", "RuntimeError: out of ideas"],
    ]
    assert "out of ideas" in write(found, tmp_path).read_text()


def test_a_suite_that_was_left_out_is_told(tmp_path: Path) -> None:
    lines = [AVB, dataclasses.replace(VAE, suite="seconds")]
    contents = Contents(tables=[dataclasses.replace(TABLE, lines=lines)])
    found = results(two_runs(1.0), contents=contents)
    assert cells(grids(found)[0], "VAE") == ["VAE", "-", "-", "not run", "-"]
    assert "suite seconds is not here" in write(found, tmp_path).read_text()


def test_a_density_ratio_above_log_p_is_marked() -> None:
    made = two_runs(0.0)
    for seed in range(3):
        scores = made.tables[2 * seed]["value"].to_numpy()
        made.measure(
            "avb", seed, scores + 1, metric="adversarial_elbo", stderr=0.01, kind="density ratio", evaluator="adversary"
        )
    [table, *_] = grids(results(made))
    assert cells(table, "AVB")[2].endswith(" !")
    assert any("ELBO (density ratio: no bound) exceeds log p(x) (seeds 0, 1, 2)" in note for note in table.notes)


# Report


LATENT = {"latent": np.random.default_rng(0).normal(size=(40, 2)), "latent_label": np.repeat(np.arange(4), 10)}


def pictured() -> Results:
    made = two_runs(1.0)
    made.galleries = {f"steps-{run}-0": LATENT for run in ("avb", "vae")}
    pictures = [
        LatentPlanes(name="latent", caption="Draws.", lines=[VAE, AVB]),
        Differences(name="differences", caption="Differences.", groups=[""]),
    ]
    contents = Contents(tables=[TABLE], contrasts=[CONTRAST], pictures=pictures, remarks=["A *remark*."])
    return results(made, contents=contents)


def test_the_report_is_a_function_of_the_results(tmp_path: Path) -> None:
    first, second = tmp_path / "a", tmp_path / "b"
    for folder in (first, second):
        folder.mkdir()
        write(pictured(), folder)
    files = sorted(path.relative_to(first) for path in first.rglob("*") if path.is_file())
    assert list(map(str, files)) == ["figures/differences.png", "figures/latent.png", "report.md", "summary.csv"]
    assert all((first / path).read_bytes() == (second / path).read_bytes() for path in files)
    text = (first / "report.md").read_text()
    assert f"- {STATEMENT}: observed (" in text
    assert "| *AVB (as reported)* | *-91.2 ± 0.6* |" in text
    assert "![latent](figures/latent.png)" in text
    assert r"- A \*remark\*." in text
    assert "    harness reproduce x" in text


def test_the_summary_has_every_number_with_its_kind(tmp_path: Path) -> None:
    write(pictured(), tmp_path)
    table = pd.read_csv(tmp_path / "summary.csv")
    assert list(table.columns) == SUMMARY
    ours = table[table["line"].eq("AVB") & table["reported"].isna()].iloc[0]
    assert (ours["kind"], ours["evaluator"], ours["seeds"], ours["observations"]) == ("exact", "exact", 3, 50)
    [theirs] = table[table["reported"].notna()].to_dict("records")
    assert theirs["reported"] == "-91.2 ± 0.6"
    assert pd.isna(theirs["value"])
    [difference] = table[table["part"] == "paired differences"].to_dict("records")
    assert difference["result"] == "observed"
    assert difference["value"] > difference["margin"] > difference["stderr"] > 0


# Figures


def trained(values: Mapping[tuple[str, int], float], floor: float | None = 0.02) -> Results:
    """KL to the posterior of runs after some steps, seeds 0 and 1."""
    made: dict[int, Made] = {}
    for (run, steps), value in values.items():
        suite = made.setdefault(steps, Made(name=f"steps-{steps}"))
        for seed in (0, 1):
            job = {"fit_steps": steps, "fit_seconds": steps / 50}
            suite.measure(run, seed, np.array([value + 0.01 * seed]), "kl_to_posterior", kind="consistent", job=job)
            if floor is not None:
                suite.measure(
                    run, seed, np.array([floor]), "kl_to_posterior_floor", kind="consistent", evaluator="knn", job=job
                )
    curves = {run: [Line(label=run, suite=f"steps-{n}", run=run) for r, n in values if r == run] for run, _ in values}
    picture = Progression(
        name="training", caption="", curves=curves, levels=[], metric="kl_to_posterior", axis="KL",
        floor="kl_to_posterior_floor",
    )  # fmt: skip
    return results(*made.values(), contents=Contents(tables=[], pictures=[picture]))


def progression_of(found: Results) -> Progression:
    [picture] = found.contents.pictures
    assert isinstance(picture, Progression)
    return picture


def test_every_point_of_a_progression_is_a_fit_of_its_own() -> None:
    found = trained({("avb", 100): 1.0, ("avb", 200): 0.3, ("vae", 100): 2.0, ("vae", 200): 1.5})
    table = points(progression_of(found), found)
    assert len(table) == 8
    figure = progression(progression_of(found), table)
    assert figure is not None
    steps, seconds = figure.axes
    curve = next(line for line in steps.get_lines() if line.get_label() == "avb")
    assert np.asarray(curve.get_xdata()).tolist() == [100, 200]
    assert np.asarray(curve.get_ydata()) == pytest.approx([1.005, 0.305])
    curve = next(line for line in seconds.get_lines() if line.get_label() == "avb")
    assert np.asarray(curve.get_xdata()).tolist() == [2, 4]
    assert [tick.get_text() for tick in steps.get_xticklabels()] == ["100", "200"]


@pytest.mark.parametrize(("lowest", "floor"), [(0.3, None), (-0.05, None), (0.3, 0.02), (-0.05, 0.02), (0.3, -0.01)])
def test_a_progression_shows_all_values_whatever_their_sign(lowest: float, floor: float | None) -> None:
    found = trained({("avb", 100): 1.0, ("avb", 200): lowest}, floor)
    figure = progression(progression_of(found), points(progression_of(found), found))
    assert figure is not None
    low, high = figure.axes[0].get_ylim()
    assert low <= lowest < 1.0 < high


def test_seconds_that_are_not_valid_are_not_drawn() -> None:
    """As those of fits that ran beside others."""
    found = trained({("avb", 100): 1.0, ("avb", 200): 0.3})
    for ran in found.ran.values():
        ran.records["timing_valid"] = False
    table = points(progression_of(found), found)
    assert table["seconds"].isna().all()
    figure = progression(progression_of(found), table)
    assert figure is not None
    [steps] = figure.axes
    assert steps.get_xlabel() == "training steps"
    figure.savefig(io.BytesIO())
    nothing = table.iloc[:0]
    assert progression(progression_of(found), nothing) is None


def planes(shares: Sequence[float]) -> dict[str, dict[str, np.ndarray]]:
    """Galleries of posteriors of which a part of the draws is far off."""
    random = np.random.default_rng(0)
    names, exact = np.array(["mu", "tau", "eta"]), random.normal(size=(400, 3))
    galleries: dict[str, dict[str, np.ndarray]] = {}
    for share in shares:
        drawn = random.normal(size=(400, 3))
        drawn[: int(400 * share)] += 50
        galleries[f"{share:g} off"] = {"quantity_names": names, "quantities": drawn, "exact_quantities": exact}
    return galleries


def test_marginals_are_framed_by_the_exact_density() -> None:
    picture = Marginals(name="m", caption="", planes=[("mu", "tau"), ("tau", "eta")], lines=[])
    figure = marginals(picture, planes([0, 0.25]))
    assert figure is not None
    assert len(figure.axes) == 4
    for axes in figure.axes:
        low, high = axes.get_xlim()
        assert -8 < low < -2
        assert 2 < high < 8
    told = [[text.get_text() for text in axes.texts] for axes in figure.axes]
    assert told == [[], ["25% outside"], [], ["25% outside"]]
    assert [axes.get_title() for axes in figure.axes[:2]] == ["0 off", "0.25 off"]


def test_contour_lines_hold_half_and_nine_tenths_of_the_density_that_is_known() -> None:
    """Of two independent standard normal quantities they are circles: a part 1 - exp(-r^2/2) is within r."""
    side = np.linspace(-5, 5, 120)
    x, y = np.meshgrid(2 * side, side)
    known = {
        "planes": np.array([["tau", "eta"], ["mu", "tau"]]),
        "plane_axes": np.stack([[side, side], [2 * side, side]]),
        "plane_density": np.stack([np.ones((120, 120)), np.exp(-0.5 * ((x / 2) ** 2 + y**2))]),
    }
    galleries = {label: {**arrays, **known} for label, arrays in planes([0]).items()}
    figure = marginals(Marginals(name="m", caption="", planes=[("mu", "tau")], lines=[]), galleries)
    assert figure is not None
    [contours] = [each for each in figure.axes[0].collections if isinstance(each, ContourSet)]
    for path, mass in zip(contours.get_paths(), (0.9, 0.5), strict=True):
        across, up = np.asarray(path.vertices).T
        radius = np.hypot(across / 2, up)
        assert radius == pytest.approx((-2 * np.log(1 - mass)) ** 0.5, rel=0.03)  # a cell is 0.08 wide


def test_there_is_no_figure_of_quantities_that_are_not_there() -> None:
    picture = Marginals(name="m", caption="", planes=[("mu", "sigma")], lines=[])
    assert marginals(picture, planes([0])) is None

"""`harness reproduce` end to end, with the experiment of the authors' guide and those of the paper, on few steps."""

from __future__ import annotations

import os
import subprocess
import sysconfig
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest

import harness
from harness.store import Store

HARNESS = str(Path(sysconfig.get_path("scripts")) / "harness")
EXAMPLE = Path(__file__).parents[1] / "distributions/harness-experiment/tiny_toy.py"
PLUGIN = ["--plugin", "tiny_toy.py"]
FAULTY = """
from dataclasses import dataclass
from harness import hookimpl
from harness_plugins.vae import VAE

@dataclass(frozen=True, kw_only=True)
class Faulty(VAE):
    name: str = "faulty"

    def losses(self, modules, x, noise):
        raise RuntimeError("out of ideas")

@hookimpl
def harness_methods():
    return [Faulty()]
"""

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("COLUMNS", raising=False)
    Path("tiny_toy.py").write_text(EXAMPLE.read_text())


def contents(folder: Path) -> dict[str, bytes]:
    """What is made of the results: report, figures and summary."""
    files = [*folder.glob("*.*"), *(folder / "figures").iterdir()]
    return {path.name: path.read_bytes() for path in files if path.is_file()}


def test_an_experiment_is_run_reported_and_not_run_twice(run: Run) -> None:
    """In a fresh process, as a user types it; then once more in this one, which computes nothing."""
    words = ["reproduce", "tiny-toy[steps=5]", "--scale", "smoke", *PLUGIN]
    environment = dict(os.environ)  # as Python has it: readline, which pytest imports, adds COLUMNS behind its back
    done = subprocess.run([HARNESS, *words], capture_output=True, text=True, timeout=300, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("started") == 6  # two methods and two seeds, then one method in the first one's seconds
    folder = Path("results/tiny-toy-steps-5-smoke")
    assert set(contents(folder)) == {"report.md", "summary.csv", "latent.png", "differences.png"}
    for suite, runs in (("equal-steps", {"avb", "vae"}), ("equal-seconds", {"vae"})):
        assert set(pd.read_csv(folder / suite / "records.csv")["method"]) == runs
        assert (folder / suite / "examples.parquet").is_file()
    assert "-1.403" in done.stdout
    assert "AVB has the higher log p(x) at equal seconds" in done.stdout, done.stdout
    assert f"report:  {folder}/report.md" in done.stdout
    budgets = set(pd.read_csv(folder / "equal-seconds/records.csv")["budget"])
    assert len(budgets) == 1
    assert budgets.pop().startswith("seconds=")

    before = contents(folder)
    code, out, err = run(*words)
    assert (code, err) == (0, "")
    assert out == done.stdout
    assert contents(folder) == before


@pytest.mark.parametrize(
    ("name", "figures"),
    [("avb-toy", {"latent", "differences"}), ("avb-eight-schools", {"training", "marginals", "differences"})],
)
def test_experiments_of_the_paper_come_to_their_end(name: str, figures: set[str], run: Run) -> None:
    code, out, _ = run("reproduce", name, "--scale", "smoke", "--seeds", "1", "--out", "here")
    assert code == 0, out
    assert {path.stem for path in Path("here/figures").iterdir()} == figures
    statuses = pd.concat([pd.read_csv(path) for path in Path("here").glob("*/records.csv")])["status"]
    assert set(statuses) <= {"ok", "skipped"}


def test_a_failed_job_is_told_and_the_rest_goes_on(run: Run) -> None:
    Path("faulty.py").write_text(FAULTY)
    source = EXAMPLE.read_text().replace('"avb[noise_dim=8]"', '"faulty"')
    Path("tiny_toy.py").write_text(source)
    words = ["reproduce", "tiny-toy[steps=5]", "--scale", "smoke", *PLUGIN, "--plugin", "faulty.py", "--out", "here"]
    words += ["--seeds", "1"]
    code, out, err = run(*words)
    assert code == 1
    assert "harness: failed: faulty on four-points, seed 0" in err
    assert "`harness reproduce` with --retry failed tries these again" in err
    assert "undecided: no number for avb (equal-steps)" in out
    text = Path("here/report.md").read_text()
    assert "| equal-steps | avb | seed 0 | the fit | failed | RuntimeError: out of ideas |" in text
    assert set(Store("here/equal-seconds").records()["status"]) == {"ok"}  # the VAE's own seconds

    code, _, err = run(*words)
    assert code == 1
    assert "started" not in err  # what failed is done, until it is asked for again
    code, _, err = run(*words, "--retry", "failed")
    assert code == 1
    assert err.count("started") == 1


def test_an_experiment_may_be_split_over_several_runs(run: Run) -> None:
    """Each gets something done and stops; what is done is reported, of a suite that has only begun too."""
    words = ["reproduce", "tiny-toy[steps=5]", "--scale", "smoke", *PLUGIN, "--seeds", "1", "--out", "here"]
    codes: list[int] = []
    reports: list[bool] = []
    done: list[int] = []
    while not codes or codes[-1] == 130:
        assert len(codes) < 40
        code, out, err = run(*words, "--stop-after", "1e-9")
        codes.append(code)
        assert ("stopped after 1e-09 seconds" in err) == (code == 130) == (out == "")
        report = Path("here/report.md").read_text() if Path("here/report.md").exists() else ""
        assert (", stopped before its end" in report) == (bool(report) and code == 130)
        reports.append(bool(report))
        done.append(len(list(Path("here/equal-steps/jobs").glob("*.json"))))
    assert codes[-1] == 0
    assert len(codes) > 3  # two methods, then one method in the first one's seconds
    assert (reports[0], reports[-2]) == (False, True)
    assert any(report and jobs == 1 for report, jobs in zip(reports, done, strict=True))
    assert {"equal-steps", "equal-seconds"} <= {path.name for path in Path("here").iterdir()}


def test_steps_are_taken_as_asked(run: Run) -> None:
    words = ["reproduce", "tiny-toy[steps=5]", "--scale", "smoke", *PLUGIN, "--seeds", "1", "--out", "here"]
    code, _, err = run(*words, "--step", "jit")
    assert (code, err) == (2, "harness: error: unknown step 'jit'; known: auto, compile, eager, graph\n")
    code, _, _ = run(*words, "--step", "graph")
    assert code == 0
    assert set(Store("here/equal-steps").records()["step_mode"]) == {"graph"}


def test_settings_are_not_chosen_on_the_seeds_that_are_compared(run: Run) -> None:
    code, out, err = run("reproduce", "avb-toy", "--scale", "smoke", "--seeds", "0,100")
    assert (code, out) == (2, "")
    assert err == "harness: error: seeds 100 belong to suite 'trials' alone; choose others\n"


def test_a_later_suite_that_cannot_be_run_is_refused_before_the_first(run: Run) -> None:
    source = EXAMPLE.read_text().replace('methods={"vae": "vae"}', 'methods={"vae": "vea"}')
    Path("tiny_toy.py").write_text(source)
    code, out, err = run("reproduce", "tiny-toy", "--scale", "smoke", *PLUGIN)
    assert (code, out) == (2, "")
    assert err == "harness: error: unknown method 'vea'; did you mean 'vae'?\n"
    assert not Path("results").exists()


def test_python_does_the_same_with_seeds_and_a_folder_of_ones_own(tmp_path: Path) -> None:
    folder = tmp_path / "here"
    settings = {"scale": "smoke", "seeds": [4], "step": "eager", "plugins": ["tiny_toy.py"]}
    records = harness.reproduce("tiny-toy[steps=5]", **settings, out=folder)
    assert set(records["suite"]) == {"equal-steps", "equal-seconds"}
    assert set(records["run"]) == {"avb", "vae"}
    stored = Store(folder / "equal-steps").records()
    assert set(stored["budget"]) == {"steps=5"}
    assert set(stored["seed"]) == {4}
    assert set(stored["step_mode"]) == {"eager"}
    text = (folder / "report.md").read_text()
    assert "# tiny-toy\\[steps=5\\], scale smoke" in text
    assert "harness reproduce 'tiny-toy[steps=5]' --scale smoke --seeds 4, --step eager --plugin tiny_toy.py" in text


def test_show_and_list_tell_what_an_experiment_runs(run: Run) -> None:
    code, out, _ = run("show", "tiny-toy[steps=7]", *PLUGIN)
    assert code == 0
    assert "equal-steps: avb[noise_dim=8],vae on four-points, steps=70, 2 seeds" in out
    assert "equal-seconds: on four-points, 2 seeds; depends on the suites before it" in out
    assert "tiny-toy" in run("list", "experiments", *PLUGIN)[1]

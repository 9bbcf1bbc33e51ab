"""The commands at work, in this process, on tiny budgets."""

from __future__ import annotations

import inspect
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from harness import comparison
from harness.cli import console
from harness.cli.suite import Arguments
from harness.registry import Registry
from harness.store import Store

THINGS = ["methods", "datasets", "problems", "evaluators", "experiments"]
TINY = "--problems four-points --seeds 2 --budget steps=20 --evaluators reconstruction".split()

FAULTY = """
import os
from dataclasses import dataclass

import torch
from harness import hookimpl
from harness_plugins.vae import VAE

@dataclass(frozen=True, kw_only=True)
class Faulty(VAE):
    name: str = "faulty"
    fault: str = "none"

    def losses(self, modules, x, noise):
        if self.fault == "raise":
            raise RuntimeError("half-way\\nthrough")
        losses = super().losses(modules, x, noise)
        if self.fault == "diverge":
            return {name: loss * torch.nan for name, loss in losses.items()}
        if self.fault == "interrupt" and os.environ.get("INTERRUPT"):
            raise KeyboardInterrupt
        return losses

@hookimpl
def harness_methods():
    return [Faulty()]
"""


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("COLUMNS", raising=False)


Run = Callable[..., tuple[int, str, str]]


def test_compare_prints_a_table_and_is_not_done_twice(run: Run) -> None:
    code, out, err = run("compare", "--methods", "avb,vae", *TINY)
    assert code == 0
    assert all(word in out for word in ("four-points", "avb", "vae", "results/local/records.csv", "harness report"))
    started = [line for line in err.splitlines() if line.endswith("started")]
    assert len(started) == 4
    assert len(re.findall(r"^\[\d/4\] .*: ok after", err, re.MULTILINE)) == 4

    again = run("compare", "--methods", "vae,avb", *TINY)
    assert again[0] == 0
    assert again[2] == ""  # nothing was worked on
    assert Path("results/local/records.csv").is_file()


def test_plan_shows_what_is_left_and_writes_nothing(run: Run) -> None:
    words = ["--methods", "vae,vae[lr=0.01]", *TINY, "--out", "here"]
    code, out, err = run("plan", *words)
    assert (code, err) == (0, "")
    assert "vae[lr=0.01]" in out
    assert "4 jobs: 0 done, 4 to fit, 0 to measure" in out
    assert not Path("here").exists()

    run("compare", "--methods", "vae", *TINY, "--out", "here")
    code, out, err = run("plan", *words, "--json")
    jobs = json.loads(out)
    assert [job["done"] for job in jobs] == [True, False, True, False]
    assert [job["missing"] for job in jobs] == [[], ["reconstruction"], [], ["reconstruction"]]
    assert jobs[1]["config"]["lr"] == 0.01
    assert {job["job_id"] for job in jobs if job["done"]} == set(Store("here").job_ids())

    words[words.index("reconstruction")] = "reconstruction,elbo"
    assert "4 jobs: 0 done, 2 to fit, 2 to measure" in run("plan", *words)[1]


def test_evaluate_measures_stored_fits(run: Run) -> None:
    run("compare", "--methods", "vae", *TINY, "--out", "here")
    code, out, _ = run("evaluate", "here", "--evaluators", "elbo[samples=10]")
    assert code == 0
    assert "ELBO" in out
    records = Store("here").records()
    assert set(records["evaluator"]) == {"reconstruction", "elbo[samples=10]"}
    assert records["job_id"].nunique() == 2


FLAKY = """
from dataclasses import dataclass
from pathlib import Path
from harness import hookimpl
from harness_plugins.elbo import ELBO

@dataclass(frozen=True, kw_only=True)
class Flaky(ELBO):
    name: str = "flaky"

    def measure(self, fit, problem, run):
        if Path("broken").exists():
            raise RuntimeError("no luck")
        return super().measure(fit, problem, run)

@hookimpl
def harness_evaluators():
    return [Flaky()]
"""


def test_a_measurement_that_failed_can_be_tried_again(run: Run) -> None:
    Path("flaky.py").write_text(FLAKY)
    Path("broken").touch()
    run("compare", "--methods", "vae", *TINY, "--out", "here")
    words = ["evaluate", "here", "--evaluators", "flaky", "--plugin", "flaky.py"]
    code, _, err = run(*words)
    assert code == 1
    assert err.splitlines()[-1] == "harness: `harness evaluate` with --retry failed tries these again"
    Path("broken").unlink()
    assert run(*words)[0] == 1  # it is done, until it is asked for again
    assert run(*words, "--retry", "failed")[0] == 0
    assert set(Store("here").records()["status"]) == {"ok"}


def test_evaluate_without_a_fit_to_measure_is_refused(run: Run) -> None:
    Store.create("here")
    code, out, err = run("evaluate", "here", "--evaluators", "elbo")
    assert (code, out) == (2, "")
    assert "no stored fit" in err


def test_report_writes_what_it_says(run: Run) -> None:
    run("compare", "--methods", "vae", *TINY, "--out", "here")
    code, out, err = run("report", "here")
    assert (code, err) == (0, "")
    assert "four-points" in out
    assert Path(out.splitlines()[-1].removeprefix("report: ")).is_file()


@pytest.mark.parametrize("against", ["avb", "vae[batch_size=4]"])
def test_report_holds_the_others_against_the_row_that_is_named(run: Run, against: str) -> None:
    run("compare", "--methods", "vae[batch_size=2|4],avb", *TINY, "--out", "here")
    _, out, _ = run("report", "here", "--against", against)
    report = Path(out.splitlines()[-1].removeprefix("report: ")).read_text()
    cells = [line.replace("\\", "").strip("|* ").split(" | ") for line in report.splitlines() if "2 seeds" in line]
    methods = {row[0].strip("* "): row[3] for row in cells if row[1] == "2 seeds"}
    assert next(iter(methods)) == against
    assert [method for method, difference in methods.items() if difference == "first"] == [against]

    code, out, err = run("report", "here", "--against", "vea")
    assert (code, out) == (2, "")
    assert err == "harness: error: unknown row 'vea'; did you mean 'vae'?\n"


def test_a_failed_job_gives_exit_code_1_and_can_be_tried_again(run: Run) -> None:
    Path("faulty.py").write_text(FAULTY)
    words = ["--methods", "faulty[fault=raise|diverge|none]", *TINY, "--plugin", "faulty.py", "--out", "here"]
    words[words.index("2")] = "1"
    code, out, err = run("compare", *words)
    assert code == 1
    assert "faulty" in out
    told = r"^harness: failed: faulty on four-points, seed 0 \(job \w{16}\): RuntimeError: half-way through; see (.*)"
    seen = re.search(told, err, re.MULTILINE)
    assert seen
    assert "Traceback" in Path(seen[1]).read_text()
    assert re.search(r"^harness: diverged: faulty on four-points, seed 0", err, re.MULTILINE)
    assert "--retry diverged,failed" in err

    code, _, err = run("compare", *words)
    assert code == 1
    assert "started" not in err  # what failed is done, until it is asked for again
    code, _, err = run("compare", *words, "--retry", "failed")
    assert code == 1
    assert err.count("started") == 1


def test_an_interrupt_keeps_what_is_done(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("faulty.py").write_text(FAULTY)
    words = ["--methods", "vae,faulty[fault=interrupt]", *TINY, "--plugin", "faulty.py", "--out", "here"]
    words[words.index("2")] = "1"
    monkeypatch.setenv("INTERRUPT", "now")
    code, out, err = run("compare", *words)
    assert (code, out) == (130, "")
    assert err.splitlines()[-1].startswith("harness: interrupted; finished jobs are kept")
    assert list(Store("here").records()["method"]) == ["vae"]

    monkeypatch.delenv("INTERRUPT")
    code, _, err = run("compare", *words)
    assert code == 0
    assert err.count("started") == 1


def test_a_suite_says_the_same_as_options_and_options_override_it(run: Run) -> None:
    Path("suite.toml").write_text(
        'methods = ["vae", "vae[lr=0.01]"]\nproblems = "four-points"\nseeds = [4, 2]\nbudget = "steps=20"\n'
        'evaluators = ["reconstruction"]\nprecision = "float64"\ndevice = "cpu"\nout = "here"\nretry = "failed"\n'
        "vectorize-seeds = true\n"
    )
    options = ["--vectorize-seeds", "--methods", "vae,vae[lr=0.01]", "--seeds", "4,2", "--precision", "float64"]
    options += ["--problems", "four-points", "--budget", "steps=20", "--evaluators", "reconstruction", "--out", "here"]
    options += ["--device", "cpu"]
    same = run("plan", "--suite", "suite.toml", "--json")
    assert same == run("plan", *options, "--json")
    assert same[0] == 0
    assert same != run("plan", *options[1:], "--json")
    jobs = json.loads(run("plan", "--suite", "suite.toml", "--methods", "avb", "--seeds", "1", "--json")[1])
    assert [(job["method"], job["seed"], job["budget"]) for job in jobs] == [("avb", 0, "steps=20")]


@pytest.mark.parametrize("suite", sorted((Path(__file__).parents[2] / "benchmarks/suites").glob("*.toml")), ids=str)
def test_the_suites_of_the_repository_are_valid(suite: Path, run: Run) -> None:
    instead = ["--problems", "digits[latent_dim=8]"] if "mnist" in suite.stem else []  # tests have no MNIST
    code, out, _ = run("plan", "--suite", str(suite), *instead, "--json")
    assert code == 0
    assert json.loads(out)


def test_suites_and_options_offer_what_python_does(run: Run) -> None:
    assert set(Arguments.__annotations__) == set(inspect.signature(comparison.compare).parameters) - {"progress"}
    assert set(inspect.signature(comparison.planned).parameters) == set(Arguments.__annotations__) | {"here"}


def test_the_help_tells_the_defaults(run: Run) -> None:
    text = " ".join(run("compare", "--help")[1].split())
    defaults = {name: item.default for name, item in inspect.signature(comparison.compare).parameters.items()}
    for name, default in defaults.items():
        if default not in (None, (), False, inspect.Parameter.empty):
            shown = ",".join(default) if isinstance(default, tuple) else default
            assert re.search(rf"--{name}\b[^\[]*?(\[\w+=8\][^\[]*)?\[default: {re.escape(str(shown))}\]", text), name


@pytest.mark.parametrize(
    "kind", ["methods", "datasets", "problems", "evaluators", "experiments", "executors", "plugins"]
)
def test_list(kind: str, run: Run) -> None:
    code, text, _ = run("list", kind)
    assert code == 0
    code, out, _ = run("list", kind, "--json")
    assert code == 0
    entries: list[dict[str, Any]] = json.loads(out)
    assert entries
    assert all(entry["name"] in text for entry in entries)


def test_list_is_readable_in_a_narrow_terminal(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    lines = run("list", "methods")[1].splitlines()
    assert max(map(len, lines)) <= 60
    assert lines[0].split() == ["name", "what", "plugin"]
    assert any(re.match(r"avb +Adversarial variational", line) for line in lines)


def test_list_tells_options_and_provenance(run: Run) -> None:
    entries = {entry["name"]: entry for entry in json.loads(run("list", "methods", "--json")[1])}
    assert entries["avb"]["options"]["noise_dim"] == 32
    assert entries["avb"]["distribution"] == "inference-harness"
    plugins = {entry["name"]: entry for entry in json.loads(run("list", "plugins", "--json")[1])}
    assert plugins["four-points"]["provides"] == ["dataset four-points", "problem four-points"]
    assert not any(entry["broken"] for entry in plugins.values())


def test_show_tells_equation_options_capabilities_and_provenance(run: Run) -> None:
    code, out, _ = run("show", "avb")
    assert code == 0
    assert "https://arxiv.org/abs/1701.04722" in out
    assert ".. math::" in out
    assert "AdversarialPosterior: HasLogRatio" in out
    assert "'avb' of inference-harness" in out
    assert re.search(r"^adversary_steps +1 +integer > 0 +Adversary updates per primal update", out, re.MULTILINE)
    assert re.search(r"^lr_decay +0.1 +number > 0 +Factor by which", out, re.MULTILINE)  # documented in the base class


@pytest.mark.parametrize("kind", THINGS)
def test_everything_can_be_shown(kind: str, run: Run) -> None:
    for entry in json.loads(run("list", kind, "--json")[1]):
        code, out, err = run("show", entry["name"])
        assert (code, err) == (0, "")
        assert f"{kind[:-1]} {entry['name']}" in out
        assert all(re.search(rf"^{option} ", out, re.MULTILINE) for option in entry["options"])


def test_show_takes_options(run: Run) -> None:
    code, out, _ = run("show", "avb[lr=1e-4]")
    assert code == 0
    assert "method avb[lr=0.0001]" in out
    assert re.search(r"^lr +0.0001 +\S+ +number > 0", out, re.MULTILINE)


def test_show_tells_data_and_spec_hash_of_a_problem(run: Run) -> None:
    _, out, _ = run("show", "four-points")
    assert "dataset four-points" in out
    assert "problem four-points" in out
    assert "4 train, 4 validation, 4 test; shape 2x2" in out
    [problem] = Registry.discover().select("problems", "four-points")
    assert problem.spec_hash in out
    assert problem.default_budget in out


def test_show_of_a_problem_that_needs_an_argument(run: Run) -> None:
    code, out, _ = run("show", "file")
    assert code == 0
    assert "file:PATH.npz" in out
    assert "latent_dim" in out


def test_show_of_data_that_are_not_there_says_how_to_get_them(run: Run) -> None:
    code, out, _ = run("show", "mnist")
    assert code == 0
    assert out.count("not available") == 2
    assert "harness data fetch mnist" in out


def test_data(run: Run) -> None:
    code, out, _ = run("data", "list")
    assert code == 0
    assert all(name in out for name in ("digits", "mnist-static", "four-points", "embedded"))
    code, out, _ = run("data", "verify", "digits")
    assert code == 0
    assert "1197 train" in out
    assert re.search(r"[0-9a-f]{64}", out)
    assert run("data", "fetch", "four-points")[0] == 0


@pytest.mark.filterwarnings("default")  # as a user has it
def test_a_broken_plugin_is_warned_of_in_one_line(run: Run, write_distribution: Callable[..., None]) -> None:
    write_distribution("half-built", "raise RuntimeError('no\\nluck')")
    code, out, err = run("list", "methods", "--json")
    assert code == 0
    assert {entry["name"] for entry in json.loads(out)} >= {"avb", "vae"}
    assert err == "harness: warning: plugin 'half-built' of half-built 1.0 is broken: RuntimeError: no; luck\n"
    broken = {entry["name"]: entry["broken"] for entry in json.loads(run("list", "plugins", "--json")[1])}
    assert broken["half-built"] == "RuntimeError: no; luck"


def test_a_mistake_of_ours_is_not_taken_for_the_users(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(comparison, "plan", broken)
    with pytest.raises(ZeroDivisionError):
        run("plan", "--methods", "vae")


def test_output_is_plain_where_it_is_no_terminal(run: Run) -> None:
    for words in (["list", "methods"], ["show", "avb"], ["compare", "--methods", "vae", *TINY]):
        code, out, err = run(*words)
        assert code == 0
        assert "\x1b" not in out + err
        assert max(map(len, out.splitlines())) <= int(os.environ.get("COLUMNS", "160"))


def test_a_table_of_very_many_rows_is_whole_too(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [(f"row {i}", "", "[x]" * (i % 3)) for i in range(console.MANY + 1)]
    console.print_table(("name", "nothing", "text"), rows, "a title")
    lines = capsys.readouterr().out.splitlines()
    assert lines[:4] == ["a title", "name      text", "row 0", "row 1     [x]"]
    assert lines[-1].split() == rows[-1][0].split() + ([rows[-1][2]] if rows[-1][2] else [])
    assert len(lines) == len(rows) + 2

"""Every mistake of the user's: exit code 2, one clear line on stderr, nothing on stdout, nothing run or written."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from harness.cli import main

COMPARE = ["compare", "--problems", "four-points", "--methods", "avb"]

MISTAKES = [
    # commands and options
    (["compar"], "unknown command 'compar'; did you mean 'compare'?"),
    (["--verbose"], "unknown option '--verbose'"),
    (["compare", "--method", "avb"], "unknown option '--method'; did you mean '--methods'?"),
    (["compare", "-m", "avb"], "unknown option '-m'"),
    (["compare", "avb,vae"], "unexpected extra argument (avb,vae)"),
    (["compare"], "no methods"),
    (["compare", "--methods"], "'--methods' requires an argument"),
    (["compare", "--methods", "--problems", "digits"], "--methods needs a value"),
    (["compare", "--methods", "avb", "--methods", "vae"], "--methods is given twice"),
    (["compare", "--methods=avb", "--seeds=1", "--seeds=1"], "--seeds is given twice"),
    (["plan", "--methods", "avb", "--json", "--json"], "--json is given twice"),
    (["plan", "--methods", "avb", "--json=yes"], "does not take a value"),
    (["compare", "--json", "--methods", "avb"], "unknown option '--json'"),
    (["data"], "missing command; known: list, fetch, verify"),
    (["data", "fetch"], "missing argument"),
    (["data", "fetsh", "mnist"], "unknown command 'fetsh'; did you mean 'fetch'?"),
    (["list"], "missing argument"),
    (["list", "method"], "unknown kind 'method'; did you mean 'methods'?"),
    (["list", "methods", "problems"], "unexpected extra argument (problems)"),
    (["show"], "missing argument"),
    (["report"], "missing argument"),
    (["reproduce"], "missing argument"),
    (["reproduce", "avb-toy", "--scale"], "'--scale' requires an argument"),
    (["reproduce", "avb-toy", "--budget", "steps=3"], "unknown option '--budget'"),
    (["merge"], "missing argument"),
    (["merge", "results/all"], "missing argument"),
    (["merge", "new", "missing"], "'missing': there is no such folder"),
    (["merge", "new", "prose.txt"], "'prose.txt': there is no such folder"),
    (["merge", "new", "."], "'.' holds no results"),
    (["merge", "new", ""], "empty value"),
    (["why", "results/all"], "missing argument"),
    (["why", "missing", "3f9a"], "'missing' holds no results"),
    (["gc"], "missing argument"),
    (["gc", "missing"], "'missing' holds no results"),
    (["gc", ".", "--kep", "1"], "unknown option '--kep'; did you mean '--keep'?"),
    (["evaluate", "."], "missing option '--evaluators'"),
    # names
    (["compare", "--methods", "abv"], "unknown method 'abv'; did you mean 'avb'?"),
    (["compare", "--methods", "avb:x"], "unknown method 'avb:x'"),
    ([*COMPARE[:3], "--methods", "avb", "--problems", "digit"], "--problems is given twice"),
    (["compare", "--methods", "avb", "--problems", "digit"], "unknown problem 'digit'; did you mean 'digits'?"),
    ([*COMPARE, "--evaluators", "impotance"], "unknown evaluator 'impotance'; did you mean 'importance'?"),
    ([*COMPARE, "--device", "gpu"], "unknown device 'gpu'; did you mean 'cpu'?"),
    ([*COMPARE, "--precision", "float16"], "unknown precision 'float16'"),
    ([*COMPARE, "--retry", "faild"], "unknown status to retry 'faild'; did you mean 'failed'?"),
    ([*COMPARE, "--retry", "failed,"], "unknown status to retry ''"),
    (["show", "advb"], "unknown name 'advb'; did you mean 'avb'?"),
    (["show", "avb,vae"], "show takes one name"),
    (["reproduce", "avb-tog"], "unknown experiment 'avb-tog'; did you mean 'avb-toy'?"),
    (["reproduce", "avb-toy,avb-mnist"], "expected one experiment, got 2"),
    (["reproduce", "avb-toy", "--scale", "laptob"], "unknown scale 'laptob'; did you mean 'laptop'?"),
    (["reproduce", "avb-decoders[problm=mnist]"], "unknown option of avb-decoders 'problm'; did you mean 'problem'?"),
    (["reproduce", "avb-decoders[problem=cifar]"], "option problem='cifar': input should be 'digits' or 'mnist'"),
    (["reproduce", "avb-toy", "--seeds", "0"], "seeds 0: how many must be between 1 and"),
    (["reproduce", "avb-toy", "--device", "gpu"], "unknown device 'gpu'; did you mean 'cpu'?"),
    (["reproduce", "avb-toy", "--plugin", "missing.py"], "plugin file 'missing.py' does not exist"),
    (["data", "verify", "digit"], "unknown dataset 'digit'; did you mean 'digits'?"),
    (["data", "verify", "digits,four-points"], "expected one data set"),
    # lists
    (["compare", "--methods", ""], "--methods has an empty value"),
    (["compare", "--methods", "  "], "--methods has an empty value"),
    (["compare", "--methods", ","], "empty entry"),
    (["compare", "--methods", "avb,,vae"], "empty entry"),
    (["compare", "--methods", "avb,"], "empty entry"),
    (["compare", "--methods", "avb", "--problems", ""], "--problems has an empty value"),
    ([*COMPARE, "--evaluators", ""], "--evaluators has an empty value"),
    # options in brackets
    (["compare", "--methods", "avb[lr=1e-4"], "unbalanced bracket"),
    (["compare", "--methods", "avb]"], "unbalanced bracket"),
    (["compare", "--methods", "avb[lr=1e-4]x"], "unexpected text after ']'"),
    (["compare", "--methods", "avb[]"], "expected option=value"),
    (["compare", "--methods", "avb[lr=1,lr=2]"], "option 'lr' is given twice"),
    (["compare", "--methods", "avb[nois_dim=3]"], "unknown option of avb 'nois_dim'; did you mean 'noise_dim'?"),
    (["compare", "--methods", "avb[lr=fast]"], "option lr='fast': input should be a valid number"),
    (["compare", "--methods", "avb[noise_dim=2.5]"], "option noise_dim='2.5': input should be a valid integer"),
    (["compare", "--methods", "avb[lr=-1]"], "option lr='-1': input should be greater than 0"),
    (["compare", "--methods", "avb[beta1=1]"], "option beta1='1': input should be less than 1"),
    (["compare", "--methods", "avb[lr=nan]"], "option lr='nan'"),
    (["compare", "--methods", "avb[lr=inf]"], "must be finite"),
    (["compare", "--methods", "avb", "--problems", "four-points[latent_dim=0]"], "greater than 0"),
    ([*COMPARE, "--evaluators", "importance[samples=0]"], "greater than"),
    (["compare", "--methods", "avb", "--problems", "digits[model=conv2]"], "should be 'mlp', 'conv1' or 'conv0'"),
    (["compare", "--methods", "avb", "--problems", "digits[model=conv1,width=9]"], "option width belongs to model=mlp"),
    # the same run twice
    (["compare", "--methods", "avb,avb"], "the same run is asked for twice: avb"),
    (["compare", "--methods", "avb,avb[batch_size=128]"], "the same run is asked for twice: avb"),
    (["compare", "--methods", "avb[lr=1e-4|0.0001]"], "the same run is asked for twice: avb[lr=0.0001]"),
    (["compare", "--methods", "avb", "--problems", "digits,digits"], "asked for twice: digits"),
    ([*COMPARE, "--evaluators", "elbo,elbo"], "asked for twice: elbo"),
    # seeds and budgets
    ([*COMPARE, "--seeds", "0"], "seeds 0: how many must be between 1 and"),
    ([*COMPARE, "--seeds", "-1"], "seeds '-1'"),
    ([*COMPARE, "--seeds", "three"], "'three' is not a whole number"),
    ([*COMPARE, "--seeds", "1.5"], "'1.5' is not a whole number"),
    ([*COMPARE, "--seeds", "0,0"], "0 is given twice"),
    ([*COMPARE, "--seeds", "0,,1"], "'' is not a whole number"),
    ([*COMPARE, "--seeds", "1000000000"], "how many must be between 1 and"),
    ([*COMPARE, "--budget", ""], "--budget has an empty value"),
    ([*COMPARE, "--budget", "steps"], "budget 'steps'"),
    ([*COMPARE, "--budget", "steps="], "budget 'steps='"),
    ([*COMPARE, "--budget", "steps=-5"], "must be positive"),
    ([*COMPARE, "--budget", "steps=0"], "must be positive"),
    ([*COMPARE, "--budget", "steps=many"], "'many' is not a number"),
    ([*COMPARE, "--budget", "steps=1.5"], "whole number"),
    ([*COMPARE, "--budget", "seconds=nan"], "must be positive and finite"),
    ([*COMPARE, "--budget", "seconds=inf"], "must be positive and finite"),
    ([*COMPARE, "--budget", "a lot"], "budget 'a lot'"),
    # the time of a run
    ([*COMPARE, "--stop-after", "0"], "stop-after '0': expected a positive number of seconds"),
    ([*COMPARE, "--stop-after", "-5"], "stop-after '-5': expected a positive number"),
    ([*COMPARE, "--stop-after", "1 week"], "stop-after '1 week': expected a positive number"),
    (["plan", *COMPARE[1:], "--stop-after", "nan"], "stop-after 'nan': expected a positive number"),
    (["plan", *COMPARE[1:], "--json", "--format", "jsonl"], "--json or --format, not both"),
    ([*COMPARE, "--only-failed"], "none of these has been tried yet in 'results/local'"),
    (["exec", "binary.toml"], "not an order"),
    ([*COMPARE, "--stop_after", "5"], "unknown option '--stop_after'; did you mean '--stop-after'?"),
    # files and folders
    ([*COMPARE, "--plugin", "missing.py"], "plugin file 'missing.py' does not exist"),
    ([*COMPARE, "--plugin", "raises.py"], "plugin file 'raises.py' is broken: RuntimeError: no luck"),
    ([*COMPARE, "--plugin", "exits.py"], "plugin file 'exits.py' is broken: SystemExit"),
    ([*COMPARE, "--plugin", "prose.txt"], "plugin file 'prose.txt' is broken: SyntaxError"),
    ([*COMPARE, "--plugin", "empty.py", "--plugin", "./empty.py"], "is given twice"),
    ([*COMPARE, "--plugin", "claims.py"], "two plugins claim the method 'vae'"),
    (["list", "methods", "--plugin", "missing.py"], "plugin file 'missing.py' does not exist"),
    ([*COMPARE, "--out", "prose.txt"], "cannot write to 'prose.txt'"),
    ([*COMPARE, "--out", "prose.txt/below"], "cannot write to 'prose.txt/below'"),
    ([*COMPARE, "--out", ""], "--out has an empty value"),
    (["report", "missing"], "'missing' holds no results"),
    (["report", "prose.txt"], "'prose.txt' holds no results"),
    (["report", "."], "'.' holds no results"),
    (["evaluate", "missing", "--evaluators", "elbo"], "'missing' holds no results"),
    (["compare", "--methods", "avb", "--problems", "mnist"], "harness data fetch mnist"),
    (["data", "verify", "mnist"], "harness data fetch mnist"),
    (["compare", "--methods", "avb", "--problems", "file:missing.npz"], "missing.npz"),
    (["compare", "--methods", "avb", "--problems", "file:prose.txt"], "prose.txt"),
    (["compare", "--suite", "missing.toml"], "suite 'missing.toml': No such file"),
    (["compare", "--suite", "."], "suite '.': Is a directory"),
    (["compare", "--suite", "prose.txt"], "suite 'prose.txt' is not valid TOML"),
    (["compare", "--suite", "binary.toml"], "suite 'binary.toml' is not valid TOML"),
]

PROBLEM = """
from dataclasses import dataclass
import numpy as np
from harness import hookimpl
from harness.problem import DatasetSpec, MLPSpec, Problem

@dataclass(frozen=True, kw_only=True)
class Faulty(Problem):
    name: str = "faulty"
    fault: str = ""
    @property
    def default_budget(self):
        return 500 if self.fault == "budget" else "steps=5"
    def dataset(self):
        x = np.linspace(0, 1, 12).reshape(4, 3)
        if self.fault == "data":
            return x
        if self.fault == "bug":
            return x.no_such_attribute
        x = {"list": x.tolist(), "nan": x * np.nan, "real": 9 * x}.get(self.fault, x)
        return DatasetSpec("numbers", x, x, x, binarisation="dynamic" if self.fault == "list" else "none")
    def model_spec(self):
        return None if self.fault == "networks" else MLPSpec(latent_dim=2, width=int("x" if self.fault == "x" else 3))

@hookimpl
def harness_problems():
    return [Faulty()]
"""

CLAIMS = """
from dataclasses import dataclass
from harness import hookimpl
from harness_plugins.vae import VAE

@dataclass(frozen=True, kw_only=True)
class Other(VAE):
    name: str = "vae"

@hookimpl
def harness_methods():
    return [Other()]
"""


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A working folder with the files that the mistakes speak of."""
    monkeypatch.chdir(tmp_path)
    Path("prose.txt").write_text("It was a dark and stormy night.")
    Path("binary.toml").write_bytes(b"\xff\xfe\x00")
    Path("raises.py").write_text("raise RuntimeError('no luck\\nat all')")
    Path("exits.py").write_text("raise SystemExit(0)")
    Path("empty.py").write_text("")
    Path("claims.py").write_text(CLAIMS)
    Path("problem.py").write_text(PROBLEM)


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Run a command line that must be refused; returns the line."""
    before = sorted(os.listdir())
    code = main(arguments)
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("\n") == 1, said.err
    assert said.err.startswith("harness: error: ")
    assert code == 2
    assert sorted(os.listdir()) == before
    return said.err


@pytest.mark.parametrize(("arguments", "message"), MISTAKES, ids=[" ".join(words) for words, _ in MISTAKES])
def test_a_mistake_is_one_clear_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert message in refused(arguments, capsys)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("bug", "problem 'faulty[fault=bug]': AttributeError: 'numpy.ndarray' object has no attribute 'no_such_att"),
        ("bug", " (problem.py, line 19)"),
        ("x", "'faulty[fault=x]': ValueError: invalid literal for int() with base 10: 'x' (problem.py, line 23)"),
        ("budget", "budget 500: expected steps=N"),
        ("networks", "faulty[fault=networks]: model_spec must return a harness.problem.ModelSpec, got None"),
        ("data", "expected a harness.problem.DatasetSpec as data, got ndarray"),
        ("list", "numbers: train is a list; expected a numpy array"),
        ("nan", "numbers: train has values that are not finite; remove or replace them"),
        ("real", "numbers: train has values from 0.0 to 9.0, but a Bernoulli likelihood needs values in [0, 1]"),
    ],
)
def test_a_mistake_in_a_problem_is_one_clear_line(fault: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Also where another problem of the same command is right."""
    words = ["--methods", "vae", "--plugin", "problem.py", "--problems", f"faulty,faulty[fault={fault}]"]
    assert message in refused(["compare", *words], capsys)
    assert main(["show", f"faulty[fault={fault}]", "--plugin", "problem.py"]) == 0
    [told] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("not available")]
    assert message in told


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert "'cuda' is not available" in refused([*COMPARE, "--device", "cuda"], capsys)


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a folder that even root cannot write to")
def test_a_folder_that_cannot_be_written_to_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert "cannot write to '/proc/results'" in refused([*COMPARE, "--out", "/proc/results"], capsys)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("method = 'avb'", "suite.toml': unknown key 'method'; did you mean 'methods'?"),
        ("suite = 'other.toml'", "unknown key 'suite'"),
        ("methods = 3", "methods = 3: expected text or a list of texts"),
        ("methods = ['avb', 3]", "expected text or a list of texts"),
        ("methods = []", "expected text or a list of texts"),
        ("methods = ''", "expected text or a list of texts"),
        ("methods = {avb = 1}", "expected text or a list of texts"),
        ("methods = 'avb'\nseeds = 1.5", "seeds = 1.5: expected a number, text or a list of numbers"),
        ("methods = 'avb'\nseeds = true", "seeds = True: expected"),
        ("methods = 'avb'\nseeds = ['0']", "seeds = ['0']: expected"),
        ("methods = 'avb'\nseeds = []", "seeds = []: expected"),
        ("methods = 'avb'\nseeds = 0", "seeds 0: how many"),
        ("methods = 'avb'\nseeds = [1, 1]", "1 is given twice"),
        ("methods = 'avb'\nbudget = 500", "budget = 500: expected text"),
        ("methods = 'avb'\nout = ['a']", "out = ['a']: expected text"),
        ("methods = 'avb'\nstop_after = 5", "unknown key 'stop_after'; did you mean 'stop-after'?"),
        ("methods = 'avb'\nstop-after = [5]", "stop-after = [5]: expected a number or text"),
        ("methods = 'avb'\nstop-after = true", "stop-after = True: expected a number or text"),
        ("methods = 'avb'\nstop-after = -0.5", "stop-after -0.5: expected a positive number of seconds"),
        ("methods = 'avb'\nvectorize-seeds = 'yes'", "vectorize-seeds = 'yes': expected true or false"),
        ("methods = 'avb'\nvectorize-seeds = 1", "vectorize-seeds = 1: expected true or false"),
        ("methods = 'avb'\nprecision = true", "precision = True: expected text"),
        ("methods = 'avb'\nmethods = 'vae'", "not valid TOML"),
        ("methods = ['avb', 'avb']", "the same run is asked for twice"),
        ("methods = ['avb', 'vae,avb[batch_size=128]']", "the same run is asked for twice"),
        ("methods = 'abv'", "unknown method 'abv'; did you mean 'avb'?"),
        ("methods = 'avb'\nplugin = 'missing.py'", "plugin file 'missing.py' does not exist"),
        ("methods = 'avb'\nretry = ['okay']", "unknown status to retry 'okay'"),
        ("seeds = 2", "no methods"),
        ("", "no methods"),
    ],
)
def test_a_mistake_in_a_suite_is_one_clear_line(text: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("suite.toml").write_text(text)
    assert message in refused(["compare", "--suite", "suite.toml"], capsys)

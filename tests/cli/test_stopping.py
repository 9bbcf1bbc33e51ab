"""Commands that are interrupted, terminated, killed or out of time, and the same command again."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pandas as pd
import pytest

from harness.checkpoint import reached
from harness.record import TIMING_COLUMNS
from harness.store import Store

SIGNALLED = """
import os
import signal
from dataclasses import dataclass

from harness import hookimpl
from harness_plugins.vae import VAE

calls = 0


@dataclass(frozen=True, kw_only=True)
class Signalled(VAE):
    name: str = "signalled"

    def losses(self, modules, x, noise):
        global calls
        calls += modules.training
        for number in os.environ.get("SIGNALS", "").split():
            if calls == 5 and modules.training:
                signal.raise_signal(int(number))
        return super().losses(modules, x, noise)


@hookimpl
def harness_methods():
    return [Signalled()]
"""

WORDS = "--problems four-points --seeds 1 --budget steps=20 --evaluators exact".split()
GOES_ON = "; finished jobs are kept, and the same command goes on from there"


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("signalled.py").write_text(SIGNALLED)


@pytest.fixture(autouse=True)
def _interruptible() -> Iterator[None]:
    """A shell that runs the tests in the background has them ignore interrupts."""
    usual = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, usual)


Run = Callable[..., tuple[int, str, str]]


def records(folder: str) -> pd.DataFrame:
    return Store(folder).records().drop(columns=TIMING_COLUMNS)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_fit_goes_on_where_it_stopped(
    number: signal.Signals, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["--methods", "signalled", "--plugin", "signalled.py", *WORDS]
    assert run("compare", *words, "--out", "whole")[0] == 0
    usual = signal.getsignal(number)
    monkeypatch.setenv("SIGNALS", str(int(number)))
    code, out, err = run("compare", *words, "--out", "parts")
    assert (code, out) == (130, "")
    assert err.splitlines()[-1] == f"harness: interrupted{GOES_ON}"
    assert signal.getsignal(number) == usual

    monkeypatch.delenv("SIGNALS")
    assert re.search(r"signalled +0 +steps=20 +to fit, 25% done", run("plan", *words, "--out", "parts")[1])
    [job] = json.loads(run("plan", *words, "--out", "parts", "--json")[1])
    assert (job["status"], job["done"], job["step"], job["fraction"]) == ("", False, 5, 0.25)
    code, _, err = run("compare", *words, "--out", "parts")
    assert code == 0
    assert "[1/1] signalled on four-points, seed 0: resumed at step 5, 25%" in err.splitlines()
    assert records("parts").equals(records("whole"))


def test_a_second_interrupt_ends_at_once(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SIGNALS", f"{int(signal.SIGINT)} {int(signal.SIGINT)}")
    code, _, err = run("compare", "--methods", "signalled", "--plugin", "signalled.py", *WORDS, "--out", "here")
    assert code == 130
    assert err.splitlines()[-1] == f"harness: interrupted{GOES_ON}"
    assert not Path("here/checkpoints").exists()


def test_a_run_stops_when_its_time_is_up(run: Run) -> None:
    words = ["--methods", "vae,vae[lr=0.01]", *WORDS, "--out", "here"]
    code, out, err = run("compare", *words, "--stop-after", "1e-9")
    assert (code, out) == (130, "")
    assert err.splitlines()[-1] == f"harness: stopped after 1e-09 seconds{GOES_ON}"
    assert err.count(": started") == 1
    Path("suite.toml").write_text('methods = ["vae", "vae[lr=0.01]"]\nstop-after = 1000\n')
    words = ["--suite", "suite.toml", *WORDS, "--out", "here"]
    assert "2 jobs: 0 done, 2 to fit, 0 to measure" in run("plan", *words, "--stop-after", "1")[1]
    code, _, err = run("compare", *words)
    assert code == 0
    assert err.count("resumed at step 1") == 1


def test_measurements_stop_when_their_time_is_up(run: Run) -> None:
    assert run("compare", "--methods", "vae,vae[lr=0.01]", *WORDS, "--out", "here")[0] == 0
    words = ["evaluate", "here", "--evaluators", "importance[samples=20]"]
    code, _, err = run(*words, "--stop-after", "1e-9")
    assert code == 130
    assert err.splitlines()[-1] == f"harness: stopped after 1e-09 seconds{GOES_ON}"
    measured = Store("here").records()["evaluator"].str.startswith("importance[").sum()
    assert run(*words)[0] == 0
    assert 0 < measured < Store("here").records()["evaluator"].str.startswith("importance[").sum()


KILLED = """
import sys
from harness import checkpoint
checkpoint.EVERY, checkpoint.COST = 0.05, 0.5
from harness.cli import main
sys.exit(main(sys.argv[1:]))
"""


def test_a_killed_fit_goes_on_from_its_last_checkpoint(run: Run) -> None:
    words = ["compare", "--methods", "avb[noise_dim=4]", *WORDS]
    words[words.index("steps=20")] = "steps=250"
    command = [sys.executable, "-c", KILLED, *words, "--out", "parts"]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        while not (kept := list(Path("parts").glob("checkpoints/*/state.safetensors"))):
            assert process.poll() is None, "it ended without a checkpoint"
            time.sleep(0.005)
        process.kill()
    assert process.returncode == -signal.SIGKILL
    store = Store("parts")
    assert store.job_ids() == []
    stopped = reached(store, kept[0].parent.name)
    assert stopped is not None
    assert 0 < stopped.step < 250
    code, _, err = run(*words, "--out", "parts")
    assert code == 0
    assert f"resumed at step {stopped.step}" in err
    assert run(*words, "--out", "whole")[0] == 0
    assert records("parts").equals(records("whole"))
    states = [store.state(kept[0].parent.name) for store in (Store("parts"), Store("whole"))]
    assert states[0].keys() == states[1].keys()
    assert all((states[0][name] == states[1][name]).all() for name in states[0])

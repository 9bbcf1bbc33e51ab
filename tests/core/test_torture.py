"""Workers and the command itself are killed again and again: in the end all is as if nothing had happened.

``HARNESS_TORTURE=full pytest tests/core/test_torture.py`` does it with 60 jobs, 30 workers killed and the command 10
times, in some minutes; usually there are fewer of each.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import psutil
import pytest

import harness
from harness.record import TIMING_COLUMNS
from harness.store import Store

FULL = os.environ.get("HARNESS_TORTURE") == "full"
JOBS, WORKERS_KILLED, COMMANDS_KILLED = (60, 30, 10) if FULL else (6, 3, 1)
HARNESS = [sys.executable, "-c", "import sys; from harness.cli import main; sys.exit(main())"]

PLUGIN = """
import os, time
from dataclasses import dataclass
from harness import hookimpl
from harness_plugins.vae import VAE

@dataclass(frozen=True, kw_only=True)
class Noted(VAE):
    '''Writes down when it begins.'''
    name: str = "noted"

    def fit(self, view, run):
        with open(os.environ["NOTES"], "a") as notes:
            notes.write(f"{run.streams.seed} {time.time()} {os.getpid()}\\n")
        return super().fit(view, run)

    def one_by_one(self):
        return "it writes down each one"

    def schedule(self, modules, fraction):
        time.sleep(0.03)

@hookimpl
def harness_methods():
    return [Noted()]
"""


def results(records: pd.DataFrame) -> pd.DataFrame:
    same = records.drop(columns=[*TIMING_COLUMNS, "run_id", "timing_valid", "threads"])
    return same.sort_values(["job_id", "evaluator", "metric"]).reset_index(drop=True)


def workers_of(command: psutil.Popen) -> list[psutil.Process]:
    """Those that have begun to be some: not the process that cleans up after them."""
    try:
        return [child for child in command.children() if any("spawn_main" in word for word in child.cmdline())]
    except psutil.Error:
        return []


class Note(NamedTuple):
    seed: int
    when: float
    worker: int


def begun(path: Path) -> list[Note]:
    lines = [line.split() for line in path.read_text().splitlines()] if path.exists() else []
    return [Note(int(seed), float(when), int(worker)) for seed, when, worker in lines]


def test_nothing_is_lost_or_done_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plugin, notes, stream = tmp_path / "noted.py", tmp_path / "notes", random.Random(time.time_ns())
    plugin.write_text(PLUGIN)
    monkeypatch.setenv("NOTES", str(notes))
    given: dict[str, Any] = {
        "problems": "four-points", "seeds": JOBS, "budget": "steps=100", "evaluators": "exact", "plugins": [plugin]
    }  # fmt: skip
    words = ["--problems", "four-points", "--seeds", str(JOBS), "--budget", "steps=100", "--evaluators", "exact"]
    words += ["--methods", "noted", "--plugin", str(plugin), "--jobs", "2", "--retry", "killed"]
    out = tmp_path / "tortured"

    def run() -> psutil.Popen:
        return psutil.Popen([*HARNESS, "compare", *words, "--out", str(out)], stderr=subprocess.DEVNULL,
                            stdout=subprocess.DEVNULL)  # fmt: skip

    killed = {"workers": 0, "commands": 0}
    done = False
    while not_yet(killed) and not done:
        command = run()
        for _ in range(WORKERS_KILLED // COMMANDS_KILLED):
            seen = len(begun(notes))
            while len(begun(notes)) == seen and command.poll() is None:
                time.sleep(0.05)
            time.sleep(stream.uniform(0.0, 2.0))
            workers = workers_of(command)
            if killed["workers"] % 2 == 0:  # one that is at a fit, which takes three seconds; else any
                workers = [worker for worker in workers if worker.pid == begun(notes)[-1].worker]
            if workers:
                stream.choice(workers).kill()
                killed["workers"] += 1
        time.sleep(stream.uniform(0.0, 2.0))
        killed["commands"] += command.poll() is None
        done = command.poll() == 0
        with suppress(psutil.NoSuchProcess):
            command.kill()
        command.wait()
    assert not done, f"done before all were killed: {killed}"
    while run().wait():  # what was killed last is tried again
        pass
    tortured = Store(out).records()
    monkeypatch.setenv("NOTES", str(tmp_path / "other notes"))
    undisturbed = harness.compare("noted", out=tmp_path / "undisturbed", **given)
    assert set(tortured["status"]) == {"ok"}
    pd.testing.assert_frame_equal(results(tortured), results(undisturbed))
    assert again_after_the_end(begun(notes), out, tortured) == []
    assert len(begun(notes)) >= JOBS + 1  # some were indeed disturbed


def not_yet(killed: dict[str, int]) -> bool:
    return killed["workers"] < WORKERS_KILLED or killed["commands"] < COMMANDS_KILLED


def again_after_the_end(notes: Sequence[Note], out: Path, records: pd.DataFrame) -> list[int]:
    """Seeds whose fit began again after it had been stored."""
    ids = dict(zip(records["seed"], records["job_id"], strict=True))
    return [note.seed for note in notes if note.when > (out / f"jobs/{ids[note.seed]}.json").stat().st_mtime]

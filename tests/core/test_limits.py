"""Methods that misbehave: each gets its row within its limit, and the others are what they would be without it."""

from __future__ import annotations

import itertools
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

import harness
from harness.executors import End, Limits, WorkerProcesses
from harness.options import UserError, parse_bytes, parse_seconds
from harness.stopping import Stop

SMALL: dict[str, Any] = {"problems": "four-points", "budget": "steps=30", "evaluators": "exact,reconstruction"}

BAD = """
import ctypes, multiprocessing, os, random, sys, time
from dataclasses import dataclass
import numpy as np
import torch
import harness.checkpoint
from harness import hookimpl
from harness.evaluator import Evaluator
from harness_plugins.vae import VAE

def loops():
    while True: ...

def sleeps_in_c():
    ctypes.CDLL(None).sleep(1000)

def takes_memory():
    taken = []
    while True:
        taken.append(torch.ones(2**24))

def segfaults():
    ctypes.string_at(0)

def exits():
    os._exit(0)

def exits_politely():
    sys.exit("enough")

def prints():
    line = "x" * 1023 + "\\n"
    for _ in range(2**18):
        sys.stdout.write(line)
    os.write(2, b"the end of it\\n")
    os._exit(9)

def closes_stdout():
    os.close(1), os.close(2), sys.stdout.close(), sys.stderr.close()

def is_no_number():
    return torch.tensor(float("nan"))

def raises():
    raise ValueError("no such luck")

def meddles():
    torch.manual_seed(7), np.random.seed(7), random.seed(7)
    torch.set_default_dtype(torch.float64)
    torch.set_grad_enabled(False)

@dataclass(frozen=True, kw_only=True)
class Bad(VAE):
    '''Does it at its third step.'''
    name: str = "bad"
    what: str = "loops"

    def losses(self, modules, x, noise):
        seen[0] += torch.is_grad_enabled()  # not while it validates
        found = globals()[self.what]() if seen[0] == 3 else None
        losses = super().losses(modules, x, noise)
        return losses if found is None else {name: loss * found for name, loss in losses.items()}

    def fit(self, view, run):
        seen[0] = 0
        return super().fit(view, run)

    def one_by_one(self):
        return "it counts its steps"

seen = [0]
if multiprocessing.parent_process():  # in a worker, not in the process of all tests
    harness.checkpoint.EVERY = 0.5

@dataclass(frozen=True, kw_only=True)
class Dawdling(VAE):
    '''Ten steps a second.'''
    name: str = "dawdling"

    def schedule(self, modules, fraction):
        time.sleep(0.1)

@dataclass(frozen=True, kw_only=True)
class Endless(Evaluator):
    '''Measures for ever.'''
    name: str = "endless"

    def measure(self, fit, problem, run):
        loops()

@hookimpl
def harness_methods():
    return [Bad(), Dawdling()]

@hookimpl
def harness_evaluators():
    return [Endless()]
"""


@pytest.fixture(scope="module")
def bad(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("plugin") / "bad.py"
    path.write_text(BAD)
    return path


def numbers(records: pd.DataFrame) -> pd.DataFrame:
    return records.sort_values(["config", "metric"])[["metric", "value", "status"]].reset_index(drop=True)


LIMITED: dict[str, Any] = {"time_limit": 8, "memory_limit": "1GiB"}
FAULTS = {
    "loops": ("timeout", "time limit of 8 seconds"),
    "sleeps_in_c": ("timeout", "time limit of 8 seconds"),
    "takes_memory": ("killed", "more than the memory limit of 1,024 MiB"),
    "segfaults": ("killed", "SIGSEGV"),
    "exits": ("killed", "exit code 0"),
    "exits_politely": ("failed", "SystemExit: enough"),
    "prints": ("killed", "exit code 9"),
    "closes_stdout": ("ok", ""),
    "is_no_number": ("diverged", "objective is nan"),
    "raises": ("failed", "ValueError: no such luck"),
    "meddles": ("failed", "RuntimeError"),
}
AFTER = {what: f"vae[lr={number / 1000}]" for number, what in enumerate(FAULTS, start=1)}


@pytest.fixture(scope="module")
def faulty(tmp_path_factory: pytest.TempPathFactory, bad: Path) -> tuple[Path, pd.DataFrame]:
    """A good job after each bad one, in one worker as far as it lives."""
    out = tmp_path_factory.mktemp("faulty")
    methods = [method for what, good in AFTER.items() for method in (f"bad[what={what}]", good)]
    return out, harness.compare(methods, seeds="1", plugins=[bad], out=out, **LIMITED, **SMALL)


@pytest.mark.parametrize("what", FAULTS)
def test_a_fault_costs_its_own_job_only(faulty: tuple[Path, pd.DataFrame], what: str) -> None:
    _, records = faulty
    fault = records[records["config"].str.contains(f'"{what}"')]
    status, reason = FAULTS[what]
    assert len(fault)
    assert set(fault["status"]) == {status}
    assert fault["reason"].fillna("").str.contains(reason).all()


def test_jobs_after_a_fault_are_what_they_are_without(tmp_path: Path, faulty: tuple[Path, pd.DataFrame]) -> None:
    _, records = faulty
    well = records[records["method"] == "vae"]
    alone = harness.compare(list(AFTER.values()), seeds="1", out=tmp_path, **SMALL)
    pd.testing.assert_frame_equal(numbers(well), numbers(alone), check_dtype=False)
    assert set(well["timing_valid"]) == {True}


def test_the_last_words_are_kept(faulty: tuple[Path, pd.DataFrame]) -> None:
    """Of a quarter of a gigabyte the end; and where the program was when it met what killed it."""
    out, records = faulty

    def said(what: str) -> str:
        [job_id] = records[records["config"].str.contains(f'"{what}"')]["job_id"]
        return (out / f"jobs/{job_id}.output.txt").read_text()

    assert len(said("prints")) == 2**16
    assert said("prints").endswith("x\nthe end of it\n")
    assert "Segmentation fault" in said("segfaults")
    assert "in losses" in said("segfaults")


def test_a_measurement_without_end_costs_nothing_else(tmp_path: Path, bad: Path) -> None:
    given = {**SMALL, "evaluators": "exact,endless,reconstruction", "plugins": [bad], "out": tmp_path, "seeds": "1"}
    records = harness.compare("vae", time_limit=3, **given)
    by = records.groupby("evaluator")["status"].unique().map(list).to_dict()
    assert by == {"exact": ["ok"], "endless": ["timeout"], "reconstruction": ["ok"]}
    again = harness.compare("vae", time_limit=3, **given)
    assert list(again["started_at"]) == list(records["started_at"]), "what has ended is tried again unasked"


def test_a_fit_that_is_out_of_time_goes_on_when_it_is_tried_again(tmp_path: Path, bad: Path) -> None:
    """From its checkpoint, to the same end. Without a new try it has ended."""
    given = {**SMALL, "budget": "steps=80", "seeds": "1", "plugins": [bad]}
    parts = partial(harness.compare, "dawdling", out=tmp_path / "parts", time_limit=5, **given)
    records = parts()
    assert set(records["status"]) == {"timeout"}
    assert list(parts()["started_at"]) == list(records["started_at"])
    tries = itertools.count(1)
    while "timeout" in set(records["status"]) and next(tries) < 30:
        records = parts(retry=["timeout"])
    whole = harness.compare("dawdling", out=tmp_path / "whole", **given)
    pd.testing.assert_frame_equal(numbers(records), numbers(whole), check_dtype=False)
    assert records["fit_parts"].min() > 1


def _slow(boss: Any) -> Any:
    def work(task: float) -> None:
        boss.tell("begins", task)
        for _ in range(3):
            boss.piece_begins()
            time.sleep(task)

    return work


def test_the_limit_is_of_a_piece_of_the_work_and_not_of_all_of_it() -> None:
    begun: list[float] = []
    dead: list[tuple[float, float]] = []

    def heard(*said: Any) -> None:
        if "begins" in said:
            begun.append(time.monotonic())

    def died(worker: int, task: float, end: End) -> list[float]:
        dead.append((task, time.monotonic()))
        assert end.status == "timeout"
        return []

    WorkerProcesses(1, Limits(seconds=1.5)).run(_slow, [0.7, 1000.0, 0.1], heard, died, Stop())
    [(task, at)] = dead
    assert task == 1000.0
    assert len(begun) == 3
    assert at - begun[1] < 20  # from when it began: how long a process takes to start is the machine's affair


@pytest.mark.parametrize("limit", [{"time_limit": "10 parsecs"}, {"memory_limit": "-1GiB"}, {"time_limit": True}])
def test_limits_that_make_no_sense(tmp_path: Path, limit: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"limit .*: expected a positive number of"):
        harness.compare("vae", out=tmp_path / "out", **limit, **SMALL)
    assert not (tmp_path / "out").exists()


def test_quantities_with_units() -> None:
    seconds = [parse_seconds("t", text) for text in (90, "90", "90s", "1.5min", "2 h", "1e3S")]
    assert seconds == [90, 90, 90, 90, 7200, 1000]
    sizes = [parse_bytes("m", text) for text in (5, "5e2", "500MB", "500mib", "2 GB", "0.5GiB")]
    np.testing.assert_allclose(sizes, [5, 500, 5e8, 500 * 2**20, 2e9, 2**29], rtol=0)
    for text in ("", "s", "inf", "nan", "0", "-1s", "1d", "0x10", None, True):
        with pytest.raises(UserError):
            parse_seconds("t", text)  # pyright: ignore[reportArgumentType]

"""What benchmarks tell: medians with their intervals, the table of them, and when one has become worse."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from harness.loading import import_file

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
table: Any = import_file(BENCHMARKS / "table.py")
turns: Any = import_file(BENCHMARKS / "turns.py")


# Medians


@pytest.mark.parametrize(("n", "k"), [(1, 0), (4, 0), (5, 1), (8, 2), (30, 11), (100, 42)])
def test_the_rank_of_the_interval_is_that_of_tables(n: int, k: int) -> None:
    """Conover, Practical Nonparametric Statistics, from the binomial distribution with p = 1/2."""
    assert turns.rank(n) == k


@pytest.mark.parametrize("n", [5, 9, 20, 61])
def test_the_interval_covers_the_median_as_often_as_it_says(n: int) -> None:
    """Of skewed values; four standard errors below 90 % are one failure in 30,000 were it true."""
    stream, trials = np.random.default_rng(0), 2000
    covered = 0
    for _ in range(trials):
        found = turns.Median.of(stream.lognormal(size=n).tolist())
        covered += found.low <= 1 <= found.high
    assert covered / trials > 0.9 - 4 * math.sqrt(0.9 * 0.1 / trials)


def test_too_few_rounds_say_nothing() -> None:
    found = turns.Median.of([1.0, 3.0])
    assert (found.median, found.low, found.high, found.rounds) == (2.0, -math.inf, math.inf, 2)


def test_times_as_fast_is_the_median_of_the_rounds_ratios() -> None:
    """A machine that is slow in one round is so for both."""
    times = {"ours": [1.0, 10.0, 2.0], "theirs": [2.0, 30.0, 2.0], "others": [1.0, 10.0, 2.0]}
    theirs, others = turns.times_as_fast(times, "ours", of_one=4)
    assert (theirs.ours, theirs.peer, theirs.ratio.median) == ("ours", "theirs", 2.0)
    assert (theirs.our_value, theirs.peer_value) == (0.5, 0.5)
    assert others.ratio.median == 1.0


def test_the_slope_is_that_of_a_power() -> None:
    sizes = [1, 2, 4, 8]
    found = turns.slope(sizes, [[c * size**1.5 for c in (1.0, 3.0, 0.1)] for size in sizes])
    assert found.median == pytest.approx(1.5)


def test_a_share_of_the_peak_is_of_operations_a_second() -> None:
    product = turns.MatrixProduct(side=64, times=3)
    share = turns.share_of_peak("ours", 2 * product.operations, [4.0, 4.0], product, [1.0, 1.0])
    assert share.ratio.median == pytest.approx(0.5)
    assert share.peer_value == pytest.approx(3 * 2 * 64**3 / 1e9)
    product()
    assert 0 < product.peak < math.inf


# The table


def measured(low: float = 0.9, high: float = 1.1, *, peer: str = "by hand", cores: int = 2) -> dict[str, Any]:
    """As pytest-benchmark writes it."""
    ratio = {"median": (low + high) / 2, "low": low, "high": high, "rounds": 30}
    slope = {"median": 1.0, "low": 0.9, "high": 1.1, "rounds": 30}
    facts = {"ours": "harness", "peer": peer, "unit": "s", "our_value": 0.00741, "peer_value": 2.0, "ratio": ratio}
    return {
        "machine_info": {"node": "somebody", "cpu": {"brand_raw": "A Processor", "count": cores}},
        "commit_info": {"id": "0123456789abcdef", "dirty": True, "project": "somebody's", "branch": "main"},
        "datetime": "2026-01-31T12:34:56+00:00",
        "benchmarks": [
            {
                "fullname": "benchmarks/test_x.py::test_y",
                "extra_info": {"what": "training loop", "threads": 2, "ratios": [facts], "measures": {"slope": slope}},
                "stats": {"data": [1.0]},
            },
            {"fullname": "benchmarks/test_x.py::test_z", "extra_info": {}, "stats": {}},
        ],
    }


def speeds(*args: Any, **kwargs: Any) -> Any:
    return table.read(measured(*args, **kwargs))


def test_the_table_has_values_ratio_interval_and_machine() -> None:
    text = table.markdown(speeds())
    assert "| training loop | harness, 7.41 ms | by hand, 2 s | 1 (0.9, 1.1) | 30 |" in text
    assert "| training loop | slope | 1 (0.9, 1.1) | 30 |" in text
    assert "A Processor, 2 cores, threads [2]" in text
    assert "Measured at commit 0123456 and changes that are in none, 2026-01-31." in text
    old = {name: value for name, value in measured().items() if name not in ("commit_info", "datetime")}
    assert "Measured" not in table.markdown(table.read(old))


def test_what_is_kept_is_read_as_the_same_and_names_no_machine() -> None:
    kept = table.slim(measured())
    assert table.read(json.loads(json.dumps(kept))) == speeds()
    assert "somebody" not in json.dumps(kept)


@pytest.mark.parametrize(
    ("low", "high", "is_worse"), [(0.7, 0.89, True), (0.7, 0.9, False), (0.95, 1.0, False), (1.2, 1.3, False)]
)
def test_a_ratio_is_worse_only_if_its_interval_is_below(low: float, high: float, is_worse: bool) -> None:
    assert bool(table.worse(speeds(low, high), speeds(0.9, 1.1))) == is_worse


@pytest.mark.parametrize(
    ("name", "cores", "is_worse"), [("log-log slope", 2, True), ("log-log slope", 4, True), ("seconds", 2, True),
                                    ("seconds", 4, False)],
)  # fmt: skip
def test_a_measure_is_worse_only_if_its_interval_is_above(name: str, cores: int, is_worse: bool) -> None:
    """Seconds on another machine say nothing."""

    def told(low: float, high: float, cores: int) -> Any:
        found = measured(cores=cores)
        facts = found["benchmarks"][0]["extra_info"]
        facts["measures"] = {name: {"median": (low + high) / 2, "low": low, "high": high, "rounds": 9}}
        return table.read(found)

    assert bool(table.worse(told(1.2, 1.3, cores), told(0.9, 1.1, 2))) == is_worse
    assert table.worse(told(1.0, 1.3, cores), told(0.9, 1.1, 2)) == []
    assert table.worse(told(0.1, 0.2, cores), told(0.9, 1.1, 2)) == []


def test_what_cannot_be_compared_is_said() -> None:
    assert table.worse(speeds(0.1, 0.2, peer="pyro"), speeds()) == []
    notes = table.not_compared(speeds(peer="pyro", cores=4), speeds())
    assert [note.partition(":")[0] for note in notes] == [
        "not measured this time", "not measured before", "another machine",
    ]  # fmt: skip
    assert table.not_compared(speeds(), speeds()) == []


def test_two_ratios_of_one_name_are_refused() -> None:
    twice = measured()
    twice["benchmarks"] *= 2
    with pytest.raises(ValueError, match="two ratios have the name training loop, harness, by hand"):
        table.read(twice)


def command(*words: str | Path) -> subprocess.CompletedProcess[str]:
    arguments = [sys.executable, str(BENCHMARKS / "table.py"), *map(str, words)]
    return subprocess.run(arguments, capture_output=True, text=True, timeout=60, check=False)


def test_the_command_writes_and_compares(tmp_path: Path) -> None:
    before, after = tmp_path / "before.json", tmp_path / "after.json"
    before.write_text(json.dumps(measured(0.9, 1.1)))
    after.write_text(json.dumps(measured(0.5, 0.6)))
    assert command(before, "--into", tmp_path / "speed").returncode == 0
    assert "| training loop |" in (tmp_path / "speed/speed.md").read_text()
    kept = tmp_path / "speed/speed.json"
    same, worse = command(before, "--against", kept), command(after, "--against", kept)
    assert (same.returncode, same.stdout) == (0, "0 of 2 are worse\n")
    assert worse.returncode == 1
    assert "worse: training loop: harness against by hand was 1 (0.9, 1.1), is 0.55 (0.5, 0.6)" in worse.stdout


TINY = """
from benchmarks.turns import Median, take_turns, tell, times_as_fast

def test_tiny(benchmark):
    times = take_turns(benchmark, {"ours": lambda: None, "theirs": lambda: sum(range(10_000))}, rounds=6)
    tell(benchmark, "tiny", ratios=times_as_fast(times, "ours"), measures={"seconds": Median.of(times["ours"])})
"""


def test_what_a_benchmark_tells_is_in_the_table(tmp_path: Path) -> None:
    """As pytest-benchmark keeps it, in the other order every second round and without the round before."""
    (tmp_path / "test_tiny.py").write_text(TINY)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    environment = {**os.environ, "PYTHONPATH": str(BENCHMARKS.parent)}
    for name in ("HARNESS_BENCHMARK_ROUNDS", "PYTEST_XDIST_WORKER"):  # nothing is timed where tests run in parallel
        environment.pop(name, None)
    subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", ".", "--benchmark-json=new.json"],
        cwd=tmp_path, env=environment, check=True, capture_output=True, timeout=120,
    )  # fmt: skip
    found = table.read(json.loads((tmp_path / "new.json").read_text()))
    [line], [measure] = found.lines, found.measures
    assert (line.key, line.rounds, measure.name) == (("tiny", "ours", "theirs"), 6, "seconds")
    assert 1 < line.low <= line.median <= line.high


@pytest.mark.parametrize("content", ["{}", "no JSON", '{"benchmarks": [{}]}'])
def test_a_file_of_another_kind_is_one_line_and_code_2(tmp_path: Path, content: str) -> None:
    (tmp_path / "new.json").write_text(content)
    done = command(tmp_path / "new.json")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr

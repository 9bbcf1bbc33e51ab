"""What `--jobs` brings: the same comparison with one job at a time and with several, as whole processes, in turns.

Run with ``pytest benchmarks/test_throughput.py --benchmark-only --log-cli-level=INFO``. Starting Python, loading torch
and starting the workers are in the times.
"""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.turns import take_turns, tell, times_as_fast

HARNESS = [sys.executable, "-c", "import sys; from harness.cli import main; sys.exit(main())"]
CORES = psutil.cpu_count() or 1


@pytest.mark.parametrize(("method", "steps"), [("vae", 3000), ("avb", 1500)])
def test_jobs_at_once(benchmark: BenchmarkFixture, tmp_path: Path, method: str, steps: int) -> None:
    """Two fits for each core, with an evaluation each."""
    numbers = itertools.count()

    def compare(jobs: int) -> None:
        words = ["compare", "--methods", method, "--problems", "digits", "--seeds", str(2 * CORES)]
        words += ["--budget", f"steps={steps}", "--evaluators", "reconstruction", "--jobs", str(jobs)]
        subprocess.run([*HARNESS, *words, "--out", str(tmp_path / str(next(numbers)))], check=True, capture_output=True)

    at_once, one = f"{CORES} jobs at once", "one job at a time"
    ways = {at_once: lambda: compare(CORES), one: lambda: compare(1)}
    times = take_turns(benchmark, ways, rounds=5, warm_up=0)
    tell(benchmark, f"{2 * CORES} fits of {method} on the digits", ratios=times_as_fast(times, at_once))

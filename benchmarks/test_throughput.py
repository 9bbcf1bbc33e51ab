"""What `--jobs` brings: the same comparison with one job at a time and with several, as whole processes, in turns.

Run with ``pytest benchmarks/test_throughput.py --benchmark-only --log-cli-level=INFO``. Starting Python, loading torch
and starting the workers are in the times. The ratios of the rounds are kept in ``extra_info`` too.
"""

from __future__ import annotations

import itertools
import logging
import statistics
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from pytest_benchmark.fixture import BenchmarkFixture

log = logging.getLogger(__name__)

ROUNDS = 3
HARNESS = [sys.executable, "-c", "import sys; from harness.cli import main; sys.exit(main())"]
CORES = psutil.cpu_count() or 1


@pytest.mark.parametrize(("method", "steps"), [("vae", 6000), ("avb", 3000)])
def test_jobs_at_once(benchmark: BenchmarkFixture, tmp_path: Path, method: str, steps: int) -> None:
    """Two fits for each core, with an evaluation each."""
    numbers = itertools.count()

    def seconds(jobs: int) -> float:
        words = ["compare", "--methods", method, "--problems", "digits", "--seeds", str(2 * CORES)]
        words += ["--budget", f"steps={steps}", "--evaluators", "reconstruction", "--jobs", str(jobs)]
        began = time.perf_counter()
        subprocess.run([*HARNESS, *words, "--out", str(tmp_path / str(next(numbers)))], check=True, capture_output=True)
        return time.perf_counter() - began

    rounds: list[tuple[float, float]] = []
    benchmark.pedantic(lambda: rounds.append((seconds(1), seconds(CORES))), rounds=ROUNDS, iterations=1)
    ratios = sorted(alone / beside for alone, beside in rounds)
    benchmark.extra_info["ratios"] = ratios
    log.info("%s, --jobs %d: %.2f times as fast (rounds %s)", method, CORES, statistics.median(ratios), ratios)

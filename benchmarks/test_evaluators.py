"""Speed and memory of evaluators: time, the part of the matrix-product peak that it is, and whether memory is bounded.

Run with ``pytest benchmarks/test_evaluators.py --log-cli-level=INFO``. Evaluations take turns with products of large
matrices, of float32 or float64 as theirs are; trees and sorted projections have seconds only.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

import harness
from benchmarks.mnist_sized import MNISTShaped, operations
from benchmarks.turns import CPU, MatrixProduct, Median, share_of_peak, take_turns, tell
from harness.evaluator import EvaluationRun, Evaluator, Measurement
from harness.method import Fit
from harness.problem import Problem, placed
from harness.registry import Registry

REGISTRY = Registry.discover()
HERE = Path(__file__).parent
BUDGET = "steps=200"


@dataclass(frozen=True)
class Case:
    """An evaluator with a fit that it measures.

    Args:
        method, evaluator: As on the command line.
        problem: The same, or that of the size of MNIST.
        products: What its matrix products are in; None where they are only those of drawing.
    """

    evaluator: str
    method: str
    problem: str | MNISTShaped
    products: torch.dtype | None


CASES = [
    Case("importance[observations=50,samples=1000]", "vae", MNISTShaped(), torch.float32),
    Case("exact", "vae", "four-points", torch.float64),
    Case("mmd[observations=1,samples=4000]", "full-rank", "eight-schools-avb", torch.float64),
    Case("knn[observations=1,samples=4000]", "full-rank", "eight-schools-avb", None),
    Case("sliced-wasserstein[observations=1,samples=4000]", "full-rank", "eight-schools-avb", None),
]


@cache
def fitted(case: Case) -> tuple[Fit, Problem]:
    problem = case.problem if isinstance(case.problem, Problem) else REGISTRY.select("problems", case.problem)[0]
    return harness.fit(case.method, problem, budget=BUDGET), problem


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.evaluator.partition("[")[0])
def test_evaluation(benchmark: BenchmarkFixture, case: Case) -> None:
    evaluator: Evaluator
    [evaluator] = REGISTRY.select("evaluators", case.evaluator)
    fit, problem = fitted(case)
    run = EvaluationRun(placed(problem, CPU, torch.float32), problem, CPU, torch.float32, 0)

    def measure() -> list[Measurement]:
        with torch.no_grad():
            return evaluator.measure(fit, problem, run)

    product, counted = MatrixProduct(case.products or torch.float32), operations(measure)
    times = take_turns(benchmark, {"evaluation": measure, "product": product}, rounds=7)
    share = share_of_peak("harness", counted, times["evaluation"], product, times["product"])
    tell(
        benchmark,
        f"evaluation by {case.evaluator} of {case.method} on {problem.label}",
        gflop=counted / 1e9,
        peak_gflop_per_second=product.peak,
        measures={"seconds": Median.of(times["evaluation"])},
        ratios=[share] if case.products else [],
    )


# Memory

MIB = 2**20


def raised(method: str, problem: str, evaluator: str, samples: int) -> int:
    """Bytes by which one evaluation of one observation raises the peak of a new process."""
    words = [method, problem, evaluator, str(samples)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, str(HERE / "peak_memory.py"), "evaluation", *words]
    return int(subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a process's own peak is read from /proc")
@pytest.mark.parametrize(
    ("evaluator", "method", "problem", "few", "many", "bytes_at_once"),
    [
        # The outputs of the decoder for all samples at once.
        pytest.param("importance", "vae", "digits", 20_000, 1_000_000, lambda n: n * 64 * 4, id="importance"),
        # One matrix of all pairs of draws.
        pytest.param("mmd", "full-rank", "eight-schools-avb", 1_000, 8_000, lambda n: n * n * 8, id="mmd"),
    ],
)
def test_memory_does_not_grow_with_samples(
    benchmark: BenchmarkFixture,
    evaluator: str,
    method: str,
    problem: str,
    few: int,
    many: int,
    bytes_at_once: Callable[[int], int],
) -> None:
    """By less than a quarter of what all at once would take more, between few samples and many."""
    at_few = raised(method, problem, evaluator, few)
    at_many = benchmark.pedantic(lambda: raised(method, problem, evaluator, many), rounds=1)
    tell(
        benchmark,
        f"memory of evaluation by {evaluator} on {problem}",
        samples=[few, many],
        raised_mib=[at_few / MIB, at_many / MIB],
        all_at_once_mib=bytes_at_once(many) / MIB,
    )
    assert at_many - at_few < (bytes_at_once(many) - bytes_at_once(few)) / 4

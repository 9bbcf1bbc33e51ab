"""Speed of one training step and of one evaluation of every registered method, on specs that all methods share.

Run with ``pytest benchmarks/ --benchmark-only``. What a method reaches after a short fit (log-likelihood and KL, with
the kind of each) is kept beside its times in ``extra_info`` (see it with ``--benchmark-json=FILE``).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from pydantic import PositiveInt
from pytest_benchmark.fixture import BenchmarkFixture

import harness
from harness.clock import Clock
from harness.evaluator import EvaluationRun, Evaluator
from harness.method import Budget, Fit, Method, Run
from harness.problem import DatasetSpec, MLPSpec, ModelSpec, Problem, placed
from harness.registry import Registry
from harness.seeding import Streams
from harness.training import GradientMethod, stepper

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPE = torch.float32
FIT = "steps=300"
REGISTRY = Registry.discover()


@dataclass(frozen=True, kw_only=True)
class MNISTShaped(Problem):
    """Noise in the shape of MNIST, with the networks of the paper's fully connected experiment: for times only."""

    name: str = "mnist-shaped-noise"
    latent_dim: PositiveInt = 32

    @property
    def default_budget(self) -> str:
        return "steps=300"

    def dataset(self) -> DatasetSpec:
        pixels = np.random.default_rng(0).integers(0, 256, size=(6000, 28, 28), dtype=np.uint8)
        return DatasetSpec(
            self.name, pixels[:4000], pixels[4000:5000], pixels[5000:], levels=255, binarisation="dynamic"
        )

    def model_spec(self) -> ModelSpec:
        return MLPSpec(latent_dim=self.latent_dim)


def things(kind: str, *names: str) -> list[Any]:
    provided = getattr(REGISTRY, kind)
    return [pytest.param(provided[name].thing, id=name) for name in names or provided]


METHODS = things("methods")
PROBLEMS = things("problems", "four-points", "digits")
TIMED_ONLY = [pytest.param(MNISTShaped(), id="mnist-shaped-noise")]


@cache
def short_fit(method: Method, problem: Problem) -> Fit:
    return harness.fit(method, problem, budget=FIT)


@pytest.fixture(scope="module")
def reached(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Method, Problem], dict[str, Any]]:
    """What a short fit reaches: log-likelihood and KL to the prior, each with its kind and error."""
    out = tmp_path_factory.mktemp("results")

    @cache
    def measured(method: Method, problem: Problem) -> dict[str, Any]:
        records = harness.compare([method], [problem], seeds=1, budget=FIT, out=out)
        return {"steps": FIT, **numbers(records, "log_likelihood"), **numbers(records, "kl_to_prior")}

    return measured


def numbers(records: pd.DataFrame, metric: str) -> dict[str, Any]:
    """The best-founded measurement of a metric: the exact one, if there is one."""
    rows = records[(records["metric"] == metric) & (records["status"] == "ok")]
    rows = rows.sort_values("kind", key=lambda kinds: kinds != "exact", kind="stable")
    assert len(rows) > 0, f"no evaluator measures {metric}"
    row = rows.iloc[0]
    assert math.isfinite(row["value"])
    return {metric: row["value"], f"{metric}_kind": row["kind"], f"{metric}_stderr": row["stderr"]}


def describe(benchmark: BenchmarkFixture, method: Method, problem: Problem, **more: Any) -> None:
    benchmark.group = f"{more.pop('what')} on {problem.label}"
    benchmark.extra_info |= {
        "method": method.name,
        "config": method.config,
        "problem": problem.label,
        "spec_hash": problem.spec_hash,
        "device": DEVICE.type,
        "threads": torch.get_num_threads(),
        **more,
    }


@pytest.mark.parametrize("problem", PROBLEMS + TIMED_ONLY)
@pytest.mark.parametrize("method", METHODS)
def test_training_step(benchmark: BenchmarkFixture, reached: Any, method: Method, problem: Problem) -> None:
    streams = Streams(0, problem.label, method.name, DEVICE)
    data = placed(problem, DEVICE, DTYPE)
    run = Run(DEVICE, DTYPE, Budget("steps", 1), streams, Clock(DEVICE))
    view = problem.training_view(data, streams)
    step = stepper(method, view, run) if isinstance(method, GradientMethod) else lambda: method.fit(view, run)
    known = {} if isinstance(problem, MNISTShaped) else reached(method, problem)
    describe(
        benchmark, method, problem, what="one training step", batch_size=getattr(method, "batch_size", None), **known
    )
    benchmark.pedantic(synchronised(step), rounds=30, iterations=5, warmup_rounds=3)


USUAL = [parameter for parameter in things("evaluators") if parameter.values[0].by_default]
"""The others take minutes each; annealing has benchmarks of its own."""


@pytest.mark.parametrize("evaluator", USUAL)
@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("method", METHODS)
def test_evaluation(
    benchmark: BenchmarkFixture, reached: Any, method: Method, problem: Problem, evaluator: Evaluator
) -> None:
    fit = short_fit(method, problem)
    reason = evaluator.undefined(fit, problem)
    if reason is not None:
        pytest.skip(f"{evaluator.name}: {reason}")
    run = EvaluationRun(placed(problem, DEVICE, DTYPE), problem, DEVICE, DTYPE, 0)
    describe(
        benchmark, method, problem, what=f"evaluation by {evaluator.name}", evaluator=evaluator.name,
        settings=evaluator.config, **reached(method, problem),
    )  # fmt: skip
    with torch.no_grad():
        measurements = benchmark.pedantic(
            synchronised(lambda: evaluator.measure(fit, problem, run)), rounds=3, iterations=1, warmup_rounds=1
        )
    assert all(math.isfinite(measurement.value) for measurement in measurements)


def synchronised(work: Callable[[], Any]) -> Callable[[], Any]:
    """Work that is over when the device has done it."""
    if DEVICE.type != "cuda":
        return work

    def waited() -> Any:
        result = work()
        torch.cuda.synchronize(DEVICE)
        return result

    return waited

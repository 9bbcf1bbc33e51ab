"""Speed of an evaluation of every amortised method by every evaluator that is used by default.

Run with ``pytest benchmarks/test_methods.py --benchmark-only``. What a method reaches after a short fit (log-likelihood
and KL, with the kind of each) is kept beside its times in ``extra_info`` (see it with ``--benchmark-json=FILE``).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import pandas as pd
import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

import harness
from benchmarks.turns import DEVICE, take_turns, tell
from harness.evaluator import EvaluationRun, Evaluator, Measurement
from harness.method import Fit, Method
from harness.problem import Problem, placed
from harness.registry import Registry
from harness.training import GradientMethod

DTYPE = torch.float32
FIT = "steps=300"
REGISTRY = Registry.discover()


def amortised(method: Method) -> bool:
    return isinstance(method, GradientMethod) and method.one_by_one() is None


def things(kind: str, *names: str) -> list[Any]:
    provided = getattr(REGISTRY, kind)
    return [pytest.param(provided[name].thing, id=name) for name in names or provided]


METHODS = [parameter for parameter in things("methods") if amortised(parameter.values[0])]
PROBLEMS = things("problems", "four-points", "digits")


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
    measured: list[Measurement] = []

    def measure() -> None:
        with torch.no_grad():
            measured.extend(evaluator.measure(fit, problem, run))

    take_turns(benchmark, {evaluator.name: measure}, rounds=3)
    assert all(math.isfinite(measurement.value) for measurement in measured)
    tell(
        benchmark,
        f"evaluation of {method.name} by {evaluator.name} on {problem.label}",
        device=DEVICE.type,
        config=method.config,
        settings=evaluator.config,
        **reached(method, problem),
    )

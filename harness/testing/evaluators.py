"""Laws of evaluators: measurements that repeat bit for bit, are complete, and change nothing."""

from __future__ import annotations

import json
from collections.abc import Mapping

import numpy as np
import torch

from harness.evaluator import EvaluationRun, Evaluator, Measurement
from harness.method import Fit, Method
from harness.problem import Problem, placed
from harness.testing.laws import check_options, require, require_equal, untouched
from harness.testing.methods import trial
from harness.testing.small import SmallPosteriorProblem, SmallProblem, known_chains, known_fit, problem_for, view_of


def check_evaluator(evaluator: Evaluator, method: Method | None = None, problem: Problem | None = None) -> None:
    """Everything that the harness asks of an evaluator.

    Args:
        method: Whose fit to measure; unless given, a fit whose posterior has every capability.
        problem: Unless given, `SmallProblem` for a method that is fit for it, else `SmallPosteriorProblem`; and both
            where no method is given, the latter with chains too: whatever an evaluator needs, it finds on one of them.

    Raises:
        ConformanceError: If a law does not hold.
    """
    check_options(evaluator, Evaluator)
    if method:
        problem = problem or problem_for(method)
        _check_on(evaluator, trial(method, problem).fit, problem)
        return
    tried = [
        _check_on(evaluator, known_fit(view_of(where)), where)
        for where in ([problem] if problem else [SmallProblem(), SmallPosteriorProblem()])
    ]
    if problem is None:
        tried.append(_check_on(evaluator, known_chains(view_of(SmallPosteriorProblem())), SmallPosteriorProblem()))
        require(
            any(tried), f"{evaluator.name}: undefined on every fit that it was tried on; check it on one of its own"
        )


def _check_on(evaluator: Evaluator, fit: Fit, problem: Problem) -> bool:
    """Whether it is defined there."""
    reason = evaluator.undefined(fit, problem)
    require(reason is None or bool(reason.strip()), f"{evaluator.name}: undefined without a reason")
    if reason is not None:
        return False
    before = {key: tensor.clone() for key, tensor in fit.model.state_dict().items()}
    first, second = _measure(evaluator, fit, problem), _measure(evaluator, fit, problem)
    for key, tensor in before.items():
        require_equal(fit.model.state_dict()[key], tensor, f"{evaluator.name}: measuring changes the model's {key!r}")
    require(bool(first), f"{evaluator.name}: no measurement; say why in `undefined`")
    metrics = [measurement.metric for measurement in first]
    require(len(set(metrics)) == len(metrics), f"{evaluator.name}: a metric is measured twice: {metrics}")
    for measurement, again in zip(first, second, strict=True):
        _check_measurement(evaluator.name, measurement, again, len(problem.dataset().test))
    return True


def _measure(evaluator: Evaluator, fit: Fit, problem: Problem) -> list[Measurement]:
    data = placed(problem, torch.device("cpu"), torch.float64)
    run = EvaluationRun(data, problem, torch.device("cpu"), torch.float64, seed=0)
    with torch.no_grad(), untouched(f"{evaluator.name}: measure"):
        return evaluator.measure(fit, problem, run)


def _check_measurement(name: str, measurement: Measurement, again: Measurement, n_test: int) -> None:
    what = f"{name}: {measurement.metric}"
    values, stderrs, indices = measurement.values, measurement.stderrs, measurement.indices
    for part in ("values", "stderrs", "indices"):
        same = np.array_equal(getattr(measurement, part), getattr(again, part))
        require(same, f"{what}: measuring the same fit twice gives different {part}")
    for part in ("metric", "kind", "split", "settings"):
        same = getattr(measurement, part) == getattr(again, part)
        require(same, f"{what}: measuring the same fit twice gives different {part}")
    require(values.dtype == np.float64, f"{what}: values must be float64, got {values.dtype}")
    require(measurement.kind != "exact" or not stderrs.any(), f"{what}: an exact number has no standard error")
    inside = bool((indices < n_test).all()) or measurement.split not in ("", "test")
    require(inside, f"{what}: indices must lie within the test split, or name another split")
    json.dumps(dict(measurement.settings), allow_nan=False)
    require(measurement.warning == again.warning, f"{what}: measuring the same fit twice gives different warnings")
    require(measurement.warning.isprintable(), f"{what}: a warning is one line of text, got {measurement.warning!r}")
    _check_traces(what, measurement.traces, again.traces)


def _check_traces(what: str, traces: Mapping[str, np.ndarray], again: Mapping[str, np.ndarray]) -> None:
    require(sorted(traces) == sorted(again), f"{what}: measuring the same fit twice gives different traces")
    for name, trace in traces.items():
        numeric = isinstance(trace, np.ndarray) and trace.dtype.kind in "fiub"
        require(
            numeric, f"{what}: trace {name!r} must be an array of numbers, got {getattr(trace, 'dtype', type(trace))}"
        )
        least = f"{what}: trace {name!r} is minus infinity somewhere; nan means unknown, infinity beyond all measure"
        require(not bool(np.isneginf(trace).any()), least)
        same = np.array_equal(trace, again[name], equal_nan=trace.dtype.kind == "f")
        require(same, f"{what}: measuring the same fit twice gives different traces {name!r}")

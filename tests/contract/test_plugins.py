"""Every registered plugin goes through the public conformance checks that third parties use."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from harness.evaluator import Evaluator
from harness.experiment import Experiment
from harness.method import Diverged, Method
from harness.model import CanSimulate, has_standard_normal_prior
from harness.options import UserError
from harness.problem import DataError, Dataset, Problem
from harness.registry import Registry
from harness.testing import (
    check_dataset,
    check_evaluator,
    check_experiment,
    check_method,
    check_problem,
)
from harness.testing.small import view_of

REGISTRY = Registry.discover()


def things(kind: str) -> list:
    return [pytest.param(provided.thing, id=name) for name, provided in getattr(REGISTRY, kind).items()]


def has_data(problem: Problem) -> bool:
    """Embedded data only: no test reaches for a download, or for a file that a user would name."""
    try:
        problem.dataset()
    except (DataError, UserError):
        return False
    return True


PROBLEMS = [
    pytest.param(provided.thing, id=name) for name, provided in REGISTRY.problems.items() if has_data(provided.thing)
]


def of_each_kind(problems: list) -> list:
    """Of the problems with one observation one that simulates and one that does not, with either kind of prior."""
    found: dict[tuple[bool, bool], Any] = {}
    for parameter in problems:
        view = view_of(parameter.values[0])
        if len(view.validation) == 1:
            found[isinstance(view.model, CanSimulate), has_standard_normal_prior(view.model)] = parameter
    return list(found.values())


def test_no_plugin_is_broken() -> None:
    assert [plugin for plugin in REGISTRY.plugins if plugin.broken] == []
    assert {"four-points", "digits", "linear-gaussian"} <= {str(parameter.id) for parameter in PROBLEMS}


FEW = {"chains": 2, "warmup": 10, "draws": 20, "max_tree_depth": 3}


def with_few_draws(method: Method) -> Method:
    """The laws hold for chains of any length, and long ones take minutes."""
    return replace(method, **{name: value for name, value in FEW.items() if name in method.config})  # type: ignore[type-var]


METHODS = [pytest.param(with_few_draws(provided.thing), id=name) for name, provided in REGISTRY.methods.items()]


@pytest.mark.parametrize("method", METHODS)
def test_method(method: Method) -> None:
    check_method(method)


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("method", METHODS)
def test_method_on_problem(method: Method, problem: Problem) -> None:
    """Where it fits. A few steps may lead to no approximation (there is no mode to expand around): then it says so."""
    reason = method.unfit(view_of(problem))
    if reason is not None:
        assert reason.strip()
        return
    try:
        check_method(method, with_small_networks(problem))
    except Diverged as error:  # the loop's own word, or that a search for a mode has found none in five steps
        if "not finite" in str(error) or "objective" in str(error):
            raise


def with_small_networks(problem: Problem) -> Problem:
    """The same posterior problem with networks that take no time; the laws hold for any size."""
    small = {"width": 16, "pair_width": 16, "pair_depth": 1}
    return replace(problem, **small) if small.keys() <= problem.config.keys() else problem  # type: ignore[type-var]


@pytest.mark.parametrize("problem", PROBLEMS)
def test_problem(problem: Problem) -> None:
    check_problem(problem)


@pytest.mark.parametrize("dataset", things("datasets"))
def test_dataset(dataset: Dataset) -> None:
    """Embedded data are what they say; those that are not there (the tests' data folder is empty) name the remedy."""
    if dataset.location == "embedded":
        check_dataset(dataset)
    else:
        with pytest.raises(DataError, match="harness data fetch"):
            dataset.load()


SMALL = {
    "observations": 8, "samples": 40, "temperatures": 5, "leapfrog": 2, "steps": 10, "discriminator_steps": 10,
    "width": 16, "components": 20, "repetitions": 2, "validation": 4, "evaluation_samples": 20, "draws": 40,
    "epochs": 5,
}  # fmt: skip


def with_small_settings(evaluator: Evaluator) -> Evaluator:
    """The laws hold for any number of temperatures, steps and draws, and many take minutes."""
    small = {name: value for name, value in SMALL.items() if name in evaluator.config}
    return replace(evaluator, **small)  # type: ignore[type-var]


@pytest.mark.parametrize("evaluator", things("evaluators"))
def test_evaluator(evaluator: Evaluator) -> None:
    """On a posterior with every capability, and on what each registered method gives."""
    evaluator = with_small_settings(evaluator)
    check_evaluator(evaluator)
    for provided in REGISTRY.methods.values():
        check_evaluator(evaluator, with_few_draws(provided.thing))


@pytest.mark.parametrize("problem", of_each_kind(PROBLEMS))
@pytest.mark.parametrize("evaluator", things("evaluators"))
def test_evaluator_on_a_single_observation(evaluator: Evaluator, problem: Problem) -> None:
    """The known posterior may be so far off that one weight is everything: of its own k-hat there is no number then."""
    try:
        check_evaluator(with_small_settings(evaluator), problem=problem)
    except Diverged as error:
        if not (evaluator.name == "psis" and "a few weights are everything" in str(error)):
            raise


@pytest.mark.parametrize("experiment", things("experiments"))
def test_experiment(experiment: Experiment) -> None:
    check_experiment(experiment)

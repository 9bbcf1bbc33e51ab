"""Conformance checks for plugins, the ones that the built-in plugins pass too.

Each check raises `ConformanceError` at the first law that does not hold, saying which, what came and what to do::

    from harness.testing import check_method

    def test_my_method() -> None:
        check_method(MyMethod())
"""

from __future__ import annotations

from harness.testing.evaluators import check_evaluator
from harness.testing.experiments import check_experiment
from harness.testing.laws import ConformanceError, check_options
from harness.testing.methods import check_method
from harness.testing.posteriors import check_posterior
from harness.testing.problems import check_dataset, check_problem
from harness.testing.small import SmallGaussianProblem, SmallGreyProblem, SmallPosteriorProblem, SmallProblem

__all__ = [
    "ConformanceError",
    "SmallGaussianProblem",
    "SmallGreyProblem",
    "SmallPosteriorProblem",
    "SmallProblem",
    "check_dataset",
    "check_evaluator",
    "check_experiment",
    "check_method",
    "check_options",
    "check_posterior",
    "check_problem",
]

"""The hooks that a plugin may implement. Implementations ask only for the arguments that they use."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    from harness.evaluator import Evaluator
    from harness.executor import Executor
    from harness.experiment import Experiment
    from harness.job import Job
    from harness.method import Method
    from harness.problem import Dataset, Problem
    from harness.running import JobOutcome

PROJECT = "harness"
ENTRY_POINT_GROUP = "harness.plugins"

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec
def harness_methods() -> Sequence[Method]:
    """Inference methods, each with its default options."""
    ...


@hookspec
def harness_datasets() -> Sequence[Dataset]:
    """Sources of data, for `harness data` and for problems."""
    ...


@hookspec
def harness_problems() -> Sequence[Problem]:
    """Problems: data with a model spec, each with its default options."""
    ...


@hookspec
def harness_evaluators() -> Sequence[Evaluator]:
    """Evaluators, each with its default settings."""
    ...


@hookspec
def harness_experiments() -> Sequence[Experiment]:
    """Experiments of papers, each with its default options."""
    ...


@hookspec
def harness_executors() -> Sequence[Executor]:
    """Executors, each with its default options."""
    ...


@hookspec
def harness_job_started(job: Job) -> None:
    """A job is about to be fitted; jobs that are done already are not announced.

    Told, as its end, in the process that the user has started, wherever the job is worked on.
    """
    ...


@hookspec
def harness_job_finished(job: Job, outcome: JobOutcome) -> None:
    """A job has been fitted and measured, or has ended in another status."""
    ...

"""One job: fit a method to a problem from one seed, and measure the fit. The only place that seeds anything."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import traceback
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache, cached_property
from typing import Any, Literal

import numpy as np
import torch

from harness import (
    estimators,
    evaluator,
    method,
    minibatches,
    model,
    nn,
    players,
    posterior,
    problem,
    seeding,
    training,
)
from harness.checkpoint import StoredCheckpoint
from harness.clock import Clock
from harness.evaluator import EvaluationRun, Evaluator, Measurement
from harness.gallery import gallery
from harness.method import Budget, CurvePoint, Diverged, Fit, Method, Run
from harness.nn import count_parameters
from harness.problem import DeviceData, Problem, TrainingView, class_sources, loaded, placed, source_hash
from harness.record import SCHEMA
from harness.registry import Plugin
from harness.seeding import Streams, derive, isolated
from harness.stopping import Stop
from harness.store import Facts, Store

Precision = Literal["float32", "float64"]
OnProgress = Callable[[float, CurvePoint], None]
OnResumed = Callable[[float, int], None]
OnMeasured = Callable[[float, str], None]

_FIT_SOURCES = (seeding, model, posterior, nn, problem, minibatches, method, players, training)
_MEASURE_SOURCES = (evaluator, estimators)


def _digest(facts: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Job:
    """(problem, method, seed) with everything else that its result depends on.

    Args:
        device: Where the job runs.
        fitted_on: Type of the device that a stored fit was made on, where it is measured on another.
    """

    problem: Problem
    method: Method
    seed: int
    budget: Budget
    device: torch.device
    precision: Precision
    plugin: Plugin
    step_mode: str = "eager"
    fitted_on: str = ""

    @cached_property
    def job_id(self) -> str:
        """The fit key.

        It changes with the data, the configuration and the sources that define the fit, and with nothing else: neither
        the git commit nor other methods matter.
        """
        return _digest(
            {
                "spec": self.problem.spec_hash,
                "method": self.method.name,
                "config": self.method.config,
                "seed": self.seed,
                "budget": str(self.budget),
                "precision": self.precision,
                "step_mode": self.step_mode,
                "device": self.fitted_on or self.device.type,
                "source": [
                    *class_sources(type(self.method)),
                    *map(source_hash, (*self.method.modules, *_FIT_SOURCES)),
                ],
            }
        )

    def measurement_key(self, by: Evaluator) -> str:
        sources = [*class_sources(type(by)), *map(source_hash, (*by.modules, *_MEASURE_SOURCES))]
        return _digest({"fit": self.job_id, "name": by.name, "config": by.config, "source": sources})

    @property
    def dtype(self) -> torch.dtype:
        return {"float32": torch.float32, "float64": torch.float64}[self.precision]

    @property
    def streams(self) -> Streams:
        return Streams(self.seed, self.problem.label, self.method.name, self.device)

    def data(self) -> DeviceData:
        return placed(self.problem, self.device, self.dtype)

    def training_view(self) -> TrainingView:
        return self.problem.training_view(self.data(), self.streams)

    def new_run(self, on_progress: OnProgress = lambda fraction, point: None) -> Run:
        return Run(self.device, self.dtype, self.budget, self.streams, Clock(self.device), on_progress)

    def facts(self) -> Facts:
        """The columns of a record that are known before the job runs."""
        data = loaded(self.problem)
        return {
            "schema": SCHEMA,
            "job_id": self.job_id,
            "problem": self.problem.label,
            "problem_name": self.problem.name,
            "problem_config": self.problem.config,
            "dataset": data.name,
            "binarisation": data.binarisation,
            "split": "test",
            "model": repr(self.problem.model_spec()),
            "event_shape": list(data.event_shape),
            "optimum": self.problem.optimum,
            "spec_hash": self.problem.spec_hash,
            "method": self.method.name,
            "config": json.dumps(self.method.config, sort_keys=True),
            "plugin": self.plugin.distribution,
            "plugin_version": self.plugin.version,
            "seed": self.seed,
            "budget": str(self.budget),
            "precision": self.precision,
            "step_mode": self.step_mode,
        }


@dataclass(frozen=True)
class JobOutcome:
    """How a job ended: one of `harness.record.STATUSES`, and why, unless it is ok."""

    status: str
    reason: str = ""


def evaluator_file(by: Evaluator) -> str:
    """Name of the store's file for an evaluator with its settings."""
    return f"{by.name}-{_digest({'label': by.label})[:8]}"


def is_measured(job: Job, by: Evaluator, store: Store, retry: Collection[str] = ()) -> bool:
    """Whether an evaluator, with its settings and its source as it is now, has measured this job's fit."""
    key = job.measurement_key(by)  # before anything runs: of the source that was imported, not of a later edit
    facts = store.measured(job.job_id, evaluator_file(by))
    return facts is not None and facts["key"] == key and not any(found["status"] in retry for found in facts["rows"])


def fit_in_memory(job: Job, run: Run) -> Fit:
    """Fit a job; the fit is not stored. The process-wide random state is as before when it returns or raises.

    Args:
        run: A new one of the job's.

    Raises:
        Skipped: If the method declares itself unfit for the problem.
        Diverged: If numbers are no longer finite.
    """
    clock = run.clock
    with isolated(derive("job", job.job_id)):
        with clock.phase("load"):
            view = job.training_view()
        reason = job.method.unfit(view)
        if reason:
            raise Skipped(reason)
        with clock.phase("warm-up"):
            training.warm_up(job.device, job.dtype)
        with clock.phase("fit"), run.streams.initial_weights(shared=False):
            fit = job.method.fit(view, run)
    return dataclasses.replace(fit, curve=tuple(run.curve), seconds=clock.seconds["fit"])


class Skipped(Exception):
    """A method or an evaluator that declares itself unfit for what it was given; the message is the reason."""


def restored(job: Job, store: Store) -> Fit:
    """The stored fit of a job; nothing is trained."""
    state = {name: torch.from_numpy(array).to(job.device) for name, array in store.state(job.job_id).items()}
    with isolated(derive("job", job.job_id)):
        return job.method.restore(job.training_view(), state)


def run_job(
    job: Job,
    evaluators: Sequence[Evaluator],
    store: Store,
    environment: Mapping[str, Any],
    on_progress: OnProgress = lambda fraction, point: None,
    on_measuring: Callable[[str], None] = lambda name: None,
    on_measured: OnMeasured = lambda fraction, facts: None,
    on_resumed: OnResumed = lambda fraction, step: None,
    stop: Stop | None = None,
) -> JobOutcome:
    """Fit a job, unless its fit is stored, and measure it by each of the evaluators; store everything.

    Whatever the method or an evaluator raises becomes a status; only interrupts get through. A fit that is interrupted
    keeps a checkpoint first, if its method uses them.

    Raises:
        Stopped: If the run is to end before the job is done.
    """
    stop = stop or Stop()
    facts = store.job(job.job_id)
    if facts is None or facts["status"] != "ok":
        fit_run = job.new_run(on_progress)
        fit_run.checkpoint = checkpoint = StoredCheckpoint(fit_run, store, job.job_id, environment, stop, on_resumed)
        with stop.interrupts_wait():
            outcome, fit = _fit_and_store(job, checkpoint, store, environment)
    else:
        outcome, fit = JobOutcome("ok"), None
    if outcome.status != "ok":
        return outcome
    the_fit = cache(lambda: fit or restored(job, store))
    run = EvaluationRun(job.data(), job.problem, job.device, job.dtype, job.seed, on_measured)
    for number, by in enumerate(evaluators):
        if number or fit is not None:  # a run gets something done, however short its time
            stop.obey()
        on_measuring(by.name)
        measured = _measure_and_store(job, by, the_fit, run, store)
        outcome = measured if measured.status == "failed" else outcome
    return outcome


def _fit_and_store(
    job: Job, checkpoint: StoredCheckpoint, store: Store, environment: Mapping[str, Any]
) -> tuple[JobOutcome, Fit | None]:
    facts = {**job.facts(), **environment, "started_at": datetime.now(UTC).isoformat(timespec="seconds")}
    facts |= {"shared_clock": False}
    run, fit, text = checkpoint.run, None, ""
    try:
        fit = fit_in_memory(job, run)
        facts |= _spent(fit, run.clock)
        state = {name: tensor.cpu().contiguous().numpy() for name, tensor in fit.state.items()}
        curve = [dataclasses.asdict(point) for point in run.curve]
        with isolated(derive("gallery", job.job_id)):
            store.write_fit(job.job_id, state, curve, gallery(fit, job.data(), job.seed))
        outcome = JobOutcome("ok")
    except Skipped as error:
        outcome = JobOutcome("skipped", str(error))
    except Diverged as error:
        outcome = JobOutcome("diverged", str(error))
    except (Exception, SystemExit) as error:  # a method may fail in any way; the other jobs go on
        outcome, text = JobOutcome("failed", f"{type(error).__name__}: {error}"), traceback.format_exc()
    facts |= {**checkpoint.facts(), "status": outcome.status, "reason": outcome.reason}
    store.write_job(job.job_id, facts, text)
    if outcome.status != "failed":  # what failed (the disk was full ...) may be tried again from where it was
        store.remove_checkpoint(job.job_id)
    return outcome, fit


def _spent(fit: Fit, clock: Clock) -> Facts:
    seconds = clock.seconds["fit"]
    return {
        "decoder_parameters": count_parameters(fit.model),
        "method_parameters": fit.parameters,
        "fit_seconds": seconds,
        "fit_steps": int(fit.steps),
        "steps_per_second": int(fit.steps) / seconds if fit.steps else None,
        "gradient_evaluations": int(fit.gradient_evaluations),
        "compile_seconds": clock.seconds.get("compile", 0.0),
        "peak_memory_bytes": clock.peak_bytes["fit"],
    }


def _measure_and_store(job: Job, by: Evaluator, fit: Callable[[], Fit], run: EvaluationRun, store: Store) -> JobOutcome:
    """Measure and store; an evaluator that is undefined here or fails gives one row that says why."""
    clock, name = Clock(job.device), evaluator_file(by)
    rows: list[Facts] = []
    examples: dict[str, np.ndarray] = {}
    outcome = JobOutcome("ok")
    try:
        measurements = _measure(job, by, fit(), run, clock)
        rows = [_columns(measurement) for measurement in measurements]
        examples = {key: array for measurement in measurements for key, array in _arrays(measurement)}
    except Skipped as error:
        outcome = JobOutcome("skipped", str(error))
    except (Exception, SystemExit) as error:  # an evaluator may fail in any way; the other evaluators go on
        outcome = JobOutcome("failed", f"{type(error).__name__}: {error}")
        store.write_text(f"measurements/{job.job_id}/{name}.traceback.txt", traceback.format_exc())
    common = {
        "evaluator": by.label,
        "status": outcome.status,
        "reason": outcome.reason,
        "evaluate_seconds": clock.seconds.get("measure"),
    }
    facts = {"key": job.measurement_key(by), "config": by.config, "rows": [{**common, **row} for row in rows or [{}]]}
    store.write_measured(job.job_id, name, facts, examples)
    return outcome


def _measure(job: Job, by: Evaluator, fit: Fit, run: EvaluationRun, clock: Clock) -> list[Measurement]:
    reason = by.undefined(fit, job.problem)
    if reason:
        raise Skipped(reason)
    with isolated(derive("measure", job.job_id, by.label)), torch.no_grad(), clock.phase("measure"):
        return by.measure(fit, job.problem, run)


def _arrays(measurement: Measurement) -> list[tuple[str, np.ndarray]]:
    columns = {"index": measurement.indices, "value": measurement.values, "stderr": measurement.stderrs}
    columns |= {f"traces/{name}": array for name, array in measurement.traces.items()}
    return [(f"{measurement.metric}/{column}", array) for column, array in columns.items()]


def _columns(measurement: Measurement) -> Facts:
    stderr_test = measurement.stderr_test
    settings = dict(measurement.settings) | ({"warning": measurement.warning} if measurement.warning else {})
    return {
        "split": measurement.split,
        "metric": measurement.metric,
        "value": measurement.value,
        "kind": measurement.kind,
        "bounds": measurement.bounds,
        "unit": measurement.unit,
        "stderr": measurement.stderr,
        "stderr_test": stderr_test if np.isfinite(stderr_test) else None,
        "n_observations": len(measurement.values),
        "settings": json.dumps(settings, sort_keys=True),
    }

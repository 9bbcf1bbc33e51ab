"""One job: a method on a problem from one seed, and what its results depend on."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import torch

from harness import (
    cuda_graph,
    estimators,
    evaluator,
    loop,
    method,
    minibatches,
    model,
    nn,
    players,
    posterior,
    precision,
    problem,
    replicas,
    seeding,
    stepping,
    training,
)
from harness.clock import Clock
from harness.evaluator import Evaluator
from harness.loading import source_name
from harness.method import Budget, Method, Run
from harness.precision import Precision, dtype_of, products_of
from harness.problem import DataError, DeviceData, Problem, TrainingView, loaded, placed
from harness.record import SCHEMA
from harness.registry import Plugin
from harness.seeding import Streams
from harness.sources import class_sources, source_hash
from harness.store import Facts, Store

_FIT_SOURCES = (
    seeding,
    model,
    posterior,
    nn,
    problem,
    minibatches,
    precision,
    method,
    players,
    replicas,
    stepping,
    cuda_graph,
    loop,
    training,
)
VECTORISED = "vectorised"
"""Begins the step mode of a fit that may share its steps with others."""

_MEASURE_SOURCES = (evaluator, estimators)

for _module in (*_FIT_SOURCES, *_MEASURE_SOURCES):
    source_hash(_module)  # as they have been imported, whatever becomes of the files


@lru_cache(maxsize=64)
def _spec_hash(problem: Problem, content_hash: str) -> str:
    """Thousands of jobs share it, as long as the data are the same."""
    return problem.spec_hash


_json = json.JSONEncoder(sort_keys=True).encode  # made once: `json.dumps` makes one anew each time


def _digest(facts: Mapping[str, Any]) -> str:
    return hashlib.sha256(_json(facts).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Job:
    """(problem, method, seed) with everything else that its result depends on.

    Args:
        device: Where the job runs.
        step_mode: How steps of training are taken (`harness.stepping`), after the word ``vectorised`` if those of
            several jobs are taken at once.
        fitted_on: Type of the device that a stored fit was made on, where it is measured on another.
    """

    problem: Problem
    method: Method
    seed: int
    budget: Budget
    device: torch.device
    precision: Precision
    plugin: Plugin
    step_mode: str = "auto"
    fitted_on: str = ""

    @cached_property
    def _content_hash(self) -> str:
        """Of the data as they were when the job was asked for its key."""
        return loaded(self.problem).content_hash

    @cached_property
    def job_id(self) -> str:
        """The fit key.

        It changes with the data, the configuration and the sources that define the fit, and with nothing else: neither
        the git commit nor other methods matter.
        """
        return _digest(
            {
                "spec": _spec_hash(self.problem, self._content_hash),
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
    def vectorised(self) -> bool:
        return self.step_mode.startswith(VECTORISED)

    @property
    def dtype(self) -> torch.dtype:
        return dtype_of(self.precision)

    @property
    def streams(self) -> Streams:
        return Streams(self.seed, self.problem.stream_name, self.method.name, self.device)

    def data(self) -> DeviceData:
        """The data on the job's device.

        Raises:
            DataError: If they have changed since the job was asked for its key.
        """
        data = placed(self.problem, self.device, self.dtype)
        if data.spec.content_hash != self._content_hash:
            raise DataError(f"{self.problem.label}: its data have changed since the run began; start it again")
        return data

    def training_view(self) -> TrainingView:
        return self.problem.training_view(self.data(), self.streams)

    def new_run(self, clock: Clock | None = None) -> Run:
        return Run(
            self.device,
            self.dtype,
            self.budget,
            self.streams,
            clock or Clock(self.device),
            products=products_of(self.precision),
            step=self.step_mode.split()[-1],
        )

    def sources(self) -> dict[str, str]:
        """Hashes of all sources that the fit key depends on, by module: what has changed can be told by name."""
        spec = self.problem.model_spec()
        classes = [base for thing in (self.method, self.problem, spec) for base in type(thing).__mro__]
        ours = [base for base in classes if base.__module__.partition(".")[0] not in sys.stdlib_module_names]
        modules = (*self.method.modules, *spec.modules, *_FIT_SOURCES)
        named = {**{base.__module__: base for base in ours}, **{module.__name__: module for module in modules}}
        return {source_name(name): source_hash(thing)[:16] for name, thing in sorted(named.items())}

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
            "data_sha256": data.content_hash,
            "spec_hash": self.problem.spec_hash,
            "sources": self.sources(),
            "method": self.method.name,
            "config": json.dumps(self.method.config, sort_keys=True),
            "plugin": self.plugin.distribution,
            "plugin_version": self.plugin.version,
            "seed": self.seed,
            "budget": str(self.budget),
            "precision": self.precision,
            "step_mode": self.step_mode,
        }


def evaluator_file(by: Evaluator) -> str:
    """Name of the store's file for an evaluator with its settings."""
    return f"{by.name}-{_label_hash(by.label)}"


@lru_cache(maxsize=64)
def _label_hash(label: str) -> str:
    return _digest({"label": label})[:8]


def is_measured(job: Job, by: Evaluator, store: Store, retry: Collection[str] = ()) -> bool:
    """Whether an evaluator, with its settings and its source as it is now, has measured this job's fit."""
    key = job.measurement_key(by)  # before anything runs: of the source that was imported, not of a later edit
    facts = store.measured(job.job_id, evaluator_file(by))
    return facts is not None and facts["key"] == key and not any(found["status"] in retry for found in facts["rows"])

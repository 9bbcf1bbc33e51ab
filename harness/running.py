"""Jobs are run: fitted, alone or together, and measured. The only place that seeds anything."""

from __future__ import annotations

import dataclasses
import importlib
import json
import logging
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from harness import loop, training
from harness.checkpoint import StoredCheckpoint
from harness.clock import Clock
from harness.evaluator import EvaluationRun, Evaluator, Measurement
from harness.files import DiskFull, checksum
from harness.gallery import gallery
from harness.job import Job, evaluator_file
from harness.memory import keep_freed
from harness.method import CurvePoint, Diverged, Fit, Run
from harness.nn import count_parameters
from harness.precision import products_of
from harness.seeding import derive, isolated
from harness.stopping import Stop
from harness.store import Facts, Store

log = logging.getLogger(__name__)

OnProgress = Callable[[float, CurvePoint], None]
OnResumed = Callable[[float, int], None]
OnMeasured = Callable[[float, str], None]


@dataclass(frozen=True)
class JobOutcome:
    """How a job ended: one of `harness.record.STATUSES`, and why, unless it is ok."""

    status: str
    reason: str = ""


class Skipped(Exception):
    """A method or an evaluator that declares itself unfit for what it was given; the message is the reason."""


def fit_in_memory(job: Job) -> Fit:
    """Fit a job; the fit is not stored. The process-wide random state is as before when it returns or raises.

    Raises:
        Skipped: If the method declares itself unfit for the problem.
        Diverged: If numbers are no longer finite.
    """
    [ended] = _fitted([job], [job.new_run()])
    if isinstance(ended, Diverged):
        raise ended
    return ended


def _fitted(jobs: Sequence[Job], runs: Sequence[Run]) -> list[Fit | Diverged]:
    """The fits of one job, or of several together (`harness.training.fit_together`), whose runs share their clock.

    Raises:
        Skipped, Diverged: As `fit_in_memory`; the latter for a single job only.
    """
    first, clock = jobs[0], runs[0].clock
    keep_freed()
    with isolated(derive("job", first.job_id)):
        with clock.phase("load"):
            views = [job.training_view() for job in jobs]
        reason = first.method.unfit(views[0]) or _unfit_precision(first)
        if reason:
            raise Skipped(reason)
        with clock.phase("warm-up"):
            loop.warm_up(first.device, first.dtype)
            for library in first.method.libraries:
                importlib.import_module(library)
        with clock.phase("fit"):
            if len(jobs) == 1:
                with runs[0].streams.initial_weights(shared=False):
                    ended = [first.method.fit(views[0], runs[0])]
            else:
                methods = [job.method for job in jobs if isinstance(job.method, training.GradientMethod)]
                ended = training.fit_together(methods, views, runs)
    return [
        dataclasses.replace(fit, curve=tuple(run.curve), seconds=clock.seconds["fit"]) if isinstance(fit, Fit) else fit
        for fit, run in zip(ended, runs, strict=True)
    ]


def _unfit_precision(job: Job) -> str | None:
    reason = None if products_of(job.precision) is None else job.method.full_precision_only()
    return reason and f"precision {job.precision}: {reason}"


def restored(job: Job, store: Store) -> Fit:
    """The stored fit of a job; nothing is trained."""
    return _restored(job, store.state(job.job_id))


def _restored(job: Job, arrays: Mapping[str, np.ndarray]) -> Fit:
    state = {name: torch.from_numpy(array).to(job.device) for name, array in arrays.items()}
    with isolated(derive("job", job.job_id)):
        return job.method.restore(job.training_view(), state)


def fit_jobs(
    jobs: Sequence[Job],
    store: Store,
    environment: Mapping[str, Any],
    on_progress: OnProgress = lambda fraction, point: None,
    on_resumed: OnResumed = lambda fraction, step: None,
    stop: Stop | None = None,
) -> list[tuple[JobOutcome, Fit | None]]:
    """Fit a job, or several together, and store everything; of each, how it ended, and the fit if that is ok.

    Whatever the method raises becomes a status; only interrupts get through. A fit that is interrupted keeps a
    checkpoint first, if its method uses them.

    Args:
        on_progress: Told of every job.
        on_resumed: Told of the first one.

    Raises:
        Stopped: If the run is to end before that is done.
        DiskFull: If a fit cannot be stored for that; its checkpoint, if there is one, is left for the next run.
    """
    stop = stop or Stop()
    clock, runs, checkpoints = Clock(jobs[0].device), [], []
    for job in jobs:
        runs.append(job.new_run(clock))
        checkpoints.append(StoredCheckpoint(runs[-1], store, job.job_id, environment, stop, together=len(jobs)))
        runs[-1].checkpoint, runs[-1].on_progress = checkpoints[-1], on_progress
    checkpoints[0].on_resumed = on_resumed
    facts = {**environment, "started_at": datetime.now(UTC).isoformat(timespec="seconds")}
    with stop.interrupts_wait():
        try:
            ended: Sequence[Fit | BaseException] = _fitted(jobs, runs)
        except (Exception, SystemExit) as error:  # a method may fail in any way; the other jobs go on
            ended = [error] * len(jobs)
        return [_stored(*of_job, store, facts) for of_job in zip(jobs, checkpoints, ended, strict=True)]


def _stored(
    job: Job, checkpoint: StoredCheckpoint, ended: Fit | BaseException, store: Store, facts: Facts
) -> tuple[JobOutcome, Fit | None]:
    run, text = checkpoint.run, ""
    facts = {**job.facts(), **facts}
    try:
        if isinstance(ended, BaseException):
            raise ended
        if not isinstance(ended, Fit):
            raise TypeError(f"{job.method.name}: fit must return a harness.method.Fit; got {type(ended).__name__}")
        state = _arrays_of(ended)
        _check_restored(job, ended, state)
        facts |= _spent(ended, run.clock)
        curve = [dataclasses.asdict(point) for point in run.curve]
        pictures = _pictures(ended, job)
        ok = {**facts, **checkpoint.facts(), "status": "ok", "reason": ""}
        store.write_fit(job.job_id, state, curve, pictures, ok)
        store.remove_checkpoint(job.job_id)
        return JobOutcome("ok"), ended
    except DiskFull:  # which is no fault of the job
        raise
    except Skipped as error:
        outcome = JobOutcome("skipped", str(error))
    except Diverged as error:
        outcome = JobOutcome("diverged", str(error))
    except (Exception, SystemExit) as error:
        outcome, text = JobOutcome("failed", f"{type(error).__name__}: {error}"), traceback.format_exc()
    facts |= {**checkpoint.facts(), "status": outcome.status, "reason": outcome.reason}
    store.write_job(job.job_id, facts, text)
    if outcome.status != "failed":  # what failed may be tried again from where it was
        store.remove_checkpoint(job.job_id)
    return outcome, None


def _check_restored(job: Job, fit: Fit, arrays: Mapping[str, np.ndarray]) -> None:
    """See that what is stored gives the same model and the same draws again.

    Raises:
        ValueError: If it does not, or if draws are not what all that measures them relies on.
    """
    draws, again = _draws(job, fit), _restored(job, arrays)
    own, other = (dict((*each.model.named_parameters(), *each.model.named_buffers())) for each in (fit, again))
    lost = [name for name, tensor in own.items() if name not in other or not _same_bits(tensor, other[name].detach())]
    if lost or not torch.allclose(draws, _draws(job, again), rtol=1e-4, atol=1e-6, equal_nan=True):
        what = f"the model's {', '.join(lost[:3])}{', ...' * (len(lost) > 3)}" if lost else "the posterior"
        raise ValueError(
            f"{job.method.name}: restore(view, state) gives another fit back, {what} being different: all that fit has "
            "learned, the model's parameters too, belongs into the state that it returns"
        )


def _draws(job: Job, fit: Fit) -> Tensor:
    """A few draws of the posterior, from a stream that nothing else reads.

    Raises:
        ValueError: If they are not what all that measures a posterior relies on.
    """
    x, n = job.data().test[:2], 3
    stream = torch.Generator(device=job.device)
    stream.manual_seed(derive("draws", job.job_id))
    with isolated(derive("draws", job.job_id)), torch.no_grad():
        z: object = fit.posterior.sample(x, n, stream)
    expected = f"{job.dtype} of shape {(n, len(x), fit.model.latent_dim)}"
    got = f"{z.dtype} of shape {tuple(z.shape)}" if isinstance(z, Tensor) else f"a {type(z).__name__}"
    if got != expected:
        raise ValueError(
            f"{job.method.name}: its posterior's sample(x, n={n}, generator) must return (n, N, D), for x of {len(x)} "
            f"observations {expected}; got {got}"
        )
    assert isinstance(z, Tensor)
    return z


def _pictures(fit: Fit, job: Job) -> dict[str, np.ndarray]:
    """Arrays for the figures; none where they cannot be made, which is no reason to lose a fit."""
    try:
        with isolated(derive("gallery", job.job_id)):
            return gallery(fit, job.data(), job.seed)
    except Exception as error:
        log.warning("job %s: no arrays for figures: %s: %s", job.job_id, type(error).__name__, error)
        return {}


def measure_job(
    job: Job,
    evaluators: Sequence[Evaluator],
    fit: Fit | None,
    store: Store,
    on_measuring: Callable[[Evaluator], None] = lambda by: None,
    on_measured: OnMeasured = lambda fraction, facts: None,
    stop: Stop | None = None,
) -> JobOutcome:
    """Measure a fit by each of the evaluators, and store what they say.

    Args:
        fit: If it has just been made; else it is the stored one.

    Raises:
        Stopped: If the run is to end before that is done.
    """
    stop = stop or Stop()
    outcome = JobOutcome("ok")
    original = _Original(job, store, fit)
    run = EvaluationRun(job.data(), job.problem, job.device, job.dtype, job.seed, on_measured)
    for number, by in enumerate(evaluators):
        if number or fit is not None:  # a run gets something done, however short its time
            stop.obey()
        on_measuring(by)
        measured = _measure_and_store(job, by, original, run, store)
        outcome = measured if measured.status == "failed" else outcome
    return outcome


class _Original:
    """The fit of a job that is measured, the same one for all evaluators.

    Args:
        given: If it has just been made; else, and once an evaluator has changed it, it is the stored one.
    """

    def __init__(self, job: Job, store: Store, given: Fit | None) -> None:
        self.job, self.store, self.given = job, store, given

    @cached_property
    def fit(self) -> Fit:
        return self.given or restored(self.job, self.store)

    @cached_property
    def sha256(self) -> str:
        return checksum(_arrays_of(self.fit))

    @cached_property
    def copies(self) -> dict[str, tuple[Tensor, Tensor]]:
        """The tensors of the fit by name, each with a copy of it: to compare these is cheaper than another checksum."""
        return {name: (tensor, tensor.detach().clone()) for name, tensor in _tensors_of(self.fit).items()}

    def changed(self, copies: Mapping[str, tuple[Tensor, Tensor]]) -> list[str]:
        """Names of the tensors that are not what they were; if there are any, the next one to ask gets a fit anew."""
        names = [name for name, (tensor, before) in copies.items() if not _same_bits(tensor.detach(), before)]
        if names:
            self.given = None
            del self.fit, self.sha256, self.copies
        return names


def _tensors_of(fit: Fit) -> dict[str, Tensor]:
    """The state of a fit, and what its model has besides, as it has where it is known and fixed."""
    own = {f"model.{name}": tensor for name, tensor in (*fit.model.named_parameters(), *fit.model.named_buffers())}
    there = {tensor.data_ptr() for tensor in own.values()}
    return own | {name: tensor for name, tensor in fit.state.items() if tensor.data_ptr() not in there}


def _same_bits(tensor: Tensor, other: Tensor) -> bool:
    if tensor.shape != other.shape or tensor.dtype != other.dtype:
        return False
    if tensor.numel() == 0:  # of which some have no bytes to view
        return True
    return torch.equal(*(each.reshape(-1).view(torch.uint8) for each in (tensor, other)))


def _arrays_of(fit: Fit) -> dict[str, np.ndarray]:
    """The state of a fit, as it is stored.

    Raises:
        TypeError: If it has something else than tensors.
    """
    arrays: dict[str, np.ndarray] = {}
    for name, tensor in fit.state.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"the state of a fit is of tensors; {name!r} is a {type(tensor).__name__}")
        kept = tensor.detach().cpu().contiguous()
        arrays[name] = (kept.float() if kept.dtype == torch.bfloat16 else kept).numpy()  # numpy has no bfloat16
    return arrays


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
        "step_used": fit.step_used,
        "peak_memory_bytes": clock.peak_bytes["fit"],
        "busy_elsewhere": clock.busy_elsewhere["fit"],
    }


def _measure_and_store(job: Job, by: Evaluator, original: _Original, run: EvaluationRun, store: Store) -> JobOutcome:
    """Measure and store; an evaluator that is undefined here or fails gives one row that says why."""
    clock, name = Clock(job.device), evaluator_file(by)
    rows: list[Facts] = []
    examples: dict[str, np.ndarray] = {}
    outcome, of_fit = JobOutcome("ok"), None
    try:
        of_fit = original.sha256
        measurements = _measured(job, by, original, run, clock)
        rows = [_columns(measurement) for measurement in measurements]
        examples = {key: array for measurement in measurements for key, array in _arrays(measurement)}
    except Skipped as error:
        outcome = JobOutcome("skipped", str(error))
    except (Exception, SystemExit) as error:  # an evaluator may fail in any way; the other evaluators go on
        outcome = JobOutcome("failed", f"{type(error).__name__}: {error}")
        store.write_text(f"measurements/{job.job_id}/{name}.traceback.txt", traceback.format_exc())
    store_measured(job, by, outcome, store, rows, examples, clock.seconds.get("measure"), of_fit=of_fit)
    return outcome


def store_measured(
    job: Job,
    by: Evaluator,
    outcome: JobOutcome,
    store: Store,
    rows: Sequence[Facts] = (),
    examples: Mapping[str, np.ndarray] | None = None,
    seconds: float | None = None,
    output: str = "",
    of_fit: str | None = None,
) -> None:
    """Store what an evaluator has said of a job, or how it has ended, and what it has printed last.

    Args:
        of_fit: Checksum of the state of the fit that was measured, if that is known.
    """
    if output:
        store.write_text(f"measurements/{job.job_id}/{evaluator_file(by)}.output.txt", output)
    common = {
        "evaluator": by.label,
        "status": outcome.status,
        "reason": outcome.reason,
        "evaluate_seconds": seconds,
    }
    facts = {"key": job.measurement_key(by), "config": by.config, "rows": [{**common, **row} for row in rows or [{}]]}
    facts |= {"fit_sha256": of_fit} if of_fit else {}
    store.write_measured(job.job_id, evaluator_file(by), facts, examples or {})


def store_end(job: Job, outcome: JobOutcome, store: Store, environment: Mapping[str, Any], output: str = "") -> None:
    """Store how a job's fit ended that cannot do so itself, and what it has printed last."""
    if output:
        store.write_text(f"jobs/{job.job_id}.output.txt", output)
    now = datetime.now(UTC).isoformat(timespec="seconds")
    facts = {**environment, "started_at": now, "status": outcome.status, "reason": outcome.reason}
    store.write_job(job.job_id, {**job.facts(), **facts})


def _measured(job: Job, by: Evaluator, original: _Original, run: EvaluationRun, clock: Clock) -> list[Measurement]:
    """What an evaluator says of a fit.

    Raises:
        Skipped: If it is undefined there.
        RuntimeError: If it has changed the fit, which is as it was for the next one; and so is what they share.
        TypeError, ValueError: If what it has returned are no measurements, or cannot be kept side by side.
    """
    fit, copies = original.fit, original.copies
    try:
        found = _measure(job, by, fit, run, clock)
    finally:
        changed = original.changed(copies)
        if changed:
            run.found.clear()
    if changed:
        some = ", ".join(changed[:3]) + ", ..." * (len(changed) > 3)
        raise RuntimeError(
            f"{by.name} changes the fit ({some}), which other evaluators measure too; let it change a copy.deepcopy"
        )
    return _whole(by, found)


def _measure(job: Job, by: Evaluator, fit: Fit, run: EvaluationRun, clock: Clock) -> object:
    reason = by.undefined(fit, job.problem)
    if reason:
        raise Skipped(reason)
    keep_freed()
    with isolated(derive("measure", job.job_id, by.label)), torch.no_grad(), clock.phase("measure"):
        return by.measure(fit, job.problem, run)


def _whole(by: Evaluator, found: object) -> list[Measurement]:
    """What an evaluator has returned, if it is one measurement or several, each of another metric.

    Of one metric twice, even of two splits, the values per observation could not be told apart where they are kept.
    """
    several = isinstance(found, list | tuple)
    said = cast(Sequence[object], found) if several else ()
    measurements = [each for each in said if isinstance(each, Measurement)]
    if not measurements or len(measurements) < len(said):
        got = f"[{', '.join(type(each).__name__ for each in said)}]" if several else type(found).__name__
        raise TypeError(f"{by.name}: measure must return a list of measurements, at least one; got {got}")
    metrics = [measurement.metric for measurement in measurements]
    if twice := sorted({metric for metric in metrics if metrics.count(metric) > 1}):
        raise ValueError(f"{by.name}: measure returned {', '.join(twice)} twice; give each a metric of its own")
    return measurements


def _arrays(measurement: Measurement) -> list[tuple[str, np.ndarray]]:
    columns = {"index": measurement.indices, "value": measurement.values, "stderr": measurement.stderrs}
    columns |= {f"traces/{name}": array for name, array in measurement.traces.items()}
    return [(f"{measurement.metric}/{column}", array) for column, array in columns.items()]


def _plain(setting: object) -> object:
    """What JSON can say of a setting."""
    if isinstance(setting, np.generic | np.ndarray | Tensor):
        return setting.tolist()
    raise TypeError(f"settings of a measurement must be JSON-compatible; got {setting!r}")


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
        "settings": json.dumps(settings, sort_keys=True, default=_plain),
    }

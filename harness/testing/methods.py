"""Laws of methods: a short fit that repeats bit for bit, can be stored and restored, and leaves the process alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from harness.checkpoint import StoredCheckpoint
from harness.clock import Clock
from harness.job import Job
from harness.method import Budget, Fit, Method, Run
from harness.problem import Problem, TrainingView
from harness.registry import Plugin
from harness.stopping import Stop, Stopped
from harness.store import Store
from harness.testing.laws import (
    ConformanceError,
    check_options,
    in_single_precision,
    require,
    require_close,
    require_equal,
    require_shape,
    untouched,
)
from harness.testing.posteriors import check_posterior, check_single_precision, stream
from harness.testing.small import problem_for, view_of
from harness.training import GradientMethod, Modules, Noise, fit_together

STEPS = 5
CPU = torch.device("cpu")
NO_PLUGIN = Plugin("trial", "not a plugin", "")


@dataclass(frozen=True)
class Trial:
    """A short fit, with the job that it belongs to."""

    job: Job
    fit: Fit


def trial(method: Method, problem: Problem, seed: int = 0) -> Trial:
    """Fit for a few steps in float64, on the CPU."""
    job = Job(problem, method, seed, Budget("steps", STEPS), CPU, "float64", NO_PLUGIN)
    return Trial(job, _fit(job, job.new_run()))


def _fit(job: Job, run: Run) -> Fit:
    with untouched(f"{job.method.name}: fit"), job.streams.initial_weights(shared=False):
        return job.method.fit(job.training_view(), run)


def in_parts(job: Job) -> Fit:
    """A fit that is stopped wherever it lets itself be stopped, and goes on in another run that knows nothing of it."""
    with TemporaryDirectory() as folder:
        for _ in range(STEPS + 1):
            run = job.new_run()
            run.checkpoint = StoredCheckpoint(run, Store(folder), job.job_id, {}, Stop(after=0))
            with suppress(Stopped):
                return _fit(job, run)
    raise ConformanceError(
        f"{job.method.name}: a fit of {STEPS} steps, stopped at each checkpoint, does not come to an end"
    )


def check_method(method: Method, problem: Problem | None = None) -> None:
    """Everything that the harness asks of a method.

    Args:
        problem: Where to try it; unless given, `SmallProblem`, or `SmallPosteriorProblem` if it is unfit for that.

    Raises:
        ConformanceError: If a law does not hold.
    """
    check_options(method, Method)
    problem = problem or problem_for(method)
    view = view_of(problem)
    unfit = method.unfit(view)
    require(unfit is None, f"{method.name} is unfit for {problem.label} ({unfit}): check it on another problem")
    if isinstance(method, GradientMethod):
        _check_losses(method, view)
    first = trial(method, problem)
    _check_fit(first, view)
    check_posterior(first.fit.posterior, first.fit.model, view.validation)
    _check_same(first.fit, trial(method, problem).fit, view.validation, "two fits from the same seed")
    _check_same(first.fit, in_parts(first.job), view.validation, "a fit in one go and one that was interrupted")
    _check_restores(first, view.validation)
    _check_single_precision(method, problem)
    if isinstance(method, GradientMethod):
        _check_gradients(method, view_of(problem), first.fit)
        _check_per_replica(method, view_of(problem), first.fit)
        if method.one_by_one() is None:
            _check_together(method, problem)


def _check_fit(tried: Trial, view: TrainingView) -> None:
    name, fit = tried.job.method.name, tried.fit
    require(isinstance(fit, Fit), f"{name}: fit must return a harness.method.Fit, got {type(fit).__name__}")
    require(fit.steps <= STEPS, f"{name}: took {fit.steps} steps with a budget of {STEPS}")
    ours, theirs = _shapes(view.model.state_dict()), _shapes(fit.model.state_dict())
    require(ours == theirs, f"{name}: the fitted model must be the view's: expected {ours}, got {theirs}")
    for key, tensor in fit.state.items():
        require(isinstance(tensor, Tensor), f"{name}: state {key!r} must be a tensor, got {type(tensor).__name__}")
        require(not tensor.requires_grad, f"{name}: state {key!r} must be detached")
        require_shape(tensor, tuple(tensor.shape), f"{name}: state {key!r}")


def _shapes(state: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def _check_same(fit: Fit, again: Fit, x: Tensor, what: str) -> None:
    require(sorted(fit.state) == sorted(again.state), f"{what} have different states")
    for key in fit.state:
        require_equal(again.state[key], fit.state[key], f"{what}: {key!r}")
    require_equal(again.posterior.sample(x, 2, stream(0)), fit.posterior.sample(x, 2, stream(0)), f"{what}: samples")


def _check_restores(tried: Trial, x: Tensor) -> None:
    """From the state alone: the view that it is restored into has other initial weights."""
    job = tried.job
    other = Job(job.problem, job.method, 1, job.budget, job.device, job.precision, job.plugin)
    state = {key: tensor.clone() for key, tensor in tried.fit.state.items()}
    with other.streams.initial_weights(shared=False):
        restored = job.method.restore(other.training_view(), state)
    for key, tensor in tried.fit.model.state_dict().items():
        require_equal(restored.model.state_dict()[key], tensor, f"{job.method.name}: restored model, {key!r}")
    samples = restored.posterior.sample(x, 2, stream(0))
    require_equal(samples, tried.fit.posterior.sample(x, 2, stream(0)), f"{job.method.name}: samples of a restored fit")


def _check_single_precision(method: Method, problem: Problem) -> None:
    job = Job(problem, method, 0, Budget("steps", STEPS), CPU, "float32", NO_PLUGIN)
    with in_single_precision(f"{method.name}: fit"):
        fit = _fit(job, job.new_run())
    check_single_precision(fit.posterior, fit.model, job.training_view().validation)


def _modules(method: GradientMethod, view: TrainingView) -> Modules:
    """Fresh modules; the process-wide generator that their initial weights come from is restored."""
    with torch.random.fork_rng(devices=[]):
        return method.build(view).to(view.validation.dtype)


def _noise(method: GradientMethod, view: TrainingView) -> Noise:
    shapes = method.noise(view)
    x = view.validation
    return {
        name: torch.randn((len(x), *shape), generator=stream(i), dtype=x.dtype)
        for i, (name, shape) in enumerate(shapes.items())
    }


def _check_losses(method: GradientMethod, view: TrainingView) -> None:
    modules, x, noise = _modules(method, view), view.validation, _noise(method, view)
    _check_pure(method, modules, x, noise)
    _check_noise(method, modules, x, noise)
    for key, gradient in _gradients(method, modules, x, noise).items():
        require(gradient is not None, f"{method.name}: {key}, whose loss does not depend on it")


def _check_pure(method: GradientMethod, modules: Modules, x: Tensor, noise: Noise) -> None:
    inputs = {**{f"noise {name!r}": value for name, value in noise.items()}, "x": x, **modules.state_dict()}
    before = {name: tensor.clone() for name, tensor in inputs.items()}
    with untouched(f"{method.name}: losses"):
        losses = method.losses(modules, x, noise)
    names = [player.name for player in method.players()]
    require(sorted(losses) == sorted(names), f"{method.name}: losses {sorted(losses)} for players {sorted(names)}")
    with torch.no_grad():
        again = method.losses(modules, x, noise)
    for name, loss in losses.items():
        require_shape(loss, (), f"{method.name}: loss {name!r}")
        require_equal(again[name], loss, f"{method.name}: loss {name!r} of the same inputs twice")
    for name, tensor in before.items():
        require_equal(inputs[name], tensor, f"{method.name}: losses must change nothing, but {name} has changed")


def _check_noise(method: GradientMethod, modules: Modules, x: Tensor, noise: Noise) -> None:
    with torch.no_grad():
        losses = method.losses(modules, x, noise)
        for name, value in noise.items():
            other = method.losses(modules, x, {**noise, name: value.flip(0) + 1})
            changed = any(bool(other[player] != losses[player]) for player in losses)
            require(changed, f"{method.name}: noise {name!r} is asked for, but no loss depends on it")


def _check_gradients(method: GradientMethod, view: TrainingView, fit: Fit) -> None:
    """After some steps, so that layers behind one that starts at zero have a gradient too."""
    modules = _modules(method, view)
    modules.load_state_dict(dict(fit.state))
    for key, gradient in _gradients(method, modules, view.validation, _noise(method, view)).items():
        require(gradient is not None and bool(gradient.any()), f"{method.name}: {key}, whose loss gives it no gradient")


def _check_per_replica(method: GradientMethod, view: TrainingView, fit: Fit) -> None:
    """Options that are said to be the players' own change no loss."""
    unknown = sorted(method.per_replica - method.config.keys())
    require(not unknown, f"{method.name}: per_replica names no options: {', '.join(unknown)}")
    of_loop = sorted(method.per_replica & {field.name for field in dataclasses.fields(GradientMethod)})
    require(not of_loop, f"{method.name}: per_replica names options of the loop: {', '.join(of_loop)}")
    modules, x, noise = _modules(method, view), view.validation, _noise(method, view)
    modules.load_state_dict(dict(fit.state))
    changed = {option: 0.9 * method.config[option] for option in method.per_replica}
    losses, others = (own.losses(modules, x, noise) for own in (method, dataclasses.replace(method, **changed)))
    for name, loss in losses.items():
        require_equal(others[name], loss, f"{method.name}: per_replica has an option that changes loss {name!r}")


def _check_together(method: GradientMethod, problem: Problem) -> None:
    """Fits that share their steps, against each alone."""
    alone = [trial(method, problem, seed) for seed in (0, 1)]
    clock = Clock(CPU)
    runs, views = [tried.job.new_run(clock) for tried in alone], [tried.job.training_view() for tried in alone]
    try:
        with untouched(f"{method.name}: fit_together"):
            together = fit_together([method, method], views, runs)
    except RuntimeError as error:
        raise ConformanceError(f"{method.name}: {error}") from error
    for seed, fit in enumerate(together):
        what = f"{method.name}: a fit of seed {seed} alone, and one together with seed {1 - seed}"
        if not isinstance(fit, Fit):
            raise ConformanceError(f"{what}: {fit}")
        for key, tensor in alone[seed].fit.state.items():
            require_close(fit.state[key], tensor, what)


def _gradients(method: GradientMethod, modules: Modules, x: Tensor, noise: Noise) -> dict[str, Tensor | None]:
    """The gradient of each player's loss with respect to each of its parameters, under a text that names both."""
    losses = method.losses(modules, x, noise)
    found: dict[str, Tensor | None] = {}
    for player in method.players():
        named = {f"{on}.{key}": value for on in player.on for key, value in modules[on].named_parameters()}
        if named:
            loss, values = losses[player.name], list(named.values())
            gradients = torch.autograd.grad(loss, values, retain_graph=True, allow_unused=True)
            found |= {
                f"{key} belongs to player {player.name!r}": gradient
                for key, gradient in zip(named, gradients, strict=True)
            }
    return found

"""The conformance checks find what they are there for: each faulty plugin below breaks one law."""

from __future__ import annotations

import math
import random
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import numpy as np
import pyro
import pytest
import torch
from pydantic import PositiveInt
from torch import Tensor

from harness.evaluator import EvaluationRun, Evaluator, Measurement
from harness.method import Checkpoint, Fit, Run, State, unfit_for_one_posterior
from harness.model import DecoderModel, LatentModel
from harness.posterior import LocalFamily, LocalGaussian, Posterior
from harness.problem import DatasetSpec, MLPSpec, ModelSpec, Problem, TrainingView
from harness.testing import (
    ConformanceError,
    SmallPosteriorProblem,
    SmallProblem,
    check_evaluator,
    check_method,
    check_posterior,
    check_problem,
)
from harness.testing.small import KnownPosterior, problem_for, view_of
from harness.training import Modules, Noise

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "tests/distributions/harness-example/harness_example.py"


def example() -> ModuleType:
    spec = spec_from_file_location("harness_example", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    sys.modules["harness_example"] = module
    spec.loader.exec_module(module)
    return module


SharedScale: Any = example().SharedScale
SharedScalePosterior: Any = sys.modules["harness_example"].SharedScalePosterior


def test_the_example_passes() -> None:
    check_method(SharedScale())


@dataclass(frozen=True, kw_only=True)
class OnePosterior(SharedScale):
    """Unfit where there are several observations; the small posterior problem is for such."""

    def unfit(self, view: TrainingView) -> str | None:
        return unfit_for_one_posterior(view)


def test_a_method_for_one_posterior_is_tried_on_one() -> None:
    assert problem_for(SharedScale()) == SmallProblem()
    assert problem_for(OnePosterior()) == SmallPosteriorProblem()
    check_problem(SmallPosteriorProblem())
    check_method(OnePosterior())


def loss(method: Any, modules: Modules, x: Tensor, noise: Noise) -> Tensor:
    return SharedScale.losses(method, modules, x, noise)["negative_elbo"]


@dataclass(frozen=True, kw_only=True)
class HiddenNoise(SharedScale):
    def losses(self, modules: Modules, x: Tensor, noise: Noise) -> dict[str, Tensor]:
        return {"negative_elbo": loss(self, modules, x, {"eps": noise["eps"] + torch.randn(())})}


@dataclass(frozen=True, kw_only=True)
class UnusedNoise(SharedScale):
    def losses(self, modules: Modules, x: Tensor, noise: Noise) -> dict[str, Tensor]:
        return {"negative_elbo": loss(self, modules, x, {"eps": torch.ones_like(noise["eps"])})}


@dataclass(frozen=True, kw_only=True)
class Stateful(SharedScale):
    def losses(self, modules: Modules, x: Tensor, noise: Noise) -> dict[str, Tensor]:
        modules["encoder"].log_sd.data += 1e-3
        return {"negative_elbo": loss(self, modules, x, noise)}


@dataclass(frozen=True, kw_only=True)
class WrongPlayer(SharedScale):
    def losses(self, modules: Modules, x: Tensor, noise: Noise) -> dict[str, Tensor]:
        value = loss(self, modules, x, noise)
        return {"negative_elbo": value, "elbo": -value}


@dataclass(frozen=True, kw_only=True)
class DetachedEncoder(SharedScale):
    def losses(self, modules: Modules, x: Tensor, noise: Noise) -> dict[str, Tensor]:
        mean, log_sd = modules["encoder"](x)
        z = mean.detach() + torch.exp(log_sd) * noise["eps"]
        return {"negative_elbo": (log_sd.sum() - modules["model"].log_joint(x, z)).mean()}


@dataclass(frozen=True, kw_only=True)
class ZeroGradient(SharedScale):
    def losses(self, modules: Modules, x: Tensor, noise: Noise) -> dict[str, Tensor]:
        mean, log_sd = modules["encoder"](x)
        z = 0 * mean + torch.exp(log_sd) * noise["eps"]
        return {"negative_elbo": -modules["model"].log_joint(x, z).mean()}


@dataclass(frozen=True, kw_only=True)
class Unbatched(SharedScale):
    name: str = "unbatched"

    def losses(self, modules: Modules, x: Tensor, noise: Noise) -> dict[str, Tensor]:
        value = loss(self, modules, x, noise)
        return {"negative_elbo": value if float(value.detach()) < math.inf else -value}


@dataclass(frozen=True, kw_only=True)
class Entangled(SharedScale):
    """Its losses depend on a tensor that is neither parameter nor buffer: a batched program takes the first seed's."""

    def build(self, view: TrainingView) -> Modules:
        modules = super().build(view)
        modules["encoder"].shift = torch.randn(())
        return modules

    def losses(self, modules: Modules, x: Tensor, noise: Noise) -> dict[str, Tensor]:
        return {"negative_elbo": loss(self, modules, x, noise) * modules["encoder"].shift}


@dataclass(frozen=True, kw_only=True)
class OtherLoss(SharedScale):
    per_replica: ClassVar[frozenset[str]] = frozenset({"lr"})

    def losses(self, modules: Modules, x: Tensor, noise: Noise) -> dict[str, Tensor]:
        return {"negative_elbo": loss(self, modules, x, noise) * (1 + self.lr)}


@dataclass(frozen=True, kw_only=True)
class NoSuchOption(SharedScale):
    per_replica: ClassVar[frozenset[str]] = frozenset({"learning_rate"})


@dataclass(frozen=True, kw_only=True)
class OfTheLoop(SharedScale):
    per_replica: ClassVar[frozenset[str]] = frozenset({"lr", "lr_decay"})


@dataclass(frozen=True, kw_only=True)
class NotANumber(SharedScale):
    def posterior(self, modules: Modules) -> Any:
        return altered(modules, sample=lambda own, x, n, generator: own.sample(x, n, generator) / 0)


@dataclass(frozen=True, kw_only=True)
class WrongShape(SharedScale):
    def posterior(self, modules: Modules) -> Any:
        return altered(modules, sample=lambda own, x, n, generator: own.sample(x, n, generator).transpose(0, 1))


@dataclass(frozen=True, kw_only=True)
class IgnoresGenerator(SharedScale):
    def posterior(self, modules: Modules) -> Any:
        return altered(modules, sample=lambda own, x, n, generator: own.sample(x, n, torch.default_generator))


@dataclass(frozen=True, kw_only=True)
class IgnoresX(SharedScale):
    def posterior(self, modules: Modules) -> Any:
        return altered(modules, sample=lambda own, x, n, generator: own.sample(torch.zeros_like(x), n, generator))


@dataclass(frozen=True, kw_only=True)
class NotNormalised(SharedScale):
    def posterior(self, modules: Modules) -> Any:
        return altered(modules, log_prob=lambda own, x, z: own.log_prob(x, z) + 0.1)


@dataclass(frozen=True, kw_only=True)
class DensitiesDisagree(SharedScale):
    def posterior(self, modules: Modules) -> Any:
        def shifted(own: Any, x: Tensor, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
            z = own.sample(x, n, generator)
            return z, own.log_prob(x, z) + 1e-3

        return altered(modules, sample_and_log_prob=shifted)


@dataclass(frozen=True, kw_only=True)
class MixesObservations(SharedScale):
    def posterior(self, modules: Modules) -> Any:
        return altered(modules, log_prob=lambda own, x, z: own.log_prob(x, z) + x.mean())


@dataclass(frozen=True, kw_only=True)
class WrongKL(SharedScale):
    def posterior(self, modules: Modules) -> Any:
        return altered(modules, kl_to_prior=lambda own, x: torch.ones(len(x), dtype=x.dtype))


@dataclass(frozen=True, kw_only=True)
class ForgetsItsState(SharedScale):
    def restore(self, view: TrainingView, state: Mapping[str, Tensor]) -> Fit:
        return SharedScale.restore(self, view, {**state, "encoder.log_sd": torch.zeros(view.latent_dim)})


@dataclass(frozen=True, kw_only=True)
class OwnModel(SharedScale):
    def fit(self, view: TrainingView, run: Run) -> Fit:
        fit = SharedScale.fit(self, view, run)
        bigger = MLPSpec(latent_dim=view.latent_dim, width=99).new_model(view.event_shape)
        return replace(fit, model=bigger.to(view.validation))


@dataclass(frozen=True, kw_only=True)
class NeverTheSame(SharedScale):
    def fit(self, view: TrainingView, run: Run) -> Fit:
        fit = SharedScale.fit(self, view, run)
        fit.state["encoder.log_sd"].add_(random.SystemRandom().random())
        return fit


@dataclass(frozen=True, kw_only=True)
class TakesTooLong(SharedScale):
    def fit(self, view: TrainingView, run: Run) -> Fit:
        return replace(SharedScale.fit(self, view, run), steps=1000)


@dataclass(frozen=True, kw_only=True)
class UsesGlobalNumpy(SharedScale):
    def fit(self, view: TrainingView, run: Run) -> Fit:
        np.random.random()
        return SharedScale.fit(self, view, run)


@dataclass(frozen=True, kw_only=True)
class LeavesDouble(SharedScale):
    def fit(self, view: TrainingView, run: Run) -> Fit:
        torch.set_default_dtype(torch.float64)
        return SharedScale.fit(self, view, run)


@dataclass(frozen=True, kw_only=True)
class DoubleConstant(SharedScale):
    """What is wrong where runs are in single precision, as they are by default, shows in no check in double."""

    def losses(self, modules: Modules, x: Tensor, noise: Noise) -> dict[str, Tensor]:
        eps = noise["eps"] + torch.zeros(noise["eps"].shape, dtype=torch.float64)
        return {"negative_elbo": loss(self, modules, x, {"eps": eps})}


@dataclass(frozen=True, kw_only=True)
class DoubleDraws(SharedScale):
    def posterior(self, modules: Modules) -> Any:
        return altered(modules, sample=lambda own, x, n, generator: own.sample(x, n, generator).double())


@dataclass(frozen=True, kw_only=True)
class DoubleDensity(SharedScale):
    def posterior(self, modules: Modules) -> Any:
        def double(own: Any, x: Tensor, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
            z, log_q = own.sample_and_log_prob(x, n, generator)
            return z, log_q.double()

        return altered(modules, sample_and_log_prob=double)


class Forgetful(Checkpoint):
    """Does not give back what Adam knew."""

    def __init__(self, kept: Checkpoint) -> None:
        self.kept = kept

    def load(self) -> State | None:
        state = self.kept.load()
        if state is None:
            return None
        return replace(state, tensors={key: x * (not key.endswith("exp_avg")) for key, x in state.tensors.items()})

    def due(self) -> bool:
        return self.kept.due()

    def save(self, state: State, step: int, fraction: float) -> None:
        self.kept.save(state, step, fraction)


@dataclass(frozen=True, kw_only=True)
class ForgetsWhenInterrupted(SharedScale):
    def fit(self, view: TrainingView, run: Run) -> Fit:
        run.checkpoint = Forgetful(run.checkpoint)
        return SharedScale.fit(self, view, run)


@dataclass(frozen=True, kw_only=True)
class LeavesParameters(SharedScale):
    def fit(self, view: TrainingView, run: Run) -> Fit:
        pyro.param("left_behind", torch.tensor(1.0))
        return SharedScale.fit(self, view, run)


@dataclass(frozen=True, kw_only=True)
class GetsNowhere(SharedScale):
    def fit(self, view: TrainingView, run: Run) -> Fit:
        if run.checkpoint.due():
            run.checkpoint.save(State({}, {}), 0, 0.0)
        return SharedScale.fit(self, view, run)


@dataclass(frozen=True, kw_only=True)
class NowhereFit(SharedScale):
    name: str = "nowhere-fit"

    def unfit(self, view: TrainingView) -> str | None:
        return "never fits"


class Thawed(SharedScale):
    """Not a dataclass of its own."""


def altered(modules: Modules, **methods: Any) -> Any:
    """The example's posterior with some of its methods replaced; each is given the unaltered posterior first."""
    own = SharedScalePosterior(modules["encoder"])

    def bound(method: Any) -> Any:
        return lambda self, *arguments: method(own, *arguments)

    cls = type("Altered", (SharedScalePosterior,), {name: bound(method) for name, method in methods.items()})
    return cls(modules["encoder"])


@pytest.mark.parametrize(
    ("method", "law"),
    [
        (HiddenNoise, "losses changes torch's global generator"),
        (UnusedNoise, "noise 'eps' is asked for, but no loss depends on it"),
        (Stateful, "of the same inputs twice"),
        (WrongPlayer, r"losses \['elbo', 'negative_elbo'\] for players \['negative_elbo'\]"),
        (DetachedEncoder, "encoder.* belongs to player 'negative_elbo', whose loss does not depend on it"),
        (ZeroGradient, "encoder.* belongs to player 'negative_elbo', whose loss gives it no gradient"),
        (Unbatched, r"unbatched: its losses, or the problem's model, are no batched program .*one_by_one\(\)"),
        (Entangled, "a fit of seed 1 alone, and one together with seed 0: differ by up to"),
        (OtherLoss, "per_replica has an option that changes loss 'negative_elbo'"),
        (NoSuchOption, "per_replica names no options: learning_rate"),
        (OfTheLoop, "per_replica names options of the loop: lr_decay"),
        (NotANumber, "sample: not finite"),
        (WrongShape, r"sample: expected shape \(3, 4, 2\), got \(4, 3, 2\)"),
        (IgnoresGenerator, "Posterior.sample changes torch's global generator"),
        (IgnoresX, "the same draws whatever x is"),
        (NotNormalised, "does not integrate to 1"),
        (DensitiesDisagree, "sample_and_log_prob and Posterior.log_prob: differ by up to 0.001"),
        (MixesObservations, "log_prob of one observation alone and among others"),
        (WrongKL, "kl_to_prior against the mean of log q - log p: off by"),
        (ForgetsItsState, "samples of a restored fit: expected the same numbers bit for bit"),
        (OwnModel, "the fitted model must be the view's"),
        (NeverTheSame, "two fits from the same seed"),
        (TakesTooLong, "took 1000 steps with a budget of 5"),
        (UsesGlobalNumpy, "changes numpy's global generator"),
        (LeavesDouble, "changes torch's default dtype"),
        (DoubleConstant, "fit in float32, as runs are unless another precision is asked for: .* same dtype"),
        (DoubleDraws, "Posterior.sample: expected float32 in a run in float32, got torch.float64"),
        (DoubleDensity, "log density of Posterior draws: expected float32 in a run in float32, got torch.float64"),
        (ForgetsWhenInterrupted, "in one go and one that was interrupted.* expected the same numbers bit for bit"),
        (GetsNowhere, "stopped at each checkpoint, does not come to an end"),
        (LeavesParameters, "changes Pyro's parameters"),
        (NowhereFit, "nowhere-fit is unfit for small-posterior \\(never fits\\): check it on another problem"),
        (Thawed, "Thawed must be a frozen dataclass"),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else "",
)
def test_a_faulty_method_is_found(method: Any, law: str) -> None:
    dtype = torch.get_default_dtype()
    try:
        with pytest.raises(ConformanceError, match=law), pyro.get_param_store().scope():
            check_method(method())
    finally:
        torch.set_default_dtype(dtype)


class LooseLikelihood(DecoderModel):
    def log_joint(self, x: Tensor, z: Tensor) -> Tensor:
        return super().log_joint(x, z) + 1.0


class WidePrior(DecoderModel):
    def log_prior(self, z: Tensor) -> Tensor:
        return super().log_prior(z) - math.log(2)


class DoubleLikelihood(DecoderModel):
    def log_likelihood(self, x: Tensor, z: Tensor) -> Tensor:
        return super().log_likelihood(x, z) + torch.zeros(len(x), dtype=torch.float64)


class DoubleWeights(DecoderModel):
    def log_prior(self, z: Tensor) -> Tensor:
        return super().log_prior(z @ torch.eye(z.shape[-1], dtype=torch.float64))


class SlightlyWidePrior(DecoderModel):
    def log_prior(self, z: Tensor) -> Tensor:
        return super().log_prior(z) - math.log(1.05)


class ShiftedSimulator(DecoderModel):
    def sample_observation(self, z: Tensor, generator: torch.Generator) -> Tensor:
        return super().sample_observation(z, generator) * 0


class CorrelatedSimulator(DecoderModel):
    """Of the right mean over all elements, which are mixed up."""

    def sample_observation(self, z: Tensor, generator: torch.Generator) -> Tensor:
        return super().sample_observation(z, generator).flatten(-2).flip(-1).unflatten(-1, self.event_shape)


@dataclass(frozen=True, kw_only=True)
class FaultyProblem(SmallProblem):
    """One fault at a time."""

    name: str = "faulty"
    fault: str = ""
    latent_dim: PositiveInt = 2

    def dataset(self) -> DatasetSpec:
        spec = super().dataset()
        if self.fault == "grey":
            return replace(spec, test=spec.test * 0.5)
        if self.fault == "levels":
            return replace(spec, train=spec.train * 255, binarisation="dynamic")
        if self.fault == "real":
            return replace(spec, train=2 * spec.train - 1, binarisation="none")
        if self.fault == "nan":
            return replace(spec, validation=spec.validation * np.nan)
        return replace(spec, test=spec.test[:, :1]) if self.fault == "shape" else spec

    def model_spec(self) -> ModelSpec:
        faulty: dict[str, type[DecoderModel]] = {
            "joint": LooseLikelihood,
            "prior": WidePrior,
            "prior by 5 %": SlightlyWidePrior,
            "double": DoubleLikelihood,
            "double weights": DoubleWeights,
            "simulated mean": ShiftedSimulator,
            "simulated noise": CorrelatedSimulator,
        }
        spec = super().model_spec()
        if self.fault in faulty:
            object.__setattr__(spec, "new_model", lambda shape: recast(spec, shape, faulty[self.fault]))
        return spec


def recast(spec: ModelSpec, event_shape: tuple[int, ...], cls: type[DecoderModel]) -> LatentModel:
    model = type(spec).new_model(spec, event_shape)
    model.__class__ = cls
    return model


@pytest.mark.parametrize(
    ("fault", "law"),
    [
        ("grey", "test has values besides 0 and 1, but binarisation='static'"),
        ("levels", r"values from 0.0 to 255.0, but binarisation='dynamic' needs probabilities in \[0, 1\]"),
        ("nan", "validation has values that are not finite"),
        ("shape", r"test has observations of shape \(1, 3\), train of \(2, 3\)"),
        ("joint", "log_joint and log_likelihood \\+ log_prior: differ by up to 1"),
        ("prior", "log_prior does not integrate to 1 where its draws are, but to about 0.50"),
        ("prior by 5 %", "log_prior does not integrate to 1 where its draws are, but to about 0.95"),
        ("real", r"train has values from -1.0 to 1.0, but a Bernoulli likelihood needs values in \[0, 1\]"),
        ("double", "log_likelihood: expected float32 in a run in float32, got torch.float64"),
        ("double weights", "log_prior in float32, as runs are unless another precision is asked for: "),
        ("simulated mean", "sample_observation against mean: off by"),
        ("simulated noise", r"of x that sample_observation draws from p\(x\|z\): off by"),
    ],
)
def test_a_faulty_problem_is_found(fault: str, law: str) -> None:
    check_problem(FaultyProblem())
    with pytest.raises(ConformanceError, match=law):
        check_problem(FaultyProblem(fault=fault))


@dataclass(frozen=True, kw_only=True)
class FaultyEvaluator(Evaluator):
    """One fault at a time."""

    name: str = "faulty"
    fault: str = ""

    def undefined(self, fit: Fit, problem: Problem) -> str | None:
        if self.fault == "nowhere" or not isinstance(fit.posterior, KnownPosterior):
            return "needs what nobody has"
        return " " if self.fault == "silent" else None

    def measure(self, fit: Fit, problem: Problem, run: EvaluationRun) -> list[Measurement]:
        assert isinstance(fit.posterior, KnownPosterior)
        x, indices = run.data.scored(8)
        values = fit.posterior.kl_to_prior(x)
        if self.fault == "random":
            values = values + random.SystemRandom().random()
        if self.fault == "trains":
            next(fit.model.parameters()).data += 1
        if self.fault in ("outside", "simulated"):
            indices = indices + 1000
        traces: dict[str, Any] = {
            "text": {"notes": np.array(["fine"])},
            "infinite": {"curve": np.array([1.0, -np.inf])},
            "random trace": {"curve": np.array([random.SystemRandom().random()])},
            "unknown": {"curve": np.array([1.0, np.nan]), "counts": np.arange(3)},
        }.get(self.fault, {})
        split = "simulated" if self.fault == "simulated" else ""
        stderrs = torch.ones_like(values) if self.fault == "exact" else torch.zeros_like(values)
        if self.fault == "random errors":
            stderrs = stderrs + random.SystemRandom().random()
        warnings = {"long warning": "two\nlines", "random warning": str(random.SystemRandom().random())}
        settings = {"noise": random.SystemRandom().random()} if self.fault == "random settings" else {}
        extra: dict[str, Any] = {
            "settings": settings,
            "split": split,
            "traces": traces,
            "warning": warnings.get(self.fault, ""),
        }
        measured = run.measurement("kl_to_prior", values, stderrs, "exact", indices, **extra)
        return [] if self.fault == "nothing" else [measured] * (2 if self.fault == "twice" else 1)


@pytest.mark.parametrize(
    ("fault", "law"),
    [
        ("silent", "undefined without a reason"),
        ("random", "measuring the same fit twice gives different values"),
        ("random errors", "measuring the same fit twice gives different stderrs"),
        ("random settings", "measuring the same fit twice gives different settings"),
        ("nowhere", "undefined on every fit that it was tried on"),
        ("trains", "measuring changes the model's"),
        ("outside", "indices must lie within the test split"),
        ("text", "trace 'notes' must be an array of numbers, got <U4"),
        ("infinite", "trace 'curve' is minus infinity somewhere"),
        ("random trace", "measuring the same fit twice gives different traces 'curve'"),
        ("exact", "an exact number has no standard error"),
        ("nothing", "no measurement; say why"),
        ("long warning", "a warning is one line of text"),
        ("random warning", "measuring the same fit twice gives different warnings"),
        ("twice", "a metric is measured twice"),
    ],
)
def test_a_faulty_evaluator_is_found(fault: str, law: str) -> None:
    check_evaluator(FaultyEvaluator())
    with pytest.raises(ConformanceError, match=law):
        check_evaluator(FaultyEvaluator(fault=fault))


@pytest.mark.parametrize("peculiarity", ["simulated", "unknown"])
def test_what_is_no_fault(peculiarity: str) -> None:
    """Indices of observations that are not the test split's, and diagnostics that are not known everywhere."""
    check_evaluator(FaultyEvaluator(fault=peculiarity))


class Local(LocalGaussian):
    """A local family with one fault at a time."""

    def __init__(self, mean: Tensor, log_sd: Tensor, fault: str) -> None:
        start = mean + 0.5 * (fault == "other mean")
        super().__init__(start, log_sd[0] if fault == "shared" else log_sd + 0.2 * (fault == "other scale"))
        self.fault, self.first = fault, log_sd
        if fault == "unused":
            self.more = torch.nn.Parameter(torch.ones_like(mean))

    def sample_and_log_prob(self, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        z, log_q = super().sample_and_log_prob(n, generator)
        if self.fault == "detached":
            return z.detach(), log_q.detach()
        if self.fault == "mixed":
            z = z + self.mean.mean(0) - self.mean.detach().mean(0)
        if self.fault == "old density":
            log_q = log_q + (self.log_sd - self.first).sum(-1)
        if self.fault == "greedy" and bool((self.log_sd != self.first).any()):
            torch.rand(1, generator=generator)
        return z, log_q


class FaultyFamily(KnownPosterior):
    def __init__(self, fault: str) -> None:
        super().__init__(latent_dim=2)
        self.fault = fault

    def local(self, x: Tensor) -> LocalFamily:
        if self.fault == "global noise":
            torch.rand(1)
        return Local(self._mean(x), torch.full((len(x), 2), math.log(self.SD), dtype=x.dtype), self.fault)


class FaultyDraws(KnownPosterior):
    """Draws without their density that are not those with it, or no draws of their own."""

    def __init__(self, fault: str) -> None:
        super().__init__(latent_dim=2)
        self.fault = fault

    def sample(self, x: Tensor, n: int, generator: torch.Generator) -> Tensor:
        z = KnownPosterior(2).sample(x, n, generator)
        mean = self._mean(x)
        if self.fault == "narrow":
            return mean + 0.25 * (z - mean)
        if self.fault == "shifted":
            return z + 0.2
        return z[:1].expand(n, -1, -1) if self.fault == "one draw" else z

    def sample_and_log_prob(self, x: Tensor, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        z = KnownPosterior(2).sample(x, n, generator)
        return z, self.log_prob(x, z)


@pytest.mark.parametrize(
    ("fault", "law"),
    [
        ("narrow", "Posterior.sample and sample_and_log_prob differ in second moments"),
        ("shifted", "Posterior.sample and sample_and_log_prob differ in means"),
        ("one draw", "several of the n draws of a posterior with a density are the same"),
    ],
)
def test_draws_are_those_of_the_density(fault: str, law: str) -> None:
    model, x = view_of(SmallProblem()).model, torch.linspace(-1, 1, 24, dtype=torch.float64).reshape(4, 2, 3)
    check_posterior(FaultyDraws(""), model, x)
    with pytest.raises(ConformanceError, match=law):
        check_posterior(FaultyDraws(fault), model, x)


class ImplicitLocal(Posterior):
    """Its draws may say what they like; only that it forgot its density matters."""

    def sample(self, x: Tensor, n: int, generator: torch.Generator) -> Tensor:
        return KnownPosterior(2).sample(x, n, generator)

    def local(self, x: Tensor) -> LocalFamily:
        return KnownPosterior(2).local(x)


class WithoutPointDensity(Posterior):
    """Where the density is known for draws alone, the members' moments are looked at."""

    def __init__(self, fault: str) -> None:
        self.own = FaultyFamily(fault)

    def sample(self, x: Tensor, n: int, generator: torch.Generator) -> Tensor:
        return self.own.sample(x, n, generator)

    def sample_and_log_prob(self, x: Tensor, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        return self.own.sample_and_log_prob(x, n, generator)

    def local(self, x: Tensor) -> LocalFamily:
        return self.own.local(x)


@pytest.mark.parametrize(
    ("posterior", "law"),
    [
        (FaultyFamily("other mean"), "log density of Posterior.local's draws and Posterior.log_prob: differ by"),
        (WithoutPointDensity("other mean"), "the mean of Posterior.local's draws and of Posterior.sample's: off by"),
        (WithoutPointDensity("other scale"), "the second moment of Posterior.local's draws"),
        (FaultyFamily("shared"), r"log_sd must have shape \(4, ...\), got \(2,\)"),
        (FaultyFamily("unused"), "the ELBO gives more no gradient"),
        (FaultyFamily("detached"), "draws and densities are detached from the parameters"),
        (FaultyFamily("mixed"), "mean: the row of one observation matters to another"),
        (FaultyFamily("old density"), "the density of moved members does not integrate to 1"),
        (FaultyFamily("greedy"), "what two members leave of the same generator"),
        (FaultyFamily("global noise"), "Posterior.local changes torch's global generator"),
        (ImplicitLocal(), "a posterior with a local family has a density too"),
    ],
    ids=lambda value: "" if isinstance(value, str) else type(value).__name__,
)
def test_a_faulty_local_family_is_found(posterior: Posterior, law: str) -> None:
    model, x = view_of(SmallProblem()).model, torch.linspace(-1, 1, 24, dtype=torch.float64).reshape(4, 2, 3)
    check_posterior(FaultyFamily("none"), model, x)
    check_posterior(WithoutPointDensity("none"), model, x)
    with pytest.raises(ConformanceError, match=law):
        check_posterior(posterior, model, x)

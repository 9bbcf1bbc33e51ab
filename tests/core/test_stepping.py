"""Laws of recorded steps: what is replayed is what is written."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributions import Normal
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import harness
from harness import cuda_graph, players, stepping
from harness.clock import Clock
from harness.method import Budget, Fit, Run
from harness.options import UserError
from harness.players import Modules, Noise
from harness.problem import Problem, TrainingView, placed
from harness.seeding import Streams
from harness.testing import SmallGreyProblem, SmallPosteriorProblem, SmallProblem
from harness.training import GradientMethod, fit_together
from harness_plugins.avb import AVB
from harness_plugins.avb_ac import AVBAC
from harness_plugins.iaf import IAF
from harness_plugins.quadrature import Quadrature
from harness_plugins.vae import VAE

CPU, DOUBLE = torch.device("cpu"), torch.float64
PROBLEM = SmallProblem()


@dataclass(frozen=True, kw_only=True)
class Drifting(VAE):
    """Its loss depends on a buffer that every step changes."""

    name: str = "drifting"

    def build(self, view: TrainingView) -> Modules:
        modules = super().build(view)
        modules["encoder"].register_buffer("drift", torch.ones(()))
        return modules

    def losses(self, modules: Modules, x: Tensor, noise: Noise) -> dict[str, Tensor]:
        modules["encoder"].drift.mul_(0.99)
        return {name: loss * modules["encoder"].drift for name, loss in super().losses(modules, x, noise).items()}


METHODS = [
    VAE(batch_size=16),
    Drifting(batch_size=16),
    IAF(batch_size=16, hidden=8, context_dim=3),
    IAF(batch_size=16, hidden=8, context_dim=3, kl_warmup=0.5),
    AVB(batch_size=16, noise_dim=3, adversary_steps=3, clip_norm=0.3, kl_warmup=0.5),
    AVBAC(batch_size=16, noise_dim=3, kl_warmup=0.5),
    AVBAC(batch_size=16, noise_dim=3, covariance="full", gaussian_part=True, adversary_steps=2),
    AVBAC(batch_size=16, noise_dim=3, encoder="injected", covariance="full"),
    Quadrature(batch_size=16, points=16),
]


def run_of(
    method: GradientMethod, step: str, budget: str, dtype: torch.dtype, device: torch.device, seed: int = 0
) -> Run:
    streams = Streams(seed, PROBLEM.label, method.name, device)
    products = torch.bfloat16 if dtype == torch.bfloat16 else None
    dtype = torch.float32 if products else dtype
    return Run(device, dtype, Budget.parse(budget), streams, Clock(device), products=products, step=step)


def fitted(
    method: GradientMethod, step: str, budget: str = "steps=50", dtype: torch.dtype = DOUBLE,
    device: torch.device = CPU, problem: Problem = PROBLEM, seed: int = 0,
) -> tuple[Fit, Run]:  # fmt: skip
    run = run_of(method, step, budget, dtype, device, seed)
    view = problem.training_view(placed(problem, device, run.dtype), run.streams)
    with run.clock.phase("fit"), run.streams.initial_weights(shared=False):
        return method.fit(view, run), run


def together(
    method: GradientMethod, step: str, budget: str = "steps=50", device: torch.device = CPU
) -> list[Mapping[str, Tensor]]:
    runs = [run_of(method, step, budget, DOUBLE, device, seed) for seed in (0, 1, 7)]
    for run in runs:
        run.clock = runs[0].clock
    views = [PROBLEM.training_view(placed(PROBLEM, device, DOUBLE), run.streams) for run in runs]
    with runs[0].clock.phase("fit"):
        fits = fit_together([method] * 3, views, runs)
    found = [fit for fit in fits if isinstance(fit, Fit)]
    assert [fit.step_used for fit in found] == [step] * 3
    return [fit.state for fit in found]


def assert_equal(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


def assert_close(first: Mapping[str, Tensor], second: Mapping[str, Tensor], atol: float) -> None:
    for name, tensor in first.items():
        torch.testing.assert_close(tensor, second[name], rtol=0, atol=atol, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.label)
def test_a_recording_gives_the_same_numbers_to_the_last_bit(method: GradientMethod, dtype: torch.dtype) -> None:
    (eager, run), (graph, other) = (fitted(method, step, dtype=dtype) for step in ("eager", "graph"))
    assert (eager.step_used, graph.step_used) == ("eager", "graph")
    assert_equal(eager.state, graph.state)
    assert [(p.step, p.objective, p.validation) for p in other.curve] == [
        (p.step, p.objective, p.validation) for p in run.curve
    ]
    assert other.clock.seconds["compile"] > 0
    assert "compile" not in run.clock.seconds


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.label)
def test_so_it_does_for_seeds_at_once(method: GradientMethod) -> None:
    for eager, graph in zip(together(method, "eager"), together(method, "graph"), strict=True):
        assert_equal(eager, graph)


@pytest.mark.compiler
def test_compiled_steps_sum_in_another_order() -> None:
    """200 steps amplify what rounding in float64 makes of that to less than 1e-8."""
    method = AVB(batch_size=16, noise_dim=3, clip_norm=0.3)
    (eager, _), (compiled, run) = (fitted(method, step, "steps=200") for step in ("eager", "compile"))
    assert compiled.step_used == "compile"
    assert_close(eager.state, compiled.state, 1e-8)
    assert run.clock.seconds["compile"] > 0


def assert_same_in_single_precision(mode: str, device: torch.device) -> None:
    """One step tightly, and the curve of 200 by what it varies over seeds."""
    method = VAE(batch_size=16)

    def single(step: str, budget: str, seed: int = 0) -> tuple[Fit, np.ndarray]:
        fit, run = fitted(method, step, budget, torch.float32, device, seed=seed)
        assert fit.step_used == step
        return fit, np.array([point.objective for point in run.curve])

    assert_close(single("eager", "steps=1")[0].state, single(mode, "steps=1")[0].state, 1e-5)
    eager = np.stack([single("eager", "steps=200", seed)[1] for seed in range(5)])
    assert eager.shape[1] > 5
    noise = eager.std(axis=0, ddof=1)
    assert (np.abs(single(mode, "steps=200")[1] - eager[0]) < noise / 10).all()


@pytest.mark.compiler
def test_compiled_steps_in_single_precision() -> None:
    assert_same_in_single_precision("compile", CPU)


@pytest.mark.compiler
def test_compiled_steps_of_seeds_at_once() -> None:
    method = VAE(batch_size=16, clip_norm=0.3)
    for eager, compiled in zip(together(method, "eager"), together(method, "compile"), strict=True):
        assert_close(eager, compiled, 1e-8)


def test_what_cannot_be_compiled_is_replayed_as_it_was_recorded(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise OSError("no compiler")

    monkeypatch.setattr(torch._inductor, "compile", broken)
    method = AVB(batch_size=16, noise_dim=3, adversary_steps=2)
    with caplog.at_level(logging.WARNING, logger="harness"):
        fit, _ = fitted(method, "compile")
    assert fit.step_used == "graph"
    assert [record.message for record in caplog.records] == [
        "steps are replayed as they were recorded, not compiled: OSError: no compiler"
    ]
    assert_equal(fitted(method, "eager")[0].state, fit.state)


def test_auto_records_when_it_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    method = AVB(batch_size=16, noise_dim=3, adversary_steps=2)
    monkeypatch.setattr(stepping, "FIRST_UPDATES", 20)
    (short, _), (long, run) = (fitted(method, "auto", f"steps={steps}") for steps in (10, 30))
    assert (short.step_used, long.step_used) == ("eager", "graph")
    assert run.clock.seconds["compile"] > 0
    assert_equal(fitted(method, "eager", "steps=30")[0].state, long.state)


@dataclass(frozen=True, kw_only=True)
class Counted(VAE):
    """Counts how often its losses are evaluated while it trains."""

    name: str = "counted"
    calls: ClassVar[list[int]] = []

    def losses(self, modules: Modules, x: Tensor, noise: Noise) -> dict[str, Tensor]:
        if modules.training:
            self.calls.append(1)
        return super().losses(modules, x, noise)


def test_losses_are_evaluated_to_record_and_to_check() -> None:
    Counted.calls.clear()
    _, run = fitted(Counted(batch_size=16), "graph", "steps=300")
    checks = sum(point.validation is not None for point in run.curve)
    assert len(Counted.calls) == 1 + checks == 21


@dataclass(frozen=True, kw_only=True)
class Branching(VAE):
    """What it computes depends on numbers: that is no recording."""

    name: str = "branching"

    def losses(self, modules: Modules, x: Tensor, noise: Noise) -> dict[str, Tensor]:
        losses = super().losses(modules, x, noise)
        return {name: loss if float(loss) > 4.0 else 2 * loss for name, loss in losses.items()}


@dataclass(frozen=True, kw_only=True)
class Choosing(VAE):
    """Its loss is of some observations, and how many these are depends on their values."""

    name: str = "choosing"

    def losses(self, modules: Modules, x: Tensor, noise: Noise) -> dict[str, Tensor]:
        chosen = noise["eps"][:, 0] > 0
        return super().losses(modules, x[chosen], {"eps": noise["eps"][chosen]})


@pytest.mark.parametrize("method", [Branching(batch_size=16), Choosing(batch_size=16)], ids=lambda method: method.name)
def test_what_cannot_be_recorded_is_taken_as_it_is_written(
    method: GradientMethod, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="harness"):
        fit, _ = fitted(method, "graph")
    assert fit.step_used == "eager"
    assert [record.message.partition(":")[0] for record in caplog.records] == [
        "steps are taken as they are written, not by graph"
    ]
    assert_equal(fitted(method, "eager")[0].state, fit.state)


@dataclass(frozen=True, kw_only=True)
class Ordering(VAE):
    """Its loss is of all observations in another order, by their places."""

    name: str = "ordering"

    def losses(self, modules: Modules, x: Tensor, noise: Noise) -> dict[str, Tensor]:
        order = noise["eps"][:, 0].argsort()
        return super().losses(modules, x[order], {"eps": noise["eps"][order]})


def test_places_are_no_masks() -> None:
    (eager, _), (graph, _) = (fitted(Ordering(batch_size=16), step) for step in ("eager", "graph"))
    assert graph.step_used == "graph"
    assert_equal(eager.state, graph.state)


@dataclass(frozen=True, kw_only=True)
class Forgetful(VAE):
    """Keeps what changes from step to step where a recording does not see it."""

    name: str = "forgetful"
    weight: ClassVar[list[float]] = [0.0]

    def schedule(self, modules: Modules, fraction: float) -> None:
        self.weight[0] = fraction

    def losses(self, modules: Modules, x: Tensor, noise: Noise) -> dict[str, Tensor]:
        return {name: self.weight[0] * loss for name, loss in super().losses(modules, x, noise).items()}


def test_a_number_that_changes_outside_of_buffers_is_an_error() -> None:
    assert fitted(Forgetful(batch_size=16), "eager")[0].step_used == "eager"
    with pytest.raises(RuntimeError, match="must be in buffers of the modules"):
        fitted(Forgetful(batch_size=16), "graph")


@dataclass(frozen=True, kw_only=True)
class Drawing(VAE):
    """Draws what it should have asked for."""

    name: str = "drawing"

    def losses(self, modules: Modules, x: Tensor, noise: Noise) -> dict[str, Tensor]:
        return super().losses(modules, x, {name: torch.randn_like(value) for name, value in noise.items()})


@pytest.mark.parametrize(("method", "told"), [(Drawing, 1), (VAE, 0)])
@pytest.mark.parametrize("step", ["eager", "graph"])
def test_draws_that_no_checkpoint_knows_of_are_told_of(
    method: type[VAE], told: int, step: str, caplog: pytest.LogCaptureFixture
) -> None:
    fit, _ = fitted(method(batch_size=16), step, budget="steps=250")  # which are checked on the way
    assert fit.step_used == ("eager" if told else step)
    assert caplog.text.count("losses draw from torch's global generator") == told


@dataclass(frozen=True, kw_only=True)
class ForgetfulGradient(Forgetful):
    """The same, where the loss itself does not show it."""

    name: str = "forgetful-gradient"

    def losses(self, modules: Modules, x: Tensor, noise: Noise) -> dict[str, Tensor]:
        losses = VAE.losses(self, modules, x, noise)
        return {name: loss + self.weight[0] * (loss - loss.detach()) for name, loss in losses.items()}


def test_so_is_one_that_enters_only_the_gradient() -> None:
    assert fitted(ForgetfulGradient(batch_size=16), "eager")[0].step_used == "eager"
    with pytest.raises(RuntimeError, match=r"gradient of negative_elbo .* must be in buffers of the modules"):
        fitted(ForgetfulGradient(batch_size=16), "graph")


def test_gradients_that_are_no_numbers_are_an_error_where_those_as_written_are() -> None:
    """What is not finite as it is written is a fit that has diverged."""
    one, off, bad = torch.ones(2, 3), torch.full((2, 3), 1.2), torch.full((2, 3), torch.nan)
    stepping.compare("loss", [one, one], [one, 1.05 * one])
    stepping.compare("loss", [bad], [one])
    for found in (off, bad):
        with pytest.raises(RuntimeError, match="the gradient of loss"):
            stepping.compare("loss", [one], [found])


@dataclass(frozen=True, kw_only=True)
class WithDistributions(VAE):
    """Written with torch's distributions, which look at their arguments unless they are told not to."""

    name: str = "with-distributions"

    def losses(self, modules: Modules, x: Tensor, noise: Noise) -> dict[str, Tensor]:
        [loss] = super().losses(modules, x, noise).values()
        scale = noise["eps"].square() + 1
        return {"negative_elbo": loss - 1e-3 * Normal(noise["eps"], scale).log_prob(noise["eps"]).mean()}


def test_distributions_do_not_look_at_their_values() -> None:
    """Else there would be no recording, and no batched program of several seeds; afterwards they do again."""
    method = WithDistributions(batch_size=16)
    assert fitted(method, "graph")[0].step_used == "graph"
    for step in ("eager", "graph"):
        together(method, step)
    with pytest.raises(ValueError, match="to satisfy the constraint"):
        Normal(0.0, -1.0)


@dataclass(frozen=True, kw_only=True)
class ForgetfulAdversary(AVB):
    """The same, of a loss that no training curve shows, and which is in the recording of further steps too."""

    name: str = "forgetful-adversary"
    weight: ClassVar[list[float]] = [0.0]

    def schedule(self, modules: Modules, fraction: float) -> None:
        self.weight[0] = fraction

    def losses(self, modules: Modules, x: Tensor, noise: Noise) -> dict[str, Tensor]:
        losses = super().losses(modules, x, noise)
        return {**losses, "adversary": self.weight[0] * losses["adversary"]}


@pytest.mark.parametrize("steps", [1, 2])
def test_so_it_is_for_every_player(steps: int) -> None:
    with pytest.raises(RuntimeError, match=r"adversary are .* must be in buffers of the modules"):
        fitted(ForgetfulAdversary(batch_size=16, noise_dim=3, adversary_steps=steps), "graph")


def test_an_error_of_the_losses_stays_their_own() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Wrong(VAE):
        def losses(self, modules: Modules, x: Tensor, noise: Noise) -> dict[str, Tensor]:
            raise ValueError("no such loss")

    with pytest.raises(ValueError, match="no such loss"):
        fitted(Wrong(batch_size=16), "graph")


def test_records_say_what_was_asked_for_and_what_was_done(tmp_path: Path) -> None:
    records = harness.compare(
        [VAE(batch_size=16), "pyro"], SmallPosteriorProblem(), seeds=1, budget="steps=5", evaluators="elbo",
        step="graph", out=tmp_path,
    )  # fmt: skip
    assert set(records["step_mode"]) == {"graph"}
    assert dict(zip(records["method"], records["step_used"], strict=True)) == {"vae": "graph", "pyro": "eager"}
    assert (records["compile_seconds"] > 0).tolist() == (records["method"] == "vae").tolist()


def test_an_unknown_mode_is_named() -> None:
    with pytest.raises(UserError, match="step 'jit'"):
        harness.fit("vae", PROBLEM, step="jit")


class Replayed:
    """A CUDA graph's part on a CPU: a step is recorded operation by operation while it is taken, and then done again on
    the same memory: what Python has decided stays as it was."""

    broken: ClassVar[bool] = False
    replays: ClassVar[int] = 0

    def __init__(self, device: torch.device, generators: Sequence[torch.Generator]) -> None:
        self.seeds = {generator.initial_seed() for generator in generators}
        self.done: list[tuple[Callable[..., Any], Any, Any, Any]] = []

    def warm_up(self, function: Callable[[], Tensor]) -> Tensor:
        return function()

    def capture(self, function: Callable[[], Tensor]) -> Tensor:
        if self.broken:
            raise RuntimeError("operation not permitted when stream is capturing")
        with Operations(self.done):
            returned = function()
        self.taken = True
        return returned

    @torch.no_grad()
    def replay(self) -> None:
        if self.taken:  # a capture takes no step, here it has
            self.taken = False
            return
        Replayed.replays += 1
        for operation, args, kwargs, returned in self.done:
            assert "generator" not in kwargs or kwargs["generator"].initial_seed() in self.seeds
            fresh = operation(*args, **kwargs)
            for old, new in zip(tree_leaves(returned), tree_leaves(fresh), strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class Operations(TorchDispatchMode):
    """Keeps what is done: operations, what they read and what they returned."""

    def __init__(self, done: list[tuple[Callable[..., Any], Any, Any, Any]]) -> None:
        super().__init__()
        self.done = done

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        returned = func(*args, **(kwargs or {}))
        self.done.append((func, args, kwargs or {}, returned))
        return returned


@pytest.fixture
def captured(monkeypatch: pytest.MonkeyPatch) -> type[Replayed]:
    monkeypatch.setattr(players, "CAPTURED", ("cpu",))
    monkeypatch.setattr(cuda_graph, "Graph", Replayed)
    monkeypatch.setattr(Replayed, "replays", 0)
    return Replayed


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.label)
def test_whole_steps_by_a_graph(method: GradientMethod, captured: type[Replayed]) -> None:
    """With everything that changes from step to step: data, noise, learning rates, schedules, buffers."""
    (expected, run), several = fitted(method, "eager", problem=SmallGreyProblem()), together(method, "eager")
    assert captured.replays == 0
    (found, other), at_once = fitted(method, "graph", problem=SmallGreyProblem()), together(method, "graph")
    before = 1 + cuda_graph.WARM_UP_STEPS + 1  # one records, and capturing takes one here
    checks = [point.step for point in other.curve if point.validation is not None and point.step >= before]
    assert captured.replays == 2 * (50 - before + len(checks))
    assert_equal(expected.state, found.state)
    assert [(p.step, p.objective, p.validation) for p in run.curve] == [
        (p.step, p.objective, p.validation) for p in other.curve
    ]
    for eager, graph in zip(several, at_once, strict=True):
        assert_equal(eager, graph)


def test_steps_that_cannot_be_captured_are_taken_as_they_are_written(
    captured: type[Replayed], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(captured, "broken", True)
    with caplog.at_level(logging.WARNING, logger="harness"):
        fit, _ = fitted(METHODS[3], "graph")
    assert (fit.step_used, captured.replays) == ("eager", 0)
    assert [record.message for record in caplog.records] == [
        "steps are taken as they are written, not by a CUDA graph: operation not permitted when stream is capturing"
    ]
    assert_equal(fitted(METHODS[3], "eager")[0].state, fit.state)


@dataclass(frozen=True, kw_only=True)
class Masking(VAE):
    """Leaves negative noise out, through a mask: as many numbers as before."""

    name: str = "masking"

    def losses(self, modules: Modules, x: Tensor, noise: Noise) -> dict[str, Tensor]:
        eps = noise["eps"].clone()
        eps[eps < 0] = 0.0
        return super().losses(modules, x, {"eps": eps})


@dataclass(frozen=True, kw_only=True)
class Factorising(VAE):
    """Its noise has a covariance, whose Cholesky factor is checked by the host."""

    name: str = "factorising"

    def losses(self, modules: Modules, x: Tensor, noise: Noise) -> dict[str, Tensor]:
        eps = noise["eps"]
        factor = torch.linalg.cholesky(torch.eye(eps.shape[-1], dtype=eps.dtype) + eps.mT @ eps)
        return super().losses(modules, x, {"eps": eps @ factor})


@pytest.mark.parametrize("method", [Masking(batch_size=16), Factorising(batch_size=16)], ids=lambda method: method.name)
def test_what_waits_for_the_device_is_recorded_where_there_is_none_to_wait_for(
    method: GradientMethod, captured: type[Replayed], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="harness"):
        refused, _ = fitted(method, "graph")
    assert (refused.step_used, captured.replays) == ("eager", 0)
    [told] = caplog.records
    assert told.message.endswith("waits for the device")
    assert_equal(fitted(method, "eager")[0].state, refused.state)
    monkeypatch.setattr(players, "CAPTURED", ())
    recorded, _ = fitted(method, "graph")
    assert recorded.step_used == "graph"
    assert_equal(fitted(method, "eager")[0].state, recorded.state)


def test_a_graph_is_held_against_steps(captured: type[Replayed], monkeypatch: pytest.MonkeyPatch) -> None:
    """Here a learning rate stays what it was when the step was captured."""
    monkeypatch.setattr(players.Adam, "rescale", lambda self, factor: setattr(self, "factor", factor))
    with pytest.raises(RuntimeError, match=r"flat is .* after a step and .* by its CUDA graph"):
        fitted(VAE(batch_size=16, lr_decay=1e-4), "graph")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("mode", ["graph", "compile"])
def test_on_cuda_in_single_precision(mode: str) -> None:
    assert_same_in_single_precision(mode, torch.device("cuda"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("mode", ["graph", "compile"])
@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.label)
def test_on_cuda_too(method: GradientMethod, mode: str) -> None:
    """In float64 over 200 steps, one seed and several; sums on the device have no fixed order."""
    device = torch.device("cuda")
    (eager, _), (recorded, _) = (
        fitted(method, step, "steps=200", device=device, problem=SmallGreyProblem()) for step in ("eager", mode)
    )
    assert recorded.step_used == mode
    assert_close(eager.state, recorded.state, 1e-8)
    several = (together(method, step, "steps=200", device) for step in ("eager", mode))
    for one, other in zip(*several, strict=True):
        assert_close(one, other, 1e-8)

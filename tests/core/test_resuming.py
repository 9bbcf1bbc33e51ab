"""An interrupted fit goes on bit for bit: laws of the training loop's state, with a clock of the tests' own."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from harness import checkpoint, loop, minibatches, players, replicas
from harness import clock as clock_module
from harness.checkpoint import StoredCheckpoint
from harness.clock import Clock
from harness.method import Budget, Fit, Run
from harness.problem import TrainingView, placed
from harness.seeding import Streams
from harness.stopping import Stop, Stopped
from harness.store import Store
from harness.testing import SmallGreyProblem
from harness.training import GradientMethod, Modules, Noise
from harness_plugins.avb import AVB
from harness_plugins.avb_ac import AVBAC
from harness_plugins.iaf import IAF
from harness_plugins.vae import VAE

CPU, DOUBLE = torch.device("cpu"), torch.float64


@dataclass(frozen=True, kw_only=True)
class Drifting(VAE):
    """Its loss depends on a buffer that every step changes and that no stored fit contains."""

    name: str = "drifting"

    def build(self, view: TrainingView) -> Modules:
        modules = super().build(view)
        modules["encoder"].register_buffer("drift", torch.ones(()), persistent=False)
        return modules

    def losses(self, modules: Modules, x: Tensor, noise: Noise) -> dict[str, Tensor]:
        modules["encoder"].drift.mul_(0.9)
        return {name: loss * modules["encoder"].drift for name, loss in super().losses(modules, x, noise).items()}


class AfterSteps(Stop):
    """Asked for when a run has come to that many steps of its own."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.steps = steps

    def asked(self) -> bool:
        self.steps -= 1
        return self.steps <= 0


@pytest.fixture(autouse=True)
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A fit clock that only moves when a test moves it; checks and points of the curve at steps of their own."""
    seconds = [0.0]
    monkeypatch.setattr(clock_module.time, "perf_counter", lambda: seconds[0])
    for name, value in {"VALIDATION_CHECKS": 3, "LOG_EVERY": 4, "CONVERGENCE_CHECK_STEPS": 5, "CLOCK_EVERY": 3}.items():
        monkeypatch.setattr(loop, name, value)
    return seconds


def part(store: Store, method: GradientMethod, budget: str, stop: Stop, step: str = "auto") -> tuple[Fit, Run]:
    """One run of a fit, by objects that know nothing of an earlier one."""
    own = Streams(0, "grey", method.name, CPU)
    view = SmallGreyProblem().training_view(placed(SmallGreyProblem(), CPU, DOUBLE), own)
    run = Run(CPU, DOUBLE, Budget.parse(budget), own, Clock(CPU), step=step)
    run.checkpoint = StoredCheckpoint(run, store, "job", {}, stop)
    with run.clock.phase("fit"), own.initial_weights(shared=False):
        return method.fit(view, run), run


def in_parts(
    store: Store, method: GradientMethod, budget: str, stops: Iterable[int], step: str = "auto"
) -> tuple[Fit, Run]:
    """A fit that is stopped after so many steps of each run, and ended by a last one."""
    for steps in stops:
        with pytest.raises(Stopped):
            part(store, method, budget, AfterSteps(steps), step)
    ended = part(store, method, budget, Stop(), step)
    store.remove_checkpoint("job")
    return ended


def assert_the_same(whole: tuple[Fit, Run], parts: tuple[Fit, Run]) -> None:
    (fit, run), (again, other) = whole, parts
    assert (again.steps, again.gradient_evaluations) == (fit.steps, fit.gradient_evaluations)
    assert other.curve == run.curve
    assert other.clock.seconds["fit"] == run.clock.seconds["fit"]
    assert again.state.keys() == fit.state.keys()
    for name, tensor in fit.state.items():
        assert torch.equal(again.state[name], tensor), name


TWO_STEPS = AVB(batch_size=8, noise_dim=3, adversary_steps=2)
METHODS = [
    VAE(batch_size=8),
    VAE(batch_size=8, lr_decay=1, clip_norm=0.3),
    AVB(batch_size=8, noise_dim=3),
    TWO_STEPS,
    Drifting(batch_size=8),
]
FAMILIES = [
    VAE(batch_size=8),
    AVB(batch_size=8, noise_dim=3, kl_warmup=0.5),
    IAF(batch_size=8, hidden=8, context_dim=3, kl_warmup=0.5),
    AVBAC(batch_size=8, noise_dim=3, kl_warmup=0.5),
]


@pytest.mark.parametrize(
    ("method", "budget"),
    [
        *((method, "steps=9") for method in METHODS),
        *((method, "steps=21") for method in FAMILIES),
        (VAE(batch_size=8), "examples=70"),
        (TWO_STEPS, "examples=100"),
    ],
)
def test_a_fit_that_is_interrupted_at_any_step_ends_as_if_it_had_not_been(
    method: GradientMethod, budget: str, tmp_path: Path
) -> None:
    store = Store(tmp_path)
    whole = part(store, method, budget, Stop())
    assert len(whole[1].curve) > 2
    for steps in range(1, whole[0].steps):
        assert_the_same(whole, in_parts(store, method, budget, [steps]))
    assert_the_same(whole, in_parts(store, method, budget, [1] * (whole[0].steps - 1)))


@pytest.mark.parametrize(
    ("method", "step"),
    [(TWO_STEPS, "graph"), pytest.param(VAE(batch_size=8, clip_norm=0.3), "compile", marks=pytest.mark.compiler)],
)
def test_so_it_does_by_steps_that_are_recorded_or_compiled(method: GradientMethod, step: str, tmp_path: Path) -> None:
    store = Store(tmp_path)
    whole = part(store, method, "steps=9", Stop(), step)
    assert whole[0].step_used == step
    assert_the_same(whole, in_parts(store, method, "steps=9", [1, 6], step))


def test_a_fit_goes_on_into_the_next_permutations(tmp_path: Path) -> None:
    """Permutations are drawn for 64 batches at a time."""
    store = Store(tmp_path)
    whole = part(store, TWO_STEPS, "steps=140", Stop())
    assert_the_same(whole, in_parts(store, TWO_STEPS, "steps=140", [50, 14, 63, 2]))


@pytest.mark.parametrize("method", [VAE(batch_size=8, lr=0.1), AVB(batch_size=8, lr=0.1)], ids=lambda m: m.name)
def test_convergence_is_judged_by_the_whole_curve(method: GradientMethod, tmp_path: Path) -> None:
    store = Store(tmp_path)
    whole = part(store, method, "converged=2", Stop())
    steps = whole[0].steps
    assert steps >= 15
    for stops in ([steps // 2], [steps - 1], [7, 7]):
        assert_the_same(whole, in_parts(store, method, "converged=2", stops))


@pytest.mark.parametrize("base", [VAE, AVB])
def test_a_budget_of_seconds_counts_those_of_all_runs(base: Any, now: list[float], tmp_path: Path) -> None:
    """A step takes a second; what passes before a run, and while its state is written, is on no clock."""

    @dataclass(frozen=True, kw_only=True)
    class Timed(base):
        def losses(self, modules: Modules, x: Tensor, noise: Noise) -> dict[str, Tensor]:
            now[0] += 1.0 if modules.training else 1000.0
            return super().losses(modules, x, noise)

        def build(self, view: TrainingView) -> Modules:
            now[0] += 500.0 if store.checkpoint_path("job").exists() else 0.0
            return super().build(view)

    class SlowStore(Store):
        def write(self, name: str, content: bytes) -> None:
            now[0] += 100.0
            super().write(name, content)

    store, method = SlowStore(tmp_path), Timed(batch_size=8)
    whole = part(store, method, "seconds=30", Stop())
    assert whole[1].clock.seconds["fit"] == whole[0].steps == 30
    for stops in ([4], [1, 1, 1, 1], [17, 12]):
        assert_the_same(whole, in_parts(store, method, "seconds=30", stops))


FORGETFUL = {
    "parameters": ("InPlace", "load_state_dict", "tensor.copy_(state[name])",
                   'name == "flat" or tensor.copy_(state[name])'),
    "Adam": ("InPlace", "load_state_dict", "tensor.copy_(state[name])",
             'name.startswith("exp_avg") or tensor.copy_(state[name])'),
    "Adam's steps": ("InPlace", "load_state_dict", "tensor.copy_(state[name])",
                     'name == "step" or tensor.copy_(state[name])'),
    "noise": ("NoiseStreams", "load_state_dict", "stream.set_state(state[name])", "pass"),
    "one kind of noise": (
        "NoiseStreams", "load_state_dict", "stream.set_state(state[name])",
        'stream.set_state(state[name]) if name == "eps" else None',
    ),
    "buffers": (
        "Loop", "_parts", '"buffers": InPlace(dict(replica.modules.named_buffers()))', '"buffers": InPlace({})',
    ),
    "pending scalars": (
        "Loop", "resume", "self.pending = list(torch.stack(pending, dim=1))", "pass",
    ),
    "learning rate": ("Loop", "resume", 'self._rescale(facts["lr_factor"])', "pass"),
    "further minibatches": (
        "Replica", "streams", "FURTHER: self.further_batches", '"unused": self.run.batches(self.view.train, 1)',
    ),
    "waiting permutation": (
        "Minibatches", "load_state_dict", 'self.waiting = state["waiting"].to(self.waiting.device)', "pass",
    ),
    "order": ("Minibatches", "load_state_dict", 'self.order.set_state(state["order"])', "pass"),
    "curve": ("StoredCheckpoint", "load", 'self.run.curve[:] = _points(tensors.pop("curve").tolist())', "pass"),
    "binarisation": (
        "Minibatches", "load_state_dict", 'self.binarisation.set_state(state["binarisation"])', "pass",
    ),
}  # fmt: skip


@pytest.mark.parametrize("forgotten", FORGETFUL)
def test_a_resumption_that_forgets_something_is_noticed(
    forgotten: str, mutated: Callable[..., ModuleType], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    owner, method, text, by = FORGETFUL[forgotten]
    modules = {"Minibatches": minibatches, "StoredCheckpoint": checkpoint, "Loop": loop, "Replica": replicas}
    module = modules.get(owner, players)
    forgetful = mutated(module, text, by)
    monkeypatch.setattr(getattr(module, owner), method, getattr(getattr(forgetful, owner), method))
    trained = Drifting(batch_size=8) if forgotten == "buffers" else TWO_STEPS
    budget, stop = ("steps=70", 60) if forgotten == "order" else ("steps=11", 7)  # permutations last for 64 batches
    store = Store(tmp_path)
    whole = part(store, trained, budget, Stop())
    with pytest.raises(AssertionError):
        assert_the_same(whole, in_parts(store, trained, budget, [stop]))


def test_a_checkpoint_of_other_modules_is_refused(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with pytest.raises(Stopped):
        part(store, AVB(batch_size=8, noise_dim=3), "steps=9", AfterSteps(2))
    with pytest.raises(ValueError, match=r"avb: the checkpoint does not fit the modules .* 'checkpoints' to fit anew"):
        part(store, AVB(batch_size=8, noise_dim=30), "steps=9", Stop())


# When checkpoints are kept, and what they cost


@dataclass(frozen=True, kw_only=True)
class Steady(VAE):
    """One step is one call of the loss, which a test may make take some time."""

    def losses(self, modules: Modules, x: Tensor, noise: Noise) -> dict[str, Tensor]:
        tick(modules)
        return super().losses(modules, x, noise)


def tick(modules: Modules) -> None: ...


@pytest.mark.parametrize(("write", "expected"), [(0.0, [60, 120, 180, 240]), (0.75, [60, 210])])
def test_a_checkpoint_is_due_every_minute_and_costs_little(
    write: float, expected: list[int], now: list[float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a minute's checkpoint would cost more than half a per cent, it is due later."""
    steps: list[int] = []

    def written(self: Store, job_id: str, content: bytes) -> None:
        steps.append(int(now[0] - write * len(steps)))  # one step a second
        now[0] += write

    def moved(modules: Modules) -> None:
        now[0] += 1.0 if modules.training else 0.0

    monkeypatch.setattr(Store, "write_checkpoint", written)
    monkeypatch.setitem(globals(), "tick", moved)
    _, run = part(Store(tmp_path), Steady(batch_size=8), "steps=250", Stop(), step="eager")
    assert steps == expected
    assert run.clock.seconds["fit"] == 250.0

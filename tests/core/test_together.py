"""Laws of fits that are trained at once: each is that of its seed alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from torch import Tensor

import harness
from harness.audience import Progress
from harness.clock import Clock
from harness.comparison import evaluate, plan
from harness.method import Budget, Diverged, Fit, Run
from harness.planning import PlannedJob
from harness.players import Modules, Noise, Player
from harness.problem import TrainingView, placed
from harness.seeding import Streams
from harness.stopping import Stop, Stopped
from harness.store import Store
from harness.testing import SmallProblem
from harness.training import GradientMethod, fit_together
from harness_plugins.avb import AVB
from harness_plugins.avb_ac import AVBAC
from harness_plugins.iaf import IAF
from harness_plugins.vae import VAE

CPU, DOUBLE = torch.device("cpu"), torch.float64
PROBLEM = SmallProblem()
AMORTISED = [
    VAE(batch_size=16),
    IAF(batch_size=16, hidden=8, context_dim=3),
    IAF(batch_size=16, hidden=8, context_dim=3, kl_warmup=0.5),
    AVB(batch_size=16, noise_dim=3),
    AVB(batch_size=16, noise_dim=3, adversary_steps=3, clip_norm=0.3, lr_decay=0.01, kl_warmup=0.5),
    AVBAC(batch_size=16, noise_dim=3, kl_warmup=0.5),
    AVBAC(batch_size=16, noise_dim=3, covariance="full", gaussian_part=True, adversary_steps=2),
    AVBAC(batch_size=16, noise_dim=3, encoder="injected", covariance="full"),
]


def run_of(method: GradientMethod, seed: int, budget: str, clock: Clock) -> Run:
    return Run(CPU, DOUBLE, Budget.parse(budget), Streams(seed, PROBLEM.label, method.name, CPU), clock)


def alone(method: GradientMethod, seed: int, budget: str) -> tuple[Fit, Run]:
    run = run_of(method, seed, budget, Clock(CPU))
    view = PROBLEM.training_view(placed(PROBLEM, CPU, DOUBLE), run.streams)
    with run.clock.phase("fit"), run.streams.initial_weights(shared=False):
        return method.fit(view, run), run


def at_once(
    methods: Sequence[GradientMethod], seeds: Sequence[int], budget: str
) -> tuple[list[Fit | Diverged], list[Run]]:
    clock = Clock(CPU)
    runs = [run_of(method, seed, budget, clock) for method, seed in zip(methods, seeds, strict=True)]
    views = [PROBLEM.training_view(placed(PROBLEM, CPU, DOUBLE), run.streams) for run in runs]
    with clock.phase("fit"):
        return fit_together(methods, views, runs), runs


def assert_close(together: Fit | Diverged, single: Fit) -> None:
    assert isinstance(together, Fit)
    assert together.state.keys() == single.state.keys()
    assert (together.steps, together.gradient_evaluations) == (single.steps, single.gradient_evaluations)
    assert together.parameters == single.parameters
    for name, tensor in single.state.items():
        torch.testing.assert_close(together.state[name], tensor, rtol=0, atol=1e-8, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("method", AMORTISED, ids=lambda method: method.label)
def test_each_of_three_seeds_is_as_alone(method: GradientMethod) -> None:
    """In float64 sums in another order differ by rounding only; 50 steps amplify it to less than 1e-8."""
    seeds = (0, 1, 7)
    fits, runs = at_once([method] * 3, seeds, "steps=50")
    for seed, together, run in zip(seeds, fits, runs, strict=True):
        single, own = alone(method, seed, "steps=50")
        assert_close(together, single)
        assert [point.step for point in run.curve] == [point.step for point in own.curve]
        for point, expected in zip(run.curve, own.curve, strict=True):
            assert point.objective == pytest.approx(expected.objective, abs=1e-8)
            assert point.validation == pytest.approx(expected.validation, abs=1e-8)
    first, second = (fit.state for fit in fits[:2] if isinstance(fit, Fit))
    assert any(bool((first[name] != second[name]).any()) for name in first)


def test_learning_rates_may_differ() -> None:
    fast = AVB(batch_size=16, noise_dim=3, lr=1e-2, adversary_lr=2e-2)
    slow = replace(fast, lr=1e-3, adversary_lr=3e-3, beta1=0.9)
    methods, seeds = [fast, slow, fast], [0, 0, 1]
    fits, _ = at_once(methods, seeds, "steps=50")
    for together, method, seed in zip(fits, methods, seeds, strict=True):
        assert_close(together, alone(method, seed, "steps=50")[0])


@pytest.mark.filterwarnings("ignore:.*overflow")
def test_one_that_diverges_does_not_end_the_others() -> None:
    method = VAE(batch_size=16)
    fits, runs = at_once([method, replace(method, lr=1e38), method], [0, 1, 2], "steps=250")
    assert isinstance(fits[1], Diverged)
    assert "objective is nan at or before step" in str(fits[1])
    for number in (0, 2):
        assert_close(fits[number], alone(method, number, "steps=250")[0])
        assert runs[number].curve[-1].step == 250
    assert runs[1].curve[-1].step < 250


def test_all_that_diverge_end_early() -> None:
    fits, runs = at_once([VAE(batch_size=16, lr=1e38)] * 2, [0, 1], "steps=1000")
    assert all(isinstance(fit, Diverged) for fit in fits)
    assert runs[0].curve[-1].step < 200


@pytest.mark.parametrize(
    ("budgets", "message"),
    [
        (("steps=5", "steps=6"), "must share their budget and their clock"),
        (("converged=2", "converged=2"), "a budget of converged cannot be shared"),
        (("seconds=2", "seconds=2"), "a budget of seconds cannot be shared"),
    ],
)
def test_what_cannot_be_trained_together_is_refused(budgets: tuple[str, str], message: str) -> None:
    clock = Clock(CPU)
    runs = [run_of(VAE(), seed, budget, clock) for seed, budget in enumerate(budgets)]
    views = [PROBLEM.training_view(placed(PROBLEM, CPU, DOUBLE), run.streams) for run in runs]
    with pytest.raises(ValueError, match=message):
        fit_together([VAE()] * 2, views, runs)
    runs[1] = run_of(VAE(), 1, budgets[0], Clock(CPU))
    with pytest.raises(ValueError, match=r"their clock"):
        fit_together([VAE()] * 2, views, runs)


@pytest.mark.parametrize("other", [VAE(batch_size=8), VAE(lr_decay=1), VAE(clip_norm=1), AVB()])
def test_unlike_methods_are_not_trained_together(other: GradientMethod) -> None:
    with pytest.raises(ValueError, match="must be of one method, batch size, decay and clipping"):
        at_once([VAE(), other], [0, 1], "steps=5")


def test_players_that_take_other_steps_are_not_trained_together() -> None:
    methods = [AVB(noise_dim=3), AVB(noise_dim=3, adversary_steps=2)]
    with pytest.raises(ValueError, match="may differ in learning rate and betas only"):
        at_once(methods, [0, 1], "steps=5")


@dataclass(frozen=True, kw_only=True)
class WithIdlePlayer(VAE):
    """The same, with a player that has nothing to learn, as one on a fixed model."""

    def build(self, view: TrainingView) -> Modules:
        return Modules({**super().build(view), "fixed": torch.nn.Identity()})

    def players(self) -> list[Player]:
        return [*super().players(), Player("nothing", on=("fixed",), lr=1e-3)]

    def losses(self, modules: Modules, x: Tensor, noise: Noise) -> dict[str, Tensor]:
        found = super().losses(modules, x, noise)
        return {**found, "nothing": found["negative_elbo"]}


def test_a_player_without_parameters_never_steps() -> None:
    fits, _ = at_once([WithIdlePlayer(batch_size=16)] * 2, (0, 1), "steps=20")
    for seed, together in enumerate(fits):
        assert_close(together, alone(WithIdlePlayer(batch_size=16), seed, "steps=20")[0])


# In a comparison

SMALL: dict[str, Any] = {
    "problems": SmallProblem(), "seeds": 3, "budget": "steps=30", "precision": "float64",
    "evaluators": "elbo,adversary",
}  # fmt: skip
METHODS = [VAE(batch_size=16), AVB(batch_size=16, noise_dim=3)]


def test_a_comparison_of_seeds_at_once(tmp_path: Path) -> None:
    one_by_one = harness.compare(METHODS, out=tmp_path, **SMALL)
    records = harness.compare(METHODS, out=tmp_path, vectorize_seeds=True, **SMALL)
    assert len(records) == len(one_by_one) == len(Store(tmp_path).records()) / 2
    assert list(records["seed"]) == list(one_by_one["seed"])
    measured = records["value"].notna()
    assert measured.sum() >= 6
    assert (records["value"] - one_by_one["value"])[measured].abs().max() < 1e-7
    assert set(records["step_mode"]) == {"vectorised auto"}
    assert records["shared_clock"].all()
    assert not records["timing_valid"].any()
    assert not one_by_one["shared_clock"].any()
    assert not set(records["job_id"]) & set(one_by_one["job_id"])
    for seconds in records.groupby("method")["fit_seconds"]:
        assert seconds[1].nunique() == 1
    pd.testing.assert_frame_equal(records, harness.compare(METHODS, out=tmp_path, vectorize_seeds=True, **SMALL))


def test_stored_fits_can_be_measured_later(tmp_path: Path) -> None:
    records = harness.compare("vae", "four-points", 2, budget="steps=5", vectorize_seeds=True, out=tmp_path)
    assert set(evaluate(tmp_path, "reconstruction")["job_id"]) == set(records["job_id"])


class Counted(Progress):
    """Progress that knows what was started together."""

    def __init__(self) -> None:
        self.together: list[int] = []

    def job_started(self, job: PlannedJob, together: int = 1) -> None:
        self.together.append(together)


class After(Stop):
    """Asked for when it has been asked about so often."""

    def __init__(self, times: int) -> None:
        super().__init__()
        self.times = times

    def asked(self) -> bool:
        self.times -= 1
        return self.times < 0


@pytest.mark.parametrize("after", [1, 11, 14])
def test_fits_that_were_stopped_go_on_together(after: int, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Also between two points of the training curve, with scalars that are in none of them yet; bit for bit."""
    asked = {**SMALL, "budget": "steps=300", "vectorize_seeds": True}  # a point every 15 steps
    whole = harness.compare(METHODS[1], out=tmp_path / "a", **asked)
    with pytest.raises(Stopped):
        harness.compare(METHODS[1], out=tmp_path / "b", **asked, stop_after=After(after))
    assert [job.step for job in plan(METHODS[1], out=tmp_path / "b", **asked)] == [after + 1] * 3
    progress = Counted()
    parts = harness.compare(METHODS[1], out=tmp_path / "b", **asked, progress=progress)
    assert progress.together == [3, 1, 1, 1]
    assert caplog.messages == []
    columns = ["job_id", "metric", "value", "fit_steps", "status", "shared_clock", "timing_valid"]
    pd.testing.assert_frame_equal(parts[columns], whole[columns])
    for job_id in whole["job_id"].unique():
        curves = [(tmp_path / folder / "fits" / job_id / "curve.csv").read_text() for folder in ("a", "b")]
        points = [[line.split(",")[::2] for line in curve.splitlines()] for curve in curves]  # without the seconds
        assert points[0] == points[1]


def test_a_fit_that_goes_on_alone_has_shared_its_clock(tmp_path: Path) -> None:
    with pytest.raises(Stopped):
        harness.compare(METHODS[1], out=tmp_path, vectorize_seeds=True, **SMALL, stop_after=After(11))
    alone = harness.compare(METHODS[1], out=tmp_path, vectorize_seeds=True, **{**SMALL, "seeds": 1})
    assert alone["shared_clock"].all()
    assert not alone["timing_valid"].any()


def test_one_that_has_diverged_stays_so(tmp_path: Path) -> None:
    """Where the run is stopped afterwards it is not found again later, for another reason."""
    asked = {**SMALL, "seeds": 1, "budget": "steps=600", "vectorize_seeds": True}
    methods = [VAE(batch_size=16), VAE(batch_size=16, lr=1e38)]
    whole = harness.compare(methods, out=tmp_path / "a", **asked)
    with pytest.raises(Stopped):
        harness.compare(methods, out=tmp_path / "b", **asked, stop_after=After(400))
    parts = harness.compare(methods, out=tmp_path / "b", **asked)
    columns = ["job_id", "status", "reason", "value"]
    pd.testing.assert_frame_equal(parts[columns], whole[columns])
    assert set(whole.loc[whole["config"].str.contains("e+38", regex=False), "status"]) == {"diverged"}


def test_fits_that_have_come_unequally_far_go_on_apart(tmp_path: Path) -> None:
    """As after a run that was killed between two of their checkpoints."""
    with pytest.raises(Stopped):
        harness.compare(METHODS[1], out=tmp_path, vectorize_seeds=True, **SMALL, stop_after=After(11))
    Store(tmp_path).remove_checkpoint(plan(METHODS[1], out=tmp_path, vectorize_seeds=True, **SMALL)[1].job_id)
    progress = Counted()
    parts = harness.compare(METHODS[1], out=tmp_path, vectorize_seeds=True, **SMALL, progress=progress)
    assert progress.together == [2, 1, 1, 1]
    whole = harness.compare(METHODS[1], out=tmp_path / "whole", vectorize_seeds=True, **SMALL)
    assert (parts["value"] - whole["value"]).abs().max() < 1e-7
    assert not parts["status"].eq("failed").any()


def test_bundles_are_of_what_differs_in_seeds_and_learning_rates(tmp_path: Path) -> None:
    methods = [VAE(), VAE(lr=1e-2), VAE(batch_size=16), AVB(noise_dim=3)]
    progress = Counted()
    harness.compare(methods, out=tmp_path, vectorize_seeds=True, progress=progress, **{**SMALL, "budget": "steps=2"})
    assert [number for number in progress.together if number > 1] == [6, 3, 3]


@dataclass(frozen=True, kw_only=True)
class Choosy(VAE):
    """Its losses look at values."""

    name: str = "choosy"

    def losses(self, modules: Modules, x: Tensor, noise: Noise) -> dict[str, Tensor]:
        losses = super().losses(modules, x, noise)
        return losses if float(x.sum()) >= 0 else {}


def test_losses_that_are_no_batched_program_fail_with_the_remedy(tmp_path: Path) -> None:
    records = harness.compare(Choosy(), out=tmp_path, vectorize_seeds=True, **SMALL)
    assert set(records["status"]) == {"failed"}
    assert records["reason"].str.contains("are no batched program").all()
    assert records["reason"].str.contains("one_by_one").all()
    assert "ok" in set(harness.compare(Choosy(), out=tmp_path, **SMALL)["status"])


@pytest.mark.parametrize(
    ("method", "budget", "reason"),
    [
        ("mean-field", "steps=5", "mean-field: seeds are fitted one by one: Pyro draws from one generator for all"),
        (
            "nuts[warmup=5,draws=5]",
            "steps=5",
            "nuts: seeds are fitted one by one: it has no steps that could be batched",
        ),
        (VAE(batch_size=16), "converged=1", "vae: seeds are fitted one by one: each ends where it has converged"),
        (VAE(batch_size=16), "seconds=0.1", "vae: seeds are fitted one by one: its seconds would be those of all"),
    ],
)
def test_what_cannot_be_batched_says_so(
    method: Any, budget: str, reason: str, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    problem = SmallProblem() if isinstance(method, VAE) else "eight-schools"
    asked = {**SMALL, "problems": problem, "budget": budget, "evaluators": "elbo"}
    records = harness.compare(method, out=tmp_path, vectorize_seeds=True, **asked)
    assert reason in caplog.messages
    assert caplog.messages.count(reason) == 1
    assert set(records["step_mode"]) == {"auto"}
    assert not records["shared_clock"].any()

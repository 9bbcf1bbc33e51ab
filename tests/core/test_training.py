"""Laws of the training loop: it does what a hand-written two-optimiser loop does, within its budget, off the clock."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from harness import clock as clock_module
from harness import loop
from harness.clock import Clock
from harness.method import Budget, CurvePoint, Diverged, Fit, Run
from harness.minibatches import Minibatches
from harness.model import BernoulliLikelihood, DecoderModel, LatentModel
from harness.nn import MLP
from harness.problem import MLPSpec, ModelSpec, Split, TrainingView, placed
from harness.replicas import FURTHER, Together
from harness.seeding import Streams
from harness.testing import SmallProblem
from harness.training import GradientMethod, Modules, Noise, Player, fit_together
from harness_plugins.avb import AVB
from harness_plugins.vae import VAE

CPU, DOUBLE = torch.device("cpu"), torch.float64
PROBLEM = SmallProblem()


def streams(method: str = "avb", seed: int = 0) -> Streams:
    return Streams(seed, PROBLEM.label, method, CPU)


def view_and_run(
    budget: str, method: str = "avb", problem: SmallProblem = PROBLEM, step: str = "auto"
) -> tuple[TrainingView, Run]:
    own = streams(method)
    view = problem.training_view(placed(problem, CPU, DOUBLE), own)
    return view, Run(CPU, DOUBLE, Budget.parse(budget), own, Clock(CPU), step=step)


def fitted(
    method: GradientMethod, budget: str = "steps=20", problem: SmallProblem = PROBLEM, step: str = "auto"
) -> tuple[Fit, Run]:
    view, run = view_and_run(budget, method.name, problem, step)
    with run.clock.phase("fit"), run.streams.initial_weights(shared=False):
        return method.fit(view, run), run


def hand_written_avb(method: AVB, steps: int) -> dict[str, Tensor]:
    """Algorithm 1 of the paper as one would write it down: two optimisers, detached samples, a loop."""
    view, run = view_and_run(f"steps={steps}")
    with run.streams.initial_weights(shared=False):
        modules = method.build(view).to(DOUBLE)
    model, encoder, adversary = modules["model"], modules["encoder"], modules["adversary"]
    primal, dual = [*model.parameters(), *encoder.parameters()], list(adversary.parameters())
    primal_optimiser = torch.optim.Adam(primal, lr=method.lr, betas=(0.5, 0.999))
    dual_optimiser = torch.optim.Adam(dual, lr=method.adversary_lr, betas=(0.5, 0.999))
    batches = run.batches(view.train, method.batch_size)
    further_batches = run.batches(view.train, method.batch_size, FURTHER)
    eps_stream, prior_stream = run.generator("noise/eps"), run.generator("noise/prior_z")

    def draw(batches: Iterator[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        eps = torch.randn(method.batch_size, method.noise_dim, generator=eps_stream, dtype=DOUBLE)
        prior_z = torch.randn(method.batch_size, view.latent_dim, generator=prior_stream, dtype=DOUBLE)
        return next(batches), eps, prior_z

    def adversary_loss(x: Tensor, z: Tensor, prior_z: Tensor) -> Tensor:
        logits = torch.cat([adversary(x, z.detach()), adversary(x, prior_z)])
        labels = torch.cat([torch.ones(len(x), dtype=DOUBLE), torch.zeros(len(x), dtype=DOUBLE)])
        return 2 * binary_cross_entropy_with_logits(logits, labels)

    def differentiate(loss: Tensor, parameters: list[nn.Parameter]) -> None:
        for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
            parameter.grad = gradient
        if method.clip_norm:
            nn.utils.clip_grad_norm_(parameters, method.clip_norm)

    for step in range(1, steps + 1):
        x, eps, prior_z = draw(batches)
        z = encoder(x, eps)
        primal_loss = (adversary(x, z) - model.log_likelihood(x, z)).mean()
        dual_loss = adversary_loss(x, z, prior_z)
        differentiate(primal_loss, primal)
        differentiate(dual_loss, dual)
        primal_optimiser.step()
        dual_optimiser.step()
        for _ in range(method.adversary_steps - 1):
            x, eps, prior_z = draw(further_batches)
            differentiate(adversary_loss(x, encoder(x, eps), prior_z), dual)
            dual_optimiser.step()
        factor = method.lr_decay ** max(0.0, (step / steps - 0.4) / 0.6)
        primal_optimiser.param_groups[0]["lr"] = method.lr * factor
        dual_optimiser.param_groups[0]["lr"] = method.adversary_lr * factor
    return modules.state_dict()


@pytest.mark.parametrize(
    "options",
    [{}, {"adversary_steps": 2}, {"clip_norm": 0.3}, {"lr_decay": 0.01}, {"adversary_steps": 3, "clip_norm": 1.0}],
)
def test_the_loop_equals_a_hand_written_one(options: dict[str, Any]) -> None:
    """In float64 the two orders of summation differ by rounding only; 20 steps amplify it to less than 1e-12."""
    method = AVB(batch_size=16, noise_dim=3, lr=1e-2, adversary_lr=1e-2, **options)
    fit, _ = fitted(method)
    expected = hand_written_avb(method, 20)
    assert fit.state.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(
            fit.state[name], tensor, rtol=0, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}"
        )
    unused = AVB(batch_size=16, noise_dim=3, lr=1e-2, adversary_lr=1e-2)
    assert not options or any(bool((fit.state[name] != fitted(unused)[0].state[name]).any()) for name in expected)


def test_steps_and_gradient_evaluations_are_counted() -> None:
    fit, run = fitted(AVB(batch_size=8, adversary_steps=3), "steps=7")
    assert (fit.steps, fit.gradient_evaluations) == (7, 28)  # one of the primal and three of the adversary a step
    assert run.curve[-1].step == 7


def test_a_budget_of_examples_is_the_same_run_as_one_of_steps() -> None:
    """And how often the validation objective is looked at changes nothing."""
    by_steps, run = fitted(VAE(batch_size=8), "steps=30")
    by_examples, other = fitted(VAE(batch_size=8), "examples=240")
    assert by_examples.steps == 30
    assert len(run.curve) > len(other.curve)
    assert all(bool((by_steps.state[name] == by_examples.state[name]).all()) for name in by_steps.state)


def test_further_steps_leave_the_shared_minibatches_alone() -> None:
    """The first step of a method with further ones reads what a method without them reads, step by step."""

    def first_batches(method: AVB) -> list[Tensor]:
        seen: list[Tensor] = []
        view, run = view_and_run("steps=6")
        read = run.batches

        class Watched(Minibatches):
            def read(self, indices: Tensor) -> Tensor:
                seen.append(super().read(indices))
                return seen[-1]

        def watched(split: Split, batch_size: int, purpose: str = "minibatches") -> Minibatches:
            batches = read(split, batch_size, purpose)
            kind = Watched if purpose == "minibatches" else Minibatches
            return kind(split, batch_size, batches.order, batches.binarisation)

        run.batches = watched
        with run.clock.phase("fit"), run.streams.initial_weights(shared=False):
            method.fit(view, run)
        return seen

    alone, beside = first_batches(AVB(batch_size=8)), first_batches(AVB(batch_size=8, adversary_steps=3))
    assert len(alone) == len(beside) == 6
    assert all(torch.equal(a, b) for a, b in zip(alone, beside, strict=True))


def test_a_budget_of_examples_is_rounded_up_to_whole_steps() -> None:
    assert fitted(VAE(batch_size=8), "examples=17")[0].steps == 3


@dataclass(frozen=True, kw_only=True)
class Scheduled(VAE):
    """A VAE whose encoder knows the part of the budget that is spent."""

    def build(self, view: TrainingView) -> Modules:
        modules = super().build(view)
        modules["encoder"].register_buffer("spent", torch.zeros((), dtype=DOUBLE), persistent=False)
        return modules

    def schedule(self, modules: Modules, fraction: float) -> None:
        modules["encoder"].spent.fill_(fraction)

    def losses(self, modules: Modules, x: Tensor, noise: Noise) -> dict[str, Tensor]:
        losses = super().losses(modules, x, noise)
        return {name: loss + 1000 * modules["encoder"].spent for name, loss in losses.items()}


def test_a_schedule_knows_the_part_of_the_budget_that_is_spent(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before step k of n it is (k - 1)/n, whatever the budget counts; never known while convergence decides."""
    monkeypatch.setattr(loop, "LOG_EVERY", 1)
    monkeypatch.setattr(loop, "CONVERGENCE_CHECK_STEPS", 2)
    for budget in ("steps=5", "examples=40"):
        _, plain = fitted(VAE(batch_size=8), budget)
        _, run = fitted(Scheduled(batch_size=8), budget)
        added = [a.objective - b.objective for a, b in zip(run.curve, plain.curve, strict=True)]
        assert added == pytest.approx([0, 200, 400, 600, 800], abs=1e-9)
    _, run = fitted(Scheduled(batch_size=8), "converged=1")
    assert max(point.objective for point in run.curve) < 100


@pytest.fixture
def time(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that only moves when a test moves it."""
    now = [0.0]
    monkeypatch.setattr(clock_module.time, "perf_counter", lambda: now[0])
    return now


def timed(now: list[float]) -> VAE:
    """A VAE whose training loss takes a second and whose validation takes a thousand."""

    @dataclass(frozen=True, kw_only=True)
    class Timed(VAE):
        def losses(self, modules: Modules, x: Tensor, noise: Noise) -> dict[str, Tensor]:
            now[0] += 1.0 if modules.training else 1000.0
            return super().losses(modules, x, noise)

    return Timed(batch_size=8)


def test_validation_is_off_the_fit_clock(time: list[float]) -> None:
    fit, run = fitted(timed(time), "steps=40", step="eager")
    assert fit.steps == 40
    assert run.clock.seconds["fit"] == 40.0
    assert all(point.seconds == point.step for point in run.curve)
    assert time[0] > 20_000  # it was validated all the same


def test_a_budget_of_seconds_ends_when_they_are_over(time: list[float]) -> None:
    fit, run = fitted(timed(time), "seconds=100", step="eager")
    assert run.clock.seconds["fit"] == fit.steps == 100


def test_convergence_is_judged_by_validation() -> None:
    """Two checks without a new best end a budget of converged=2; the training objective has no say."""
    _, run = view_and_run("converged=2")
    ended = []
    for step, validation in enumerate([5.0, None, 4.0, 4.5, 3.0, None, 3.2, 3.1]):
        run.log(CurvePoint(step, 0.0, -float(step), validation), 0.0)
        ended.append(run.converged())
    assert ended == [False] * 7 + [True]


@dataclass(frozen=True, kw_only=True)
class Breaks(VAE):
    """Its loss is not a number from the step at which the encoder's bias has moved far enough."""

    name: str = "breaks"

    def losses(self, modules: Modules, x: Tensor, noise: Noise) -> dict[str, Tensor]:
        loss = super().losses(modules, x, noise)["negative_elbo"]
        return {"negative_elbo": loss + torch.log(1e-2 - modules["encoder"].head.bias.abs().sum())}


def test_a_loss_that_is_not_a_number_ends_the_fit() -> None:
    with pytest.raises(Diverged, match="objective is nan at or before step"):
        fitted(Breaks(batch_size=8, lr=1e-2), "steps=200")


@dataclass(frozen=True, kw_only=True)
class Misstated(AVB):
    """Its losses are not what they should be, one fault at a time."""

    name: str = "misstated"
    fault: str = ""

    def losses(self, modules: Modules, x: Tensor, noise: Noise) -> dict[str, Tensor]:
        losses = super().losses(modules, x, noise)
        primal, adversary = losses["negative_elbo"], losses["adversary"]
        returned: Any = {
            "surplus": lambda: {**losses, "for curiosity": 1},
            "bare": lambda: primal,
            "none": lambda: None,
            "empty": dict,
            "misnamed": lambda: {"elbo": primal, "adversary": adversary},
            "forgotten": lambda: {"negative_elbo": primal},
            "each": lambda: {**losses, "adversary": adversary.expand(len(x))},
            "row": lambda: {**losses, "negative_elbo": primal[None]},
            "precision": lambda: {**losses, "negative_elbo": primal.float()},
            "number": lambda: {**losses, "adversary": 1.0},
            "detached": lambda: {**losses, "adversary": adversary.detach()},
        }[self.fault]()
        return returned


PLAYERS = r"misstated: losses must return a dict with a loss for each player \(negative_elbo, adversary\), got a "
LACKING = r"misstated: losses must return one loss for each player \(negative_elbo, adversary\), got "
SCALAR = "misstated: loss '{}' must be a scalar tensor of torch.float64, a mean; got "
MISSTATED = {
    "bare": PLAYERS + "Tensor$",
    "none": PLAYERS + "NoneType$",
    "empty": LACKING + "none$",
    "misnamed": LACKING + "elbo, adversary$",
    "forgotten": LACKING + "negative_elbo$",
    "surplus": LACKING + "negative_elbo, adversary, for curiosity$",
    "each": SCALAR.format("adversary") + r"torch.float64 of shape \(8,\)$",
    "row": SCALAR.format("negative_elbo") + r"torch.float64 of shape \(1,\)$",
    "precision": SCALAR.format("negative_elbo") + r"torch.float32 of shape \(\)$",
    "number": SCALAR.format("adversary") + "a float$",
    "detached": r"misstated: loss 'adversary' has no gradient: it must require grad, .* or no_grad\(\)$",
}


def fitted_together(method: GradientMethod, seeds: Sequence[int], step: str) -> list[Fit | Diverged]:
    clock = Clock(CPU)
    own = [streams(method.name, seed) for seed in seeds]
    views = [PROBLEM.training_view(placed(PROBLEM, CPU, DOUBLE), each) for each in own]
    runs = [Run(CPU, DOUBLE, Budget.parse("steps=3"), each, clock, step=step) for each in own]
    with clock.phase("fit"):
        return fit_together([method] * len(runs), views, runs)


@pytest.mark.parametrize("step", ["eager", "graph"])
@pytest.mark.parametrize("fault", MISSTATED)
def test_losses_that_are_not_one_scalar_for_each_player_are_told_in_one_line(fault: str, step: str) -> None:
    method = Misstated(batch_size=8, fault=fault)
    with pytest.raises(ValueError, match=f"^{MISSTATED[fault]}"):
        fitted(method, "steps=3", step=step)
    with pytest.raises(ValueError, match=f"^{MISSTATED[fault]}"):
        fitted_together(method, [0, 1], step)


def test_losses_are_looked_at_once_in_a_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    for check in ("_check_form", "_check_gradients"):
        whole = getattr(Together, check)

        def counted(self: Together, losses: Any, check: str = check, whole: Any = whole) -> None:
            seen.append(check)
            whole(self, losses)

        monkeypatch.setattr(Together, check, counted)
    for step in ("eager", "graph"):
        fitted(AVB(batch_size=8, adversary_steps=2), "steps=5", step=step)
        fitted_together(AVB(batch_size=8), [0, 1], step)
    assert seen == ["_check_form", "_check_gradients"] * 4


@dataclass(frozen=True, kw_only=True)
class AdversaryBreaks(AVB):
    """Only the second player, whose loss is not on the curve, breaks."""

    name: str = "adversary-breaks"

    def losses(self, modules: Modules, x: Tensor, noise: Noise) -> dict[str, Tensor]:
        losses = super().losses(modules, x, noise)
        return {**losses, "adversary": losses["adversary"] * torch.nan}


def test_parameters_that_are_not_finite_are_a_divergence() -> None:
    """At the first step the objective is still what it was."""
    with pytest.raises(Diverged, match="validation objective is nan at step 1"):
        fitted(AdversaryBreaks(batch_size=8), "steps=1")


def test_every_observation_is_read_equally_often() -> None:
    view, run = view_and_run("steps=1")
    batches = run.batches(view.train, 10)
    seen = Counter(tuple(x.flatten().tolist()) for _ in range(12) for x in next(batches))
    assert len(seen) == len(view.train) == 24
    assert set(seen.values()) == {5}  # 12 batches of 10 are 5 epochs of 24
    order = [tuple(x.flatten().tolist()) for _ in range(12) for x in next(batches)]
    assert order[:24] != order[24:48]


def test_minibatches_and_initial_decoder_do_not_depend_on_the_method() -> None:
    def seen(method: str, seed: int) -> tuple[Tensor, Tensor, Tensor]:
        own = streams(method, seed)
        view = PROBLEM.training_view(placed(PROBLEM, CPU, DOUBLE), own)
        run = Run(CPU, DOUBLE, Budget("steps", 1), own, Clock(CPU))
        batch = next(run.batches(view.train, 16))
        return batch, next(view.model.parameters()).detach(), torch.rand(5, generator=run.generator("noise"))

    (batch, weights, noise), (other_batch, other_weights, other_noise) = seen("avb", 0), seen("vae", 0)
    assert bool((batch == other_batch).all())
    assert bool((weights == other_weights).all())
    assert bool((noise != other_noise).all())
    changed = seen("avb", 1)
    assert all(bool((a != b).any()) for a, b in zip((batch, weights, noise), changed, strict=True))


def test_a_batch_may_be_larger_than_the_data() -> None:
    view, run = view_and_run("steps=1")
    counts = Counter(tuple(x.flatten().tolist()) for x in next(run.batches(view.train, 100)))
    assert set(counts.values()) <= {4, 5}


class FixedModel(DecoderModel):
    """A known model: its weights are part of the problem."""

    def __init__(self, latent_dim: int, event_shape: tuple[int, ...]) -> None:
        super().__init__(latent_dim, event_shape, MLP(latent_dim, 6, 4, 1, "tanh"), BernoulliLikelihood())
        for module in self.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                delattr(module, name)
                module.register_buffer(name, parameter.detach())


@dataclass(frozen=True, kw_only=True)
class FixedSpec(MLPSpec):
    def new_model(self, event_shape: tuple[int, ...]) -> LatentModel:
        return FixedModel(self.latent_dim, event_shape)


@dataclass(frozen=True, kw_only=True)
class FixedProblem(SmallProblem):
    name: str = "fixed"

    def model_spec(self) -> ModelSpec:
        return FixedSpec(latent_dim=2, width=8, depth=1, pair_width=8, pair_depth=1, pair_rank=4)


@pytest.mark.parametrize("method", [VAE(batch_size=8), AVB(batch_size=8)])
def test_a_model_without_parameters_stays_as_it_is(method: GradientMethod) -> None:
    before = view_and_run("steps=1", method.name, FixedProblem())[0].model.state_dict()
    first, last = fitted(method, "steps=1", FixedProblem())[0], fitted(method, "steps=9", FixedProblem())[0]
    assert before
    for name, tensor in before.items():
        assert bool((last.model.state_dict()[name] == tensor).all())
    assert bool((first.state["encoder.head.weight"] != last.state["encoder.head.weight"]).any())


@dataclass(frozen=True, kw_only=True)
class NothingToTrain(VAE):
    """A method whose only player owns a model without parameters."""

    name: str = "nothing"

    def build(self, view: TrainingView) -> Modules:
        return Modules({"model": view.model})

    def players(self) -> list[Player]:
        return [Player("negative_elbo", on=("model",), lr=1.0)]

    def losses(self, modules: Modules, x: Tensor, noise: Noise) -> dict[str, Tensor]:
        return {"negative_elbo": -modules["model"].log_likelihood(x, noise["eps"]).mean()}

    def posterior(self, modules: Modules) -> Any:
        return None


def test_a_player_without_parameters_never_steps() -> None:
    fit, run = fitted(NothingToTrain(batch_size=8), "steps=3", FixedProblem())
    assert fit.steps == 3
    assert [point.step for point in run.curve] == [1, 2, 3]


def test_a_run_until_convergence_ends() -> None:
    _, run = fitted(NothingToTrain(batch_size=8), "converged=1", FixedProblem())
    first, second = (point.validation for point in run.curve if point.validation is not None)
    assert first == second  # the same noise at every check


def test_the_fit_is_frozen_and_its_state_detached() -> None:
    fit, _ = fitted(VAE(batch_size=8), "steps=2")
    assert not any(tensor.requires_grad for tensor in (*fit.state.values(), *fit.model.parameters()))
    assert not fit.model.training


@dataclass(frozen=True, kw_only=True)
class OwnModel(VAE):
    def build(self, view: TrainingView) -> Modules:
        other = view.spec.new_model(view.event_shape)
        return Modules({**dict(VAE.build(self, view).items()), "model": other})


@dataclass(frozen=True, kw_only=True)
class Orphan(VAE):
    def build(self, view: TrainingView) -> Modules:
        return Modules({**dict(VAE.build(self, view).items()), "extra": nn.Linear(1, 1)})


@dataclass(frozen=True, kw_only=True)
class SharedEncoder(AVB):
    def players(self) -> list[Player]:
        primal, adversary = super().players()
        return [primal, replace(adversary, on=("adversary", "encoder"))]


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (OwnModel(), "must return the view's model under 'model'"),
        (Orphan(), r"players own \['encoder', 'kl_weight', 'model'\], build\(\) returned \['encoder', 'extra', 'kl_w"),
        (SharedEncoder(), r"players own \['adversary', 'encoder', 'encoder', 'kl_weight', 'model'\]"),
    ],
)
def test_modules_and_players_that_do_not_match_are_refused(method: GradientMethod, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fitted(method)

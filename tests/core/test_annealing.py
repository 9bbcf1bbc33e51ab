"""Annealed importance sampling where the answer is known: unbiased in both directions, honest errors, frozen kernels.

Stochastic checks return how far off they are in standard errors; a right estimator is beyond four once in 16,000 times.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from harness import annealing, hmc
from harness.annealing import Annealing, Kernels, Weights, schedule
from harness.hmc import FunctionDensity
from harness.model import BernoulliLikelihood, DecoderModel, StandardNormalPrior, log_normal
from harness.nn import MLP
from harness.starts import GaussianStart, PriorStart, Start
from harness_plugins.linear_gaussian import LinearGaussianModel, true_parameters

DOUBLE = torch.float64
STANDARD_ERRORS = 4
MEMORY = 2**30


@pytest.fixture(autouse=True)
def without_gradients():
    """As evaluators are called."""
    with torch.no_grad():
        yield


def stream(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@dataclass(frozen=True, eq=False)
class Oracle:
    """Observations x that a linear-Gaussian model has simulated from z, so that z is an exact draw of p(z|x).

    Args:
        log_p: The exact log p(x), shape (N,).
        start: A diagonal Gaussian: neither the posterior's correlation nor quite its place.
    """

    model: LinearGaussianModel
    x: Tensor
    z: Tensor
    log_p: Tensor
    start: GaussianStart

    @staticmethod
    def make(observations: int, dtype: torch.dtype = torch.float32, latent_dim: int = 2, shift: float = 0.6) -> Oracle:
        parameters = true_parameters(latent_dim, latent_dim + 2, correlation=0.6, scale=1.0)
        model = LinearGaussianModel.fixed(*parameters, 0.5)
        z = model.sample_prior(observations, stream(1))
        x = model.sample_observation(z, stream(2))
        log_p, (mean, covariance) = model.log_evidence(x), model.exact_posterior(x)
        sd = 1.1 * covariance.diagonal().sqrt().expand_as(mean)
        start = GaussianStart(sd.to(dtype), (mean + shift * sd).to(dtype))
        return Oracle(model.to(dtype), x.to(dtype), z.to(dtype), log_p, start)

    def path(self, chains: int, module: ModuleType = annealing, forces: torch.dtype | None = None) -> Annealing:
        return module.Annealing(self.model, self.x, self.start, chains, leapfrog=2, memory=MEMORY, forces=forces)

    def kernels(
        self,
        temperatures: int,
        acceptance: float = 0.7,
        module: ModuleType = annealing,
        forces: torch.dtype | None = None,
    ) -> Kernels:
        """Tuned on the first fifty observations: the posteriors of all have the same shape."""
        start = GaussianStart(self.start.scale[:50], self.start.mean[:50])
        path = module.Annealing(self.model, self.x[:50], start, 2, leapfrog=2, memory=MEMORY, forces=forces)
        kernels = path.tuned("sigmoid", temperatures, acceptance, stream(3))
        steps = kernels.steps.log().mean(1, keepdim=True).exp()
        return Kernels(kernels.betas, steps.expand(-1, len(self.x)), kernels.leapfrog)


# Unbiased weights


def mean_error(log_w: Tensor) -> float:
    """By how many standard errors the mean of w differs from 1; infinitely many where a weight is not finite."""
    w = log_w.exp()
    return float((w.mean() - 1).abs() / w.std() * math.sqrt(w.numel())) if w.isfinite().all() else math.inf


@dataclass(frozen=True)
class Verdict:
    """Of 16,000 independent runs of one chain each, in each direction.

    Args:
        forward, reverse: `mean_error` of w / p(x), and of w p(x).
        spread: The larger variance of log w.
        acceptance: The mean probability of acceptance forwards and in reverse.
    """

    forward: float
    reverse: float
    spread: float
    acceptance: tuple[float, float]

    @property
    def worst(self) -> float:
        return max(self.forward, self.reverse)


def unbiasedness(module: ModuleType, dtype: torch.dtype = torch.float32, forces: torch.dtype | None = None) -> Verdict:
    oracle = Oracle.make(16_000, dtype)
    kernels, path = oracle.kernels(30, module=module, forces=forces), oracle.path(1, module, forces)
    forward, reverse = path.forward(kernels, stream(4)), path.reverse(kernels, oracle.z, stream(5))
    up, down = forward.log_w[0] - oracle.log_p, reverse.log_w[0] + oracle.log_p
    acceptance = float(forward.acceptance.mean()), float(reverse.acceptance.mean())
    return Verdict(mean_error(up), mean_error(down), float(max(up.var(), down.var())), acceptance)


@pytest.mark.parametrize(
    ("dtype", "forces"), [(torch.float32, None), (DOUBLE, None), (torch.float32, torch.bfloat16)], ids=str
)
def test_weights_are_unbiased_in_both_directions(dtype: torch.dtype, forces: torch.dtype | None) -> None:
    """With forces of low precision too: what a trajectory follows is not what it is judged by."""
    verdict = unbiasedness(annealing, dtype, forces)
    assert verdict.worst < STANDARD_ERRORS
    assert 0.05 < verdict.spread < 0.5  # small enough for the mean of w to have a normal error, and not nothing
    assert all(0.6 < acceptance < 0.8 for acceptance in verdict.acceptance)


@pytest.mark.parametrize("chains", [1, 4])
def test_estimates_of_two_hundred_small_runs_are_unbiased(chains: int) -> None:
    """Every run has a pilot of its own; reverse chains of a run share z, and the runs' estimates are still unbiased."""
    oracle = Oracle.make(200)
    path = oracle.path(chains)
    kernels = path.tuned("sigmoid", 30, 0.65, stream(3))
    assert kernels.steps.std(1).min() > 0
    for weights, exact in (
        (path.forward(kernels, stream(4)), oracle.log_p),
        (path.reverse(kernels, oracle.z, stream(5)), -oracle.log_p),
    ):
        assert (weights.log_w - exact).var() < 0.5
        assert mean_error(weights.estimate().value() - exact) < STANDARD_ERRORS


WEIGH = """
            log_w += change * torch.cat([state.log_joint - state.log_start for state in states], dim=1).double()"""
MOVE = """
            if i < last:
                draws = Randomness.draw(z, stream)
                states, probability = self._move(states, kernels.betas[t], kernels.steps[t - 1], draws)
                acceptance.append(probability.mean())"""
ADAPTED_MOVE = """
            if i < last:
                draws = Randomness.draw(z, stream)
                factor = factor * torch.exp(probability.mean(0) - 0.7) if i else torch.ones_like(z[0, :, 0])
                states, probability = self._move(states, kernels.betas[t], kernels.steps[t - 1] * factor, draws)
                acceptance.append(probability.mean())"""
MUTANTS = {
    "accept always": (hmc, "draws.acceptance < probability, end", "draws.acceptance < 2, end"),
    "last kick the wrong way": (hmc, "end.gradient(beta), value=0.5)", "end.gradient(beta), value=-0.5)"),
    "no last half-step": (hmc, "momentum.addcmul_(step, end.gradient(beta), value=0.5)", "momentum"),
    "prior dropped": (hmc, " + self.model.log_prior(z)", ""),
    "kinetic energy the wrong way": (hmc, "state.log_density(beta) + kinetic", "state.log_density(beta) - kinetic"),
    "weighed after the move": (annealing, WEIGH + MOVE, MOVE + WEIGH),
    "adapted while weighing": (annealing, MOVE, ADAPTED_MOVE),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_mutants_are_biased(mutated: Callable[..., ModuleType], mutant: str) -> None:
    module, text, by = MUTANTS[mutant]
    wrong = mutated(module, text, by)
    if module is hmc:
        wrong = mutated(annealing)  # imports the mutant
    verdict = unbiasedness(wrong)
    assert all(0.4 < acceptance < 0.8 for acceptance in verdict.acceptance)
    assert verdict.worst > 2 * STANDARD_ERRORS


# Stated errors


def coverage(error: Tensor, stderr: Tensor, quantile: float) -> float:
    return float((error.abs() < quantile * stderr).double().mean())


def test_stated_intervals_cover_the_truth() -> None:
    """Three thousand repeats: among two hundred, what truly covers 93 % is seen below 90 % once in twenty times.

    Sixteen weights give an error with sixteen minus one degrees of freedom: value +- 1.96 stderr covers some 93 %,
    and Student's t some 95 %. The error of a coverage is 0.4 %.
    """
    oracle = Oracle.make(3000)
    weights = oracle.path(16).forward(oracle.kernels(30), stream(4))
    error, stderr = weights.estimate().value() - oracle.log_p, weights.estimate().stderr()
    normal, student = 1.96, float(stats.t.ppf(0.975, 15))
    assert coverage(error, stderr, normal) == pytest.approx(0.93, abs=0.02)
    assert coverage(error, stderr, student) == pytest.approx(0.95, abs=0.02)
    # The mean over observations has the error that is stated, apart from the bias of a logarithm: -Var/2.
    mean_stderr = float(stderr.square().sum().sqrt() / 3000)
    assert abs(float((error + stderr.square() / 2).mean())) < STANDARD_ERRORS * mean_stderr


@pytest.mark.parametrize("chains", [16, 64])
def test_stated_errors_agree_with_the_bootstrap_over_chains(chains: int) -> None:
    oracle = Oracle.make(150)
    weights = oracle.path(chains).forward(oracle.kernels(30), stream(4))
    drawn = torch.randint(chains, (500, chains), generator=stream(6))
    resampled = weights.log_w[drawn].logsumexp(1) - math.log(chains)
    ratio = resampled.std(0) / weights.estimate().stderr()
    # Resampling n weights has the variance of n, not n - 1, of them; 500 resamples are good to 1/sqrt(1000).
    assert float(ratio.mean()) == pytest.approx(math.sqrt(1 - 1 / chains), abs=0.03)
    assert ((ratio > 0.75) & (ratio < 1.25)).all()


# Schedules and kernels


@pytest.mark.parametrize("temperatures", [2, 3, 10, 1000])
@pytest.mark.parametrize("kind", ["linear", "sigmoid"])
def test_schedules_rise_from_nought_to_one(kind: annealing.Schedule, temperatures: int) -> None:
    betas = np.array(schedule(kind, temperatures))
    assert len(betas) == temperatures + 1
    assert (betas[0], betas[-1]) == (0, 1)
    assert (np.diff(betas) > 0).all()
    np.testing.assert_allclose(betas + betas[::-1], 1, atol=1e-12)
    t = np.arange(temperatures + 1) / temperatures
    grosse = stats.logistic.cdf(4 * (2 * t - 1))  # Grosse et al. 2015, section 6
    expected = t if kind == "linear" else (grosse - grosse[0]) / (grosse[-1] - grosse[0])
    np.testing.assert_allclose(betas, expected, atol=1e-12)


@pytest.mark.parametrize("latent_dim", [1, 2, 10])
@pytest.mark.parametrize("temperatures", [2, 5, 80])
@pytest.mark.parametrize("start", ["gaussian", "prior"])
def test_kernels_have_the_acceptance_that_they_are_tuned_to(latent_dim: int, temperatures: int, start: str) -> None:
    """At every temperature, and for few of them too, though chains are then far from where the pilot's were."""
    oracle = Oracle.make(50, latent_dim=latent_dim)
    scale = torch.ones(50, latent_dim)
    path = Annealing(
        oracle.model, oracle.x, oracle.start if start == "gaussian" else PriorStart(scale, oracle.model), 16, 3, MEMORY
    )
    kernels = path.tuned("sigmoid", temperatures, 0.65, stream(3))
    assert kernels.steps.shape == (temperatures - 1, 50)
    before = kernels.steps.clone()
    acceptance = path.forward(kernels, stream(4)).acceptance
    assert torch.equal(kernels.steps, before)
    assert float(acceptance.mean()) == pytest.approx(0.65, abs=0.03 if temperatures == 80 else 0.15)
    assert (acceptance - 0.65).abs().max() < 0.15


@dataclass(frozen=True, eq=False)
class Steered(Start):
    """Chains set out from given points, shape (S, N, D)."""

    points: Tensor

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        return self.points[:n]

    def density(self, block: slice) -> hmc.Density:
        return FunctionDensity(log_normal)


def test_no_chain_depends_on_another() -> None:
    """Nothing is adapted while weighing: what becomes of the others changes no weight of a chain."""
    oracle = Oracle.make(20, DOUBLE)
    kernels, points = oracle.kernels(20), torch.randn(4, 20, 2, generator=stream(6), dtype=DOUBLE)
    others = torch.cat([points[:1], points[1:] + 0.5])
    one, two = (
        Annealing(oracle.model, oracle.x, Steered(oracle.start.scale, z), 4, 3, MEMORY)
        .forward(kernels, stream(4))
        .log_w
        for z in (points, others)
    )
    torch.testing.assert_close(one[0], two[0], rtol=0, atol=1e-10)
    assert (one[1:] != two[1:]).all()


# Blocks, gradients and what is left alone


def images(observations: int, latent_dim: int = 8, width: int = 32, pixels: int = 64) -> tuple[DecoderModel, Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        decoder = MLP(latent_dim, pixels, width, 2, "softplus")
    model = DecoderModel(latent_dim, (pixels,), decoder, BernoulliLikelihood())
    return model, (torch.rand(observations, pixels, generator=stream(7)) < 0.5).float()


@pytest.mark.parametrize("kind", ["gaussian", "prior"])
def test_results_do_not_depend_on_the_memory(kind: str) -> None:
    """In float64, where rounding decides no acceptance."""
    model, x = images(10)
    model, x = model.double(), x.double()
    scale = torch.full((10, 8), 0.9, dtype=DOUBLE)
    start = GaussianStart(scale, 0.1 * scale) if kind == "gaussian" else PriorStart(scale, model)
    found: list[tuple[int, Tensor, Weights, Weights]] = []
    for memory in (MEMORY, 2**17):
        path = Annealing(model, x, start, 4, 1, memory)
        kernels = path.tuned("sigmoid", 10, 0.65, stream(3))
        forward, reverse = path.forward(kernels, stream(4)), path.reverse(kernels, scale, stream(5))
        found.append((len(path.blocks), kernels.steps, forward, reverse))
    (one, steps, *whole), (several, same_steps, *cut) = found
    assert (one, several > 1) == (1, True)
    torch.testing.assert_close(same_steps, steps, rtol=1e-8, atol=0)
    for a, b in zip(whole, cut, strict=True):
        torch.testing.assert_close(b.log_w, a.log_w, rtol=0, atol=1e-8)
        torch.testing.assert_close(b.acceptance, a.acceptance, rtol=0, atol=1e-8)


@pytest.mark.parametrize("memory", [16 * 2**20, 48 * 2**20])
def test_a_run_stays_within_the_memory(peak: Callable[[Callable[[], object]], int], memory: int) -> None:
    """Chains, noise and gradients together, from the first state to the last."""
    model, x = images(400, latent_dim=32, width=300, pixels=784)
    scale = torch.full((400, 32), 0.9)
    path = Annealing(model, x, GaussianStart(scale, 0 * scale), 16, 2, memory)
    assert 1 < path.blocks[0].stop < 400
    kernels = Kernels(schedule("linear", 3), torch.full((2, 400), 0.05), 2)
    used = peak(lambda: path.forward(kernels, stream(8)))
    assert 0.2 * memory < used <= memory


@pytest.mark.parametrize("asked", ["auto", "full", "bf16"])
@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("width", [32, 300])
def test_forces_are_of_low_precision_where_that_pays(
    monkeypatch: pytest.MonkeyPatch, asked: annealing.Forces, native: bool, width: int
) -> None:
    monkeypatch.setattr(annealing, "multiplies_bf16", lambda device: native)
    model, _ = images(1, width=width, pixels=784)
    found = {
        dtype: annealing.force_precision(asked, model, dtype, torch.device("cpu")) for dtype in (torch.float32, DOUBLE)
    }
    pays = asked == "auto" and native and width == 300
    low = asked == "bf16"
    assert found[torch.float32] == (torch.bfloat16 if low or pays else None)
    assert found[DOUBLE] == (torch.bfloat16 if low else None)


def test_forces_of_low_precision_are_those_of_the_density_nearly() -> None:
    """The value and its own gradient are of full precision; the forces keep eight bits."""
    model, x = images(20, width=300, pixels=784)
    z = torch.randn(4, 20, 8, generator=stream(8))
    scale = torch.ones(20, 8)
    low, full = (
        Annealing(model, x, GaussianStart(scale, 0 * scale), 4, 2, MEMORY, forces) for forces in (torch.bfloat16, None)
    )
    (one, two), (exact,) = (low.paths[0].joint.gradient(z), low.paths[0].at(z)), (full.paths[0].at(z),)
    assert torch.equal(two.log_joint, exact.log_joint)
    assert torch.equal(two.joint_gradient, exact.joint_gradient)
    assert 1e-6 < float((one - exact.joint_gradient).norm() / exact.joint_gradient.norm()) < 0.01
    assert (low.forces, full.forces) == ("bfloat16", "float32")


def test_gradients_are_one_for_each_leapfrog_step_of_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    oracle, calls = Oracle.make(5), []
    forward = type(oracle.model.decoder).forward
    monkeypatch.setattr(
        type(oracle.model.decoder), "forward", lambda self, z: (calls.append(z.shape), forward(self, z))[1]
    )
    path, kernels = oracle.path(4), Kernels(schedule("linear", 7), torch.full((6, 5), 0.5), 2)
    calls.clear()
    path.forward(kernels, stream(4))
    assert calls == [(4, 5, 2)] * (1 + 6 * 2)


def test_the_model_is_left_as_it_was() -> None:
    model, x = images(3)
    model.train()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    path = Annealing(model, x, PriorStart(torch.ones(3, 8), model), 2, 2, MEMORY)
    path.forward(path.tuned("linear", 3, 0.65, stream(3)), stream(4))
    assert model.training
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad
        assert parameter.grad is None
        assert torch.equal(parameter, before[name])


@pytest.mark.parametrize("temperatures", [2, 30, 100])
def test_the_running_estimate_ends_in_the_estimate(temperatures: int) -> None:
    oracle = Oracle.make(6)
    path, told = oracle.path(5), []
    kernels = oracle.kernels(temperatures)
    forward = path.forward(kernels, stream(4), lambda *facts: told.append(facts))
    reverse = path.reverse(kernels, oracle.z, stream(5))
    for weights, end in ((forward, 1.0), (reverse, 0.0)):
        traces = weights.traces()
        assert traces["acceptance"].shape == (temperatures - 1,)
        assert traces["running"].shape == (min(temperatures, 40), 6)
        assert traces["temperature"].shape == (min(temperatures, 40),)
        assert traces["temperature"][-1] == end
        assert (np.diff(traces["temperature"]) * (2 * end - 1) > 0).all()
        np.testing.assert_allclose(traces["running"][-1], weights.estimate().value())
    parts, acceptance, running = zip(*told, strict=True)
    assert parts == tuple(sorted(parts))
    assert parts[-1] == 1
    assert all(0 <= probability <= 1 for probability in acceptance)
    assert running[-1] == pytest.approx(float(forward.estimate().value().mean()))


# Densities that vanish


class Above(StandardNormalPrior):
    """z in one dimension is known to be above x; ``root`` is a likelihood that has no slope below."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.latent_dim, self.kind = 1, kind
        self.register_buffer("one", torch.ones((), dtype=DOUBLE))

    def log_likelihood(self, x: Tensor, z: Tensor) -> Tensor:
        above = (z - x)[..., 0]
        value = torch.zeros_like(above) if self.kind == "step" else above.sqrt().log()
        return torch.where(above > 0, value, -math.inf)

    def log_evidence(self, x: float) -> float:
        if self.kind == "step":
            return float(stats.norm.logsf(x))
        return math.log(stats.norm.expect(lambda z: math.sqrt(z - x), lb=x))


@pytest.mark.parametrize("x", [-1.0, 0.5, 1.0])
@pytest.mark.parametrize("kind", ["step", "root"])
def test_evidence_where_the_likelihood_vanishes(kind: str, x: float) -> None:
    """Chains that begin where p(x, z) is zero weigh nothing, and count; the pilot's do not spoil the steps."""
    model, observed = Above(kind), torch.full((40, 1), x, dtype=DOUBLE)
    path = Annealing(model, observed, PriorStart(torch.ones(40, 1, dtype=DOUBLE), model), 64, 3, MEMORY)
    kernels = path.tuned("sigmoid", 30, 0.65, stream(3))
    estimate = path.forward(kernels, stream(4)).estimate()
    error = estimate.value() - model.log_evidence(x)
    assert mean_error(error) < STANDARD_ERRORS
    assert abs((error + estimate.stderr().square() / 2).mean()) < STANDARD_ERRORS * estimate.stderr().norm() / 40
    assert kernels.steps.min() > 0.03

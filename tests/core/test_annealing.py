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
from harness.model import BernoulliLikelihood, DecoderModel, LatentModel, StandardNormalPrior, log_normal
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

    def path(self, chains: int, module: ModuleType = annealing, memory: int = MEMORY) -> Annealing:
        return module.Annealing(self.model, self.x, self.start, chains, leapfrog=2, memory=memory)

    def kernels(self, temperatures: int, acceptance: float = 0.7, module: ModuleType = annealing) -> Kernels:
        """Tuned on the first fifty observations: the posteriors of all have the same shape."""
        start = GaussianStart(self.start.scale[:50], self.start.mean[:50])
        path = module.Annealing(self.model, self.x[:50], start, 2, leapfrog=2, memory=MEMORY)
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


def unbiasedness(module: ModuleType, dtype: torch.dtype = torch.float32) -> Verdict:
    oracle = Oracle.make(16_000, dtype)
    kernels, path = oracle.kernels(30, module=module), oracle.path(1, module)
    forward, reverse = path.forward(kernels, stream(4)), path.reverse(kernels, oracle.z, stream(5))
    up, down = forward.log_w[0] - oracle.log_p, reverse.log_w[0] + oracle.log_p
    acceptance = float(forward.acceptance.mean()), float(reverse.acceptance.mean())
    return Verdict(mean_error(up), mean_error(down), float(max(up.var(), down.var())), acceptance)


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
def test_weights_are_unbiased_in_both_directions(dtype: torch.dtype) -> None:
    verdict = unbiasedness(annealing, dtype)
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
    "prior dropped": (hmc, " + self.model.log_prior(z.detach())", ""),
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

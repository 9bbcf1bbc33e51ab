"""Laws of the integrator and of its transitions, and mutants of it that break them.

Stochastic checks return how far off they are in standard errors. The largest of some ten such numbers exceeds four
once in a thousand times.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType

import pytest
import torch
from torch import Tensor

from harness import hmc
from harness.hmc import (
    DecoderDensity,
    Density,
    FunctionDensity,
    GaussianDensity,
    Path,
    Randomness,
    joint_density,
    leapfrog,
    prior_density,
    transition,
)
from harness.model import BernoulliLikelihood, DecoderModel, GaussianLikelihood, Likelihood, log_normal
from harness.nn import MLP, Activation
from harness_plugins.linear_gaussian import LinearGaussianModel, true_parameters

DOUBLE = torch.float64
LEAPFROG = 4
STANDARD_ERRORS = 4


def stream(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def decoder_model(likelihood: Likelihood, latent_dim: int = 2) -> DecoderModel:
    """A smooth decoder, far from linear."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        model = DecoderModel(latent_dim, (2, 3), MLP(latent_dim, 6, 8, 2, "softplus"), likelihood).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    return model


def decoder_path() -> Path:
    """From a Gaussian to the joint density of a decoder, for three observations."""
    x = (torch.rand(3, 2, 3, generator=stream(1), dtype=DOUBLE) < 0.5).double()
    mean = torch.randn(3, 2, generator=stream(2), dtype=DOUBLE)
    sd = torch.full((3, 2), 0.7, dtype=DOUBLE)
    return Path(GaussianDensity(mean, sd), joint_density(decoder_model(BernoulliLikelihood()), x))


@pytest.mark.parametrize("likelihood", [BernoulliLikelihood, GaussianLikelihood])
@pytest.mark.parametrize("observations", [1, 3])
def test_gradients_of_decoders_are_those_of_autograd(likelihood: type[Likelihood], observations: int) -> None:
    model = decoder_model(likelihood())
    x = (torch.rand(observations, 2, 3, generator=stream(1), dtype=DOUBLE) < 0.5).double()
    density = joint_density(model, x)
    assert isinstance(density, DecoderDensity)
    assert_differentiates(density, lambda z: model.log_joint(x, z), observations)


class Doubled(MLP):
    """With a forward pass of its own, so that what is known by hand of an MLP does not hold."""

    def forward(self, h: Tensor) -> Tensor:
        return 2 * super().forward(h)


@pytest.mark.parametrize("kind", [MLP, Doubled])
@pytest.mark.parametrize("activation", ["elu", "tanh", "leaky-relu"])
def test_gradients_of_other_decoders_are_those_of_autograd(kind: type[MLP], activation: Activation) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        model = DecoderModel(2, (2, 3), kind(2, 6, 8, 2, activation), BernoulliLikelihood()).double()
    x = (torch.rand(3, 2, 3, generator=stream(1), dtype=DOUBLE) < 0.5).double()
    assert_differentiates(joint_density(model, x), lambda z: model.log_joint(x, z), 3)


class Shifted(DecoderModel):
    """No standard normal prior."""

    def log_prior(self, z: Tensor) -> Tensor:
        return log_normal(z, 1.5, math.log(2))


class Tempered(DecoderModel):
    """No product of its parts."""

    def log_joint(self, x: Tensor, z: Tensor) -> Tensor:
        return 0.5 * super().log_joint(x, z)


@pytest.mark.parametrize("kind", [Shifted, Tempered])
def test_whatever_a_model_changes_is_in_its_density(kind: type[DecoderModel]) -> None:
    model = decoder_model(BernoulliLikelihood())
    model.__class__ = kind
    x = torch.ones(3, 2, 3, dtype=DOUBLE)
    assert_differentiates(joint_density(model, x), lambda z: model.log_joint(x, z), 3)
    assert_differentiates(prior_density(model), model.log_prior, 3)


def test_gradients_of_gaussians_functions_and_lines_are_those_of_autograd() -> None:
    mean = torch.randn(3, 2, generator=stream(3), dtype=DOUBLE)
    sd = torch.rand(3, 2, generator=stream(4), dtype=DOUBLE) + 0.1
    normal = torch.distributions.Normal(mean, sd)
    assert_differentiates(GaussianDensity(mean, sd), lambda z: normal.log_prob(z).sum(-1), 3)
    for function in (lambda z: z.sin().prod(-1), lambda z: z.sum(-1), lambda z: z[..., 0] - 2 * z[..., 1]):
        assert_differentiates(FunctionDensity(function), function, 3)
    constant = FunctionDensity(lambda z: torch.zeros(z.shape[:2], dtype=z.dtype))
    assert not constant.gradient(mean[None]).any()


def assert_differentiates(density: Density, function: Callable[[Tensor], Tensor], observations: int) -> None:
    z = torch.randn(4, observations, 2, generator=stream(5), dtype=DOUBLE).requires_grad_()
    expected = function(z)
    (slope,) = torch.autograd.grad(expected.sum(), z)
    with torch.no_grad():  # as evaluators are called
        value, gradient = density.value_and_gradient(z)
    torch.testing.assert_close(value, expected.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradient, slope, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(density.gradient(z), slope, rtol=1e-10, atol=1e-10)
    assert not value.requires_grad
    assert not gradient.requires_grad
    path = Path(density, density)  # whose gradient may be worked on in place
    for beta in (0.0, 0.3, 1.0):
        torch.testing.assert_close(path.gradient(z.detach(), beta), slope, rtol=1e-10, atol=1e-10)


# Laws of the integrator


def trajectory(
    module: ModuleType, step: float, steps: int, beta: float = 0.6
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Start and end of trajectories: z, momentum, z', momentum' of shape (S, B, D), and the change of energy (S, B)."""
    path, momentum = decoder_path(), torch.randn(50, 3, 2, generator=stream(6), dtype=DOUBLE)
    state = path.at(torch.randn(50, 3, 2, generator=stream(7), dtype=DOUBLE))
    scaled = step * torch.tensor([0.7, 1.3], dtype=DOUBLE).expand_as(momentum)
    end, end_momentum = module.leapfrog(path, beta, state, momentum, scaled, steps)
    potential = end.log_density(beta) - state.log_density(beta)
    kinetic = 0.5 * (end_momentum.square() - momentum.square()).sum(-1)
    return state.z, momentum, end.z, end_momentum, kinetic - potential


def irreversibility(module: ModuleType) -> float:
    """Go, turn round, go: the largest distance from the start."""
    path, step = decoder_path(), torch.full((50, 3, 2), 0.15, dtype=DOUBLE)
    z, momentum, end, end_momentum, _ = trajectory(module, 0.15, 7)
    scaled = step * torch.tensor([0.7, 1.3], dtype=DOUBLE)
    back, back_momentum = module.leapfrog(path, 0.6, path.at(end), -end_momentum, scaled, 7)
    return float(torch.maximum((back.z - z).abs(), (back_momentum + momentum).abs()).max())


def order(module: ModuleType) -> float:
    """Of the error of the energy at the end of trajectories of one length: 2 for the leapfrog."""
    coarse, fine = (trajectory(module, 0.02 / n, 20 * n)[-1].square().mean().sqrt() for n in (1, 2))
    return float(torch.log2(coarse / fine))


def test_the_integrator_is_reversible() -> None:
    assert irreversibility(hmc) < 1e-12


def test_the_error_of_the_energy_is_of_second_order() -> None:
    assert order(hmc) == pytest.approx(2, abs=0.05)


def test_the_integrator_preserves_volume() -> None:
    path, step = decoder_path(), torch.full((8, 3, 2), 0.2, dtype=DOUBLE)

    def flow(point: Tensor) -> Tensor:
        end, momentum = leapfrog(path, 0.6, path.at(point[:2].expand(8, 3, 2)), point[2:].expand(8, 3, 2), step, 5)
        return torch.cat([end.z[0], momentum[0]], dim=-1)

    point, h = torch.tensor([0.3, -0.8, 0.5, 1.1], dtype=DOUBLE), 1e-5
    columns = [(flow(point + h * unit) - flow(point - h * unit)) / (2 * h) for unit in torch.eye(4, dtype=DOUBLE)]
    jacobian = torch.stack(columns, dim=-1)
    assert (jacobian - torch.eye(4, dtype=DOUBLE)).abs().amax((1, 2)).min() > 0.5  # it goes somewhere
    torch.testing.assert_close(torch.linalg.det(jacobian), torch.ones(3, dtype=DOUBLE), rtol=0, atol=1e-8)


@dataclass(frozen=True, eq=False)
class Counting(FunctionDensity):
    """Keeps which of its two methods was called; a value comes with its gradient."""

    calls: list[str] = field(default_factory=list)

    def value_and_gradient(self, z: Tensor) -> tuple[Tensor, Tensor]:
        self.calls.append("both")
        return super().value_and_gradient(z)

    def gradient(self, z: Tensor) -> Tensor:
        self.calls.append("gradient")
        return FunctionDensity(self.log_prob).gradient(z)


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_one_gradient_for_each_leapfrog_step(steps: int) -> None:
    joint, start = Counting(log_normal), Counting(log_normal)
    path = Path(start, joint)
    state, step = path.at(torch.zeros(2, 3, 2)), torch.full((3, 2), 0.3)
    assert joint.calls == start.calls == ["both"]
    for _ in range(4):
        state, _ = transition(path, 0.5, state, step, steps, Randomness.draw(state.z, stream()))
    # Values are needed at the ends of trajectories only, and the first gradient of one is the last of another.
    assert joint.calls == start.calls == ["both", *([*["gradient"] * (steps - 1), "both"] * 4)]


# Laws of transitions


def test_what_a_state_carries_along_is_what_a_fresh_look_finds() -> None:
    path, generator = decoder_path(), stream(8)
    state = path.at(torch.randn(50, 3, 2, generator=generator, dtype=DOUBLE))
    rejected = torch.zeros(50, 3)
    for i in range(30):
        before, draws = state.z, Randomness.draw(state.z, generator)
        state, probability = transition(path, i / 29, state, torch.full((3, 2), 0.9, dtype=DOUBLE), 3, draws)
        moved = (state.z != before).any(-1)
        assert torch.equal(moved, draws.acceptance < probability)
        rejected += ~moved
    assert 0.1 < (rejected / 30).mean() < 0.9  # or nothing would be kept
    fresh = path.at(state.z)
    for name in ("log_start", "log_joint", "start_gradient", "joint_gradient"):
        torch.testing.assert_close(getattr(state, name), getattr(fresh, name), rtol=1e-12, atol=1e-12)


def test_a_transition_is_each_chains_own() -> None:
    """Other chains and other observations change nothing: no step depends on what chains have been through."""
    path, draws = decoder_path(), Randomness.draw(torch.zeros(6, 3, 2, dtype=DOUBLE), stream(9))
    z = torch.randn(6, 3, 2, generator=stream(10), dtype=DOUBLE)
    other = z.clone()
    other[1:] += 1
    step = torch.full((3, 2), 0.5, dtype=DOUBLE)
    one, two = (transition(path, 0.5, path.at(start), step, 3, draws)[0].z for start in (z, other))
    torch.testing.assert_close(one[0], two[0], rtol=0, atol=1e-14)
    assert not torch.equal(one[1:], two[1:])


@dataclass(frozen=True, eq=False)
class Oracle:
    """A linear-Gaussian model with a correlated posterior and a Gaussian start elsewhere: f_beta is Gaussian.

    Args:
        mean, sd: The start, of shape (2, 2) and (2,): for two observations.
    """

    model: LinearGaussianModel
    x: Tensor
    mean: Tensor
    sd: Tensor

    @staticmethod
    def make() -> Oracle:
        model = LinearGaussianModel.fixed(*true_parameters(2, 4, correlation=0.6, scale=1.0), 0.5)
        x = model.sample_observation(model.sample_prior(2, stream(11)), stream(12))
        mean, covariance = model.exact_posterior(x)
        sd = 1.3 * covariance.diagonal().sqrt()
        return Oracle(model, x, mean + sd, sd)

    def path(self, module: ModuleType, dtype: torch.dtype) -> Path:
        model, x = copy.deepcopy(self.model).to(dtype), self.x.to(dtype)
        return module.Path(
            module.GaussianDensity(self.mean.to(dtype), self.sd.to(dtype)), module.joint_density(model, x)
        )

    def gaussian(self, beta: float) -> tuple[Tensor, Tensor]:
        """f_beta: its mean (2, 2) and the Cholesky factor of its covariance (2, 2)."""
        mean, covariance = self.model.exact_posterior(self.x)
        joint, start = beta * torch.linalg.inv(covariance), (1 - beta) * torch.diag(self.sd**-2)
        together = torch.linalg.inv(joint + start)
        return (mean @ joint + self.mean @ start) @ together, torch.linalg.cholesky(together)


def moved(
    module: ModuleType, beta: float, step: float, transitions: int, chains: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, float]:
    """Exact draws of f_beta after some transitions, whitened, shape (chains, 2, 2), and the mean acceptance."""
    oracle, generator = Oracle.make(), stream(13)
    mean, factor = oracle.gaussian(beta)
    z = mean + torch.randn(chains, 2, 2, generator=generator, dtype=DOUBLE) @ factor.T
    path, scaled = oracle.path(module, dtype), (step * oracle.sd).to(dtype).expand(2, 2)
    state, accepted = path.at(z.to(dtype)), []
    for _ in range(transitions):
        draws = module.Randomness.draw(state.z, generator)
        state, probability = module.transition(path, beta, state, scaled, LEAPFROG, draws)
        accepted.append(probability.mean())
    white = torch.linalg.solve_triangular(factor, (state.z.double() - mean).mT, upper=False).mT
    return white, float(torch.stack(accepted).mean())


def step_for(module: ModuleType, beta: float, acceptance: float = 0.6) -> float:
    """The step at which transitions from exact draws are accepted with the given probability, by bisection."""
    low, high = math.log(0.01), math.log(3)
    for _ in range(12):
        middle = (low + high) / 2
        low, high = (middle, high) if moved(module, beta, math.exp(middle), 1, 500)[1] > acceptance else (low, middle)
    return math.exp(low)


def drift(module: ModuleType, beta: float, dtype: torch.dtype = torch.float32) -> float:
    """How far mean and covariance of f_beta are from those of its draws after transitions, in standard errors."""
    white, acceptance = moved(module, beta, step_for(module, beta), transitions=4, chains=20_000, dtype=dtype)
    assert 0.4 < acceptance < 0.8
    draws = white.flatten(0, 1)  # whitened, the draws for both observations are alike
    products = draws[:, :, None] * draws[:, None]
    off = [draws.mean(0), (products.mean(0) - torch.eye(2)) / torch.tensor([[2, 1], [1, 2]]).sqrt()]
    return float(torch.cat([part.flatten() for part in off]).abs().max() * math.sqrt(len(draws)))


@pytest.mark.parametrize("beta", [0.0, 0.05, 0.5, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
def test_transitions_leave_every_density_of_the_path_as_it_is(beta: float, dtype: torch.dtype) -> None:
    assert drift(hmc, beta, dtype) < STANDARD_ERRORS


MUTANTS = {
    "accept always": ("draws.acceptance < probability, end", "draws.acceptance < 2, end"),
    "last kick the wrong way": ("end.gradient(beta), value=0.5)", "end.gradient(beta), value=-0.5)"),
    "no last half-step": ("momentum.addcmul_(step, end.gradient(beta), value=0.5)", "momentum"),
    "no first half-step": ("torch.addcmul(momentum, step, state.gradient(beta), value=0.5)", "momentum.clone()"),
    "prior dropped": (" + self.model.log_prior(z)", ""),
    "kinetic energy the wrong way": ("- state.log_density(beta) + kinetic", "- state.log_density(beta) - kinetic"),
    "no kinetic energy": ("- state.log_density(beta) + kinetic", "- state.log_density(beta)"),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_mutants_do_not_leave_the_density_as_it_is(mutated: Callable[..., ModuleType], mutant: str) -> None:
    assert drift(mutated(hmc, *MUTANTS[mutant]), 0.7) > 2 * STANDARD_ERRORS


def test_mutants_of_the_integrator_break_its_laws(mutated: Callable[..., ModuleType]) -> None:
    for name in ("last kick the wrong way", "no last half-step", "no first half-step"):
        mutant = mutated(hmc, *MUTANTS[name])
        assert irreversibility(mutant) > 0.01
        assert order(mutant) < 1.5


def test_a_symmetric_mistake_is_seen_by_the_energy(mutated: Callable[..., ModuleType]) -> None:
    """Kicks the wrong way in the middle only: still reversible, still exact, and a bad integrator."""
    mutant = mutated(hmc, "addcmul_(step, path.gradient(z, beta))", "addcmul_(step, path.gradient(z, beta), value=-1)")
    assert irreversibility(mutant) < 1e-12
    assert order(mutant) < 1.5


# Where the density is zero or not a number


@pytest.mark.parametrize("outside", [-math.inf, math.nan])
def test_no_chain_leaves_the_support(outside: float) -> None:
    """A normal distribution, cut off at 0.3 without a warning from the gradient."""
    beyond = torch.tensor(outside, dtype=DOUBLE)
    joint = FunctionDensity(lambda z: torch.where(z[..., 0] > 0.3, log_normal(z), beyond))
    path = Path(FunctionDensity(log_normal), joint)
    normal, generator = torch.distributions.Normal(0.0, 1.0), stream(14)
    tail = float(1 - normal.cdf(torch.tensor(0.3)))
    z = normal.icdf(1 - tail * torch.rand(20_000, 1, 1, generator=generator, dtype=DOUBLE))
    state, accepted = path.at(z), []
    for _ in range(5):
        state, probability = transition(
            path, 0.5, state, torch.full((1, 1), 0.3, dtype=DOUBLE), 3, Randomness.draw(z, generator)
        )
        accepted.append(probability.mean())
    assert 0.4 < torch.stack(accepted).mean() < 0.8
    assert (state.z > 0.3).all()
    mean = math.exp(float(normal.log_prob(torch.tensor(0.3)))) / tail
    for values, expected in ((state.z, mean), (state.z.square(), 1 + 0.3 * mean)):
        assert abs(values.mean() - expected) < STANDARD_ERRORS * values.std() / math.sqrt(values.numel())


def test_a_chain_that_begins_outside_the_support_may_enter_it_and_one_without_a_slope_stays() -> None:
    inside = FunctionDensity(lambda z: torch.where(z[..., 0] > 0, log_normal(z), -math.inf))
    root = FunctionDensity(lambda z: torch.where(z[..., 0] > 0, z[..., 0].sqrt() - z[..., 0], -math.inf))  # slope: nan
    for joint, enters in ((inside, True), (root, False)):
        path, generator = Path(FunctionDensity(log_normal), joint), stream(15)
        state = path.at(torch.full((200, 1, 1), -0.1, dtype=DOUBLE))
        for _ in range(20):
            draws = Randomness.draw(state.z, generator)
            state, probability = transition(path, 0.5, state, torch.full((1, 1), 0.5, dtype=DOUBLE), 2, draws)
            assert probability.isfinite().all()
        assert state.z.isfinite().all()
        assert bool((state.z > 0).all()) == enters

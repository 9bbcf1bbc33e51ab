"""`bdmc` where the truth is known: it lies between the two bounds, and their gap tells good settings from bad."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from harness.annealing import Annealing, Kernels
from harness.evaluator import Measurement
from harness.model import BernoulliLikelihood, DecoderModel, LatentModel, StandardNormalPrior, log_normal
from harness.nn import MLP
from harness.posterior import Posterior
from harness_plugins.bdmc import BDMC
from harness_plugins.linear_gaussian import LinearGaussianModel

METRICS = ["bdmc_gap", "simulated_log_likelihood", "simulated_log_likelihood_upper", "simulated_log_likelihood_exact"]


@torch.no_grad()
def measure(oracle, posterior, model: LatentModel | None = None, **settings: Any) -> dict[str, Measurement]:
    fit = oracle.fit(posterior, model)
    return {found.metric: found for found in BDMC(**settings).measure(fit, oracle.problem, oracle.run)}


def mean_and_error(values: np.ndarray) -> tuple[float, float]:
    """Over simulated observations, all drawn independently together with their z: the error holds for what it is.

    The stated errors are those of the chains for given x and z. Reverse chains of an observation share z.
    """
    return float(values.mean()), float(values.std(ddof=1) / math.sqrt(len(values)))


@pytest.mark.parametrize(
    ("latent_dim", "start", "temperatures", "nats"),
    [(2, "moments", 50, 0.02), (2, "prior", 100, 0.1), (10, "moments", 100, 0.05), (10, "prior", 200, 0.3)],
)
def test_the_truth_lies_between_the_bounds(
    oracle_of, latent_dim: int, start: str, temperatures: int, nats: float
) -> None:
    oracle = oracle_of(latent_dim=latent_dim, data_dim=latent_dim + 5, noise=0.3)
    settings = {"start": start, "temperatures": temperatures, "leapfrog": 5}
    found = measure(oracle, oracle.mean_field(), observations=100, **settings)
    assert list(found) == METRICS
    gap, lower, upper, exact = found.values()
    np.testing.assert_allclose(gap.values, upper.values - lower.values, atol=1e-12)
    np.testing.assert_allclose(gap.stderrs, np.hypot(lower.stderrs, upper.stderrs), atol=1e-12)
    # The interval, widened by three errors.
    assert lower.value - 3 * lower.stderr <= exact.value <= upper.value + 3 * upper.stderr
    # Each bound is on its own side, on average.
    below, above = mean_and_error(lower.values - exact.values), mean_and_error(upper.values - exact.values)
    assert below[0] < 3 * below[1]
    assert above[0] > -3 * above[1]
    assert gap.value == pytest.approx(above[0] - below[0])
    assert -0.02 < gap.value < nats
    assert gap.settings["acceptance_reverse"] == pytest.approx(gap.settings["acceptance"], abs=0.05)


def test_the_exact_values_are_those_of_the_simulated_observations(oracle) -> None:
    found = measure(oracle, oracle.mean_field(), observations=50, temperatures=30, leapfrog=3)
    stream = oracle.run.generator("bdmc", "simulation")
    with torch.no_grad():
        x = oracle.model.sample_observation(oracle.model.sample_prior(50, stream), stream)
    exact = found["simulated_log_likelihood_exact"]
    np.testing.assert_allclose(exact.values, oracle.model.log_evidence(x).numpy())
    assert (exact.kind, exact.stderr) == ("exact", 0)


@pytest.mark.parametrize("chains", [2, 8])
def test_the_reverse_weights_of_simulated_observations_are_unbiased(oracle, chains: int) -> None:
    """E[1 / p_hat(x)] = 1 / p(x), although the chains of an observation share its z; four errors over observations."""
    settings: dict[str, Any] = {"chains": chains, "temperatures": 30, "leapfrog": 3, "observations": 500}
    gap, lower, upper, exact = measure(oracle, oracle.mean_field(), **settings).values()
    for log_w in (lower.values - exact.values, exact.values - upper.values):
        assert log_w.var() < 0.5
        mean, error = mean_and_error(np.exp(log_w))
        assert abs(mean - 1) < 4 * error
    mean, error = mean_and_error(gap.values)
    assert mean > -4 * error


def test_the_gap_shrinks_with_temperatures_and_shows_a_bad_start(oracle_of) -> None:
    oracle = oracle_of(latent_dim=10, data_dim=15, noise=0.3)

    def gap(posterior, **settings: Any) -> tuple[float, float]:
        found = measure(oracle, posterior, observations=40, leapfrog=3, chains=8, **settings)
        return mean_and_error(found["bdmc_gap"].values)

    few, more, many = (gap(oracle.mean_field(), start="prior", temperatures=n) for n in (5, 40, 250))
    for worse, better in ((few, more), (more, many)):
        assert worse[0] - better[0] > 4 * math.hypot(worse[1], better[1])
    assert few[0] > 5
    assert many[0] < 0.5
    good, bad = gap(oracle.mean_field(), temperatures=10), gap(oracle.mean_field(shift=6.0), temperatures=10)
    assert bad[0] - good[0] > 4 * math.hypot(bad[1], good[1])
    assert bad[0] > BDMC().threshold  # such settings are marked untrusted


class TwoModes(StandardNormalPrior):
    """x = |z| + noise, for x so far from zero that the two modes of p(z|x) are apart."""

    latent_dim, noise = 1, 0.1

    def log_likelihood(self, x: Tensor, z: Tensor) -> Tensor:
        return log_normal(x, z.abs(), math.log(self.noise))

    def mean(self, z: Tensor) -> Tensor:
        return z.abs()

    def sample_observation(self, z: Tensor, generator: torch.Generator) -> Tensor:
        return self.mean(z) + self.noise * torch.randn(z.shape, generator=generator)


class OneMode(Posterior):
    """N(x, 0.1^2)."""

    def sample(self, x: Tensor, n: int, generator: torch.Generator) -> Tensor:
        return x + 0.1 * torch.randn(n, *x.shape, generator=generator)


def test_a_mode_that_the_start_misses_is_in_the_gap(oracle) -> None:
    """Forward chains see one mode, which is log 2 too little, and their error is small: the reverse ones tell."""
    settings = {"observations": 300, "temperatures": 60, "leapfrog": 3}
    gap, lower, _ = measure(oracle, OneMode(), TwoModes(), **settings).values()
    stream = oracle.run.generator("bdmc", "simulation")
    z = TwoModes().sample_prior(300, stream)
    x = TwoModes().sample_observation(z, stream)[:, 0]
    # |z| + noise, where the noise cannot reach over zero: twice the marginal of z + noise.
    log_p = math.log(2) + torch.distributions.Normal(0.0, math.sqrt(1.01)).log_prob(x)
    apart = x.numpy() > 0.7
    error = (lower.values - log_p.numpy())[apart]
    assert error.mean() == pytest.approx(-math.log(2), abs=0.05)
    assert lower.stderrs[apart].mean() < 0.05
    seen = apart & (z[:, 0] > 0).numpy()  # half of the exact draws are in the mode that the start knows
    assert gap.values[seen].mean() == pytest.approx(0, abs=0.05)
    assert gap.values[apart & ~seen].mean() > 2
    assert gap.values[apart].mean() > BDMC().threshold


# What the kernels may not know


class Blindfolded(LinearGaussianModel):
    """Simulates the same x whatever z is, so that z alone can be changed."""

    constant: Tensor
    factor: float

    def sample_prior(self, n: int, generator: torch.Generator) -> Tensor:
        return self.factor * super().sample_prior(n, generator)

    def sample_observation(self, z: Tensor, generator: torch.Generator) -> Tensor:
        return self.constant


def test_kernels_are_tuned_without_a_look_at_the_exact_z(oracle, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels: list[Kernels] = []
    reverse = Annealing.reverse

    def spy(self: Annealing, tuned: Kernels, z: Tensor, *rest: Any) -> Any:
        kernels.append(tuned)
        return reverse(self, tuned, z, *rest)

    monkeypatch.setattr(Annealing, "reverse", spy)
    uppers: list[np.ndarray] = []
    lowers: list[np.ndarray] = []
    for factor in (1.0, -0.5):
        model = Blindfolded(2, 10)
        model.load_state_dict(oracle.model.state_dict())
        model.constant, model.factor = oracle.x[:20], factor
        found = measure(oracle, oracle.mean_field(), model, observations=20, temperatures=10, leapfrog=2)
        uppers.append(found["simulated_log_likelihood_upper"].values)
        lowers.append(found["simulated_log_likelihood"].values)
    one, two = kernels
    assert torch.equal(one.steps, two.steps)
    assert one.betas == two.betas
    assert np.array_equal(lowers[0], lowers[1])
    assert not np.isclose(uppers[0], uppers[1]).any()


def test_both_directions_have_the_same_kernels(oracle, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Kernels] = {}
    originals: dict[str, Callable[..., Any]] = {name: getattr(Annealing, name) for name in ("forward", "reverse")}
    for name, original in originals.items():

        def spy(self: Annealing, kernels: Kernels, *rest: Any, name: str = name, original: Any = original) -> Any:
            seen[name] = kernels
            before = kernels.steps.clone()
            weights = original(self, kernels, *rest)
            assert torch.equal(kernels.steps, before)
            return weights

        monkeypatch.setattr(Annealing, name, spy)
    measure(oracle, oracle.mean_field(), observations=5, temperatures=5, leapfrog=2)
    assert seen["forward"] is seen["reverse"]


# What is recorded


class Unsimulated(LatentModel):
    """A model that observations cannot be drawn from."""

    latent_dim = 2

    def sample_prior(self, n: int, generator: torch.Generator) -> Tensor:
        return torch.randn(n, 2, generator=generator)

    def log_prior(self, z: Tensor) -> Tensor:
        return log_normal(z)

    def log_likelihood(self, x: Tensor, z: Tensor) -> Tensor:
        return log_normal(z, x[..., :2])


def test_a_model_that_cannot_simulate_is_skipped_with_the_reason(oracle) -> None:
    fit = oracle.fit(oracle.implicit(), Unsimulated())
    assert BDMC().undefined(fit, oracle.problem) == "model cannot simulate observations"
    assert BDMC().undefined(oracle.fit(oracle.implicit()), oracle.problem) is None
    reason = BDMC(start="q").undefined(oracle.fit(oracle.implicit()), oracle.problem)
    assert reason is not None
    assert "start=moments" in reason


def test_what_is_recorded(oracle) -> None:
    told: list[tuple[float, str]] = []
    oracle.run = dataclasses.replace(oracle.run, progress=lambda part, facts: told.append((part, facts)))
    found = measure(oracle, oracle.implicit(), observations=7, temperatures=10, leapfrog=2, chains=3, threshold=0.5)
    assert [measured.kind for measured in found.values()] == [
        "stochastic upper bound",
        "stochastic lower bound",
        "stochastic upper bound",
        "exact",
    ]
    for measured in found.values():
        assert measured.split == "simulated"
        assert measured.indices.tolist() == list(range(7))
        assert math.isfinite(measured.stderr_test)  # simulated observations are never the whole population
        settings = dict(measured.settings)
        json.dumps(settings, allow_nan=False)
        asked = {"chains": 3, "temperatures": 10, "leapfrog": 2, "start": "moments", "threshold": 0.5}
        assert settings.items() >= {**asked, "schedule": "sigmoid", "target_acceptance": 0.65}.items()
        assert 0 < settings["acceptance_reverse"] < 1
        assert 1 <= settings["ess_min"] <= 3
    assert "simulated x" in found["bdmc_gap"].bounds
    parts = [part for part, _ in told]
    assert parts == sorted(parts)
    assert (parts[9], parts[-1]) == (0.5, 1)
    assert {facts.split(",")[0] for _, facts in told} == {"forward", "reverse"}


def test_results_do_not_depend_on_the_memory(oracle_of) -> None:
    """In float64: a decoder of 784 pixels, in one block and in blocks of a few observations."""
    oracle = oracle_of(data_dim=784, n_test=10)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = DecoderModel(2, (784,), MLP(2, 784, 30, 1, "softplus"), BernoulliLikelihood()).double()
    sd = torch.ones(2, dtype=torch.float64)
    posterior = type(oracle.mean_field())(lambda x: torch.zeros(len(x), 2, dtype=torch.float64), sd)
    settings = {"observations": 12, "temperatures": 5, "leapfrog": 2, "chains": 16}
    whole, cut = (measure(oracle, posterior, model, memory_mib=n, **settings) for n in (512, 2))
    assert list(whole) == METRICS[:3]  # no closed form, and so no exact values
    for metric, measured in whole.items():
        np.testing.assert_allclose(cut[metric].values, measured.values, rtol=0, atol=1e-8)

"""Importance sampling against the exact log p(x): unbiased weights, honest errors, exactly K, constant memory."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from harness import estimators
from harness.evaluator import Measurement
from harness.model import log_normal
from harness.options import UserError
from harness_plugins.importance import Importance
from harness_plugins.linear_gaussian import LinearGaussianModel, true_parameters

POSTERIORS = {
    "best mean-field": lambda oracle: oracle.mean_field(),
    "wrong moments": lambda oracle: oracle.mean_field(shift=0.5, widening=0.9),
    "implicit": lambda oracle: oracle.implicit(),
}


@torch.no_grad()
def measure(oracle, posterior, model: LinearGaussianModel | None = None, **settings: Any) -> Measurement:
    (measured,) = Importance(**settings).measure(oracle.fit(posterior, model), oracle.problem, oracle.run)
    return measured


def assert_mean_weight_is_one(log_ratio: np.ndarray) -> None:
    """E[exp(log p_hat(x))] = p(x), whatever K: four standard errors over the observations."""
    w = np.exp(log_ratio)
    assert abs(w.mean() - 1) < 4 * w.std(ddof=1) / math.sqrt(len(w))


@pytest.mark.parametrize("kind", POSTERIORS)
def test_importance_agrees_with_the_exact_log_p(oracle, kind: str) -> None:
    measured = measure(oracle, POSTERIORS[kind](oracle))
    difference = measured.values - oracle.model.log_evidence(oracle.x).numpy()
    assert abs(difference.mean()) < 4 * measured.stderr
    assert measured.stderr < 0.003
    # 600 z-scores have mean square 1 +- 0.06; four of that.
    assert np.square(difference / measured.stderrs).mean() == pytest.approx(1, abs=0.25)
    assert_mean_weight_is_one(difference)


@pytest.mark.parametrize("samples", [2, 5])
@pytest.mark.parametrize("prior_weight", [0.0, 0.1, 0.5])
def test_few_weights_are_unbiased_too(oracle_of, samples: int, prior_weight: float) -> None:
    # Dividing by K + 1 instead of K would be off by a third or a sixth; the error over 4000 observations is 0.02.
    oracle = oracle_of(n_test=4000)
    measured = measure(
        oracle, oracle.mean_field(), observations=4000, samples=samples, prior_weight=prior_weight, moment_samples=50
    )
    difference = measured.values - oracle.model.log_evidence(oracle.x).numpy()
    assert_mean_weight_is_one(difference)
    assert np.exp(difference).std() / math.sqrt(4000) < 0.025
    assert difference.mean() < -4 * difference.std() / math.sqrt(4000)  # but their logarithm is a lower bound


def test_more_samples_give_a_tighter_bound(oracle) -> None:
    posterior = oracle.mean_field(shift=1.0, widening=0.7)
    coarse, middle, fine = (measure(oracle, posterior, samples=samples) for samples in (2, 10, 100))
    exact = oracle.model.log_evidence(oracle.x).numpy()
    for lower, higher in [(coarse.values, middle.values), (middle.values, fine.values), (middle.values, exact)]:
        difference = higher - lower
        assert difference.mean() > 4 * difference.std() / math.sqrt(len(exact))


class ShiftedPrior(LinearGaussianModel):
    """The oracle with p(z) = N(c, 2^2 I): no standard normal prior."""

    CENTRE = 1.5

    def sample_prior(self, n: int, generator: torch.Generator) -> Tensor:
        return self.CENTRE + 2 * torch.randn(n, self.latent_dim, generator=generator)

    def log_prior(self, z: Tensor) -> Tensor:
        return log_normal(z, self.CENTRE, math.log(2))


@pytest.mark.parametrize("samples", [5, 500])
def test_any_prior_is_accounted_for(oracle, samples: int) -> None:
    weight, bias = true_parameters(2, 10, correlation=0.6, scale=1.0)
    model = ShiftedPrior(2, 10)
    model.load_state_dict(oracle.model.state_dict())
    # x = W (c + 2 u) + b + noise with u standard normal: again a linear-Gaussian model.
    as_standard = LinearGaussianModel.fixed(2 * weight, bias + model.CENTRE * weight.sum(1), 0.5)
    measured = measure(oracle, oracle.mean_field(widening=1.3), model, samples=samples, prior_weight=0.3)
    difference = measured.values - as_standard.log_evidence(oracle.x).numpy()
    assert_mean_weight_is_one(difference)
    assert abs(difference.mean()) < (4 * measured.stderr if samples == 500 else 0.3)


class Counting(LinearGaussianModel):
    """Keeps the numbers of samples and observations that it was called with."""

    sizes: list[tuple[int, int]]

    def log_likelihood(self, x: Tensor, z: Tensor) -> Tensor:
        self.sizes.append((z.shape[0], z.shape[1]))
        return super().log_likelihood(x, z)


@pytest.mark.parametrize("samples", [2, 7, 100, 101])
def test_exactly_the_samples_asked_for_whatever_the_blocks(
    oracle, samples: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(estimators, "BLOCK_ELEMENTS", 256 * 64 * 7)  # seven samples at a time
    model = Counting(2, 10)
    model.load_state_dict(oracle.model.state_dict())
    object.__setattr__(model, "sizes", [])
    measured = measure(oracle, oracle.mean_field(), model, samples=samples, moment_samples=20)
    assert sum(s * n for s, n in model.sizes) == samples * 600
    assert max(s * n for s, n in model.sizes) <= 64 * 7
    assert_mean_weight_is_one(measured.values - oracle.model.log_evidence(oracle.x).numpy())


class LargestTensor(TorchDispatchMode):
    """Remembers the size of the largest tensor that any operation returned."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        returned = func(*args, **(kwargs or {}))
        for tensor in returned if isinstance(returned, tuple | list) else [returned]:
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return returned


def test_memory_does_not_grow_with_samples_or_observations(oracle_of, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimators, "BLOCK_ELEMENTS", 64 * 300 * 7)

    def largest(n_test: int, samples: int) -> int:
        oracle = oracle_of(n_test=n_test, data_dim=300)
        posterior = oracle.mean_field()
        with LargestTensor() as mode:
            measure(oracle, posterior, samples=samples, moment_samples=samples)
        return mode.elements

    block = largest(128, 21)
    assert block == estimators.BLOCK_ELEMENTS
    assert largest(128, 210) == block
    assert largest(300, 21) == block


def test_what_the_number_says_of_itself(oracle) -> None:
    measured = measure(oracle, oracle.implicit(), observations=40, samples=300, widening=1.1, prior_weight=0.2)
    assert (measured.metric, measured.kind) == ("log_likelihood", "stochastic lower bound")
    assert len(measured.values) == len(measured.stderrs) == len(measured.indices) == 40
    settings = dict(measured.settings)
    assert (settings["samples"], settings["widening"], settings["prior_weight"]) == (300, 1.1, 0.2)
    assert settings["moment_samples"] == 512
    assert 1 <= settings["ess_min"] <= settings["ess_median"] <= 300
    assert settings["ess_min"] <= settings["ess_mean"] <= 300
    # The delta-method error is sqrt((1/ESS - 1/K) K/(K-1)): the two diagnostics have to agree.
    worst = measured.stderrs.max()
    assert worst == pytest.approx(math.sqrt((1 / settings["ess_min"] - 1 / 300) * 300 / 299), rel=1e-6)


def test_measurements_are_reproducible_and_share_their_noise(oracle) -> None:
    first, again = (measure(oracle, oracle.mean_field()) for _ in range(2))
    np.testing.assert_array_equal(first.values, again.values)
    moved = measure(oracle, oracle.mean_field(shift=1e-3))
    assert np.median(np.abs(moved.values - first.values) / first.stderrs) < 0.1


@pytest.mark.parametrize(
    "settings", [{"samples": 1}, {"widening": 0.0}, {"prior_weight": 1.0}, {"prior_weight": -0.1}, {"observations": 0}]
)
def test_settings_without_meaning_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=next(iter(settings))):
        Importance(**settings)

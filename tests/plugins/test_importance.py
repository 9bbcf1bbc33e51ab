"""Importance sampling against the exact log p(x): unbiased weights, honest errors, exactly K, constant memory.

And what it says of itself: the bounds for fewer draws, and the tail of the weights.
"""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from arviz_stats.base.array import array_stats
from torch import Tensor
from torch.distributions import MultivariateNormal, kl_divergence
from torch.utils._python_dispatch import TorchDispatchMode

from harness import estimators
from harness.estimators import posterior_moments
from harness.evaluator import EvaluationRun, Measurement
from harness.model import log_normal
from harness.options import UserError
from harness_plugins.importance import Importance, k_hat, tail_length
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


@torch.no_grad()
def test_the_bound_of_a_single_draw_is_the_proposals_elbo(oracle) -> None:
    """L_1 = log p(x) - KL(r || p(z|x)), with r from the moments that all evaluators with this start share."""
    posterior = oracle.mean_field(widening=1.5)
    # Moments of few draws vary so much that others, of the same posterior, would be off by far more than the error.
    measured = measure(oracle, posterior, samples=1000, prior_weight=0.0, moment_samples=6)
    stream = oracle.run.generator("start", "moments")
    moments = [posterior_moments(posterior, x, 6, stream) for x in oracle.x.split(estimators.BLOCK_OBSERVATIONS)]
    mean, sd = (torch.cat(column).double() for column in zip(*moments, strict=True))
    r = MultivariateNormal(mean, scale_tril=torch.diag_embed(1.2 * sd))
    exact = oracle.model.log_evidence(oracle.x) - kl_divergence(
        r, MultivariateNormal(*oracle.model.exact_posterior(oracle.x))
    )
    z = (measured.traces["bound"][0] - exact.numpy()) / measured.traces["bound_stderr"][0]
    # 600 z-scores: a mean of 0 +- 0.04 and a mean square of 1 +- 0.06; four of each.
    assert abs(z.mean()) < 0.17
    assert np.square(z).mean() == pytest.approx(1, abs=0.25)


class OtherDraws(EvaluationRun):
    """The same moments, other draws from the proposal."""

    def generator(self, evaluator: str, purpose: str) -> torch.Generator:
        return super().generator(evaluator, purpose if purpose == "moments" else purpose + " again")


def test_the_curve_rises_to_the_value_and_states_its_errors(oracle) -> None:
    posterior = oracle.mean_field(shift=1.0, widening=0.7)
    measured = measure(oracle, posterior, samples=2000)
    k, bound, stderr = (measured.traces[name] for name in ("k", "bound", "bound_stderr"))
    assert k.tolist() == [1, 10, 100, 1000, 2000]
    assert bound.shape == stderr.shape == (5, 600)
    np.testing.assert_array_equal(bound[-1], measured.values)
    np.testing.assert_array_equal(stderr[-1], measured.stderrs)
    assert (np.diff(bound[:4], axis=0) >= 0).all()  # all groups of ten are complete
    curve = measured.settings["curve"]
    assert list(curve) == ["1", "10", "100", "1000", "2000"]
    assert list(curve.values()) == pytest.approx(bound.mean(1).tolist())
    # Other draws of the same bounds: 600 differences in units of their errors have mean square 1 +- 0.06. Not where
    # two groups only state the error, K = 1000, nor at K = 2000, whose error is the delta method's.
    oracle.run = OtherDraws(oracle.run.data, oracle.problem, oracle.run.device, oracle.run.dtype, seed=0)
    other = measure(oracle, posterior, samples=2000)
    errors = np.hypot(stderr, other.traces["bound_stderr"])
    z = (bound - other.traces["bound"])[:3] / errors[:3]
    np.testing.assert_allclose(np.square(z).mean(1), 1, atol=0.25)


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


def full_fit(log_w: Tensor) -> np.ndarray:
    """The library's own k-hat of all weights (S, N), in its own terms: it takes log-likelihoods, log 1/w."""
    return array_stats.psislw(-log_w.double().numpy().T)[1]


@pytest.mark.parametrize("samples", [25, 29, 224, 226, 1000, 3001])
def test_the_tail_alone_has_the_k_hat_of_all_weights(samples: int) -> None:
    stream = torch.Generator().manual_seed(3)
    log_w = torch.linspace(0.1, 8, 12) * torch.randn(samples, 12, generator=stream) - 50
    tail = log_w.topk(tail_length(samples) + 1, dim=0).values
    np.testing.assert_allclose(k_hat(tail), full_fit(log_w), rtol=1e-10)


def test_the_evaluators_k_hat_is_that_of_all_its_weights(oracle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimators, "BLOCK_ELEMENTS", 256 * 64 * 30)  # several blocks of draws and of observations
    seen: list[Tensor] = []
    add = estimators.StreamedBounds.add
    monkeypatch.setattr(estimators.StreamedBounds, "add", lambda self, log_w: [seen.append(log_w), add(self, log_w)])
    measured = measure(oracle, oracle.mean_field(widening=0.6), observations=100, samples=700)
    first = torch.cat([part for part in seen if part.shape[1] == 64])
    last = torch.cat([part for part in seen if part.shape[1] == 36])
    assert (len(first), len(last), len(seen)) == (700, 700, 24 + 14)
    np.testing.assert_allclose(measured.traces["k_hat"], np.concatenate([full_fit(first), full_fit(last)]), rtol=1e-10)


@pytest.mark.parametrize("shape", [0.2, 0.5, 0.9])
def test_k_hat_is_the_shape_of_a_pareto_tail(shape: float) -> None:
    # log w = shape * exponential: w has the Pareto distribution. The fit's prior, worth ten draws at 0.5, moves it.
    log_w = shape * torch.empty(40, 10_000).exponential_(generator=torch.Generator().manual_seed(4)).T
    k = k_hat(log_w.topk(tail_length(10_000) + 1, dim=0).values)
    expected = (300 * shape + 10 * 0.5) / 310
    # The fit of M draws has a standard error of (1 + k) / sqrt(M): four of the mean of 40.
    assert k.mean() == pytest.approx(expected, abs=4 * (1 + shape) / math.sqrt(300 * 40))


@pytest.mark.parametrize(("widening", "believable"), [(0.3, False), (0.5, False), (1.0, True), (1.2, True)])
def test_k_hat_tells_a_proposal_that_is_too_narrow(oracle_of, widening: float, believable: bool) -> None:
    """Around z's mean log w = sum_i k_i u_i^2 / 2, u_i standard normal: a Pareto tail whose shape is the largest k_i.

    k_i = 1 - c^2 l_i, with l_i the eigenvalues of the posterior precision in units of the proposal's unwidened scale.
    The largest k is double in three dimensions: with u_1^2 + u_2^2 exponential, the tail is a power without a factor
    that varies slowly.
    """
    oracle = oracle_of(latent_dim=3)
    precision = torch.linalg.inv(oracle.model.exact_posterior(oracle.x)[1])
    scale = precision.diagonal().rsqrt()
    shape = float(1 - widening**2 * torch.linalg.eigvalsh(scale[:, None] * precision * scale)[0])
    assert (shape < 0.7) == believable
    measured = measure(oracle, oracle.mean_field(), samples=4000, widening=widening, prior_weight=0.0)
    k = measured.traces["k_hat"]
    assert k.shape == (100,)
    # One fit errs by (1 + k) / sqrt(M) = 0.14 at most, M = 189; four errors of the median of 100, and 0.05 since the
    # tail is a power in the limit only and the scale is known to 3 %, from 512 draws.
    assert np.median(k) == pytest.approx(shape, abs=4 * 1.25 * 0.014 + 0.05)
    settings = measured.settings
    assert (settings["k_hat_median"], settings["k_hat_max"]) == (np.median(k), k.max())
    assert settings["k_hat_above_0.7"] == (k > 0.7).mean()
    assert (settings["k_hat_median"] < 0.7) == believable
    # And rightly so: where it is not to be believed, the value is many of its own standard errors from the truth.
    z = (measured.values - oracle.model.log_evidence(oracle.x).numpy()) / measured.stderrs
    assert np.square(z).mean() < 3 if believable else np.square(z).mean() > 5


def test_weights_without_a_tail_have_no_k_hat() -> None:
    equal = torch.full((20, 1), -3.0)
    ties = torch.tensor([2.0] * 3 + [1.0] * 17)[:, None]
    none = torch.full((20, 1), -math.inf)
    assert np.isnan(k_hat(torch.cat([equal, ties, none], dim=1))).all()
    assert np.isnan(k_hat(equal[:5])).all()  # a tail of four
    alone = torch.tensor([0.0] + [-math.inf] * 19)[:, None]
    dominated = -800.0 * torch.arange(20)[:, None]
    some = torch.linspace(1, 0, 20)[:, None]
    k = k_hat(torch.cat([alone, dominated, some], dim=1))
    assert k[:2].tolist() == [math.inf, math.inf]
    assert math.isfinite(k[2])


def test_few_draws_have_bounds_and_no_k_hat(oracle) -> None:
    measured = measure(oracle, oracle.mean_field(), samples=24)
    assert set(measured.traces) == {"k", "bound", "bound_stderr"}
    assert not any(name.startswith("k_hat") for name in measured.settings)
    assert "k_hat" in measure(oracle, oracle.mean_field(), samples=25).traces


class Undefined(LinearGaussianModel):
    """Not a number where the first latent is above 1."""

    def log_likelihood(self, x: Tensor, z: Tensor) -> Tensor:
        return torch.where(z[..., 0] > 1, math.nan, super().log_likelihood(x, z))


def test_draws_without_a_density_count_nothing(oracle) -> None:
    """The bound is looser then, and still one; how many there are is told."""
    model = Undefined(2, 10)
    model.decoder, model.likelihood = oracle.model.decoder, oracle.model.likelihood
    whole = measure(oracle, oracle.mean_field())
    found = measure(oracle, oracle.mean_field(), model)
    assert np.isfinite(found.values).all()
    assert found.values.mean() < whole.values.mean() - 0.01
    assert "undefined_draws" not in whole.settings
    assert 0 < found.settings["undefined_draws"] < found.settings["samples"] * len(found.values)


class Certain(LinearGaussianModel):
    """p(x|z) does not depend on z: the posterior is the prior, and log p(x) is 0."""

    def log_likelihood(self, x: Tensor, z: Tensor) -> Tensor:
        return z.new_zeros(z.shape[:2])


class Concentrated(Certain):
    """log p(x|z) in the ten thousands: one draw is everything."""

    def log_likelihood(self, x: Tensor, z: Tensor) -> Tensor:
        return -1e6 * z.square().sum(-1).expand(-1, len(x))


def test_settings_are_json_at_both_extremes(oracle) -> None:
    posterior = oracle.mean_field()
    posterior.sd = torch.ones(2)
    posterior.mean = lambda x: torch.zeros(len(x), 2)
    exact = measure(oracle, posterior, Certain(2, 10), samples=300, prior_weight=0.999, observations=20)
    np.testing.assert_allclose(exact.values, 0, atol=1e-2)
    hopeless = measure(oracle, posterior, Concentrated(2, 10), samples=300, observations=20)
    assert hopeless.settings["k_hat_above_0.7"] == 1
    assert np.isinf(hopeless.traces["k_hat"]).any()
    assert "k_hat_max" not in hopeless.settings
    for measured in (exact, hopeless):
        json.dumps(dict(measured.settings), allow_nan=False)


def test_progress_rises_to_one_with_the_estimate(oracle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimators, "BLOCK_ELEMENTS", 256 * 64 * 20)
    told: list[tuple[float, str]] = []
    oracle.run = dataclasses.replace(oracle.run, progress=lambda fraction, facts: told.append((fraction, facts)))
    measured = measure(oracle, oracle.mean_field(), observations=100, samples=100)
    fractions = [fraction for fraction, _ in told]
    assert fractions == sorted(fractions)
    # Five blocks of 20 draws for 64 observations, then blocks for 36.
    assert fractions[:5] == pytest.approx([0.128, 0.256, 0.384, 0.512, 0.64])
    assert fractions[-1] == pytest.approx(1)
    assert told[-1][1] == f"log p(x) {measured.values[64:].mean():.3f}"


def test_the_library_of_the_tail_is_imported_on_first_use_only() -> None:
    code = "import sys, harness_plugins.importance; print('arviz_stats' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == "False"


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

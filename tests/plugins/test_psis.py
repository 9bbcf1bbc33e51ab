"""PSIS against closed forms: the exact Gaussian posterior itself, and the same shifted, widened and narrowed."""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import pytest
import torch
from arviz_stats.base.array import array_stats
from torch import Tensor

from harness.estimators import StreamedLogMeanExp
from harness.evaluator import EvaluationRun, Measurement
from harness.method import Diverged, Fit
from harness.model import log_normal
from harness.posterior import Posterior
from harness.problem import placed
from harness_plugins.linear_gaussian import LinearGaussian, LinearGaussianModel
from harness_plugins.psis import NO_DENSITY, PSIS

CPU = torch.device("cpu")
N, SAMPLES, TAIL, D = 100, 10_000, 300, 2  # TAIL = 3 sqrt(SAMPLES)
PROBLEM = LinearGaussian(latent_dim=D, n_train=10, n_validation=10, n_test=N)


class Drawn(Posterior):
    """The exact posterior N(m, L L^T), shifted and widened: z = m + L (shift + width u) with u standard normal.

    log p(x, z) / q(z|x) is log p(x) + D log width + (|u|^2 - |shift + width u|^2) / 2.

    Args:
        shift: The same in every dimension.
        widths: Two, between which that of an observation lies.
    """

    def __init__(self, shift: float, widths: tuple[float, float]) -> None:
        self.shift, self.widths = shift, widths

    def width(self, x: Tensor) -> Tensor:
        """Shape (N,)."""
        narrow, wide = self.widths
        return narrow + (wide - narrow) * (3 * x[:, -1]).sigmoid()

    def sample(self, x: Tensor, n: int, generator: torch.Generator) -> Tensor:
        return self._at(x, torch.randn((n, len(x), D), generator=generator, dtype=x.dtype))

    def _at(self, x: Tensor, u: Tensor) -> Tensor:
        mean, covariance = gaussian().exact_posterior(x)
        return mean + (self.shift + self.width(x)[:, None] * u) @ torch.linalg.cholesky(covariance).T


class Moved(Drawn):
    """The same, with its density."""

    def sample_and_log_prob(self, x: Tensor, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        u = torch.randn((n, len(x), D), generator=generator, dtype=x.dtype)
        log_volume = D * self.width(x).log() + 0.5 * torch.logdet(gaussian().exact_posterior(x)[1])
        return self._at(x, u), log_normal(u) - log_volume


class Level(Moved):
    """The same, with weights that are one to the last bit where the last number of x is positive."""

    def sample_and_log_prob(self, x: Tensor, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        z, log_q = super().sample_and_log_prob(x, n, generator)
        return z, torch.where(x[:, -1] > 0, gaussian().log_joint(x, z), log_q)


@cache
def gaussian() -> LinearGaussianModel:
    model = PROBLEM.model_spec().new_model((PROBLEM.data_dim,))
    assert isinstance(model, LinearGaussianModel)
    return model


def measured(posterior: Posterior) -> Measurement:
    evaluator, fit = PSIS(observations=N, samples=SAMPLES), Fit(gaussian(), posterior, {})
    assert evaluator.undefined(fit, PROBLEM) is None
    run = EvaluationRun(placed(PROBLEM, CPU, torch.float64), PROBLEM, CPU, torch.float64, 0)
    with torch.no_grad():
        (found,) = evaluator.measure(fit, PROBLEM, run)
    return found


def observations(found: Measurement) -> Tensor:
    """Those of a measurement."""
    return placed(PROBLEM, CPU, torch.float64).test[torch.from_numpy(found.indices)]


def fitted(shape: np.ndarray) -> np.ndarray:
    """What k-hat estimates: the fit's prior, worth ten draws at 0.5, moves it."""
    return (TAIL * shape + 10 * 0.5) / (TAIL + 10)


def require_shapes(found: Measurement, posterior: Moved) -> None:
    """Of a posterior that is too narrow: |u|^2 / 2 is exponential, and weights are Pareto of shape 1 - width^2.

    Scores have mean 0, but for a tenth that the fit errs low, and standard deviation 1: four errors of either.
    """
    score = (found.values - fitted(1 - posterior.width(observations(found)).numpy() ** 2)) / found.stderrs
    assert abs(score.mean()) < 4 / math.sqrt(len(score))
    assert abs(score.std() - 1) < 4 / math.sqrt(2 * len(score))


def test_k_hat_of_each_posterior_that_is_too_narrow_is_the_shape_of_its_weights() -> None:
    posterior = Moved(0.0, (0.1, 0.9))
    found = measured(posterior)
    np.testing.assert_array_equal(found.indices, np.arange(N))
    require_shapes(found, posterior)
    assert (found.metric, found.kind, found.unit) == ("k_hat", "consistent", "")
    assert (found.settings["samples"], found.settings["without_a_tail"]) == (SAMPLES, 0)
    assert found.settings["k_hat_max"] == found.values.max()
    assert found.settings["k_hat_above_0.7"] == np.mean(found.values > 0.7)
    assert 0.1 < found.settings["k_hat_above_0.7"] < 0.9


def test_a_posterior_that_is_much_too_narrow_is_not_to_be_believed() -> None:
    """The shape is 0.96, with an error of 0.11 for one observation: one in fifty is below 0.7, hence hardly ten."""
    found = measured(Moved(0.0, (0.2, 0.2)))
    assert found.value - 4 * found.stderr > 0.7
    assert abs(found.value - fitted(np.array(0.96))) < 4 * found.stderr
    assert found.settings["k_hat_above_0.7"] > 0.9


def moment(j: int, shift: float, width: float) -> float:
    """E[w^j] under q of the weights p(z|x) / q(z|x), a Gaussian integral in each dimension."""
    precision = 1 + j * (width**2 - 1)
    exponent = (j * shift * width) ** 2 / (2 * precision) - j * shift**2 / 2
    return (width**j * math.exp(exponent) / math.sqrt(precision)) ** D


@pytest.mark.parametrize(("shift", "width"), [(0.3, 1.0), (0.0, 1.5), (0.3, 1.3), (0.2, 0.95)])
def test_effective_sample_size_of_a_posterior_that_is_a_little_off(shift: float, width: float) -> None:
    """Four errors of a median of N, each by the delta method from the moments of the weights: E[w]^2 / E[w^2] = r.

    The variance of r's logarithm is Var(2 w / E[w] - w^2 / E[w^2]) / S.
    """
    first, second, third, fourth = (moment(j, shift, width) for j in (1, 2, 3, 4))
    assert first == pytest.approx(1)
    found = measured(Moved(shift, (width, width)))
    relative = math.sqrt((4 * second - 4 * third / second + fourth / second**2 - 1) / SAMPLES)
    error = math.sqrt(math.pi / 2 / N) * relative  # of a median, which is that of a mean times 1.25
    assert abs(found.settings["ess_median"] * second / SAMPLES - 1) < 4 * error
    assert 4 * error < 0.1 * (second - 1)
    # Bounded or log-normal weights, or a shape of 0.1: hardly a k-hat is above 0.5, with an error of 0.06.
    assert (found.values < 0.5).all()
    np.testing.assert_allclose(found.stderrs, (1 + found.values.clip(min=0)) / math.sqrt(TAIL), rtol=1e-12)


def test_k_hat_is_that_of_all_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the library's own fit, whose tail is as long as it should be; observations come in blocks of 64 and 36."""
    seen: list[Tensor] = []
    add = StreamedLogMeanExp.add
    monkeypatch.setattr(StreamedLogMeanExp, "add", lambda self, log_w: [seen.append(log_w), add(self, log_w)])
    found = measured(Moved(0.3, (0.5, 1.5)))
    log_w = [torch.cat([part for part in seen if part.shape[1] == n]).numpy().T for n in (64, 36)]
    np.testing.assert_allclose(found.values, np.concatenate([array_stats.psislw(-w)[1] for w in log_w]), rtol=1e-10)


def test_the_exact_posterior_has_nothing_to_repair() -> None:
    """Its weights differ in their rounding alone: they have no tail, or one that ends at once."""
    found = measured(Moved(0.0, (1.0, 1.0)))
    assert len(found.values) + found.settings["without_a_tail"] == N
    assert found.settings["ess_median"] == pytest.approx(SAMPLES, rel=1e-9)
    assert found.settings["k_hat_above_0.7"] == 0
    assert found.settings["k_hat_max"] < 0.5


def test_weights_without_a_tail_are_left_out() -> None:
    posterior = Level(0.0, (0.5, 0.9))
    found = measured(posterior)
    tail = placed(PROBLEM, CPU, torch.float64).test[:, -1] <= 0
    np.testing.assert_array_equal(found.indices, tail.nonzero()[:, 0])
    assert found.settings["without_a_tail"] == int((~tail).sum())
    assert 10 < len(found.values) < 90
    require_shapes(found, posterior)


class LevelEverywhere(Moved):
    """The same for all x."""

    def sample_and_log_prob(self, x: Tensor, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        z = self.sample(x, n, generator)
        return z, gaussian().log_joint(x, z)


def test_what_is_no_number_is_a_failure() -> None:
    with pytest.raises(Diverged, match="no observation has weights that differ beyond rounding"):
        measured(LevelEverywhere(0.0, (1.0, 1.0)))
    with pytest.raises(Diverged, match="a few weights are everything for 100 of 100 observations"):
        measured(Moved(2000.0, (1.0, 1.0)))


def test_draws_alone_have_no_weights() -> None:
    assert PSIS().undefined(Fit(gaussian(), Drawn(0.0, (1.0, 1.0)), {}), PROBLEM) == NO_DENSITY


class Overflowing(Moved):
    """The same, with weights of one observation that are no numbers, or all zero."""

    def __init__(self, lost: float) -> None:
        super().__init__(0.0, (0.5, 0.9))
        self.lost = lost

    def sample_and_log_prob(self, x: Tensor, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        z, log_q = super().sample_and_log_prob(x, n, generator)
        return z, log_q.index_fill(1, torch.tensor([1]), self.lost)


@pytest.mark.parametrize("lost", [math.nan, math.inf, -math.inf])
def test_an_observation_without_usable_weights_is_not_passed_over(lost: float) -> None:
    with pytest.raises(Diverged, match="weights are not finite, or all zero, for 1 of"):
        measured(Overflowing(lost))

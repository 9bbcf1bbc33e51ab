"""With the true log ratio the adversary's numbers are the ELBO and the KL; with a wrong one they bound nothing."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from harness.model import log_normal
from harness.posterior import Posterior
from harness_plugins.adversary import Adversary


class WithAdversary(Posterior):
    """A Gaussian of which only draws and an estimate of the log ratio are told, wrong by a constant."""

    def __init__(self, gaussian, error: float) -> None:
        self.gaussian, self.error = gaussian, error

    def sample(self, x: Tensor, n: int, generator: torch.Generator) -> Tensor:
        return self.gaussian.sample(x, n, generator)

    def log_ratio(self, x: Tensor, z: Tensor) -> Tensor:
        return log_normal(z, self.gaussian.mean(x), self.gaussian.sd.log()) - log_normal(z) + self.error


def measure(oracle, error: float):
    fit = oracle.fit(WithAdversary(oracle.analytic(), error))
    assert Adversary().undefined(fit, oracle.problem) is None
    return Adversary().measure(fit, oracle.problem, oracle.run)


def test_an_optimal_adversary_gives_the_elbo_and_the_kl(oracle) -> None:
    elbo, kl = measure(oracle, 0.0)
    expected = float(oracle.model.log_evidence(oracle.x).mean() - oracle.model.mean_field_gap())
    assert abs(elbo.value - expected) < 4 * elbo.stderr
    assert abs(kl.value - float(oracle.analytic().kl_to_prior(oracle.x).mean())) < 4 * kl.stderr
    assert elbo.stderr < 0.005
    assert kl.stderr < 0.02


def test_an_adversary_that_falls_behind_promises_too_much(oracle) -> None:
    elbo, kl = measure(oracle, 0.0)
    elbo_behind, kl_behind = measure(oracle, -1.0)
    np.testing.assert_allclose(elbo_behind.values, elbo.values + 1, atol=1e-4)
    np.testing.assert_allclose(kl_behind.values, kl.values - 1, atol=1e-4)
    assert elbo_behind.value > float(oracle.model.log_evidence(oracle.x).mean())


def test_a_density_ratio_bounds_nothing(oracle) -> None:
    measurements = measure(oracle, 0.0)
    assert [measurement.metric for measurement in measurements] == ["adversarial_elbo", "kl_to_prior"]
    assert {(measurement.kind, measurement.bounds) for measurement in measurements} == {("density ratio", "")}
    assert all(measurement.settings == {"samples": 100} for measurement in measurements)


@pytest.mark.parametrize("posterior", ["mean_field", "implicit"])
def test_a_posterior_without_adversary_is_not_measured(oracle, posterior: str) -> None:
    fit = oracle.fit(getattr(oracle, posterior)())
    assert Adversary().undefined(fit, oracle.problem) == "posterior has no estimate of log q(z|x) - log p(z)"

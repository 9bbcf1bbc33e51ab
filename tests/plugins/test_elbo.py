"""The ELBO against its closed form on the oracle."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from harness_plugins.elbo import ELBO


def test_elbo_of_the_best_mean_field_posterior_is_log_p_less_the_gap(oracle) -> None:
    elbo, _ = ELBO().measure(oracle.fit(oracle.mean_field()), oracle.problem, oracle.run)
    expected = oracle.model.log_evidence(oracle.x).numpy() - float(oracle.model.mean_field_gap())
    assert abs(elbo.value - expected.mean()) < 4 * elbo.stderr
    assert elbo.stderr < 0.005  # four of them tell 0.02 nats apart; the gap is 0.13
    # 600 z-scores have mean square 1 +- 0.06; four of that, and a little for 100 draws being few.
    z = (elbo.values - expected) / elbo.stderrs
    assert np.square(z).mean() == pytest.approx(1, abs=0.27)


def test_elbo_of_the_exact_posterior_is_log_p_itself(oracle_of) -> None:
    oracle = oracle_of(correlation=0.0)  # the exact posterior is mean-field
    elbo, _ = ELBO().measure(oracle.fit(oracle.mean_field()), oracle.problem, oracle.run)
    np.testing.assert_allclose(elbo.values, oracle.model.log_evidence(oracle.x), rtol=0, atol=1e-4)


@pytest.mark.parametrize(("shift", "widening"), [(0.5, 1.0), (0.0, 1.3), (-0.4, 0.8)])
def test_a_worse_posterior_has_a_lower_elbo_by_its_divergence(oracle, shift: float, widening: float) -> None:
    elbo, _ = ELBO().measure(oracle.fit(oracle.mean_field(shift, widening)), oracle.problem, oracle.run)
    mean, covariance = oracle.model.exact_posterior(oracle.x)
    _, sd = oracle.model.best_mean_field(oracle.x)
    q = torch.distributions.MultivariateNormal(mean + shift * sd, torch.diag((widening * sd) ** 2))
    divergence = torch.distributions.kl_divergence(q, torch.distributions.MultivariateNormal(mean, covariance))
    expected = oracle.model.log_evidence(oracle.x) - divergence
    assert abs(elbo.value - float(expected.mean())) < 4 * elbo.stderr
    assert divergence.min() > oracle.model.mean_field_gap() + 0.02


def test_kl_from_draws_agrees_with_the_analytic_one(oracle) -> None:
    _, sampled = ELBO().measure(oracle.fit(oracle.mean_field()), oracle.problem, oracle.run)
    _, analytic = ELBO().measure(oracle.fit(oracle.analytic()), oracle.problem, oracle.run)
    assert (sampled.kind, analytic.kind) == ("unbiased", "exact")
    assert analytic.stderr == 0 < sampled.stderr < 0.02
    assert abs(sampled.value - analytic.value) < 4 * sampled.stderr
    assert sampled.metric == analytic.metric == "kl_to_prior"


def test_what_the_numbers_say_of_themselves(oracle) -> None:
    elbo, kl = ELBO(observations=50, samples=10).measure(oracle.fit(oracle.analytic()), oracle.problem, oracle.run)
    assert (elbo.metric, elbo.kind) == ("elbo", "unbiased")
    assert elbo.bounds == "stochastic lower bound on log_likelihood"
    assert elbo.settings["samples"] == 10
    assert len(elbo.values) == len(elbo.stderrs) == len(kl.values) == 50
    np.testing.assert_array_equal(elbo.indices, oracle.run.data.scored(50)[1])
    assert elbo.stderr_test == pytest.approx(elbo.values.std(ddof=1) / 50**0.5)


def test_all_methods_meet_the_same_noise_at_every_measurement(oracle) -> None:
    first, again, moved = (
        ELBO().measure(oracle.fit(oracle.mean_field(shift)), oracle.problem, oracle.run)[0] for shift in (0, 0, 1e-3)
    )
    np.testing.assert_array_equal(first.values, again.values)
    # A posterior that differs by a thousandth of its width differs in its ELBO by far less than the ELBO's own error.
    assert np.abs(moved.values - first.values).max() < 0.1 * first.stderrs.min()


def test_a_posterior_without_density_has_no_elbo(oracle) -> None:
    fit = oracle.fit(oracle.implicit())
    assert ELBO().undefined(fit, oracle.problem) == "posterior has no density"
    assert ELBO().undefined(oracle.fit(oracle.mean_field()), oracle.problem) is None


def test_nothing_depends_on_the_size_of_blocks_but_the_noise(oracle, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[int] = []
    posterior = oracle.mean_field()
    sample = posterior.sample_and_log_prob

    def counted(x: Tensor, n: int, stream: torch.Generator) -> tuple[Tensor, Tensor]:
        drawn.append(n * len(x))
        return sample(x, n, stream)

    monkeypatch.setattr(posterior, "sample_and_log_prob", counted)
    monkeypatch.setattr("harness.estimators.BLOCK_ELEMENTS", 256 * 64 * 7)
    elbo, _ = ELBO().measure(oracle.fit(posterior), oracle.problem, oracle.run)
    assert sum(drawn) == 600 * 100
    assert max(drawn) <= 64 * 7
    expected = float(oracle.model.log_evidence(oracle.x).mean() - oracle.model.mean_field_gap())
    assert abs(elbo.value - expected) < 4 * elbo.stderr

"""The oracle's closed forms against textbook densities and against each other."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.distributions import MultivariateNormal, kl_divergence

import harness
from harness.evaluator import EvaluationRun
from harness.model import CanSimulate, HasClosedForm, LatentModel
from harness.options import UserError
from harness.problem import placed
from harness.seeding import Streams
from harness_plugins.exact import Exact
from harness_plugins.linear_gaussian import LinearGaussian, LinearGaussianModel, true_parameters
from harness_plugins.vae import VAE, GaussianEncoder

CPU = torch.device("cpu")
SHAPES = [(1, 1, 0.0), (1, 6, 0.0), (2, 10, 0.6), (5, 5, 0.3), (4, 30, 0.9)]
"""Latent dimensions, data dimensions, correlation."""


def fixed_model(latent_dim: int, data_dim: int, correlation: float, noise: float = 0.5) -> LinearGaussianModel:
    weight, bias = true_parameters(latent_dim, data_dim, correlation, scale=1.5)
    return LinearGaussianModel.fixed(weight, bias, noise)


def observations(data_dim: int) -> torch.Tensor:
    return 2 * torch.randn(7, data_dim, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("shape", SHAPES)
def test_loadings_have_the_correlation_asked_for(shape: tuple[int, int, float]) -> None:
    weight, _ = true_parameters(*shape, scale=1.5)
    expected = np.full((shape[0], shape[0]), 1.5**2 * shape[2])
    np.fill_diagonal(expected, 1.5**2)
    np.testing.assert_allclose(weight.T @ weight, expected, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
def test_evidence_is_the_textbook_density(shape: tuple[int, int, float]) -> None:
    model, x = fixed_model(*shape), observations(shape[1])
    weight, bias = true_parameters(*shape, scale=1.5)
    covariance, residual = weight @ weight.T + 0.25 * np.eye(shape[1]), x.numpy() - bias
    distance = (residual * np.linalg.solve(covariance, residual.T).T).sum(1)
    textbook = -0.5 * (distance + np.linalg.slogdet(2 * np.pi * covariance)[1])
    np.testing.assert_allclose(model.log_evidence(x), textbook, rtol=1e-10)


@pytest.mark.parametrize("shape", SHAPES)
def test_posterior_satisfies_bayes_theorem_at_every_point(shape: tuple[int, int, float]) -> None:
    model, x = fixed_model(*shape), observations(shape[1])
    assert isinstance(model, HasClosedForm)
    mean, covariance = model.exact_posterior(x)
    z = 3 * torch.randn(20, 7, shape[0], generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    log_posterior = MultivariateNormal(mean, covariance).log_prob(z)
    torch.testing.assert_close(
        model.log_joint(x, z) - log_posterior, model.log_evidence(x).expand(20, 7), rtol=1e-9, atol=1e-9
    )


@pytest.mark.parametrize("shape", SHAPES)
def test_mean_field_gap_is_the_least_divergence_of_a_diagonal_gaussian(shape: tuple[int, int, float]) -> None:
    model, x = fixed_model(*shape), observations(shape[1])
    posterior = MultivariateNormal(*model.exact_posterior(x))
    mean, sd = model.best_mean_field(x)

    def divergence(shift: float, factor: float) -> torch.Tensor:
        return kl_divergence(MultivariateNormal(mean + shift, torch.diag((factor * sd) ** 2)), posterior)

    gap = divergence(0.0, 1.0)
    torch.testing.assert_close(gap, model.mean_field_gap().expand(7))
    assert all((divergence(*other) > gap).all() for other in [(0.01, 1.0), (-0.01, 1.0), (0.0, 1.01), (0.0, 0.99)])


def test_the_default_has_a_gap_and_weights_of_finite_variance() -> None:
    model = fixed_default()
    _, covariance = model.exact_posterior(observations(10))
    precision = torch.linalg.inv(covariance)
    assert model.mean_field_gap() >= 0.1
    # Weights of N(m, v I) against N(m, Lambda^-1) have a finite variance if and only if 2 Lambda - I / v is positive.
    proposal_variance = 1.2**2 / precision.diagonal().max()
    assert 2 * torch.linalg.eigvalsh(precision).min() > 1 / proposal_variance


def fixed_default() -> LinearGaussianModel:
    model = LinearGaussian().model_spec().new_model((10,))
    assert isinstance(model, LinearGaussianModel)
    return model


@pytest.mark.parametrize("problem", [LinearGaussian(), LinearGaussian(latent_dim=4, data_dim=7, noise=0.2, scale=2)])
def test_optimum_is_the_mean_evidence_of_the_truth(problem: LinearGaussian) -> None:
    model = problem.model_spec().new_model((problem.data_dim,))
    assert isinstance(model, LinearGaussianModel)
    weight, bias, variance = model._facts()
    truth = MultivariateNormal(bias, weight @ weight.T + variance * torch.eye(problem.data_dim).double())
    assert problem.optimum == pytest.approx(-float(truth.entropy()), rel=1e-10)
    log_p = model.log_evidence(torch.from_numpy(problem.dataset().train))
    # 10,000 draws; four standard errors.
    assert abs(float(log_p.mean()) - problem.optimum) < 4 * float(log_p.std()) / 100


def test_data_are_the_same_at_every_load_and_new_in_every_split() -> None:
    first, second = LinearGaussian().dataset(), LinearGaussian().dataset()
    assert first.content_hash == second.content_hash
    assert first.content_hash != LinearGaussian(noise=0.6).dataset().content_hash
    assert not np.array_equal(first.validation, first.test)
    assert [len(split) for split in (first.train, first.validation, first.test)] == [10_000, 1000, 1000]
    # Sizes of other splits change nothing.
    assert np.array_equal(LinearGaussian(n_train=5).dataset().test, first.test)


def test_simulated_data_are_those_of_the_model() -> None:
    model = fixed_default()
    assert isinstance(model, CanSimulate)
    stream = torch.Generator().manual_seed(0)
    x = model.sample_observation(model.sample_prior(20_000, stream), stream)
    # log p(x) averages minus the entropy for data of the model, and less for any other; four standard errors.
    log_p = model.log_evidence(x)
    assert abs(float(log_p.mean()) - LinearGaussian().optimum) < 4 * float(log_p.std()) / 20_000**0.5


@pytest.mark.parametrize(("learn", "parameters"), [(False, 0), (True, 10 * 2 + 10 + 1)])
def test_only_a_learnt_model_has_parameters(learn: bool, parameters: int) -> None:
    model = LinearGaussian(learn=learn).model_spec().new_model((10,))
    assert isinstance(model, LatentModel)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    assert set(model.state_dict()) == {"decoder.weight", "decoder.bias", "likelihood.log_sd"}


def test_a_vae_can_represent_the_best_mean_field_posterior() -> None:
    problem, model = LinearGaussian(), fixed_default()
    view = problem.training_view(placed(problem, CPU, torch.float64), Streams(0, problem.label, "vae", CPU))
    encoder = VAE().build(view)["encoder"].double()
    assert isinstance(encoder, GaussianEncoder)
    # The exact mean is linear in x: read its coefficients off the exact posterior of the unit vectors.
    unit = torch.cat([torch.zeros(1, 10), torch.eye(10)]).double()
    at_unit, sd = model.best_mean_field(unit)
    with torch.no_grad():
        encoder.head.weight.copy_(torch.cat([(at_unit[1:] - at_unit[0]).T, torch.zeros(2, 10)]))
        encoder.head.bias.copy_(torch.cat([at_unit[0], sd.log()]))
    mean, log_sd = encoder(view.validation)
    torch.testing.assert_close(mean, model.best_mean_field(view.validation)[0])
    torch.testing.assert_close(log_sd.exp(), sd.expand_as(log_sd))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"latent_dim": 3, "data_dim": 2}, "data_dim=2.*at least latent_dim"),
        ({"correlation": 1.0}, "correlation"),
        ({"correlation": -0.1}, "correlation"),
        ({"noise": 0.0}, "noise"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        LinearGaussian(**options)


def test_a_trained_vae_is_off_by_the_closed_form_gap() -> None:
    """The whole chain against its exact answer: data, model, training and evaluator."""
    problem, method = LinearGaussian(), VAE(lr=2e-2, lr_decay=0.003, batch_size=256)
    fit = harness.fit(method, problem, budget="steps=600", device="cpu")
    run = EvaluationRun(harness.data(problem, device="cpu"), problem, CPU, torch.float32, seed=0)
    with torch.no_grad():
        _, kl = Exact(samples=200).measure(fit, problem, run)
    excess = kl.value - float(fixed_default().mean_field_gap())
    # No mean-field posterior can be better than the gap; 0.02 nats above it is the tolerance for 600 steps.
    assert -4 * kl.stderr < excess < 0.02 + 4 * kl.stderr
    assert kl.stderr < 0.002

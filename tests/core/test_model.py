"""Laws of models: densities are normalised, and numbers do not depend on how latents and observations are paired."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from harness.model import (
    BernoulliLikelihood,
    CanSimulate,
    DecoderModel,
    GaussianLikelihood,
    Likelihood,
    log_normal,
)
from harness.nn import MLP

LIKELIHOODS = [BernoulliLikelihood, GaussianLikelihood]


@pytest.fixture
def stream() -> torch.Generator:
    return torch.Generator().manual_seed(5)


def decoder_model(likelihood: type[Likelihood], event_shape: tuple[int, ...] = (2, 3)) -> DecoderModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = DecoderModel(2, event_shape, MLP(2, math.prod(event_shape), 5, 1, "tanh"), likelihood())
    if isinstance(model.likelihood, GaussianLikelihood):
        torch.nn.init.constant_(model.likelihood.log_sd, -0.7)
    return model.double().requires_grad_(False)


def observations(n: int, stream: torch.Generator) -> Tensor:
    return torch.randint(2, (n, 2, 3), generator=stream).double()


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("n", [1, 4])
def test_every_pairing_gives_the_same_numbers(likelihood: type[Likelihood], n: int, stream: torch.Generator) -> None:
    model, x = decoder_model(likelihood), observations(n, stream)
    z = torch.randn(3, n, 2, generator=stream, dtype=torch.float64)
    by_loop = torch.stack(
        [torch.stack([model.log_likelihood(x[i : i + 1], z[s, i : i + 1])[0] for i in range(n)]) for s in range(3)]
    )
    torch.testing.assert_close(model.log_likelihood(x, z), by_loop)
    torch.testing.assert_close(model.log_likelihood(x, z[1]), by_loop[1])
    shared = z[:, :1]
    torch.testing.assert_close(model.log_likelihood(x, shared), model.log_likelihood(x, shared.expand(3, n, 2)))
    torch.testing.assert_close(model.log_joint(x, z), by_loop + model.log_prior(z))


def test_bernoulli_probabilities_add_up_to_one(stream: torch.Generator) -> None:
    model = decoder_model(BernoulliLikelihood)
    every_x = torch.tensor(list(itertools.product([0.0, 1.0], repeat=6)), dtype=torch.float64).reshape(64, 2, 3)
    z = 3 * torch.randn(5, 1, 2, generator=stream, dtype=torch.float64)
    torch.testing.assert_close(model.log_likelihood(every_x, z).logsumexp(1), torch.zeros(5).double())


def test_gaussian_likelihood_integrates_to_one(stream: torch.Generator) -> None:
    model = decoder_model(GaussianLikelihood, event_shape=(2,))
    axis = torch.linspace(-8, 8, 400, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis)
    z = torch.randn(5, 1, 2, generator=stream, dtype=torch.float64)
    log_integral = model.log_likelihood(grid, z).logsumexp(1) + 2 * math.log(16 / 399)
    torch.testing.assert_close(log_integral, torch.zeros(5).double(), rtol=0, atol=1e-9)


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_log_likelihood_is_the_textbook_density(likelihood: type[Likelihood], stream: torch.Generator) -> None:
    model, x = decoder_model(likelihood), observations(4, stream)
    z = torch.randn(4, 2, generator=stream, dtype=torch.float64)
    outputs = model.decoder(z).reshape(4, 2, 3)
    textbook = (
        torch.distributions.Bernoulli(logits=outputs)
        if likelihood is BernoulliLikelihood
        else torch.distributions.Normal(outputs, math.exp(-0.7))
    )
    torch.testing.assert_close(model.log_likelihood(x, z), textbook.log_prob(x).sum((1, 2)))


def test_confident_logits_stay_finite() -> None:
    log_p = BernoulliLikelihood().log_prob(torch.tensor([[1.0, 0.0]]), torch.tensor([[200.0, 200.0]]))
    assert log_p == pytest.approx(-200)


def test_log_normal_is_the_textbook_density(stream: torch.Generator) -> None:
    value, mean, log_sd = torch.randn(3, 4, 5, generator=stream, dtype=torch.float64)
    textbook = torch.distributions.Normal(mean, log_sd.exp()).log_prob(value).sum(-1)
    torch.testing.assert_close(log_normal(value, mean, log_sd), textbook)
    torch.testing.assert_close(log_normal(value), torch.distributions.Normal(0, 1).log_prob(value).sum(-1))


def test_prior_draws_have_the_priors_density(stream: torch.Generator) -> None:
    model = decoder_model(BernoulliLikelihood)
    z = model.sample_prior(20_000, stream)
    assert z.shape == (20_000, 2)
    assert z.dtype == torch.float64
    # Mean 0, covariance I: four standard errors are 0.03 for means and covariances, 0.04 for variances.
    torch.testing.assert_close(z.mean(0), torch.zeros(2).double(), rtol=0, atol=0.03)
    torch.testing.assert_close(torch.cov(z.T), torch.eye(2).double(), rtol=0, atol=0.04)
    textbook = torch.distributions.Normal(0, 1).log_prob(z).sum(-1)
    torch.testing.assert_close(model.log_prior(z), textbook)


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_simulated_observations_have_the_models_mean(likelihood: type[Likelihood], stream: torch.Generator) -> None:
    model = decoder_model(likelihood)
    assert isinstance(model, CanSimulate)
    z = torch.randn(3, 2, generator=stream, dtype=torch.float64)
    draws = model.sample_observation(z.expand(20_000, 3, 2), stream)
    assert draws.shape == (20_000, 3, 2, 3)
    assert model.mean(z).shape == (3, 2, 3)
    errors = draws.std(0) / math.sqrt(20_000)
    # 18 comparisons at four standard errors: a chance of 1 in 900 that any fails.
    assert ((draws.mean(0) - model.mean(z)).abs() < 4 * errors).all()


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_every_parameter_gets_a_gradient(likelihood: type[Likelihood], stream: torch.Generator) -> None:
    model = decoder_model(likelihood).requires_grad_(True)
    z = torch.randn(4, 2, generator=stream, dtype=torch.float64)
    model.log_joint(observations(4, stream), z).sum().backward()
    assert all(bool(p.grad is not None and p.grad.abs().sum() > 0) for p in model.parameters())


@pytest.mark.parametrize(("middle", "sd"), [(1000.0, 1.0), (1.0, 0.02)])
@torch.no_grad()
def test_all_pairs_of_a_gaussian_likelihood_lose_no_digits(middle: float, sd: float, stream: torch.Generator) -> None:
    """Squares of data far from zero would cancel each other in single precision."""
    likelihood = GaussianLikelihood()
    likelihood.log_sd.data.fill_(math.log(sd))
    x, outputs = (middle + sd * torch.randn(n, 64, generator=stream, dtype=torch.float64) for n in (20, 5))
    exact = likelihood.double().log_prob(x, outputs[:, None])
    single = likelihood.float().log_prob(x.float(), outputs[:, None].float())
    paired = likelihood.log_prob(x.float(), outputs[:, None].float().expand(5, 20, 64))
    assert float((single - exact).abs().max()) < 2 * float((paired - exact).abs().max()) + 1e-3

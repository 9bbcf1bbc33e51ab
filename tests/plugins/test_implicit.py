"""The three checks of implicit posteriors against the truth, on posteriors whose density is known and not Gaussian.

The evaluator sees their draws alone. Truths are averages of the exact densities over 20,000 draws, or closed forms.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from harness.discrimination import Contrast, Discriminator, Training, estimate, train
from harness.estimators import posterior_means
from harness.evaluator import Measurement
from harness.model import LatentModel, log_normal
from harness.options import UserError
from harness.posterior import Posterior
from harness_plugins.implicit import Implicit, log_mixture, semi_implicit_bound

SMALL: dict[str, Any] = {"width": 64, "blocks": 2, "steps": 400, "batch_size": 300, "lr": 1e-2, "components": 300}
"""A discriminator that is large enough for two dimensions, trained in two seconds."""


class Known(Posterior):
    """A posterior with an exact density, which evaluators of implicit posteriors do not ask for."""

    def log_prob(self, x: Tensor, z: Tensor) -> Tensor:
        """x (N, *E), z (S, N, D) -> (S, N), nats."""
        raise NotImplementedError


class Mixture(Known):
    """Two Gaussians of different weight and width on either side of a mean; how far apart depends on x."""

    WEIGHTS = (0.7, 0.3)

    def __init__(self, mean: Callable[[Tensor], Tensor], sd: Tensor, noise: Tensor | None = None) -> None:
        self.mean, self.sd = mean, sd
        self.noise = torch.zeros(()) if noise is None else noise

    def _parts(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Means and standard deviations of the two, both (2, N, D)."""
        apart = (1.5 + torch.tanh(x[:, :1])) * self.sd
        means = self.mean(x) + torch.stack([-0.6 * apart, 1.4 * apart])
        sds = torch.stack([self.sd, 0.5 * self.sd])[:, None].expand_as(means)
        return means, torch.hypot(sds, self.noise.expand_as(means))

    def sample(self, x: Tensor, n: int, generator: torch.Generator) -> Tensor:
        means, sds = self._parts(x)
        second = (torch.rand(n, len(x), 1, generator=generator) < self.WEIGHTS[1]).to(x.dtype)
        eps = torch.randn(n, *means.shape[1:], generator=generator, dtype=x.dtype)
        return torch.lerp(means[0], means[1], second) + torch.lerp(sds[0], sds[1], second) * eps

    def log_prob(self, x: Tensor, z: Tensor) -> Tensor:
        means, sds = self._parts(x)
        parts = [log_normal(z, means[k], sds[k].log()) + math.log(self.WEIGHTS[k]) for k in (0, 1)]
        return torch.logaddexp(parts[0], parts[1])

    def smoothed(self, noise: Tensor) -> Mixture:
        """The convolution with a Gaussian of standard deviations ``noise`` (N, D)."""
        return Mixture(self.mean, self.sd, noise)


class Banana(Known):
    """z_2 = mean_2 + b (z_1 - mean_1)^2 + noise, in units of sd; how bent it is depends on x."""

    NOISE = 0.5

    def __init__(self, mean: Callable[[Tensor], Tensor], sd: Tensor) -> None:
        self.mean, self.sd = mean, sd

    def sample(self, x: Tensor, n: int, generator: torch.Generator) -> Tensor:
        first, second = torch.randn(2, n, len(x), generator=generator, dtype=x.dtype)
        bent = torch.tanh(x[:, 0]) * (first.square() - 1) + self.NOISE * second
        return self.mean(x) + self.sd * torch.stack([first, bent], dim=-1)

    def log_prob(self, x: Tensor, z: Tensor) -> Tensor:
        first, second = ((z - self.mean(x)) / self.sd).unbind(-1)
        straight = (second - torch.tanh(x[:, 0]) * (first.square() - 1)) / self.NOISE
        return log_normal(torch.stack([first, straight], dim=-1)) - self.sd.log().sum() - math.log(self.NOISE)


def known(oracle, kind: type[Mixture | Banana]) -> Mixture | Banana:
    """Narrower than the exact posterior, as far apart as they are."""
    sd = 0.6 * oracle.model.best_mean_field(oracle.x)[1].float()
    return kind(lambda x: oracle.model.exact_posterior(x)[0].float(), sd)


@torch.no_grad()
def truth(oracle, posterior: Known) -> dict[str, tuple[float, float]]:
    """KL(q || p) and the ELBO with the exact density: means over all observations, and their standard errors."""
    model, stream = oracle.model, torch.Generator().manual_seed(17)

    def terms(x: Tensor, n: int) -> dict[str, Tensor]:
        z = posterior.sample(x, n, stream)
        ratio = posterior.log_prob(x, z) - model.log_prior(z)
        return {"kl_to_prior": ratio, "elbo": model.log_likelihood(x, z) - ratio}

    means = posterior_means(oracle.x, 20_000, terms)
    return {name: (float(v.mean()), float(e.square().sum().sqrt()) / len(v)) for name, (v, e) in means.items()}


@torch.no_grad()
def measure(oracle, posterior: Posterior, **settings: Any) -> dict[tuple[str, str], Measurement]:
    evaluator = Implicit(**{**SMALL, **settings})
    measured = evaluator.measure(oracle.fit(posterior), oracle.problem, oracle.run)
    return {(found.metric, found.kind): found for found in measured}


def named(measured: dict[tuple[str, str], Measurement]) -> dict[str, Measurement]:
    return {metric: found for (metric, _), found in measured.items()}


@pytest.mark.parametrize("kind", [Mixture, Banana])
def test_the_estimate_and_the_bounds_against_the_truth(oracle_of, kind: type[Mixture | Banana]) -> None:
    """A discriminator after one step leaves 0.5 nats and more to be learnt; after 400 steps less than a tenth of that.

    Both times the bounds hold within four standard errors.
    """
    oracle = oracle_of(n_test=10)
    posterior = known(oracle, kind)
    (kl, kl_error), (elbo, elbo_error) = truth(oracle, posterior).values()
    assert max(kl_error, elbo_error) < 0.005
    poor = named(measure(oracle, posterior, steps=1, samples=2000))
    good = named(measure(oracle, posterior, samples=2000))
    for found in (poor, good):
        lower, upper = found["kl_to_prior"], found["elbo"]
        assert lower.value < kl + 4 * math.hypot(lower.stderr, kl_error)
        assert upper.value > elbo - 4 * math.hypot(upper.stderr, elbo_error)
        assert max(lower.stderr, upper.stderr) < 0.03
    unlearnt = kl - poor["kl_to_prior"].value
    assert unlearnt > 0.5
    assert poor["elbo"].value - elbo == pytest.approx(unlearnt, abs=0.1)
    for metric, exact in (("adversarial_kl", kl), ("kl_to_prior", kl), ("adversarial_elbo", elbo), ("elbo", elbo)):
        assert abs(good[metric].value - exact) < 0.1 * unlearnt + 4 * good[metric].stderr


def test_a_uniform_parallelogram_in_closed_form(oracle_of) -> None:
    """Sharp edges, which no network has: the bounds hold, the estimate is close."""
    oracle = oracle_of(n_test=10)
    posterior = oracle.implicit()
    factor, x = posterior.factor.double(), oracle.x
    entropy = torch.linalg.slogdet(factor)[1] + 0.5 * 2 * math.log(12)
    second_moment = posterior.mean(x).double().square().sum(-1) + factor.square().sum()
    kl = float((0.5 * second_moment + math.log(2 * math.pi) - entropy).mean())
    found = named(measure(oracle, posterior, samples=2000))
    lower = found["kl_to_prior"]
    assert kl - 0.1 < lower.value < kl + 4 * lower.stderr
    assert found["adversarial_kl"].value == pytest.approx(kl, abs=0.1)


def test_a_gaussian_posterior_leaves_nothing_to_learn(oracle_of) -> None:
    oracle = oracle_of(n_test=20)
    posterior = oracle.analytic()
    found = named(measure(oracle, posterior, steps=100, samples=2000))
    kl = float(posterior.kl_to_prior(oracle.x).mean())
    elbo = float((oracle.model.log_evidence(oracle.x) - oracle.model.mean_field_gap()).mean())
    for metric in ("adversarial_kl", "kl_to_prior"):
        assert abs(found[metric].value - kl) < 4 * found[metric].stderr + 0.01  # moments from 1000 draws: 0.002
    for metric in ("adversarial_elbo", "elbo"):
        assert abs(found[metric].value - elbo) < 4 * found[metric].stderr + 0.01
    assert found["smoothed_elbo"].value < elbo + 4 * found["smoothed_elbo"].stderr + 0.02
    assert found["smoothed_elbo"].value > elbo - 0.1


@torch.no_grad()
def contrast_of(oracle, posterior: Posterior) -> Contrast:
    return Contrast.of(posterior, oracle.x, 1000, torch.Generator().manual_seed(3))


def streams(seed: int) -> Callable[[str], torch.Generator]:
    return lambda purpose: torch.Generator().manual_seed(1000 * seed + len(purpose))


@pytest.fixture
def trained(oracle_of, seed: int) -> tuple[Any, Mixture | Banana, Contrast, Discriminator]:
    """A mixture on ten observations, with a small discriminator after few steps."""
    oracle = oracle_of(n_test=10)
    posterior = known(oracle, Mixture)
    contrast = contrast_of(oracle, posterior)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        discriminator = Discriminator(contrast, 32, 1)
    train(discriminator, posterior, contrast, Training(steps=100, batch_size=128, lr=4e-3), streams(seed)("training"))
    return oracle, posterior, contrast, discriminator


def test_the_bound_from_the_gaussian_is_the_bound_from_the_prior(trained) -> None:
    """E_p[exp(T + log r - log p)] = E_r[exp T]: four standard errors of the difference, for all x at once."""
    oracle, _, contrast, discriminator = trained
    stream = streams(5)("draws")
    with torch.no_grad():
        z = oracle.model.sample_prior(50_000, stream)[:, None].expand(-1, 10, -1)
        under_p = torch.exp(
            discriminator(contrast, contrast.standardised(z)) + contrast.log_prob(z) - oracle.model.log_prior(z)
        ).double()
        under_r = torch.exp(discriminator(contrast, contrast.draws(50_000, stream))).double()
    difference = under_p.mean(0) - under_r.mean(0)
    error = torch.sqrt((under_p.var(0) + under_r.var(0)) / 50_000)
    assert float(difference.mean().abs()) < 4 * float(error.square().sum().sqrt()) / 10
    assert float(error.max()) < 0.05


def test_with_few_draws_the_bound_still_holds(trained) -> None:
    """In the mean it is below E_q[T] - log E_r[exp T] + E_q[log r - log p], the most that this T can certify.

    The same with the logarithm of an average of few draws, or with c from the draws that it normalises, would be above.
    """
    oracle, posterior, contrast, discriminator = trained
    with torch.no_grad():
        z, u = posterior.sample(oracle.x, 50_000, streams(6)("z")), contrast.draws(50_000, streams(7)("u"))
        ratio = discriminator(contrast, contrast.standardised(z)) + contrast.log_prob(z) - oracle.model.log_prior(z)
        normaliser = discriminator(contrast, u).logsumexp(0) - math.log(50_000)
    certified = float((ratio.mean(0) - normaliser).mean())
    repeated = torch.stack(
        [
            estimate(oracle.model, posterior, discriminator, contrast, 40, streams(seed))["kl_bound"][0].mean()
            for seed in range(100, 300)
        ]
    )
    assert float(repeated.mean()) < certified - 4 * float(repeated.std()) / math.sqrt(200)


def test_a_discriminator_that_is_sure_of_itself_has_bounded_errors(trained) -> None:
    """The cap: e^T' is at most S, so that a T of a hundred nats gives a loose bound, not a wild one."""
    oracle, posterior, contrast, discriminator = trained
    with torch.no_grad():
        discriminator.head.weight.mul_(30)
    found = estimate(oracle.model, posterior, discriminator, contrast, 1000, streams(1))
    values, errors = found["kl_bound"]
    assert float(errors.max()) < 10
    assert float(values.mean()) < truth(oracle, posterior)["kl_to_prior"][0]


def test_the_errors_of_the_bounds_are_honest(trained) -> None:
    """Over 100 independent repetitions the bounds scatter as they say; their means are those of many draws."""
    oracle, posterior, contrast, discriminator = trained
    repeated = [
        estimate(oracle.model, posterior, discriminator, contrast, 100, streams(seed)) for seed in range(1, 101)
    ]
    for name in ("kl_bound", "elbo_bound", "kl", "elbo"):
        values, errors = (torch.stack([found[name][i] for found in repeated]) for i in (0, 1))
        # 100 repetitions of 10 observations: the ratio of variances has an error of sqrt(2/1000) = 0.045; three of
        # them, and more for exp(T) having tails.
        assert float(values.var(0).mean() / errors.square().mean()) == pytest.approx(1, abs=0.2)


@torch.no_grad()
def bound(
    oracle, posterior: Posterior, contrast: Contrast, components: int, seed: int = 0, scale: float = 0.3, sets: int = 20
) -> tuple[Tensor, Tensor]:
    model: LatentModel = oracle.model
    samples = min(50, components + 1)
    return semi_implicit_bound(
        model, posterior, contrast, scale, components, samples, sets, torch.Generator().manual_seed(seed)
    )


def overall(values: Tensor, errors: Tensor) -> tuple[float, float]:
    return float(values.mean()), float(errors.square().sum().sqrt()) / len(values)


@pytest.mark.parametrize("scale", [0.1, 0.3, 1.0])
def test_the_semi_implicit_bound_against_the_exact_elbo_of_the_smoothed_posterior(oracle_of, scale: float) -> None:
    oracle = oracle_of(n_test=20)
    posterior = known(oracle, Mixture)
    assert isinstance(posterior, Mixture)
    contrast = contrast_of(oracle, posterior)
    exact, exact_error = truth(oracle, posterior.smoothed(scale * contrast.sd))["elbo"]
    bounds = [overall(*bound(oracle, posterior, contrast, k, scale=scale)) for k in (1, 10, 100, 1000)]
    for value, error in bounds:
        assert value < exact + 4 * math.hypot(error, exact_error)
    assert bounds[-1][0] > exact - 0.1
    for (looser, _), (tighter, error) in itertools.pairwise(bounds):
        assert looser < tighter + 4 * error
    assert bounds[0][0] < exact - 0.1


def test_the_errors_of_the_semi_implicit_bound_are_honest(oracle_of) -> None:
    oracle = oracle_of(n_test=10)
    posterior = known(oracle, Banana)
    contrast = contrast_of(oracle, posterior)
    repeated = [bound(oracle, posterior, contrast, 30, seed, scale=0.1, sets=5) for seed in range(100)]
    values, errors = (torch.stack(column) for column in zip(*repeated, strict=True))
    assert float(values.var(0).mean() / errors.square().mean()) == pytest.approx(1, abs=0.2)


def test_the_density_of_a_mixture(generator: torch.Generator) -> None:
    u, psi = torch.randn(2, 7, 3, 4, generator=generator, dtype=torch.float64)
    weights = torch.distributions.Categorical(torch.ones(3, 7, dtype=torch.float64))
    parts = torch.distributions.Independent(torch.distributions.Normal(psi.transpose(0, 1), 0.2), 1)
    expected = torch.distributions.MixtureSameFamily(weights, parts).log_prob(u)
    torch.testing.assert_close(log_mixture(u, psi, 0.2), expected, rtol=0, atol=1e-9)


def test_blocks_change_nothing(oracle_of, monkeypatch: pytest.MonkeyPatch) -> None:
    oracle = oracle_of(n_test=5)
    posterior = known(oracle, Mixture)
    contrast = contrast_of(oracle, posterior)
    whole, _ = bound(oracle, posterior, contrast, 100)
    monkeypatch.setattr("harness_plugins.implicit.BLOCK_ELEMENTS", 101 * 5 * 3)
    parts, _ = bound(oracle, posterior, contrast, 100)
    np.testing.assert_allclose(parts, whole, rtol=0, atol=1e-9)
    assert [len(at.x) for at in contrast_of(oracle_of(n_test=150), posterior).blocks()] == [64, 64, 22]


def test_the_noise_scale_is_chosen_on_validation_data(oracle_of) -> None:
    """q is far too narrow, except at observations of great size: noise helps at the former alone."""
    oracle = oracle_of(n_test=10)
    mean, sd = oracle.mean_field().mean, oracle.model.best_mean_field(oracle.x)[1].float()

    class Fickle(Mixture):
        def _parts(self, x: Tensor) -> tuple[Tensor, Tensor]:
            width = torch.where(x.abs().amax(1, keepdim=True) > 1000, 1.0, 0.3)
            return mean(x).expand(2, -1, -1), (width * sd).expand(2, -1, -1)

    def chosen(**splits: Tensor) -> float:
        oracle.run = dataclasses.replace(oracle.run, data=dataclasses.replace(data, **splits))
        quick = {"steps": 1, "width": 8, "samples": 100}
        return named(measure(oracle, Fickle(mean, sd), **quick))["smoothed_elbo"].settings["noise_scale"]

    data = oracle.run.data
    assert chosen() == chosen(test=data.test * 10_000) == 1.0
    assert chosen(validation=data.validation * 10_000) < 0.5


def test_the_chosen_noise_scale_is_better_than_others(oracle_of, monkeypatch: pytest.MonkeyPatch) -> None:
    oracle = oracle_of(n_test=20)
    posterior, quick = known(oracle, Mixture), {"steps": 1, "width": 8, "samples": 200}
    chosen = named(measure(oracle, posterior, **quick))["smoothed_elbo"]
    for extreme in (0.02, 1.0):
        monkeypatch.setattr("harness_plugins.implicit.NOISE_SCALES", (extreme,))
        other = named(measure(oracle, posterior, **quick))["smoothed_elbo"]
        assert other.value < chosen.value - 4 * math.hypot(chosen.stderr, other.stderr)


def test_in_many_dimensions_the_semi_implicit_bound_is_marked_vacuous(oracle_of) -> None:
    """Ten strongly correlated dimensions: noise that few components can fill is wider than q in most directions."""
    oracle = oracle_of(latent_dim=10, data_dim=20, correlation=0.95, noise=0.1, n_test=10)
    narrow = named(measure(oracle, oracle.implicit(), steps=50, samples=100, components=20))
    assert narrow["smoothed_elbo"].settings["vacuous"] is True
    assert narrow["smoothed_elbo"].value < narrow["elbo"].value - 5
    easy = oracle_of(n_test=10)
    assert named(measure(easy, easy.implicit(), steps=1, samples=100))["smoothed_elbo"].settings["vacuous"] is False


def test_what_the_numbers_say_of_themselves(oracle_of) -> None:
    oracle = oracle_of(n_test=30)
    fit = oracle.fit(oracle.implicit())
    assert Implicit().undefined(fit, oracle.problem) is None
    assert not Implicit.by_default
    quick = {"observations": 20, "steps": 30, "batch_size": 8, "samples": 20, "components": 10}
    found = measure(oracle, oracle.implicit(), **quick)
    assert list(found) == [
        ("adversarial_elbo", "density ratio"),
        ("adversarial_kl", "density ratio"),
        ("kl_to_prior", "stochastic lower bound"),
        ("elbo", "stochastic upper bound"),
        ("smoothed_elbo", "stochastic lower bound"),
    ]
    assert [value.bounds for value in found.values()] == [""] * 4 + ["stochastic lower bound on log_likelihood"]
    measured = named(found)
    assert measured["adversarial_elbo"].traces["loss"].shape == (30,)
    assert measured["smoothed_elbo"].settings["of"] == "q smoothed by Gaussian noise"
    assert measured["smoothed_elbo"].settings["components"] == 10
    for value in measured.values():
        np.testing.assert_array_equal(value.indices, oracle.run.data.scored(20)[1])
    again = measure(oracle, oracle.implicit(), **quick)
    for key, value in found.items():
        np.testing.assert_array_equal(again[key].values, value.values)


@pytest.mark.parametrize("settings", [{"samples": 1}, {"repetitions": 1}, {"steps": 0}, {"lr": 0.0}, {"width": 0}])
def test_settings_without_meaning_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=next(iter(settings))):
        Implicit(**settings)

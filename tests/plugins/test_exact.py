"""Quadrature against closed forms and against a grid of brute force; what cannot be exact is refused."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributions import Cauchy, Distribution, Normal

from harness.evaluator import EvaluationRun
from harness.method import Diverged, Fit
from harness.model import DecoderModel, LatentModel
from harness.problem import placed
from harness.seeding import Streams
from harness_plugins.ais import AIS
from harness_plugins.exact import Exact, NotConverged, quadrature
from harness_plugins.four_points import FourPoints
from harness_plugins.linear_gaussian import LinearGaussianModel

CPU = torch.device("cpu")


@pytest.mark.parametrize("latent_dim", [1, 2])
@pytest.mark.parametrize("noise", [1.0, 0.5, 0.05])
def test_quadrature_equals_the_closed_form(oracle_of, latent_dim: int, noise: float) -> None:
    oracle = oracle_of(latent_dim=latent_dim, noise=noise)
    log_p, settings = quadrature(oracle.model, oracle.x)
    torch.testing.assert_close(log_p, oracle.model.log_evidence(oracle.x), rtol=0, atol=1e-6)
    assert settings["largest_change"] <= 1e-4


@pytest.mark.parametrize("distance", [0.0, 5.0, 11.0])
def test_a_narrow_posterior_is_found_far_from_the_origin_too(oracle_of, distance: float) -> None:
    # Standard deviation 0.01, and cells of the first grid have a side of 0.5.
    oracle = oracle_of(noise=0.01, correlation=0.0)
    mean = torch.tensor([[distance, 0.3], [-0.1, -distance]], dtype=torch.float64)
    x = oracle.model.double().mean(mean)
    log_p, settings = quadrature(oracle.model, x)
    torch.testing.assert_close(log_p, oracle.model.log_evidence(x), rtol=0, atol=1e-4)
    assert settings["points_per_axis"] >= 1024
    assert settings["evaluated_points"] < 0.05 * settings["points_per_axis"] ** 2


@pytest.mark.parametrize("latent_dim", [1, 2])
@pytest.mark.parametrize("noise", [0.02, 0.01])
def test_narrow_posteriors_are_found_wherever_the_first_cells_are(oracle_of, latent_dim: int, noise: float) -> None:
    # Where one is near the centre of a cell of side 0.5, the first sum is too high by several nats.
    oracle = oracle_of(latent_dim=latent_dim, noise=noise, correlation=0.0, n_test=20)
    log_p, _ = quadrature(oracle.model, oracle.x)
    torch.testing.assert_close(log_p, oracle.model.double().log_evidence(oracle.x.double()), rtol=0, atol=1e-4)


class TwoModes(LatentModel):
    """x ~ N(|z - at|, noise^2) in each dimension: of each x the posterior has modes on both sides of ``at``."""

    def __init__(self, prior: Distribution, at: float, noise: float, latent_dim: int = 1) -> None:
        super().__init__()
        self.prior, self.at, self.noise, self.latent_dim = prior, at, noise, latent_dim

    def sample_prior(self, n: int, generator: torch.Generator) -> Tensor:
        u = torch.rand(n, self.latent_dim, generator=generator, dtype=torch.float64)
        return self.prior.icdf(u)

    def log_prior(self, z: Tensor) -> Tensor:
        return self.prior.log_prob(z).sum(-1)

    def log_likelihood(self, x: Tensor, z: Tensor) -> Tensor:
        return Normal((z - self.at).abs(), self.noise).log_prob(x).sum(-1)

    def evidence(self, x: Tensor) -> Tensor:
        """log p(x) by a sum of many points near the modes, whose distance to ``at`` is x, a dimension at a time."""
        near = torch.linspace(-9 * self.noise, 9 * self.noise, 20_001, dtype=torch.float64)
        terms = [
            self.prior.log_prob(self.at + side * (x + near[:, None, None]))
            + Normal(0.0, self.noise).log_prob(near)[:, None, None]
            for side in (-1, 1)
        ]
        return (torch.cat(terms).logsumexp(0) + torch.log(near[1] - near[0])).sum(-1)


@pytest.mark.parametrize(
    ("prior", "at", "noise"),
    [
        (Normal(0.0, 20.0), 4.0, 0.2),
        (Normal(0.0, 20.0), 1.0, 0.3),
        (Normal(0.0, 50.0), 0.5, 0.1),
        (Normal(0.0, 3.0), 0.3, 0.02),
        (Cauchy(0.0, 1.0), 0.5, 0.05),
    ],
    ids=str,
)
def test_both_modes_are_found_whatever_the_prior(prior: Distribution, at: float, noise: float) -> None:
    """Much of the first grid's cells are wider than a mode, and one is nearer to a centre than the other."""
    model = TwoModes(prior, at, noise)
    x = torch.tensor([[5.0], [3.0], [8.13], [11.71]], dtype=torch.float64)
    log_p, settings = quadrature(model, x)
    torch.testing.assert_close(log_p, model.evidence(x), rtol=0, atol=1e-4)
    assert settings["half_width"] >= 32


@pytest.mark.parametrize("noise", [0.05, 0.02, 0.01])
def test_four_narrow_modes_of_the_plane_are_found(noise: float) -> None:
    model = TwoModes(Normal(0.0, 1.0), 0.13, noise, latent_dim=2)
    x = torch.tensor([[1.0, 0.7], [0.51, 2.1], [1.37, 0.62]], dtype=torch.float64)
    log_p, settings = quadrature(model, x)
    torch.testing.assert_close(log_p, model.evidence(x), rtol=0, atol=1e-4)
    assert settings["evaluated_points"] < 0.05 * settings["points_per_axis"] ** 2


def test_a_box_for_which_there_is_no_memory_is_no_answer() -> None:
    model = TwoModes(Normal(0.0, 1000.0), 0.0, 0.001, latent_dim=2)
    x = torch.tensor([[1000.0, 1000.0]], dtype=torch.float64)
    with pytest.raises(NotConverged, match="too much memory"):
        quadrature(model, x, points=2**20)


def four_points(sharpness: float) -> tuple[LatentModel, EvaluationRun]:
    """A decoder like a trained one, which maps regions of the plane to the four images."""
    problem = FourPoints(width=16)
    data = placed(problem, CPU, torch.float32)
    model = problem.training_view(data, Streams(0, problem.label, "none", CPU)).model
    assert isinstance(model, DecoderModel)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.mul_(sharpness if name.endswith("weight") else 1)
    return model, EvaluationRun(data, problem, CPU, torch.float32, 0)


@pytest.mark.parametrize(("sharpness", "spacing"), [(2.0, 0.02), (6.0, 0.01)])
def test_quadrature_equals_brute_force_for_a_decoder_with_edges(sharpness: float, spacing: float) -> None:
    model, run = four_points(sharpness)
    log_p, settings = quadrature(model, run.data.test)
    exact_model = model.double()
    axis = torch.arange(-7, 7, spacing, dtype=torch.float64)
    total = torch.full((4,), -math.inf, dtype=torch.float64)
    for z in torch.cartesian_prod(axis, axis).split(2**16):  # every point of the square, however little it matters
        with torch.no_grad():
            log_joint = exact_model.log_joint(run.data.test.double(), z[:, None])
        total = torch.logaddexp(total, log_joint.logsumexp(0))
    torch.testing.assert_close(log_p, total + 2 * math.log(spacing), rtol=0, atol=1e-4)
    assert log_p.exp().sum() <= 1 + 1e-6  # four images out of sixteen
    assert settings["largest_change"] <= 1e-4


def test_probabilities_of_all_images_add_up_to_one() -> None:
    model, _ = four_points(3.0)
    every_x = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 4).reshape(16, 2, 2)
    log_p, _ = quadrature(model, every_x)
    assert float(log_p.exp().sum()) == pytest.approx(1, abs=1e-6)


def test_the_grid_does_not_depend_on_the_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    model, run = four_points(3.0)
    whole, settings = quadrature(model, run.data.test)
    monkeypatch.setattr("harness_plugins.exact.BLOCK_ELEMENTS", 256 * 1000)
    cut, same = quadrature(model, run.data.test)
    torch.testing.assert_close(cut, whole, rtol=0, atol=1e-12)
    assert settings["evaluated_points"] == same["evaluated_points"] > 1000


def test_a_grid_that_is_too_coarse_is_no_answer(oracle_of) -> None:
    oracle = oracle_of(noise=0.01)
    with pytest.raises(NotConverged, match=r"512 points an axis still changes.*raise points"):
        quadrature(oracle.model, oracle.x, points=1023)


def test_an_integrand_beyond_the_box_is_no_answer(oracle) -> None:
    far = oracle.model.mean(torch.tensor([[40.0, 0.0]]))
    with pytest.raises(NotConverged, match="not negligible at 16"):
        quadrature(oracle.model, far)


def test_a_model_that_is_not_finite_is_no_answer() -> None:
    model, run = four_points(1.0)
    with torch.no_grad():
        next(model.parameters()).fill_(math.nan)
    with pytest.raises(Diverged, match="not finite"):
        quadrature(model, run.data.test)


def test_quadrature_leaves_the_model_as_it_was() -> None:
    model, run = four_points(1.0)
    quadrature(model, run.data.test)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_closed_form_and_divergence_from_the_posterior(oracle) -> None:
    log_p, kl = Exact().measure(oracle.fit(oracle.mean_field()), oracle.problem, oracle.run)
    np.testing.assert_allclose(log_p.values, oracle.model.log_evidence(oracle.x))
    assert (log_p.metric, log_p.kind, log_p.stderr) == ("log_likelihood", "exact", 0)
    assert log_p.settings == {"method": "closed form"}
    assert (kl.metric, kl.kind) == ("kl_to_posterior", "unbiased")
    assert abs(kl.value - float(oracle.model.mean_field_gap())) < 4 * kl.stderr
    assert 0 < kl.stderr < 0.005


def test_quadrature_is_used_where_there_is_no_closed_form(oracle) -> None:
    model, run = four_points(3.0)
    (log_p,) = Exact().measure(Fit(model, oracle.implicit(), {}), run.problem, run)
    assert (log_p.kind, log_p.stderr, log_p.stderr_test) == ("exact", 0, 0)
    assert log_p.exhaustive
    assert log_p.settings["method"] == "quadrature"
    assert log_p.settings["largest_change"] <= Exact().tolerance
    expected, _ = quadrature(model, run.data.test)
    np.testing.assert_allclose(log_p.values, expected)


class Opaque(LatentModel):
    """A model of which nothing but the size matters."""

    def __init__(self, latent_dim: int) -> None:
        super().__init__()
        self.latent_dim = latent_dim

    def sample_prior(self, n: int, generator: torch.Generator) -> Tensor:
        raise NotImplementedError

    def log_prior(self, z: Tensor) -> Tensor:
        raise NotImplementedError

    def log_likelihood(self, x: Tensor, z: Tensor) -> Tensor:
        raise NotImplementedError


@pytest.mark.parametrize(
    ("model", "defined"),
    [(Opaque(1), True), (Opaque(2), True), (Opaque(3), False), (LinearGaussianModel(5, 9), True)],
)
def test_exact_needs_a_closed_form_or_a_small_latent_space(oracle, model: LatentModel, defined: bool) -> None:
    reason = Exact().undefined(oracle.fit(oracle.implicit(), model), oracle.problem)
    assert reason == (None if defined else "needs a closed form or at most 2 latent dimensions")


def test_settings_are_chosen_by_validation_data(oracle) -> None:
    """By the same evaluators, and the record says so; the test split is not looked at."""
    validation, test = oracle.run.data.validation, oracle.run.data.test
    for evaluator in (
        Exact(split="validation", observations=7),
        AIS(split="validation", observations=7, temperatures=40),
    ):
        found = evaluator.measure(oracle.fit(oracle.mean_field()), oracle.problem, oracle.run)[0]
        assert (found.metric, found.split, found.exhaustive, len(found.values)) == (
            "log_likelihood",
            "validation",
            False,
            7,
        )
        expected = oracle.model.log_evidence(validation[found.indices]).numpy()
        np.testing.assert_allclose(found.values, expected, atol=0.2)
        other = oracle.model.log_evidence(test[found.indices]).numpy()
        assert np.abs(found.values - other).max() > 0.2

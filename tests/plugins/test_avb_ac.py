"""Laws of adaptive contrast: moments in closed form, one scale, an estimate that is exact where the adversary is."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import harness
from harness import adaptive_contrast
from harness.adaptive_contrast import (
    Auxiliary,
    BasisEncoder,
    BasisNetworks,
    Covariance,
    DiagonalAuxiliary,
    FullAuxiliary,
)
from harness.adversarial import LogRatio
from harness.clock import Clock
from harness.method import Budget, Run
from harness.model import DecoderModel, log_normal
from harness.nn import MLP, Trunk
from harness.options import UserError
from harness.problem import placed
from harness.seeding import Streams
from harness.testing import SmallProblem, check_method
from harness.testing.small import view_of
from harness.training import Modules, Noise
from harness_plugins.avb_ac import AVBAC, AdaptiveContrastPosterior
from harness_plugins.exact import quadrature
from harness_plugins.four_points import FourPoints

CPU, DOUBLE = torch.device("cpu"), torch.float64
STANDARD_ERRORS = 4
SMALL: dict[str, Any] = {"nbasis": 3, "noise_dim": 2, "basis_width": 8}
GAUSSIAN: dict[str, Any] = {"nbasis": 1, "noise_dim": 2, "basis_depth": 0, "scale_floor": 0.3}


def built(method: AVBAC, seed: int = 3) -> tuple[Modules, Tensor]:
    """Modules with random weights, and the observations of the small problem."""
    view = view_of(SmallProblem())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        modules = method.build(view).double()
    return modules.requires_grad_(False), view.validation


def noise_of(method: AVBAC, n: int, generator: torch.Generator) -> Noise:
    shapes = method.noise(view_of(SmallProblem()))
    return {name: torch.randn((n, *shape), generator=generator, dtype=DOUBLE) for name, shape in shapes.items()}


@pytest.mark.parametrize(
    "options",
    [
        {"encoder": "injected", "moment_draws": 4},
        {"encoder": "injected", "moment_draws": 12, "covariance": "full"},
        {**SMALL, "gaussian_part": True},
        {**SMALL, "gaussian_part": True, "covariance": "full"},
    ],
)
@pytest.mark.parametrize("latent_dim", [1, 3])
def test_conformance_of_other_options(options: dict[str, Any], latent_dim: int) -> None:
    check_method(AVBAC(**options), SmallProblem(latent_dim=latent_dim))


def test_basis_networks_are_separate_networks_of_their_own_noise(generator: torch.Generator) -> None:
    """The batched product equals one MLP after another, in any number of leading axes."""
    basis = BasisNetworks(3, 4, 2, 8, 2).double().requires_grad_(False)
    for bias in basis.biases:
        bias.copy_(torch.randn(bias.shape, generator=generator, dtype=DOUBLE))
    eps = torch.randn(5, 6, 3, 4, generator=generator, dtype=DOUBLE)
    together = basis(eps)
    for i in range(3):
        alone = MLP(4, 2, 8, 2, "elu").double()
        for layer, weight, bias in zip(alone.layers, basis.weights, basis.biases, strict=True):
            layer.load_state_dict({"weight": weight[i].T, "bias": bias[i, 0]})
        torch.testing.assert_close(together[:, :, i], alone(eps[:, :, i]), rtol=0, atol=1e-12)
    torch.testing.assert_close(basis(eps[0]), together[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("gaussian_part", [False, True])
def test_moments_are_those_of_all_combinations_of_the_minibatchs_draws(
    gaussian_part: bool, generator: torch.Generator
) -> None:
    """The v_i are independent of each other: mean and variance are over every choice of a draw of each.

    A Gaussian part is independent of them too, with a mean of 0; here its noise takes the values 1 and -1.
    """
    method = AVBAC(**SMALL, gaussian_part=gaussian_part)
    modules, x = built(method)
    encoder, x, eps = modules["encoder"], x[:4], noise_of(method, 4, generator)["eps"]
    basis, eta = eps[:, :6].unflatten(-1, (3, 2)), torch.ones_like(eps[:, 6:])
    of_basis = [basis[list(rows), torch.arange(3)].flatten() for rows in itertools.product(range(4), repeat=3)]
    combined = torch.stack([torch.cat([each, sign * eta[0]]) for each in of_basis for sign in (1, -1)])
    z = encoder(x, combined[:, None].expand(-1, len(x), -1))
    _, r = encoder.contrasted(x, {"eps": eps})
    torch.testing.assert_close(r.mean, z.mean(0), rtol=0, atol=1e-12)
    sd = (z.var(0, correction=0) + 1e-2**2).sqrt()
    torch.testing.assert_close(r.log_sd, sd.log(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("options", [SMALL, {**SMALL, "gaussian_part": True}, {"encoder": "injected"}])
def test_reference_moments_are_those_of_the_posteriors_draws(
    options: dict[str, Any], generator: torch.Generator
) -> None:
    """Both have errors; those of the reference are no larger than those of as many draws of z."""
    method = AVBAC(**options, scale_floor=1e-6)
    modules, x = built(method)
    posterior = method.posterior(modules)
    assert isinstance(posterior, AdaptiveContrastPosterior)
    r, z = posterior.reference(x), posterior.sample(x, 20_000, generator)
    assert isinstance(r, DiagonalAuxiliary)
    draws = adaptive_contrast.BASIS_DRAWS if method.encoder == "basis" else adaptive_contrast.INJECTED_DRAWS
    error = (1 / len(z) + 1 / draws) ** 0.5
    squared = (z - z.mean(0)).square()
    of_mean = (r.mean - z.mean(0)).abs() / (z.std(0) * error)
    of_variance = (torch.exp(2 * r.log_sd) - squared.mean(0)).abs() / (squared.std(0) * error)
    # 32 numbers, whose errors are correlated: the largest exceeds four once in five hundred times at most.
    assert float(of_mean.max()) < STANDARD_ERRORS
    assert float(of_variance.max()) < STANDARD_ERRORS


@pytest.mark.parametrize("options", [{**SMALL, "gaussian_part": True}, {"encoder": "injected", "moment_draws": 64}])
def test_with_the_full_covariance_normalised_draws_are_white(
    options: dict[str, Any], generator: torch.Generator
) -> None:
    """Within four errors of 20,000 draws and of those that the reference has: 16 means and 24 products, correlated; the
    largest of 40 exceeds four once in four hundred times at most."""
    method = AVBAC(**options, covariance="full", scale_floor=1e-6)
    modules, x = built(method)
    posterior = method.posterior(modules)
    assert isinstance(posterior, AdaptiveContrastPosterior)
    r, z = posterior.reference(x), posterior.sample(x, 20_000, generator)
    assert isinstance(r, FullAuxiliary)
    zn = r.normalised(z)
    draws = adaptive_contrast.BASIS_DRAWS if method.encoder == "basis" else adaptive_contrast.INJECTED_DRAWS
    error = (1 / len(z) + 1 / draws) ** 0.5
    products = zn[..., :, None] * zn[..., None, :]
    off = products.mean(0) - torch.eye(2, dtype=DOUBLE)
    assert float((zn.mean(0).abs() / (zn.std(0) * error)).max()) < STANDARD_ERRORS
    assert float((off.abs() / (products.std(0) * error)).max()) < STANDARD_ERRORS
    # log r is the density of that Gaussian
    same = torch.distributions.MultivariateNormal(r.mean, r.root @ r.root.mT)
    torch.testing.assert_close(r.log_prob(z[:5]), same.log_prob(z[:5]), rtol=0, atol=1e-8)


def test_a_collapse_onto_a_line_is_seen_by_the_full_covariance_alone(generator: torch.Generator) -> None:
    """q is nearly a line: with the diagonal the KL by an adversary that sees nothing, a network of zeros, is off by
    what the line costs, log of 1 over its width; with the full covariance it is right, down to the floor."""
    width = 1e-3

    def lost(covariance: str, floor: float) -> tuple[float, float]:
        options = {"covariance": covariance, "scale_floor": floor, "quadratic": False}
        method, modules, x, optimal = gaussian(generator, **options)
        encoder = modules["encoder"]
        encoder.basis.weights[0].copy_(torch.tensor([[1.0, 1.0], [0.0, width]], dtype=DOUBLE))
        encoder.amplitude.weight.zero_()
        network = LogRatio(QuadraticFeature(), quadratic=False).double().requires_grad_(False)
        network.head.weight.zero_()
        modules["adversary"] = network
        posterior = method.posterior(modules)
        assert isinstance(posterior, AdaptiveContrastPosterior)
        z = posterior.sample(x, 20_000, generator)
        exact = optimal.log_q(x, z) - log_normal(z, 1.5, math.log(2))
        error = exact - posterior.log_ratio(x, z)
        # Moments of 4,096 draws cost D (D + 3) / 4 / 4,096 = 0.0006 nats, on the average: five times that.
        return float(error.mean()), 0.003 + STANDARD_ERRORS * float(error.std()) / error.numel() ** 0.5

    value, margin = lost("full", 1e-9)
    assert value == pytest.approx(0, abs=margin)
    value, margin = lost("diagonal", 1e-9)
    assert value == pytest.approx(math.log(1 / width), abs=margin)
    assert margin < 0.02
    value, _ = lost("full", 1e-2)
    assert 1 < value < math.log(1 / width) - 2  # narrower than the default floor: that much is unseen


class ShiftedPrior(DecoderModel):
    """No standard normal prior."""

    def log_prior(self, z: Tensor) -> Tensor:
        return log_normal(z, 1.5, math.log(2))


class Optimal(nn.Module):
    """The adversary's optimum where q(z|x) is Gaussian: log q - log r at the z that zn was made from.

    Args:
        moments: x -> mean (N, D) and covariance (N, D, D) of q(z|x).
    """

    def __init__(self, moments: Callable[[Tensor], tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self.moments = moments
        self.reference: Callable[[Tensor], Auxiliary]

    def log_q(self, x: Tensor, z: Tensor) -> Tensor:
        return torch.distributions.MultivariateNormal(*self.moments(x)).log_prob(z)

    def forward(self, x: Tensor, zn: Tensor) -> Tensor:
        r = self.reference(x)
        origin, units = torch.zeros_like(r.mean), torch.eye(r.mean.shape[-1], dtype=DOUBLE)
        scale = torch.stack([r.normalised(origin + unit) - r.normalised(origin) for unit in units], dim=-1)
        z = torch.linalg.solve(scale, (zn - r.normalised(origin))[..., None])[..., 0]
        log_det = torch.linalg.slogdet(scale).logabsdet
        return self.log_q(x, z) - log_det - log_normal(zn)


def gaussian(generator: torch.Generator, **options: Any) -> tuple[AVBAC, Modules, Tensor, Optimal]:
    """A method whose q is a Gaussian, with the optimal adversary and another prior.

    Where r(z|x) has the full covariance q has correlations; else its dimensions are independent.
    """
    method = AVBAC(**{**GAUSSIAN, **options})
    modules, x = built(method)
    encoder = modules["encoder"]
    assert isinstance(encoder, BasisEncoder)
    weight, bias = encoder.basis.weights[0], encoder.basis.biases[0]
    weight.copy_(torch.tensor([[0.8, 0.9 if method.covariance == "full" else 0.0], [0.0, 1.7]], dtype=DOUBLE))
    bias.copy_(torch.randn(bias.shape, generator=generator, dtype=DOUBLE))

    def moments(x: Tensor) -> tuple[Tensor, Tensor]:
        heads = encoder._heads(x)
        root = weight[0].T * heads.amplitude[:, 0, :, None]
        own = torch.zeros(1, 1, 1) if heads.log_sd is None else torch.exp(2 * heads.log_sd).diag_embed()
        return heads.centre + heads.amplitude[:, 0] * bias[0, 0], root @ root.mT + own

    modules["model"].__class__ = ShiftedPrior
    optimal = Optimal(moments)
    modules["adversary"] = optimal
    return method, modules, x, optimal


def error_of_the_log_ratio(generator: torch.Generator, **options: Any) -> float:
    method, modules, x, optimal = gaussian(generator, **options)
    posterior = method.posterior(modules)
    assert isinstance(posterior, AdaptiveContrastPosterior)
    optimal.reference = posterior.reference
    z = posterior.sample(x, 5, generator)
    exact = optimal.log_q(x, z) - log_normal(z, 1.5, math.log(2))
    return float((posterior.log_ratio(x, z) - exact).abs().max())


def error_of_the_objective(generator: torch.Generator, *, training: bool, **options: Any) -> float:
    method, modules, x, optimal = gaussian(generator, **options)
    modules.train(training)
    noise, encoder = noise_of(method, len(x), generator), modules["encoder"]
    optimal.reference = (lambda x: encoder.contrasted(x, noise)[1]) if training else encoder.reference()
    z = encoder(x, noise["eps"])
    exact = optimal.log_q(x, z) - log_normal(z, 1.5, math.log(2)) - modules["model"].log_likelihood(x, z)
    return float((method.losses(modules, x, noise)["negative_elbo"] - exact.mean()).abs())


@pytest.mark.parametrize("covariance", ["diagonal", "full"])
@pytest.mark.parametrize("gaussian_part", [False, True])
def test_with_the_optimal_adversary_the_estimate_is_exact(
    gaussian_part: bool, covariance: str, generator: torch.Generator
) -> None:
    """Given r: log q - log p to rounding, whatever the floor (0.3 here), the prior and the errors of r's moments.

    In training r is another one at every step, which no adversary is told: there this is its best answer to each.
    """
    options = {"gaussian_part": gaussian_part, "covariance": covariance}
    assert error_of_the_log_ratio(generator, **options) < 1e-10
    assert error_of_the_objective(generator, training=True, **options) < 1e-10
    assert error_of_the_objective(generator, training=False, **options) < 1e-10


class TwoScales(DiagonalAuxiliary):
    """The released code: the floor is in the normalisation, not in log r."""

    def log_prob(self, z: Tensor) -> Tensor:
        variance = torch.exp(2 * self.log_sd) - GAUSSIAN["scale_floor"] ** 2
        return -0.5 * (self.normalised(z).square() + variance.log() + math.log(2 * math.pi)).sum(-1)


class BareNormalisation(DiagonalAuxiliary):
    """The other way round."""

    def normalised(self, z: Tensor) -> Tensor:
        variance = torch.exp(2 * self.log_sd) - GAUSSIAN["scale_floor"] ** 2
        return (z - self.mean) / variance.sqrt()


@pytest.mark.parametrize("mutant", [TwoScales, BareNormalisation])
def test_two_scales_would_be_noticed(
    mutant: type[DiagonalAuxiliary], generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adaptive_contrast, "DiagonalAuxiliary", mutant)
    assert error_of_the_log_ratio(generator) > 0.01
    assert error_of_the_objective(generator, training=True) > 0.01


class QuadraticFeature(Trunk):
    """|z|^2 as the one feature of a pair."""

    features = 1

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        return z.square().sum(-1, keepdim=True)


@pytest.mark.parametrize("quadratic", [True, False])
def test_the_adversary_has_nothing_to_learn_where_q_is_gaussian(quadratic: bool, generator: torch.Generator) -> None:
    """T = 0, a constant, then gives KL(q || p): the network is -|zn|^2/2 with the quadratic, and zero without."""
    method, modules, x, optimal = gaussian(generator, scale_floor=1e-6, quadratic=quadratic)
    network = LogRatio(QuadraticFeature(), quadratic=quadratic).double().requires_grad_(False)
    network.head.weight.fill_(-0.5 if quadratic else 0)
    modules["adversary"] = network
    posterior = method.posterior(modules)
    assert isinstance(posterior, AdaptiveContrastPosterior)
    estimates = posterior.log_ratio(x, posterior.sample(x, 20_000, generator))
    mean, covariance = optimal.moments(x)
    sd = covariance.diagonal(dim1=-2, dim2=-1).sqrt()
    q, prior = torch.distributions.Normal(mean, sd), torch.distributions.Normal(1.5, 2.0)
    exact = torch.distributions.kl_divergence(q, prior).sum(-1)
    # Errors of 4,096 draws in the moments move E[log r] by about D / 4096, much less than an error.
    stderr = estimates.std(0) / len(estimates) ** 0.5
    assert float(((estimates.mean(0) - exact).abs() / stderr).max()) < STANDARD_ERRORS


@pytest.mark.parametrize("covariance", ["diagonal", "full"])
def test_no_gradient_goes_through_the_moments(covariance: Covariance, generator: torch.Generator) -> None:
    """The primal gradient is that with m and L as constants; it would be another one through them."""
    method = AVBAC(**SMALL, gaussian_part=True, covariance=covariance)
    modules, x = built(method)
    noise, model, adversary = noise_of(method, len(x), generator), modules["model"], modules["adversary"]
    encoder = modules["encoder"].requires_grad_(True)

    def gradients(loss: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(loss, list(encoder.parameters())))

    def loss(r: Auxiliary) -> Tensor:
        z = encoder(x, noise["eps"])
        log_ratio = adversary(x, r.normalised(z)) + r.log_prob(z) - model.log_prior(z)
        return (log_ratio - model.log_likelihood(x, z)).mean()

    _, r = encoder.contrasted(x, noise)
    ours = gradients(method.losses(modules, x, noise)["negative_elbo"])
    for gradient, expected in zip(ours, gradients(loss(r)), strict=True):
        torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-10)
    heads, (v, _) = encoder._heads(x), encoder._noises(noise["eps"])
    off = v - v.mean(0)
    of_basis = (off[..., :, None] * off[..., None, :]).mean(0)
    a, own = heads.amplitude, torch.exp(2 * heads.log_sd) + 1e-2**2
    whole = (a[..., :, None] * a[..., None, :] * of_basis).sum(1) + own.diag_embed()
    mean = heads.centre + (a * v.mean(0)).sum(-2)
    variances = whole.diagonal(dim1=-2, dim2=-1)
    diagonal, full = DiagonalAuxiliary(mean, 0.5 * variances.log()), FullAuxiliary(mean, torch.linalg.cholesky(whole))
    through = gradients(loss(full if covariance == "full" else diagonal))
    assert max(float((a - b).abs().max()) for a, b in zip(ours, through, strict=True)) > 1e-3


@pytest.mark.parametrize(
    "options",
    [SMALL, {**SMALL, "gaussian_part": True, "covariance": "full"}, {"encoder": "injected", "moment_draws": 4}],
)
def test_in_evaluation_no_observation_has_a_part_in_anothers_objective(
    options: dict[str, Any], generator: torch.Generator
) -> None:
    """Of eight observations the mean is that of two halves; in training the moments are those of the minibatch."""
    method = AVBAC(**options)
    modules, x = built(method)
    noise = noise_of(method, len(x), generator)

    def difference() -> float:
        def objective(rows: slice) -> Tensor:
            part = {name: value[rows] for name, value in noise.items()}
            return method.losses(modules, x[rows], part)["negative_elbo"]

        halves = 0.5 * (objective(slice(0, 4)) + objective(slice(4, 8)))
        return float((halves - objective(slice(0, 8))).abs())

    modules.eval()
    assert difference() < 1e-10
    modules.train()
    assert (difference() > 1e-3) == (method.encoder == "basis")  # an injected encoder's are those of each x


def test_moments_of_an_injected_encoder_are_the_same_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    method = AVBAC(encoder="injected")
    modules, x = built(method)
    whole = modules["encoder"].reference()(x)
    monkeypatch.setattr(
        adaptive_contrast,
        "BLOCK_ELEMENTS",
        3 * adaptive_contrast.INJECTED_DRAWS * modules["encoder"].encoder.trunk.features,
    )
    parts = modules["encoder"].reference()(x)
    torch.testing.assert_close(parts.mean, whole.mean, rtol=0, atol=1e-12)
    torch.testing.assert_close(parts.log_sd, whole.log_sd, rtol=0, atol=1e-12)


@pytest.mark.parametrize("options", [{}, {"gaussian_part": True, "covariance": "full"}])
def test_a_restored_fit_estimates_the_same_ratio(options: dict[str, Any], generator: torch.Generator) -> None:
    problem, method = SmallProblem(), AVBAC(**SMALL, **options)
    fit = harness.fit(method, problem, budget="steps=5", device="cpu")
    data = placed(problem, CPU, torch.float32)
    restored = method.restore(problem.training_view(data, Streams(1, problem.label, "other", CPU)), fit.state)
    z = fit.posterior.sample(data.test, 3, generator)
    first, second = fit.posterior, restored.posterior
    assert isinstance(first, AdaptiveContrastPosterior)
    assert isinstance(second, AdaptiveContrastPosterior)
    assert torch.equal(first.log_ratio(data.test, z), second.log_ratio(data.test, z))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 1}, "avb-ac: option batch_size=1: input should be greater than or equal to 2"),
        ({"nbasis": 0}, "option nbasis=0"),
        ({"covariance": "banded"}, "option covariance='banded'"),
        ({"encoder": "sum"}, "option encoder='sum': input should be 'basis' or 'injected'"),
        ({"scale_floor": 0.0}, "option scale_floor=0.0: input should be greater than 0"),
        ({"encoder": "injected", "gaussian_part": True}, "option gaussian_part belongs to encoder=basis"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        AVBAC(**options)


def test_a_short_fit_of_the_four_points_learns() -> None:
    """Exact log p(x) ends above that of the best model whose pixels do not depend on z, four pixels with p = 1/4."""
    problem = FourPoints()
    view = problem.training_view(placed(problem, CPU, torch.float32), Streams(0, problem.label, "avb-ac", CPU))
    method = AVBAC(basis_width=32)

    def log_p() -> float:
        return float(quadrature(view.model, view.validation)[0].mean())

    before = log_p()
    run = Run(CPU, torch.float32, Budget("steps", 300), Streams(0, problem.label, "avb-ac", CPU), Clock(CPU))
    with run.clock.phase("fit"), run.streams.initial_weights(shared=False):
        method.fit(view, run)
    independent = 4 * (0.25 * math.log(0.25) + 0.75 * math.log(0.75))
    assert before < independent < log_p() < problem.optimum


@pytest.mark.parametrize(
    ("options", "option"),
    [({"encoder": "injected", "moment_draws": 7}, "moment_draws"), ({"batch_size": 7}, "batch_size")],
)
def test_a_full_covariance_needs_enough_draws(options: dict[str, Any], option: str) -> None:
    view = view_of(SmallProblem())
    few = AVBAC(**options, covariance="full").unfit(view)
    assert few == f"covariance=full needs {option} of at least 4 x 2 dimensions, got 7"
    assert AVBAC(**{**options, option: 8}, covariance="full").unfit(view) is None
    assert AVBAC(**options).unfit(view) is None

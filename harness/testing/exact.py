"""Laws of exact answers: what a model knows of p(z|x) agrees with its density, and each part with the others."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributions import MultivariateNormal

from harness.model import HasClosedForm, HasEvidence, HasExactDraws, HasModes, HasPlanes, HasQuantities, LatentModel
from harness.testing.laws import (
    STANDARD_ERRORS,
    require,
    require_close,
    require_equal,
    require_mean,
    require_shape,
    untouched,
)
from harness.testing.posteriors import stream

DRAWS = 20_000
HEAVIEST = 0.9  # quantile of the weights above which they are left out
NARROWING = 0.7  # standard deviations of the Gaussian in the harmonic identity, relative to the posterior's
TRANSITIONS = 30
SMALLEST_STEP, LARGEST_STEP = 0.03, 3.0  # in standard deviations of the posterior, divided by the root of D
EDGES = (0.02, 0.5, 0.98)  # of rectangles in a plane, as quantiles of either quantity
ACROSS = 200  # points along a side of one
TELLING = 200
"""Effective number of draws below which a few of them are everything, and a mean has no error to be judged by."""


@torch.no_grad()
def check_exact_answers(model: LatentModel, x: Tensor) -> None:
    """Everything that is asked of the exact answers that a model offers; nothing of a model that offers none.

    Args:
        x: Observations in float64, shape (N, *E); quantities and modes are looked at for the first one.

    Raises:
        ConformanceError: If a law does not hold.
    """
    draws = _draws(model, x) if isinstance(model, HasExactDraws) else None
    if isinstance(model, HasEvidence):
        require_shape(model.log_evidence(x), (len(x),), "log_evidence")
        if draws:
            _check_harmonic(model, x, draws)
        else:
            _check_importance(model, x)
    if isinstance(model, HasClosedForm):
        _check_bayes(model, x)
    if draws:
        _check_stationary(model, x, draws)
    first = draws.z[:, :1] if draws else None
    if isinstance(model, HasQuantities):
        _check_quantities(model, x[:1], first)
    if isinstance(model, HasPlanes):
        _check_planes(model, x[:1], first)
    if isinstance(model, HasModes):
        _check_modes(model, first)


# Draws


@dataclass(frozen=True, eq=False)
class Draws:
    """Draws of p(z|x), shape (S, N, D): the first half says what the posterior looks like, the second is tested."""

    z: Tensor

    @property
    def tested(self) -> Tensor:
        return self.z[len(self.z) // 2 :]

    @property
    def mean(self) -> Tensor:
        """Shape (N, D)."""
        return self.z[: len(self.z) // 2].mean(0)

    @property
    def factor(self) -> Tensor:
        """Cholesky factor of the covariance, shape (N, D, D)."""
        centred = self.z[: len(self.z) // 2] - self.mean
        return torch.linalg.cholesky(torch.einsum("snd,sne->nde", centred, centred) / len(centred))


def _draws(model: LatentModel, x: Tensor) -> Draws:
    assert isinstance(model, HasExactDraws)
    with untouched("sample_exact_posterior"):
        z = model.sample_exact_posterior(x, DRAWS, stream(10))
    require_shape(z, (DRAWS, len(x), model.latent_dim), "sample_exact_posterior")
    single = model.sample_exact_posterior(x.float(), 1, stream(10))
    require(single.dtype == torch.float32, f"sample_exact_posterior: expected float32 as x has, got {single.dtype}")
    require_equal(
        model.sample_exact_posterior(x, DRAWS, stream(10)), z, "sample_exact_posterior from the same generator"
    )
    log_joint = model.log_joint(x, z)
    require(bool(log_joint.isfinite().all()), "sample_exact_posterior: draws where p(x, z) is zero or not finite")
    centred = log_joint - log_joint.mean(0)
    correlation = (centred[1:] * centred[:-1]).mean(0) / centred.square().mean(0).clamp(min=1e-300)
    dependent = float(correlation.abs().max()) * math.sqrt(DRAWS)
    require(dependent <= STANDARD_ERRORS, "sample_exact_posterior: draws depend on the ones before")
    return Draws(z)


def _check_stationary(model: LatentModel, x: Tensor, draws: Draws) -> None:
    """Draws of p(z|x) have the same moments after transitions that leave p(z|x) invariant; others move towards it.

    The transitions are reversible, so that the difference between a draw and where it has moved is symmetric around
    zero, and its mean can be judged whatever its tails are.
    """
    start, end = draws.tested, _moved(model, x, draws)
    what = "sample_exact_posterior: transitions that leave p(z|x) invariant change"
    require_mean(model.log_joint(x, end) - model.log_joint(x, start), 0.0, f"{what} the mean of log p(x, z)")
    require_mean((end - start).flatten(1), 0.0, f"{what} the means of z")
    i, j = torch.triu_indices(model.latent_dim, model.latent_dim)
    before, after = start - draws.mean, end - draws.mean
    products = after[..., i] * after[..., j] - before[..., i] * before[..., j]
    require_mean(products.flatten(1), 0.0, f"{what} the second moments of z")


def _moved(model: LatentModel, x: Tensor, draws: Draws) -> Tensor:
    """The tested draws after transitions of random-walk Metropolis, with steps of many sizes: (S, N, D)."""
    noise, z, log_joint = stream(11), draws.tested, model.log_joint(x, draws.tested)
    factor, ratio = draws.factor / math.sqrt(model.latent_dim), math.log(LARGEST_STEP / SMALLEST_STEP)
    for _ in range(TRANSITIONS):
        step = SMALLEST_STEP * torch.exp(ratio * torch.rand(log_joint.shape, generator=noise, dtype=z.dtype))
        direction = torch.randn(z.shape, generator=noise, dtype=z.dtype)
        proposed = z + step[..., None] * torch.einsum("nde,sne->snd", factor, direction)
        log_proposed = model.log_joint(x, proposed)
        level = torch.rand(log_joint.shape, generator=noise, dtype=z.dtype)
        accepted = level < (log_proposed - log_joint).exp()
        z = torch.where(accepted[..., None], proposed, z)
        log_joint = torch.where(accepted, log_proposed, log_joint)
    return z


# Evidence


def _check_harmonic(model: LatentModel, x: Tensor, draws: Draws) -> None:
    r"""Evidence, density and draws fit together.

    .. math:: E_{p(z|x)}\Bigl[\frac{g(z)}{p(x, z)} 1_A(z)\Bigr] = \frac{1}{p(x)} \int_A g(z)\, dz

    for any density g and any set A; with A = {g / p(x, z) <= c} the mean on the left is over bounded weights, unlike
    that of the harmonic mean estimator. Gelfand and Dey 1994, https://doi.org/10.1111/j.2517-6161.1994.tb01996.x;
    Robert and Wraith 2009, https://arxiv.org/abs/0907.5123
    """
    assert isinstance(model, HasEvidence)
    factor = NARROWING * draws.factor
    g = MultivariateNormal(draws.mean, scale_tril=factor)

    def log_weight(z: Tensor) -> Tensor:
        return g.log_prob(z) - model.log_joint(x, z)

    bound = log_weight(draws.z[: len(draws.z) // 2]).quantile(HEAVIEST, dim=0)
    log_w = log_weight(draws.tested)
    weights = torch.exp(log_w + model.log_evidence(x)).where(log_w <= bound, 0)
    noise = torch.randn(draws.tested.shape, generator=stream(12), dtype=x.dtype)
    inside = log_weight(draws.mean + torch.einsum("nde,sne->snd", factor, noise)) <= bound
    message = (
        "log_evidence, log_joint and sample_exact_posterior do not fit together: E[g / p(x, z)] over draws and 1/p(x)"
    )
    require_mean(weights - inside.to(x.dtype), 0.0, message)


def _check_importance(model: LatentModel, x: Tensor) -> None:
    """E[p(x|z)] over the prior is p(x): looked at where enough of the prior's draws matter."""
    assert isinstance(model, HasEvidence)
    log_w = model.log_likelihood(x, model.sample_prior(DRAWS, stream(13))[:, None]) - model.log_evidence(x)
    telling = torch.exp(2 * log_w.logsumexp(0) - (2 * log_w).logsumexp(0)) >= TELLING
    if bool(telling.any()):
        require_mean(log_w.exp()[:, telling], 1.0, "log_evidence against the mean of p(x|z) over the prior")


def _check_bayes(model: LatentModel, x: Tensor) -> None:
    """log p(x) = log p(x, z) - log p(z|x), whatever z is."""
    assert isinstance(model, HasClosedForm)
    evidence = model.log_evidence(x)
    mean, covariance = model.exact_posterior(x)
    require_shape(mean, (len(x), model.latent_dim), "exact_posterior mean")
    posterior = MultivariateNormal(mean, covariance)
    z = model.sample_prior(len(x), stream(3))
    require_close(model.log_joint(x, z) - posterior.log_prob(z), evidence, "log_evidence and log_joint - log posterior")


# Quantities and modes


def _check_quantities(model: LatentModel, x: Tensor, draws: Tensor | None) -> None:
    assert isinstance(model, HasQuantities)
    z = model.sample_prior(6, stream(14))
    values, moments = model.quantities(z.unflatten(0, (2, 3))), model.exact_moments(x)
    names = f"quantities {list(values)}, exact_moments {list(moments)}"
    require(list(values) == list(moments), f"quantities and exact_moments have different names: {names}")
    for name, value in values.items():
        require_shape(value, (2, 3), f"quantity {name!r} of z (2, 3, D)")
        mean, sd = moments[name]
        require(math.isfinite(mean) and math.isfinite(sd) and sd >= 0, f"exact_moments of {name!r}: {mean} and {sd}")
    for name, value in model.quantities(draws).items() if draws is not None else ():
        mean, sd = moments[name]
        require_mean(value, mean, f"the mean of {name!r} over sample_exact_posterior and exact_moments")
        squares = (value - mean).square()
        if float(squares.sum() ** 2 / squares.square().sum()) >= TELLING:
            require_mean(squares, sd**2, f"the variance of {name!r} over sample_exact_posterior and exact_moments")


def _check_planes(model: LatentModel, x: Tensor, draws: Tensor | None) -> None:
    """Of four rectangles that share a corner: as much of the density is in each as of the exact draws."""
    assert isinstance(model, HasPlanes)
    known = model.quantities(model.sample_prior(2, stream(18))[:, None] if draws is None else draws)
    for plane in model.planes:
        require(set(plane) <= set(known) and len(set(plane)) == 2, f"planes: {plane} are not two of {list(known)}")
        found = model.log_density_in_plane(x, plane, torch.zeros(2, 3, 2, dtype=x.dtype))
        require_shape(found, (2, 3), "log_density_in_plane of points (2, 3, 2)")
        if draws is None:
            continue
        pair = torch.stack([known[name].flatten().double() for name in plane], dim=-1)
        edges = torch.quantile(pair, torch.tensor(EDGES, dtype=pair.dtype), dim=0)
        for i, j in ((0, 0), (0, 1), (1, 0), (1, 1)):
            low, high = (torch.stack([edges[i + k, 0], edges[j + k, 1]]) for k in (0, 1))
            steps = (torch.arange(ACROSS, dtype=pair.dtype) + 0.5)[:, None] / ACROSS * (high - low) + low
            points = torch.stack(torch.meshgrid(*steps.T, indexing="ij"), dim=-1)
            mass = model.log_density_in_plane(x, plane, points).exp().mean() * (high - low).prod()
            inside = ((pair >= low) & (pair < high)).all(1).double()
            require_mean(inside, mass, f"the share of sample_exact_posterior in a part of {plane} and its density")


def _check_modes(model: LatentModel, draws: Tensor | None) -> None:
    assert isinstance(model, HasModes)
    weights = model.mode_weights
    one = len(weights) > 1 and min(weights.values()) > 0 and math.isclose(sum(weights.values()), 1)
    require(one, f"mode_weights must be of at least two modes, positive and add up to 1, got {weights}")
    z = model.sample_prior(DRAWS, stream(15))[:, None] if draws is None else draws
    index = model.mode_of(z)
    require_shape(index, tuple(z.shape[:-1]), "mode_of")
    known = index.dtype == torch.int64 and bool((index >= 0).all() and (index < len(weights)).all())
    require(known, f"mode_of must give int64 indices from 0 to {len(weights) - 1}, got {index.unique()}")
    for i, (name, weight) in enumerate(weights.items()) if draws is not None else ():
        require_mean(
            (index == i).double(), weight, f"the share of mode {name!r} in sample_exact_posterior and mode_weights"
        )

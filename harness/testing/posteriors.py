"""Laws of posteriors: shapes, randomness from the generator only, densities that normalise and agree."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from harness.model import LatentModel, log_normal
from harness.posterior import HasAnalyticKL, HasDensity, HasLogRatio, HasPointDensity, Posterior
from harness.testing.laws import require, require_close, require_equal, require_mean, require_shape, untouched

DRAWS = 4000
SMOOTHED_DIMENSIONS = 3
"""In more dimensions the draws' kernel estimate is too rough for its ratio to the density to have a useful error."""


def stream(seed: int, device: torch.device | None = None) -> torch.Generator:
    generator = torch.Generator(device=device or "cpu")
    generator.manual_seed(seed)
    return generator


@torch.no_grad()
def check_posterior(posterior: Posterior, model: LatentModel, x: Tensor) -> None:
    """Everything that evaluators rely on.

    Args:
        model: Whose prior `kl_to_prior` speaks of.
        x: Observations in float64, shape (N, *E), not all the same.

    Raises:
        ConformanceError: If a law does not hold.
    """
    require(isinstance(posterior, Posterior), f"expected a harness.posterior.Posterior, got {type(posterior).__name__}")
    x = x[:4]
    with untouched("Posterior.sample"):
        z = posterior.sample(x, 3, stream(0))
    require_shape(z, (3, len(x), model.latent_dim), "Posterior.sample")
    require_shape(posterior.sample(x[:1], 1, stream(0)), (1, 1, model.latent_dim), "Posterior.sample of one for one x")
    require(z.dtype == x.dtype, f"Posterior.sample: expected {x.dtype} as x has, got {z.dtype}")
    require_equal(posterior.sample(x, 3, stream(0)), z, "Posterior.sample from the same generator twice")
    if bool((x[0] != x[-1]).any()):
        moved = bool((posterior.sample(x.flip(0), 3, stream(0)) != z).any())
        require(moved, "Posterior.sample: the same draws whatever x is")
    _check_log_ratio(posterior, x, z)
    _check_densities(posterior, model, x)


def _check_log_ratio(posterior: Posterior, x: Tensor, z: Tensor) -> None:
    if isinstance(posterior, HasLogRatio):
        _check_pointwise(posterior.log_ratio, x, z, "Posterior.log_ratio")
    if isinstance(posterior, HasPointDensity):
        _check_pointwise(posterior.log_prob, x, z, "Posterior.log_prob")


def _check_pointwise(function, x: Tensor, z: Tensor, what: str) -> None:
    """A function of pairs (x, z) treats each pair by itself."""
    with untouched(what):
        value = function(x, z)
    require_shape(value, tuple(z.shape[:2]), what)
    alone = torch.cat([function(x[i : i + 1], z[:, i : i + 1]) for i in range(len(x))], dim=1)
    require_close(alone, value, f"{what} of one observation alone and among others")


def _check_densities(posterior: Posterior, model: LatentModel, x: Tensor) -> None:
    drawn = _draws(posterior, x)
    if drawn is None:
        return
    z, log_q = drawn
    require_shape(log_q, (DRAWS, len(x)), "log density of Posterior draws")
    if isinstance(posterior, HasPointDensity):
        require_close(posterior.log_prob(x, z), log_q, "Posterior.sample_and_log_prob and Posterior.log_prob")
    if model.latent_dim <= SMOOTHED_DIMENSIONS:
        ratio = torch.exp(_smoothed(posterior, x, z) - log_q)
        require_mean(ratio, 1.0, "the posterior's density does not integrate to 1 where its draws are")
    if isinstance(posterior, HasAnalyticKL):
        kl = posterior.kl_to_prior(x)
        require_shape(kl, (len(x),), "Posterior.kl_to_prior")
        require(bool((kl >= -1e-9).all()), "Posterior.kl_to_prior: negative")
        require_mean(log_q - model.log_prior(z), kl, "Posterior.kl_to_prior against the mean of log q - log p")


def _draws(posterior: Posterior, x: Tensor) -> tuple[Tensor, Tensor] | None:
    if isinstance(posterior, HasDensity):
        with untouched("Posterior.sample_and_log_prob"):
            return posterior.sample_and_log_prob(x, DRAWS, stream(1))
    if isinstance(posterior, HasPointDensity):
        z = posterior.sample(x, DRAWS, stream(1))
        return z, posterior.log_prob(x, z)
    return None


def _smoothed(posterior: Posterior, x: Tensor, z: Tensor) -> Tensor:
    """Log density at z (S, N, D) of a mixture of Gaussians around other draws: it lies where q lies, whatever q's form.

    E_q[g / q] = 1 for any density g that lives on the support of q.
    """
    centres = posterior.sample(x, 64, stream(2))
    log_sd = torch.log(0.3 * centres.std(0) + 1e-12)
    return log_normal(z[:, None], centres, log_sd).logsumexp(1) - math.log(len(centres))

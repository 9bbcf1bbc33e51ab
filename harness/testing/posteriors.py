"""Laws of posteriors: shapes, randomness from the generator only, densities that normalise and agree."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from harness.model import LatentModel
from harness.posterior import (
    HasAnalyticKL,
    HasDensity,
    HasLocalFamily,
    HasLogRatio,
    HasPointDensity,
    LocalFamily,
    Posterior,
)
from harness.testing.laws import (
    in_single_precision,
    require,
    require_close,
    require_equal,
    require_mean,
    require_shape,
    require_single,
    untouched,
)
from harness.testing.normalisation import require_normalised

DRAWS = 4000
MOVED = 0.5
"""Standard deviation of what is added to a local family's parameters; less would move too little to be noticed."""


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
    if isinstance(posterior, HasLocalFamily):
        require(isinstance(posterior, HasDensity), "Posterior.local: a posterior with a local family has a density too")
        _check_local_family(posterior, posterior.local, model, x)


@torch.no_grad()
def check_single_precision(posterior: Posterior, model: LatentModel, x: Tensor) -> None:
    """What evaluators ask for in a run in float32 is finite and of that precision.

    Args:
        x: Observations in float32, shape (N, *E).

    Raises:
        ConformanceError: If it is not.
    """
    x, pairs = x[:4], (3, len(x[:4]))
    with in_single_precision("Posterior.sample"):
        z = posterior.sample(x, 3, stream(0))
    require_single(z, (*pairs, model.latent_dim), "Posterior.sample")
    if isinstance(posterior, HasDensity | HasPointDensity):
        with in_single_precision("log density of Posterior draws"):
            drawn, log_q = _draws(posterior, x, 3, stream(1))
        require_single(drawn, tuple(z.shape), "Posterior.sample_and_log_prob")
        require_single(log_q, pairs, "log density of Posterior draws")
    if isinstance(posterior, HasLogRatio):
        with in_single_precision("Posterior.log_ratio"):
            log_ratio = posterior.log_ratio(x, z)
        require_single(log_ratio, pairs, "Posterior.log_ratio")
    if isinstance(posterior, HasAnalyticKL):
        with in_single_precision("Posterior.kl_to_prior"):
            kl = posterior.kl_to_prior(x)
        require_single(kl, (len(x),), "Posterior.kl_to_prior")


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
    if not isinstance(posterior, HasDensity | HasPointDensity):
        return
    with untouched("Posterior.sample_and_log_prob"):
        z, log_q = _draws(posterior, x, DRAWS, stream(1))
    require_shape(log_q, (DRAWS, len(x)), "log density of Posterior draws")
    _check_same_draws(posterior.sample(x, DRAWS, stream(2)), z)
    if isinstance(posterior, HasPointDensity):
        require_close(posterior.log_prob(x, z), log_q, "Posterior.sample_and_log_prob and Posterior.log_prob")
    for one in x.split(1):
        log_prob = partial(_at, posterior, one) if isinstance(posterior, HasPointDensity) else None
        require_normalised(partial(_alone, posterior, one), log_prob, 6, "the posterior's density")
    if isinstance(posterior, HasAnalyticKL):
        kl = posterior.kl_to_prior(x)
        require_shape(kl, (len(x),), "Posterior.kl_to_prior")
        require(bool((kl >= -1e-9).all()), "Posterior.kl_to_prior: negative")
        require_mean(log_q - model.log_prior(z), kl, "Posterior.kl_to_prior against the mean of log q - log p")


def _check_same_draws(sampled: Tensor, z: Tensor) -> None:
    """Draws with and without their density have the same means and scales, and each is one of its own."""
    for draws in (sampled, z):
        again = bool((draws[1:] == draws[:1]).flatten(1).all(1).any())
        require(not again, "several of the n draws of a posterior with a density are the same for all x")
    for n, what in ((1, "means"), (2, "second moments")):
        middle = z.mean(0)
        require_mean(
            (sampled - middle) ** n - (z - middle) ** n,
            0.0,
            f"Posterior.sample and sample_and_log_prob differ in {what}",
        )


def _draws(posterior: Posterior, x: Tensor, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Of a posterior with a density: (n, N, D) and (n, N)."""
    if isinstance(posterior, HasDensity):
        return posterior.sample_and_log_prob(x, n, generator)
    assert isinstance(posterior, HasPointDensity)
    z = posterior.sample(x, n, generator)
    return z, posterior.log_prob(x, z)


def _alone(posterior: Posterior, one: Tensor, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draws for one observation: (n, D) and (n,)."""
    z, log_q = _draws(posterior, one, n, generator)
    return z[:, 0], log_q[:, 0]


def _at(posterior: HasPointDensity, one: Tensor, z: Tensor) -> Tensor:
    return posterior.log_prob(one, z[:, None])[:, 0]


def _check_local_family(
    posterior: Posterior, local: Callable[[Tensor], LocalFamily], model: LatentModel, x: Tensor
) -> None:
    with untouched("Posterior.local"):
        members = local(x)
    require(isinstance(members, LocalFamily), f"Posterior.local: expected a LocalFamily, got {type(members).__name__}")
    shapes = {name: tuple(parameter.shape) for name, parameter in members.named_parameters()}
    require(bool(shapes), "Posterior.local: members without parameters")
    for name, shape in shapes.items():
        require(shape[:1] == (len(x),), f"LocalFamily: {name} must have shape ({len(x)}, ...), got {shape}")
    _check_start(posterior, members, model, x)
    _check_gradients(members, model, x)
    _check_moved(posterior, members, model, x)
    _check_common_noise(local(x), members)


def _check_start(posterior: Posterior, members: LocalFamily, model: LatentModel, x: Tensor) -> None:
    """The members are the amortised posterior."""
    with untouched("LocalFamily.sample_and_log_prob"):
        z, log_q = members.sample_and_log_prob(DRAWS, stream(1))
    require_shape(z, (DRAWS, len(x), model.latent_dim), "LocalFamily: draws")
    require_shape(log_q, (DRAWS, len(x)), "LocalFamily: log density of draws")
    if isinstance(posterior, HasPointDensity):
        require_close(log_q, posterior.log_prob(x, z), "log density of Posterior.local's draws and Posterior.log_prob")
    amortised = posterior.sample(x, DRAWS, stream(2))
    for moment, power in (("mean", 1), ("second moment", 2)):
        difference = (z**power - amortised**power).flatten(1)
        require_mean(difference, 0.0, f"the {moment} of Posterior.local's draws and of Posterior.sample's")


def _check_gradients(members: LocalFamily, model: LatentModel, x: Tensor) -> None:
    """The ELBO of an observation moves its own row of every parameter and no other."""
    with torch.enable_grad():
        z, log_q = members.sample_and_log_prob(16, stream(3))
        attached = z.requires_grad or log_q.requires_grad
        require(attached, "LocalFamily: draws and densities are detached from the parameters")
        elbo = (model.log_joint(x, z) - log_q).mean(0)[0]
        parameters = dict(members.named_parameters())
        gradients = torch.autograd.grad(elbo, list(parameters.values()), allow_unused=True)
    for name, gradient in zip(parameters, gradients, strict=True):
        require(gradient is not None and bool(gradient[0].any()), f"LocalFamily: the ELBO gives {name} no gradient")
        require(
            gradient is None or not bool(gradient[1:].any()),
            f"LocalFamily: {name}: the row of one observation matters to another",
        )


def _check_moved(posterior: Posterior, members: LocalFamily, model: LatentModel, x: Tensor) -> None:
    """Elsewhere in the family the density is still that of the draws; the amortised posterior stays where it is."""
    before, noise = posterior.sample(x, 3, stream(0)), stream(4)
    for parameter in members.parameters():
        change = torch.randn(parameter.shape, generator=noise, dtype=parameter.dtype)
        parameter.data += MOVED * change
    require_equal(posterior.sample(x, 3, stream(0)), before, "Posterior.sample before and after its local members move")
    for i in range(len(x)):
        require_normalised(partial(_of_member, members, i), None, 7, "LocalFamily: the density of moved members")


def _of_member(members: LocalFamily, i: int, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    z, log_q = members.sample_and_log_prob(n, generator)
    return z[:, i], log_q[:, i]


def _check_common_noise(members: LocalFamily, moved: LocalFamily) -> None:
    """What is read from the generator is the same for all members, so that two stay in step."""
    one, other = stream(5), stream(5)
    members.sample_and_log_prob(3, one)
    moved.sample_and_log_prob(3, other)
    require_equal(one.get_state(), other.get_state(), "LocalFamily: what two members leave of the same generator")

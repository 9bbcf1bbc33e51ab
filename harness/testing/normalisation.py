r"""Whether a density integrates to 1 where its draws are, whatever its form: funnels and separate modes too.

.. math:: E_{p(z)}\Bigl[\frac{g(z)}{p(z)} 1_A(z)\Bigr] = \int_A g(z)\, dz

for any density g and any set A. Here g is a mixture of Gaussians fitted to some of the draws, and A = {g <= c p}: the
mean on the left is over weights of at most c, so that its standard error can be trusted, and is compared with the share
of g's own draws in A. Which g and c tell most is found out on draws that are used for nothing else. Where the density
is known for draws of p alone, an estimate of p from the distances to the nearest draws says what A is.
Gelfand and Dey 1994, https://doi.org/10.1111/j.2517-6161.1994.tb01996.x; Robert and Wraith 2009,
https://arxiv.org/abs/0907.5123; Loftsgaarden and Quesenberry 1965 (nearest draws),
https://doi.org/10.1214/aoms/1177700079

Shapes: S draws, D latent dimensions, K components.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.distributions import MultivariateNormal

from harness.testing.laws import require_mean

FITTED, CHOSEN = 2000, 1000
"""Draws that mixtures are fitted to, and that g and c are chosen on."""
LEAST, MOST = 2000, 20_000
PRECISION = 0.006
"""Relative standard error for which so many draws are tested: 5 % too much or too little are more than five of them."""
TELLING = 200
"""Effective number of draws below which a mean has no error to be judged by."""
COMPONENTS = 8
NARROW = 0.7
"""Standard deviations of a second g, relative to those of the first: it sees draws from a density of another shape."""
LEVELS = (0.5, 0.8, 0.9, 0.95, 0.99)
"""Of g / p among draws: c is one of these quantiles."""
ROUNDS = 20
REFERENCE = 10_000
NEIGHBOURS = 32
OFF_CENTRE = 0.35
"""Of the distance to the last of the nearest draws, how far their mean may be away from a point between draws."""
MEASURABLE_DIMENSIONS = 3
"""In more dimensions the nearest draws are too far away to tell a density."""
AT_ONCE = 2000

Draw = Callable[[int, torch.Generator], tuple[Tensor, Tensor]]
"""Draws (S, D) and their log density (S,)."""
Density = Callable[[Tensor], Tensor]
"""(S, D) -> (S,), nats."""


@torch.no_grad()
def require_normalised(draw: Draw, log_prob: Density | None, seed: int, what: str) -> None:
    """The density of draws integrates to 1 where they are; nothing is asked where that cannot be told.

    Args:
        log_prob: The density at any point, if it is known there.
        seed: Of the draws.

    Raises:
        ConformanceError: If it does not.
    """
    stream = torch.Generator().manual_seed(seed)
    z, log_p = draw(FITTED + CHOSEN, stream)
    if log_prob is None and z.shape[1] > MEASURABLE_DIMENSIONS:
        return
    known = log_prob or _Nearest(draw(REFERENCE, stream)[0])
    looked_at = _Looked(z[FITTED:], log_p[FITTED:], log_p[FITTED:] if log_prob else known(z[FITTED:]))
    best = _chosen(z[:FITTED], looked_at, known, stream)
    narrow = _placed(best.g.narrowed(NARROW), looked_at, known, stream)
    n = int(min(MOST, max(LEAST, best.variance / PRECISION**2)))
    z, log_p = draw(n, stream)
    tested = _Looked(z, log_p, log_p if log_prob else known(z))
    for trial in (best, narrow):
        if trial.telling(n):
            weights, inside = trial.weights(tested), trial.inside(trial.g.sample(n, stream)).to(z.dtype)
            about = float(inside.mean() / weights.mean())
            message = f"{what} does not integrate to 1 where its draws are, but to about {about:.3g}"
            require_mean((weights - inside)[:, None], 0.0, message)


@dataclass(frozen=True, eq=False)
class _Looked:
    """Draws (S, D), their log density (S,), and what A is made with: the same, or an estimate of it."""

    z: Tensor
    log_p: Tensor
    estimate: Tensor


# The mixture g


@dataclass(frozen=True, eq=False)
class Mixture:
    """A mixture of Gaussians: weights (K,), means (K, D), Cholesky factors of covariances (K, D, D)."""

    shares: Tensor
    means: Tensor
    factors: Tensor

    def log_parts(self, z: Tensor) -> Tensor:
        """Log densities of the components times their weights: (S, D) -> (S, K)."""
        parts = MultivariateNormal(self.means, scale_tril=self.factors, validate_args=False)
        return parts.log_prob(z[:, None]) + self.shares.log()

    def log_prob(self, z: Tensor) -> Tensor:
        return torch.cat([self.log_parts(some).logsumexp(1) for some in z.split(AT_ONCE)])

    def sample(self, n: int, stream: torch.Generator) -> Tensor:
        index = torch.multinomial(self.shares, n, replacement=True, generator=stream)
        eps = torch.randn(n, self.means.shape[1], generator=stream, dtype=self.means.dtype)
        return self.means[index] + torch.einsum("sde,se->sd", self.factors[index], eps)

    def narrowed(self, factor: float) -> Mixture:
        return replace(self, factors=factor * self.factors)


def fitted(z: Tensor, components: int) -> Mixture:
    """A mixture fitted to draws (S, D) by the EM algorithm, which starts with means at some of them."""
    scale = _scale(z)
    scaled, eye = z / scale, torch.eye(z.shape[1], dtype=z.dtype)
    mixture = Mixture(z.new_full((components,), 1 / components), scaled[:components], eye.expand(components, -1, -1))
    for _ in range(ROUNDS if components > 1 else 1):
        belongs = mixture.log_parts(scaled).softmax(1)
        totals = belongs.sum(0) + 1e-9
        means = belongs.T @ scaled / totals[:, None]
        away = scaled[:, None] - means
        covariances = torch.einsum("sk,skd,ske->kde", belongs, away, away) / totals[:, None, None]
        mixture = Mixture(totals / totals.sum(), means, torch.linalg.cholesky(covariances + 1e-6 * eye))
    return Mixture(mixture.shares, mixture.means * scale, scale[:, None] * mixture.factors)


def _scale(z: Tensor) -> Tensor:
    """Standard deviations of draws (S, D), if these were Gaussian, by their quartiles: (D,)."""
    low, high = torch.quantile(z, torch.tensor([0.25, 0.75], dtype=z.dtype), dim=0)
    return (high - low) / 1.35 + 1e-12


# The set A


@dataclass(frozen=True, eq=False)
class _Trial:
    """A density g and the set A = {log g - log p <= bound}, with what is to be expected of them.

    Args:
        log_p: Log density, known or estimated, (S, D) -> (S,).
        share: Of g's draws in A.
        variance: Relative variance of one draw's part in the comparison.
    """

    g: Mixture
    bound: float
    log_p: Density
    share: float = 0.0
    variance: float = float("inf")

    def inside(self, z: Tensor) -> Tensor:
        return self.g.log_prob(z) - self.log_p(z) <= self.bound

    def weights(self, draws: _Looked) -> Tensor:
        log_g = self.g.log_prob(draws.z)
        return torch.exp(log_g - draws.log_p).where(log_g - draws.estimate <= self.bound, 0)

    def telling(self, n: int) -> bool:
        return n * self.share >= TELLING and n / (1 + self.variance) >= TELLING


def _chosen(z: Tensor, draws: _Looked, known: Density, stream: torch.Generator) -> _Trial:
    """The trial that tells most; mixtures are tried where a single Gaussian would need more than the fewest draws.

    Args:
        z: What mixtures are fitted to, (S, D).
    """
    best = _placed(fitted(z, 1), draws, known, stream)
    if best.variance <= LEAST * PRECISION**2:
        return best
    mixture = _placed(fitted(z, COMPONENTS), draws, known, stream)
    return mixture if mixture.variance < best.variance else best


def _placed(g: Mixture, draws: _Looked, known: Density, stream: torch.Generator) -> _Trial:
    """g with the bound that tells most."""
    own, log_g = g.sample(CHOSEN, stream), g.log_prob(draws.z)
    of_own, of_draws = g.log_prob(own) - known(own), log_g - draws.estimate
    weights, best = torch.exp(log_g - draws.log_p), _Trial(g, float("-inf"), known)
    for level in LEVELS:
        bound = float(of_draws.sort().values[int(level * len(of_draws))])
        some, share = weights.where(of_draws <= bound, 0), float((of_own <= bound).double().mean())
        variance = float(some.var() / some.mean() ** 2) + (1 - share) / (share + 1e-9)
        if bound < float("inf") and variance < best.variance:
            best = _Trial(g, bound, known, share, variance)
    return best


class _Nearest:
    """An estimate of a density, up to a factor, by the distance to the k-th nearest of some draws (S, D).

    Where they do not surround a point, beyond their edges, it is zero.
    """

    def __init__(self, draws: Tensor) -> None:
        from scipy.spatial import KDTree  # slow to import

        self.scale = _scale(draws)
        self.draws = draws / self.scale
        self.tree = KDTree(self.draws.numpy())

    def __call__(self, z: Tensor) -> Tensor:
        scaled = z / self.scale
        distances, nearest = map(torch.from_numpy, self.tree.query(scaled.numpy(), NEIGHBOURS))
        radius, off = distances[:, -1], (self.draws[nearest].mean(1) - scaled).norm(dim=1)
        return (-z.shape[1] * radius.log()).where(off <= OFF_CENTRE * radius, float("-inf"))

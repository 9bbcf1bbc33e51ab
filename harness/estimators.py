"""Estimators that evaluators share: means and bounds in constant memory, and the proposal that scores all alike.

Shapes: S samples, N observations (B in one block), D latent dimensions, E event shape of one observation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from harness.model import LatentModel, log_normal
from harness.posterior import Posterior

# A block's size follows from that of an observation alone, never from the machine: noise is drawn block by block, so
# that another size would give other draws. 2^21 elements are 8 MiB in float32, about what a processor's cache holds.
BLOCK_ELEMENTS = 2**21
BLOCK_OBSERVATIONS = 64
SMALLEST_EVENT = 256  # networks of small observations are wider than the observations


def observation_blocks(x: Tensor) -> tuple[Tensor, ...]:
    """Observations in blocks of bounded memory: (N, *E) -> several of (B, *E)."""
    return x.split(min(BLOCK_OBSERVATIONS, _pairs(x)))


def sample_blocks(x: Tensor, samples: int) -> Iterator[int]:
    """Sizes that add up to exactly ``samples``, each small enough to be drawn at once for a block of observations."""
    size = max(1, _pairs(x) // len(x))
    for start in range(0, samples, size):
        yield min(size, samples - start)


def _pairs(x: Tensor) -> int:
    return max(1, BLOCK_ELEMENTS // max(x[0].numel(), SMALLEST_EVENT))


class StreamedMean:
    """Mean, standard deviation and standard error over the first axis, in constant memory.

    Merges the moments of one block after another in float64 (Chan, Golub, LeVeque 1983, Eq. 1.5).
    """

    def __init__(self) -> None:
        self.n = 0
        self._mean = self._squares = torch.zeros((), dtype=torch.float64)

    def add(self, values: Tensor) -> None:
        """Add values of shape (S, ...)."""
        values = values.double()
        n, mean = len(values), values.mean(0)
        change = mean - self._mean.to(mean.device)
        self._squares = (
            self._squares.to(mean.device)
            + (values - mean).square().sum(0)
            + change.square() * (self.n * n / (self.n + n))
        )
        self.n += n
        self._mean = self._mean.to(mean.device) + change * (n / self.n)

    def value(self) -> Tensor:
        """Shape (...).

        Raises:
            ValueError: If nothing was added.
        """
        if self.n == 0:
            raise ValueError("no values were added")
        return self._mean

    def sd(self) -> Tensor:
        """Standard deviation of the values, shape (...); nan for a single one."""
        return torch.sqrt(self._squares / (self.n - 1)) if self.n > 1 else torch.full_like(self._mean, math.nan)

    def stderr(self) -> Tensor:
        """Standard error of `value`, shape (...); nan for a single value."""
        return self.sd() / math.sqrt(self.n)


class StreamedLogMeanExp:
    r"""log (1/S) sum_s w_s in constant memory, with its delta-method error and the effective sample size.

    .. math:: \hat\sigma^2(\log \bar w) = \frac{1}{S} \frac{\operatorname{Var}(w)}{\bar w^2},
              \quad \mathrm{ESS} = (\textstyle\sum w)^2 / \sum w^2

    Sums are kept as logarithms in float64. A weight of zero (log w = -inf) counts as a sample. The error cannot exceed
    1 nat: where few weights are nearly everything it is too small, as the effective sample size shows.
    """

    def __init__(self) -> None:
        self.n = 0
        self._log_sum = self._log_sum_squares = torch.tensor(-math.inf, dtype=torch.float64)

    def add(self, log_w: Tensor) -> None:
        """Add weights of shape (S, N)."""
        log_w = log_w.double()
        self.n += log_w.shape[0]
        self._log_sum = torch.logaddexp(self._log_sum.to(log_w.device), log_w.logsumexp(0))
        self._log_sum_squares = torch.logaddexp(self._log_sum_squares.to(log_w.device), (2 * log_w).logsumexp(0))

    def value(self) -> Tensor:
        """Shape (N,).

        Raises:
            ValueError: If nothing was added.
        """
        if self.n == 0:
            raise ValueError("no weights were added")
        return self._log_sum - math.log(self.n)

    def effective_sample_size(self) -> Tensor:
        """Shape (N,), between 1 and S."""
        return torch.exp(2 * self._log_sum - self._log_sum_squares)

    def stderr(self) -> Tensor:
        """Standard error of `value`, shape (N,); nan for a single weight."""
        return _delta_method(self._log_sum, self._log_sum_squares, self.n)


class LogMeanExp(StreamedLogMeanExp):
    r"""The same of weights that are all at hand, (S, N), with the jackknife's error.

    .. math:: \hat\sigma^2 = \frac{S-1}{S} \sum_s \bigl(\theta_s - \bar\theta\bigr)^2,
              \quad \theta_s = \log \tfrac{1}{S-1} \textstyle\sum_{t \ne s} w_t

    Weights that differ by nats have it within a seventh of the truth even if they are two, where the delta method's
    stops at 1. Efron, Stein 1981, https://doi.org/10.1214/aos/1176345462
    """

    def __init__(self, log_w: Tensor) -> None:
        super().__init__()
        self.add(log_w)
        self._log_w = log_w.double()

    def stderr(self) -> Tensor:
        """Standard error of `value`, shape (N,); the delta method's where all weights but one are zero."""
        usual = super().stderr()
        if self.n < 2:
            return usual
        none = torch.full_like(self._log_w[:1], -math.inf)
        before = torch.cat([none, self._log_w[:-1].logcumsumexp(0)])
        after = torch.cat([self._log_w.flip(0)[:-1].logcumsumexp(0).flip(0), none])
        without = torch.logaddexp(before, after)
        squares = (without - without.mean(0)).square().sum(0)
        return torch.where(squares.isfinite(), torch.sqrt(squares * (self.n - 1) / self.n), usual)


def _delta_method(log_sum: Tensor, log_sum_squares: Tensor, n: int) -> Tensor:
    """Standard error of log (1/n) sum w, from log sum w and log sum w^2; nan for n = 1."""
    if n < 2:
        return torch.full_like(log_sum, math.nan)
    relative_variance = (n * torch.exp(log_sum_squares - 2 * log_sum) - 1).clamp(min=0) * n / (n - 1)
    return torch.sqrt(relative_variance / n)


@dataclass(frozen=True, eq=False)
class BoundCurve:
    """The importance-weighted bounds L_K for J values of K: bound and stderr have shape (J, N), nats, float64."""

    k: tuple[int, ...]
    bound: Tensor
    stderr: Tensor


class StreamedBounds:
    r"""The importance-weighted bounds for K = 1, 10, 100, ... and for all S weights, in one pass and constant memory.

    .. math:: L_K = \mathbb{E} \log \frac{1}{K} \sum_{k=1}^K w_k \le L_{K+1} \le \log p(x)

    Each is the mean over the disjoint groups of K consecutive weights, so that it has no bias; weights that do not fill
    a group are left out. Groups of K consist of ten groups of K/10, hence the estimates of a complete power of ten
    increase with K in every sample, not in expectation alone. Burda et al. 2016, Theorem 1,
    https://arxiv.org/abs/1509.00519
    """

    def __init__(self) -> None:
        self.total = StreamedLogMeanExp()
        self._levels: list[_Groups] = []

    def add(self, log_w: Tensor) -> None:
        """Add weights of shape (S, N)."""
        self.total.add(log_w)
        sums = torch.stack([log_w.double(), 2 * log_w.double()])
        level = 0
        while len(sums[0]):
            if level == len(self._levels):
                self._levels.append(_Groups(10**level))
            sums = self._levels[level].add(sums)
            level += 1

    def curve(self) -> BoundCurve:
        """K = 1, 10, 100, ... below S, then S itself, whose value and error are those of `total`.

        An error is that over groups, or the delta method's where there is one group only.

        Raises:
            ValueError: If nothing was added.
        """
        last = self.total.value(), self.total.stderr()
        levels = [level for level in self._levels if level.k < self.total.n]
        points = [*((level.means.value(), level.stderr()) for level in levels), last]
        bound, stderr = (torch.stack(column) for column in zip(*points, strict=True))
        return BoundCurve((*(level.k for level in levels), self.total.n), bound, stderr)


class _Groups:
    """One level of the cascade: groups of k weights, and those of them that wait for ten to be complete.

    A group is log sum w and log sum w^2: sums have shape (2, groups, N).
    """

    def __init__(self, k: int) -> None:
        self.k, self.means = k, StreamedMean()
        self._waiting = self._last = torch.empty(2, 0, 0)

    def add(self, sums: Tensor) -> Tensor:
        """Add at least one group; returns the groups of 10 k that this completes."""
        self.means.add(sums[0] - math.log(self.k))
        self._last = sums[:, -1].clone()
        if self._waiting.numel():
            sums = torch.cat([self._waiting, sums], dim=1)
        tens = sums.shape[1] // 10
        self._waiting = sums[:, 10 * tens :].clone()  # a view would keep the whole block
        return sums[:, : 10 * tens].reshape(2, tens, 10, -1).logsumexp(2) if tens else sums[:, :0]

    def stderr(self) -> Tensor:
        return self.means.stderr() if self.means.n > 1 else _delta_method(self._last[0], self._last[1], self.k)


class StreamedLargest:
    """The ``count`` largest of all values along the first axis; keeps twice as many, and one block, at most."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._parts: list[Tensor] = []

    def add(self, values: Tensor) -> None:
        """Add values of shape (S, N)."""
        self._parts.append(values)
        # Waiting until as many are new as are kept makes the cost a value independent of the block's size.
        if sum(map(len, self._parts)) >= 2 * self.count:
            self._parts = [self._merged()]

    def value(self) -> Tensor:
        """Shape (count, N), or (S, N) if fewer were added, in descending order.

        Raises:
            ValueError: If nothing was added.
        """
        if not self._parts:
            raise ValueError("no values were added")
        return self._merged()

    def _merged(self) -> Tensor:
        values = torch.cat(self._parts)
        return values.topk(min(self.count, len(values)), dim=0).values


def posterior_means(
    x: Tensor, samples: int, terms: Callable[[Tensor, int], Mapping[str, Tensor]]
) -> dict[str, tuple[Tensor, Tensor]]:
    """Means over exactly ``samples`` draws per observation, with their standard errors, in constant memory.

    Args:
        x: Observations, shape (N, *E).
        terms: Draws n latents for each observation of a block and returns named values: (B, *E), n -> each (n, B).

    Returns:
        For each name the means and their standard errors, both of shape (N,), float64.
    """
    parts: dict[str, list[StreamedMean]] = {}
    for block in observation_blocks(x):
        means: dict[str, StreamedMean] = {}
        for n in sample_blocks(block, samples):
            for name, values in terms(block, n).items():
                means.setdefault(name, StreamedMean()).add(values)
        for name, mean in means.items():
            parts.setdefault(name, []).append(mean)
    return {
        name: (torch.cat([mean.value() for mean in means]), torch.cat([mean.stderr() for mean in means]))
        for name, means in parts.items()
    }


def posterior_moments(posterior: Posterior, x: Tensor, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of q(z|x) from exactly ``n`` of its samples: a block x (B, *E) -> two of (B, D).

    Where draws are the same but for rounding the standard deviation is 1e-4: a posterior that has collapsed to a point
    still gives a density.
    """
    moments = StreamedMean()
    for size in sample_blocks(x, n):
        moments.add(posterior.sample(x, size, generator))
    mean, sd = moments.value().to(x.dtype), moments.sd().to(x.dtype)
    return mean, torch.where(sd > 100 * torch.finfo(x.dtype).eps * mean.abs(), sd, sd.clamp(min=1e-4))


@dataclass(frozen=True, eq=False)
class DefensiveProposal:
    r"""The proposal that scores every method alike: the posterior's per-x Gaussian, widened, mixed with the prior.

    .. math:: r(z|x) = (1 - \alpha)\, N(z; m(x), (c\, s(x))^2) + \alpha\, p(z)

    The prior part bounds the weights p(x, z)/r(z|x) by p(x|z)/alpha (defensive mixture: Hesterberg 1995,
    https://doi.org/10.1080/00401706.1995.10484303).

    Args:
        mean, sd: Moments of q(z|x), shape (N, D).
        widening: The factor c.
        prior_weight: The mixture weight alpha, in [0, 1).
    """

    model: LatentModel
    mean: Tensor
    sd: Tensor
    widening: float
    prior_weight: float

    def sample_and_log_prob(self, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Independent draws, shape (n, N, D), and their log density, shape (n, N)."""
        shape = (n, *self.mean.shape)
        kwargs = {"generator": generator, "device": self.mean.device, "dtype": self.mean.dtype}
        from_prior = torch.rand(shape[:2], **kwargs) < self.prior_weight
        gaussian = self.mean + self.widening * self.sd * torch.randn(shape, **kwargs)
        prior = self.model.sample_prior(n * shape[1], generator).reshape(shape)
        z = torch.where(from_prior[..., None], prior, gaussian)
        return z, self.log_prob(z)

    def log_prob(self, z: Tensor) -> Tensor:
        """(S, N, D) -> (S, N), nats."""
        log_gaussian = log_normal(z, self.mean, torch.log(self.widening * self.sd))
        if self.prior_weight == 0:
            return log_gaussian
        log_prior = self.model.log_prior(z)
        return torch.logaddexp(math.log1p(-self.prior_weight) + log_gaussian, math.log(self.prior_weight) + log_prior)

"""Estimators that evaluators share: streamed log-mean-exp, and the start distribution that is the same for all methods."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from harness.model import LatentModel, log_normal
from harness.posterior import Posterior


class StreamedLogMeanExp:
    r"""log (1/S) sum_s w_s in constant memory, with its delta-method error and the effective sample size.

    .. math:: \hat\sigma^2(\log \bar w) = \frac{1}{S} \frac{\operatorname{Var}(w)}{\bar w^2},
              \quad \mathrm{ESS} = (\textstyle\sum w)^2 / \sum w^2

    Sums are kept in float64 relative to the running maximum.
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
        if self.n < 2:
            return torch.full_like(self._log_sum, math.nan)
        relative_variance = (self.n / self.effective_sample_size() - 1).clamp(min=0) * self.n / (self.n - 1)
        return torch.sqrt(relative_variance / self.n)


def posterior_moments(posterior: Posterior, x: Tensor, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of q(z|x) from ``n`` of its samples: x (N, *E) -> two of (N, D)."""
    z = posterior.sample(x, n, generator)
    sd, mean = torch.std_mean(z, dim=0)
    return mean, sd.clamp(min=1e-4)


@dataclass(frozen=True)
class DefensiveProposal:
    r"""The proposal that scores every method alike: the posterior's per-x Gaussian, widened, mixed with the prior.

    .. math:: r(z|x) = (1 - \alpha)\, N(z; m(x), (c\, s(x))^2) + \alpha\, p(z)

    The prior part bounds the weights p(x, z)/r(z|x) by p(x|z)/alpha (defensive mixture: Hesterberg 1995).

    Args:
        mean, sd: Moments of q(z|x), shape (N, D).
        widening: The factor c.
        prior_weight: The mixture weight alpha.
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
        return torch.logaddexp(
            math.log1p(-self.prior_weight) + log_gaussian if self.prior_weight < 1 else log_gaussian - math.inf,
            math.log(self.prior_weight) + self.model.log_prior(z),
        )

"""The oracle of the evaluators' tests: a model whose exact answers are known, and posteriors built by hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from harness.evaluator import EvaluationRun
from harness.method import Fit
from harness.model import LatentModel, log_normal
from harness.posterior import Posterior
from harness.problem import placed
from harness_plugins.linear_gaussian import LinearGaussian, LinearGaussianModel

CPU = torch.device("cpu")


class Gaussian(Posterior):
    """q(z|x) = N(mean(x), diag(sd^2))."""

    def __init__(self, mean: Callable[[Tensor], Tensor], sd: Tensor) -> None:
        self.mean, self.sd = mean, sd

    def sample(self, x: Tensor, n: int, generator: torch.Generator) -> Tensor:
        return self.sample_and_log_prob(x, n, generator)[0]

    def sample_and_log_prob(self, x: Tensor, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        mean = self.mean(x)
        z = mean + self.sd * torch.randn((n, *mean.shape), generator=generator, dtype=mean.dtype)
        return z, log_normal(z, mean, self.sd.log())


class AnalyticGaussian(Gaussian):
    """The same, with its KL to a standard normal prior."""

    def kl_to_prior(self, x: Tensor) -> Tensor:
        q = torch.distributions.Normal(self.mean(x), self.sd)
        return torch.distributions.kl_divergence(q, torch.distributions.Normal(0.0, 1.0)).sum(-1)


class Implicit(Posterior):
    """Draws alone: correlated, and uniform where a Gaussian would have tails."""

    def __init__(self, mean: Callable[[Tensor], Tensor], factor: Tensor) -> None:
        self.mean, self.factor = mean, factor

    def sample(self, x: Tensor, n: int, generator: torch.Generator) -> Tensor:
        mean = self.mean(x)
        uniform = torch.rand((n, *mean.shape), generator=generator, dtype=mean.dtype)
        return mean + (uniform - 0.5) * 12**0.5 @ self.factor.T


@dataclass
class Oracle:
    """A fixed linear-Gaussian problem with correlated posteriors."""

    problem: LinearGaussian
    seed: int = 0

    def __post_init__(self) -> None:
        view_model = self.problem.model_spec().new_model((self.problem.data_dim,))
        assert isinstance(view_model, LinearGaussianModel)
        self.model = view_model.float()
        self.run = EvaluationRun(placed(self.problem, CPU, torch.float32), self.problem, CPU, torch.float32, self.seed)

    @property
    def x(self) -> Tensor:
        return self.run.data.scored(self.problem.n_test)[0]

    def mean_field(self, shift: float = 0.0, widening: float = 1.0, kind: type[Gaussian] = Gaussian) -> Gaussian:
        """The best mean-field posterior, moved by ``shift`` of its standard deviations and widened."""
        sd = self.model.best_mean_field(self.x)[1].float()
        return kind(lambda x: self.model.exact_posterior(x)[0].float() + shift * sd, widening * sd)

    def analytic(self) -> Gaussian:
        return self.mean_field(kind=AnalyticGaussian)

    def implicit(self) -> Implicit:
        """The exact moments, in another shape."""
        factor = torch.linalg.cholesky(self.model.exact_posterior(self.x)[1]).float()
        return Implicit(lambda x: self.model.exact_posterior(x)[0].float() + 0.1, factor)

    def fit(self, posterior: Posterior, model: LatentModel | None = None) -> Fit:
        return Fit(model or self.model, posterior, {})


@pytest.fixture
def oracle() -> Oracle:
    return Oracle(LinearGaussian(n_train=10, n_validation=10, n_test=600))


@pytest.fixture
def oracle_of() -> Callable[..., Oracle]:
    """Oracles with other options."""
    return lambda **options: Oracle(LinearGaussian(n_train=10, n_validation=10, **{"n_test": 100, **options}))

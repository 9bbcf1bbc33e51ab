r"""What an adversary says of an implicit posterior: ELBO and KL with its estimate T of log q(z|x) - log p(z).

.. math:: E_{q(z|x)}[\log p(x|z) - T(x, z)], \qquad E_{q(z|x)}[T(x, z)]

Equal to the ELBO and to KL(q(z|x) || p(z)) only if the adversary is optimal, and bounds of nothing: an adversary that
falls behind lets the first exceed log p(x).
Mescheder, Nowozin, Geiger 2017, Eq. 3.8, https://arxiv.org/abs/1701.04722
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field, PositiveInt
from torch import Tensor

from harness import hookimpl
from harness.estimators import posterior_means
from harness.evaluator import EvaluationRun, Evaluator, Measurement
from harness.method import Fit
from harness.posterior import HasLogRatio
from harness.problem import Problem

NO_RATIO = "posterior has no estimate of log q(z|x) - log p(z)"


@dataclass(frozen=True, kw_only=True)
class Adversary(Evaluator):
    """`adversarial_elbo` and `kl_to_prior` as the adversary estimates them.

    Args:
        observations: How many of the fixed scored test observations.
        samples: Draws of z per observation.
    """

    name: str = "adversary"
    observations: PositiveInt = 1000
    samples: Annotated[int, Field(ge=2)] = 100

    def undefined(self, fit: Fit, problem: Problem) -> str | None:
        return None if isinstance(fit.posterior, HasLogRatio) else NO_RATIO

    def measure(self, fit: Fit, problem: Problem, run: EvaluationRun) -> list[Measurement]:
        model, posterior = fit.model, fit.posterior
        if not isinstance(posterior, HasLogRatio):
            raise TypeError(NO_RATIO)
        x, indices = run.data.scored(self.observations)
        stream = run.generator(self.name, "posterior")

        def terms(x: Tensor, n: int) -> Mapping[str, Tensor]:
            z = posterior.sample(x, n, stream)
            log_ratio = posterior.log_ratio(x, z)
            return {"adversarial_elbo": model.log_likelihood(x, z) - log_ratio, "kl_to_prior": log_ratio}

        means = posterior_means(x, self.samples, terms)
        settings = {"samples": self.samples}
        return [
            run.measurement(metric, *mean, "density ratio", indices, settings=settings)
            for metric, mean in means.items()
        ]


@hookimpl
def harness_evaluators() -> list[Adversary]:
    return [Adversary()]

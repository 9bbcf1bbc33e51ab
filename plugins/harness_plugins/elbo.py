r"""The evidence lower bound of a posterior whose density is known, and its divergence from the prior.

.. math:: \mathrm{ELBO}(x) = E_{q(z|x)}[\log p(x, z) - \log q(z|x)] \le \log p(x)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field, PositiveInt
from torch import Tensor

from harness import hookimpl
from harness.estimators import observation_blocks, posterior_means
from harness.evaluator import EvaluationRun, Evaluator, Measurement
from harness.method import Fit
from harness.posterior import HasAnalyticKL, HasDensity
from harness.problem import Problem

NO_DENSITY = "posterior has no density"


@dataclass(frozen=True, kw_only=True)
class ELBO(Evaluator):
    """`elbo` by Monte Carlo, and `kl_to_prior`: analytic where the posterior knows it, else from the same draws.

    The ELBO averages log p(x, z) - log q(z|x) even where the KL is known: for a good posterior that difference is
    nearly constant in z, which log p(x|z) is not.

    Args:
        observations: How many of the fixed scored test observations.
        samples: Draws of z per observation.
    """

    name: str = "elbo"
    observations: PositiveInt = 1000
    samples: Annotated[int, Field(ge=2)] = 100

    def undefined(self, fit: Fit, problem: Problem) -> str | None:
        return None if isinstance(fit.posterior, HasDensity) else NO_DENSITY

    def measure(self, fit: Fit, problem: Problem, run: EvaluationRun) -> list[Measurement]:
        model, posterior = fit.model, fit.posterior
        if not isinstance(posterior, HasDensity):
            raise TypeError(NO_DENSITY)
        x, indices = run.data.scored(self.observations)
        stream = run.generator(self.name, "posterior")

        def terms(x: Tensor, n: int) -> Mapping[str, Tensor]:
            z, log_q = posterior.sample_and_log_prob(x, n, stream)
            log_prior = model.log_prior(z)
            return {"elbo": model.log_likelihood(x, z) + log_prior - log_q, "kl_to_prior": log_q - log_prior}

        means = posterior_means(x, self.samples, terms)
        elbo = run.measurement(
            "elbo",
            *means["elbo"],
            "unbiased",
            indices,
            bounds="stochastic lower bound on log_likelihood",
            settings={"samples": self.samples, "average_of": "log p(x, z) - log q(z|x)"},
        )
        if isinstance(posterior, HasAnalyticKL):
            kl = torch.cat([posterior.kl_to_prior(block) for block in observation_blocks(x)])
            exact = {"average_of": "closed form"}
            return [elbo, run.measurement("kl_to_prior", kl, torch.zeros_like(kl), "exact", indices, settings=exact)]
        sampled = {"samples": self.samples, "average_of": "log q(z|x) - log p(z)"}
        return [elbo, run.measurement("kl_to_prior", *means["kl_to_prior"], "unbiased", indices, settings=sampled)]


@hookimpl
def harness_evaluators() -> list[ELBO]:
    return [ELBO()]

r"""log p(x) by importance sampling, from the same kind of proposal for every method.

.. math:: \log \hat p(x) = \log \frac{1}{K} \sum_{k=1}^K \frac{p(x, z_k)}{r(z_k|x)}, \quad z_k \sim r(z|x)

with r the posterior's per-x Gaussian, widened, mixed with the prior (`harness.estimators.DefensiveProposal`). A
posterior enters through two moments only, so that one without a density is scored exactly like one that has it.
A stochastic lower bound, by Jensen. Burda et al. 2016, Eq. 8, https://arxiv.org/abs/1509.00519
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor

from harness import hookimpl
from harness.estimators import (
    DefensiveProposal,
    StreamedLogMeanExp,
    observation_blocks,
    posterior_moments,
    sample_blocks,
)
from harness.evaluator import EvaluationRun, Evaluator, Measurement
from harness.method import Fit
from harness.problem import Problem


@dataclass(frozen=True, kw_only=True)
class Importance(Evaluator):
    """`log_likelihood` from exactly ``samples`` draws per observation, in constant memory.

    Args:
        observations: How many of the fixed scored test observations.
        samples: K, the draws from the proposal per observation.
        widening: Factor on the posterior's standard deviations.
        prior_weight: Part of the draws that come from the prior.
        moment_samples: Draws from the posterior, apart from the K, that its moments are computed from.
    """

    name: str = "importance"
    observations: PositiveInt = 1000
    samples: Annotated[int, Field(ge=2)] = 1000
    widening: PositiveFloat = 1.2
    prior_weight: Annotated[float, Field(ge=0, lt=1)] = 0.1
    moment_samples: Annotated[int, Field(ge=2)] = 512

    def measure(self, fit: Fit, problem: Problem, run: EvaluationRun) -> list[Measurement]:
        x, indices = run.data.scored(self.observations)
        moments, proposals = run.generator(self.name, "moments"), run.generator(self.name, "proposal")
        parts = [self._weigh(fit, block, moments, proposals) for block in observation_blocks(x)]
        values, stderrs, sizes = (torch.cat(column) for column in zip(*parts, strict=True))
        return [
            run.measurement(
                "log_likelihood",
                values,
                stderrs,
                "stochastic lower bound",
                indices,
                settings=self._settings(sizes),
            )
        ]

    def _weigh(
        self, fit: Fit, x: Tensor, moments: torch.Generator, proposals: torch.Generator
    ) -> tuple[Tensor, Tensor, Tensor]:
        """log p(x), its standard error and the effective sample size: a block x (B, *E) -> three of (B,)."""
        mean, sd = posterior_moments(fit.posterior, x, self.moment_samples, moments)
        proposal = DefensiveProposal(fit.model, mean, sd, self.widening, self.prior_weight)
        estimate = StreamedLogMeanExp()
        for n in sample_blocks(x, self.samples):
            z, log_r = proposal.sample_and_log_prob(n, proposals)
            estimate.add(fit.model.log_joint(x, z) - log_r)
        return estimate.value(), estimate.stderr(), estimate.effective_sample_size()

    def _settings(self, sizes: Tensor) -> Mapping[str, Any]:
        return {
            "samples": self.samples,
            "widening": self.widening,
            "prior_weight": self.prior_weight,
            "moment_samples": self.moment_samples,
            "ess_min": float(sizes.min()),
            "ess_median": float(sizes.median()),
            "ess_mean": float(sizes.mean()),
        }


@hookimpl
def harness_evaluators() -> list[Importance]:
    return [Importance()]

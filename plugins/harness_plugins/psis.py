r"""Pareto k-hat of a posterior's own importance weights p(x, z) / q(z|x): how far q falls short of the exact tails.

Below 0.7 reweighting its draws repairs what is wrong with q, and expectations under it are of use; above, q misses
parts of the exact posterior that matter, whatever its ELBO. Yao, Vehtari, Simpson, Gelman 2018,
https://arxiv.org/abs/1802.02538; the fit of the tail: `harness.pareto`. The k-hat of `importance` is another one, of a
proposal that was widened and mixed with the prior so that it be small.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import ModuleType
from typing import Annotated, ClassVar

import torch
from pydantic import Field, PositiveInt
from torch import Tensor

from harness import hookimpl, pareto
from harness.estimators import StreamedLargest, StreamedLogMeanExp, observation_blocks, sample_blocks
from harness.evaluator import EvaluationRun, Evaluator, Measurement
from harness.method import Diverged, Fit
from harness.pareto import BELIEVABLE, k_hat, tail_length
from harness.posterior import HasDensity
from harness.problem import Problem

NO_DENSITY = "posterior has no density"


@dataclass(frozen=True, kw_only=True)
class PSIS(Evaluator):
    """`k_hat` of q(z|x) itself, where its density is known.

    Observations whose largest weights are all the same have no tail and are left out; their number is in the settings.
    Weights that are the same but for rounding have one, of a k-hat that means nothing and alarms nobody. Errors are the
    asymptotic ones of a tail of M draws, (1 + k) / sqrt(M) (Smith 1987, https://doi.org/10.1214/aos/1176350499), taken
    as if k were not negative.

    Args:
        observations: How many of the fixed scored test observations.
        samples: Draws of z per observation.
    """

    by_default: ClassVar[bool] = False
    modules: ClassVar[tuple[ModuleType, ...]] = (pareto,)

    name: str = "psis"
    observations: PositiveInt = 100
    samples: Annotated[int, Field(ge=25)] = 10_000

    def undefined(self, fit: Fit, problem: Problem) -> str | None:
        return None if isinstance(fit.posterior, HasDensity) else NO_DENSITY

    def measure(self, fit: Fit, problem: Problem, run: EvaluationRun) -> list[Measurement]:
        x, indices = run.data.scored(self.observations)
        stream = run.generator(self.name, "posterior")
        parts = [self._weigh(fit, block, stream) for block in observation_blocks(x)]
        k, sizes = (torch.cat(column) for column in zip(*parts, strict=True))
        if bool(k.isinf().any()):
            raise Diverged(f"k_hat: a few weights are everything for {int(k.isinf().sum())} of {len(k)} observations")
        fitted = ~k.isnan()
        if not bool(fitted.any()):
            raise Diverged("k_hat: no observation has weights that differ beyond rounding, so there is no tail to fit")
        stderr = (1 + k[fitted].clamp(min=0)) / math.sqrt(tail_length(self.samples))
        settings = {
            "samples": self.samples,
            "without_a_tail": int((~fitted).sum()),
            "k_hat_above_0.7": float((k[fitted] > BELIEVABLE).double().mean()),
            "k_hat_max": float(k[fitted].max()),
            "ess_median": float(sizes.median()),
        }
        kept = indices[fitted.to(indices.device)]
        return [run.measurement("k_hat", k[fitted], stderr, "consistent", kept, unit="", settings=settings)]

    def _weigh(self, fit: Fit, x: Tensor, stream: torch.Generator) -> tuple[Tensor, Tensor]:
        """k-hat and effective sample size of a block of observations x (B, *E), two of shape (B,)."""
        posterior = fit.posterior
        if not isinstance(posterior, HasDensity):
            raise TypeError(NO_DENSITY)
        largest, total = StreamedLargest(tail_length(self.samples) + 1), StreamedLogMeanExp()
        for n in sample_blocks(x, self.samples):
            z, log_q = posterior.sample_and_log_prob(x, n, stream)
            log_w = fit.model.log_joint(x, z) - log_q
            largest.add(log_w)
            total.add(log_w)
        lost = int((~total.value().isfinite()).sum())
        if lost:
            raise Diverged(
                f"k_hat: weights are not finite, or all zero, for {lost} of a block of {len(x)} observations"
            )
        return torch.from_numpy(k_hat(largest.value())), total.effective_sample_size().cpu()


@hookimpl
def harness_evaluators() -> list[PSIS]:
    return [PSIS()]

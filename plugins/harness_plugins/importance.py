r"""log p(x) by importance sampling, from the same kind of proposal for every method, and what it owes to the draws.

.. math:: \log \hat p(x) = \log \frac{1}{K} \sum_{k=1}^K \frac{p(x, z_k)}{r(z_k|x)}, \quad z_k \sim r(z|x)

with r the posterior's per-x Gaussian, widened, mixed with the prior (`harness.estimators.DefensiveProposal`). A
posterior enters through two moments only, so that one without a density is scored exactly like one that has it.
A stochastic lower bound, by Jensen. Burda et al. 2016, Eq. 8, https://arxiv.org/abs/1509.00519

From the same draws: the bound against K, which still rises where draws are wanting, and Pareto k-hat, the shape of the
weights' tail. Above 0.7 neither the value nor its standard error can be believed, however many draws there are in
practice. Vehtari, Simpson, Gelman, Yao, Gabry 2024, https://arxiv.org/abs/1507.02646
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor

from harness import hookimpl, pareto
from harness.estimators import (
    BoundCurve,
    DefensiveProposal,
    StreamedBounds,
    StreamedLargest,
    observation_blocks,
    posterior_moments,
    sample_blocks,
)
from harness.evaluator import EvaluationRun, Evaluator, Measurement
from harness.method import Fit
from harness.pareto import BELIEVABLE, k_hat, tail_length
from harness.problem import Problem


@dataclass(frozen=True, kw_only=True)
class Importance(Evaluator):
    """`log_likelihood` from exactly ``samples`` draws per observation, and how far it is to be believed.

    Memory does not depend on ``samples``, but for the tail of the weights: 3 sqrt(samples) an observation.

    Args:
        observations: How many of the fixed scored test observations.
        samples: K, the draws from the proposal per observation.
        widening: Factor on the posterior's standard deviations.
        prior_weight: Part of the draws that come from the prior.
        moment_samples: Draws from the posterior, apart from the K, that its moments are computed from.
    """

    modules: ClassVar[tuple[ModuleType, ...]] = (pareto,)

    name: str = "importance"
    observations: PositiveInt = 1000
    samples: Annotated[int, Field(ge=2)] = 1000
    widening: PositiveFloat = 1.2
    prior_weight: Annotated[float, Field(ge=0, lt=1)] = 0.1
    moment_samples: Annotated[int, Field(ge=2)] = 512

    def measure(self, fit: Fit, problem: Problem, run: EvaluationRun) -> list[Measurement]:
        x, indices = run.data.scored(self.observations)
        streams = run.generator("start", "moments"), run.generator(self.name, "proposal")
        parts: list[_Weighed] = []
        done = 0
        for block in observation_blocks(x):

            def tell(part: float, facts: str, done: int = done, n: int = len(block)) -> None:
                run.progress((done + part * n) / len(x), facts)

            parts.append(self._weigh(fit, block, *streams, tell))
            done += len(block)
        weighed = _joined(parts)
        return [
            run.measurement(
                "log_likelihood",
                weighed.curve.bound[-1],
                weighed.curve.stderr[-1],
                "stochastic lower bound",
                indices,
                settings=self._settings(weighed),
                traces=_traces(weighed),
            )
        ]

    def _weigh(
        self,
        fit: Fit,
        x: Tensor,
        moments: torch.Generator,
        proposals: torch.Generator,
        tell: Callable[[float, str], None],
    ) -> _Weighed:
        """Draw for a block of observations x (B, *E)."""
        mean, sd = posterior_moments(fit.posterior, x, self.moment_samples, moments)
        proposal = DefensiveProposal(fit.model, mean, sd, self.widening, self.prior_weight)
        bounds, largest, undefined = StreamedBounds(), StreamedLargest(tail_length(self.samples) + 1), 0.0
        for n in sample_blocks(x, self.samples):
            z, log_r = proposal.sample_and_log_prob(n, proposals)
            log_w = fit.model.log_joint(x, z) - log_r
            undefined += float(log_w.isnan().sum())
            log_w = torch.where(log_w.isnan(), -math.inf, log_w)  # still a lower bound, as if p(x, z) were 0 there
            bounds.add(log_w)
            largest.add(log_w)
            tell(bounds.total.n / self.samples, f"log p(x) {float(bounds.total.value().mean()):.3f}")
        sizes = bounds.total.effective_sample_size()
        return _Weighed(bounds.curve(), sizes, k_hat(largest.value()), undefined)

    def _settings(self, weighed: _Weighed) -> Mapping[str, Any]:
        sizes, curve = weighed.sizes, weighed.curve
        return {
            "samples": self.samples,
            "widening": self.widening,
            "prior_weight": self.prior_weight,
            "moment_samples": self.moment_samples,
            "ess_min": float(sizes.min()),
            "ess_median": float(sizes.median()),
            "ess_mean": float(sizes.mean()),
            "curve": _finite(dict(zip(map(str, curve.k), curve.bound.mean(1).tolist(), strict=True))),
            **_summary(weighed.k_hat),
            **({"undefined_draws": weighed.undefined} if weighed.undefined else {}),
        }


@dataclass(frozen=True, eq=False)
class _Weighed:
    """What the weights of N observations say: the bounds, effective sample sizes (N,) and k-hat (N,).

    Args:
        undefined: How many draws have a log p(x, z) that is not a number.
    """

    curve: BoundCurve
    sizes: Tensor
    k_hat: np.ndarray
    undefined: float


def _joined(parts: Sequence[_Weighed]) -> _Weighed:
    curves = [part.curve for part in parts]
    return _Weighed(
        BoundCurve(
            curves[0].k,
            torch.cat([curve.bound for curve in curves], dim=1),
            torch.cat([curve.stderr for curve in curves], dim=1),
        ),
        torch.cat([part.sizes for part in parts]),
        np.concatenate([part.k_hat for part in parts]),
        sum(part.undefined for part in parts),
    )


def _traces(weighed: _Weighed) -> dict[str, np.ndarray]:
    curve = weighed.curve
    traces = {"k": np.array(curve.k), "bound": curve.bound.cpu().numpy(), "bound_stderr": curve.stderr.cpu().numpy()}
    return traces if np.isnan(weighed.k_hat).all() else {**traces, "k_hat": weighed.k_hat}


def _summary(k: np.ndarray) -> dict[str, float]:
    """Of the observations that have a k-hat; nothing if none has."""
    known = k[~np.isnan(k)]
    if not len(known):
        return {}
    numbers = {"k_hat_median": np.median(known), "k_hat_max": known.max(), "k_hat_above_0.7": (k > BELIEVABLE).mean()}
    return _finite({name: float(number) for name, number in numbers.items()})


def _finite(numbers: dict[str, float]) -> dict[str, float]:
    return {name: number for name, number in numbers.items() if math.isfinite(number)}


@hookimpl
def harness_evaluators() -> list[Importance]:
    return [Importance()]

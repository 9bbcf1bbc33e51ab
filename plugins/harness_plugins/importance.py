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
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor

from harness import hookimpl
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
from harness.problem import Problem

SHORTEST_TAIL = 5  # draws; the least that the fit of a tail asks for
BELIEVABLE = 0.7  # k-hat
WIDEST = 600.0  # nats within a tail, whose weights are still well above the smallest double


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
        bounds, largest = StreamedBounds(), StreamedLargest(tail_length(self.samples) + 1)
        for n in sample_blocks(x, self.samples):
            z, log_r = proposal.sample_and_log_prob(n, proposals)
            log_w = fit.model.log_joint(x, z) - log_r
            bounds.add(log_w)
            largest.add(log_w)
            tell(bounds.total.n / self.samples, f"log p(x) {float(bounds.total.value().mean()):.3f}")
        return _Weighed(bounds.curve(), bounds.total.effective_sample_size(), k_hat(largest.value()))

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
        }


@dataclass(frozen=True, eq=False)
class _Weighed:
    """What the weights of N observations say: the bounds, effective sample sizes (N,) and k-hat (N,)."""

    curve: BoundCurve
    sizes: Tensor
    k_hat: np.ndarray


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


def tail_length(samples: int) -> int:
    """How many of the largest weights make up their tail. Vehtari et al. 2024, Section 2.4."""
    return int(min(samples / 5, 3 * math.sqrt(samples)))


def k_hat(largest: Tensor) -> np.ndarray:
    """Shape of the generalised Pareto distribution that fits the tail of the weights.

    Args:
        largest: The M largest logarithms of weights and the one after them, in descending order, shape (M + 1, N).

    Returns:
        Shape (N,). nan where there is no tail to fit: too few draws, or a quarter of the tail at its lower end.
        inf where the spread is beyond double precision, so that few weights are everything.
    """
    # Not at the top: scipy, which it brings, takes a second or two that `harness --help` has no use for.
    from arviz_stats.base.array import array_stats

    log_w = largest.double().cpu().numpy()
    tail = len(log_w) - 1
    k = np.full(log_w.shape[1], np.nan)
    if tail < SHORTEST_TAIL:
        return k
    with np.errstate(invalid="ignore"):  # no weight but zeros
        log_w = log_w - log_w[0]
    w = np.exp(log_w)
    # The fit scales the tail by its lower quartile (Zhang and Stephens 2009, https://doi.org/10.1198/tech.2009.08017).
    # Where that is zero the library gives its prior's mean as if it were a result.
    quartile = tail - int(tail / 4 + 0.5)
    k[log_w[quartile] < -WIDEST] = np.inf
    fits = (log_w[quartile] >= -WIDEST) & (w[quartile] > w[-1])
    if fits.any():
        # The library takes the tail's length from the number of draws S and their efficiency e: min(S/5, 3 sqrt(S/e)).
        # With S = 5 M and e = 1/M that is M; what lies below the threshold does not enter the fit.
        draws = np.concatenate([w[:, fits], np.repeat(w[-1:, fits], 4 * tail - 1, axis=0)])
        chains = draws.T[:, None]  # one for each observation
        k[fits] = array_stats.pareto_khat(chains, r_eff=1 / tail, tail="right")
    return k


@hookimpl
def harness_evaluators() -> list[Importance]:
    return [Importance()]

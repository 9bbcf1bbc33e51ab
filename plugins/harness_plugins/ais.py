r"""log p(x) by annealed importance sampling, from the same kind of start and with frozen kernels for every method.

.. math:: \log \hat p(x) = \log \frac{1}{S} \sum_{s=1}^S w_s \quad \text{along} \quad q_0(z|x)^{1-\beta} p(x, z)^\beta

A stochastic lower bound (see `harness.annealing`). Neal 2001, https://arxiv.org/abs/physics/9803008; Wu, Burda,
Salakhutdinov, Grosse 2017, https://arxiv.org/abs/1611.04273
"""

from __future__ import annotations

from dataclasses import dataclass

from harness import hookimpl
from harness.annealed import AnnealedEvaluator
from harness.evaluator import EvaluationRun, Measurement
from harness.method import Fit
from harness.problem import Problem, ScoredSplit


@dataclass(frozen=True, kw_only=True)
class AIS(AnnealedEvaluator):
    """`log_likelihood` of any model, whatever its prior, given any posterior that can be sampled.

    Args:
        split: Which observations are scored: ``test``, or ``validation``, to choose settings by.
    """

    name: str = "ais"
    split: ScoredSplit = "test"

    def undefined(self, fit: Fit, problem: Problem) -> str | None:
        return self.unstartable(fit)

    def measure(self, fit: Fit, problem: Problem, run: EvaluationRun) -> list[Measurement]:
        def told(part: float, acceptance: float, running: float) -> None:
            run.progress(part, f"acceptance {acceptance:.2f}, log p(x) so far {running:.2f}")

        weights = self.annealed(fit, run, told, self.split)
        estimate, indices = weights.estimate(), run.data.scored(self.observations, self.split)[1]
        return [
            run.measurement(
                "log_likelihood",
                estimate.value(),
                estimate.stderr(),
                "stochastic lower bound",
                indices,
                split=self.split,
                settings={**self.settings(), **weights.diagnostics()},
                traces=weights.traces(),
            )
        ]


@hookimpl
def harness_evaluators() -> list[AIS]:
    return [AIS()]

r"""The reconstruction cost E_q[-log p(x|z)] of a posterior, in nats: it needs nothing but draws."""

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
from harness.problem import Problem


@dataclass(frozen=True, kw_only=True)
class Reconstruction(Evaluator):
    """`reconstruction`: the mean of -log p(x|z) over draws from q(z|x); lower is better.

    Args:
        observations: How many of the fixed scored test observations.
        samples: Draws of z per observation.
    """

    name: str = "reconstruction"
    observations: PositiveInt = 1000
    samples: Annotated[int, Field(ge=2)] = 100

    def measure(self, fit: Fit, problem: Problem, run: EvaluationRun) -> list[Measurement]:
        x, indices = run.data.scored(self.observations)
        stream = run.generator(self.name, "posterior")

        def terms(x: Tensor, n: int) -> Mapping[str, Tensor]:
            return {"reconstruction": -fit.model.log_likelihood(x, fit.posterior.sample(x, n, stream))}

        values, stderrs = posterior_means(x, self.samples, terms)["reconstruction"]
        settings = {"samples": self.samples}
        return [run.measurement("reconstruction", values, stderrs, "unbiased", indices, settings=settings)]


@hookimpl
def harness_evaluators() -> list[Reconstruction]:
    return [Reconstruction()]

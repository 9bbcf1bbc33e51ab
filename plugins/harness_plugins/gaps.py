r"""Why a posterior falls short of p(z|x): its family is too small, or the amortised member is not the family's best.

.. math:: KL(q(z|x) \| p(z|x)) = \underbrace{\log p(x) - L[q^*]}_{\text{approximation gap}}
          + \underbrace{L[q^*] - L[q]}_{\text{amortisation gap}}, \qquad q^* = \arg\max_{q' \in \mathcal{Q}} L[q']

with L the evidence lower bound of one observation x and q* the best member of the family for that x alone. Cremer, Li,
Duvenaud 2018, Eq. 5, https://arxiv.org/abs/1801.03558

What is found in the place of q* is at best q* itself, and AIS errs low, so that

================== ============================ ================================================
log p(x)           known to the model           by AIS, a stochastic lower bound
================== ============================ ================================================
approximation gap  stochastic upper bound       consistent: its parts err in opposite directions
amortisation gap   stochastic lower bound       stochastic lower bound
sum                unbiased                     stochastic lower bound
================== ============================ ================================================

An implicit posterior has the sum alone, with the stochastic upper bound on its ELBO that `implicit` gives: whatever
log p(x) is, a stochastic lower bound.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor
from torch.optim.lr_scheduler import LinearLR
from torch.optim.swa_utils import AveragedModel

from harness import discrimination, hookimpl
from harness.annealed import AnnealedEvaluator
from harness.estimators import observation_blocks, posterior_means, sample_blocks
from harness.evaluator import EvaluationRun, Kind, Measurement
from harness.method import Fit
from harness.model import HasClosedForm, HasEvidence, LatentModel
from harness.posterior import NO_FRESH_DRAWS, HasChains, HasDensity, HasLocalFamily, LocalFamily
from harness.problem import Problem

Means = Mapping[str, tuple[Tensor, Tensor]]
"""By name, means and standard errors per observation, both of shape (N,), float64."""


@dataclass(frozen=True, eq=False)
class LogLikelihood:
    """log p(x), with its standard error, both of shape (N,), and where it comes from."""

    value: Tensor
    stderr: Tensor
    exact: bool
    settings: Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class ELBOs:
    """ELBOs of a posterior, and where they come from.

    Args:
        means: ``amortised``, and where there is a local family ``optimised`` and ``difference``.
        upper: The amortised one is a stochastic upper bound, else it is unbiased.
    """

    means: Means
    settings: Mapping[str, Any]
    traces: Mapping[str, np.ndarray] = field(default_factory=dict)
    upper: bool = False


@dataclass(frozen=True, kw_only=True)
class Gaps(AnnealedEvaluator):
    """`approximation_gap`, `amortisation_gap` and `kl_to_posterior`, their sum, nats.

    Posteriors without a local family have the sum alone. log p(x) is what the model knows, else it is from annealed
    importance sampling: the settings besides those below are its own, and the same run serves `ais`.

    Args:
        steps: Of the optimisation of q*, all observations at once.
        samples: Draws per observation and step.
        lr: Adam's learning rate at the start, in units of the family's parameters; it falls linearly to zero.
        evaluation_samples: Draws per observation of either ELBO, and as many for the choice between the two.
        discriminator_steps: An implicit posterior's ELBO is bounded as by `implicit` with so many steps.
    """

    modules: ClassVar[tuple[ModuleType, ...]] = (*AnnealedEvaluator.modules, discrimination)

    name: str = "gaps"
    steps: Annotated[int, Field(ge=2)] = 500
    samples: PositiveInt = 20
    lr: PositiveFloat = 0.1
    evaluation_samples: Annotated[int, Field(ge=2)] = 1000
    discriminator_steps: PositiveInt = discrimination.Check.steps

    def undefined(self, fit: Fit, problem: Problem) -> str | None:
        if isinstance(fit.posterior, HasChains):
            return NO_FRESH_DRAWS
        return None if isinstance(fit.model, HasEvidence) else self.unstartable(fit)

    def measure(self, fit: Fit, problem: Problem, run: EvaluationRun) -> list[Measurement]:
        x, indices = run.data.scored(self.observations)
        if isinstance(fit.posterior, HasLocalFamily):
            elbos = self._optimised(fit.model, fit.posterior, x, run)
        elif isinstance(fit.posterior, HasDensity):
            elbos = self._amortised(fit.model, fit.posterior, x, run)
        else:
            elbos = self._bounded(fit, run)
        log_p = self._log_likelihood(fit, x, run)
        kinds, settings = _kinds(log_p, elbos), {**elbos.settings, **log_p.settings}
        return [
            run.measurement(
                metric,
                *values,
                kinds[metric],
                indices,
                settings=settings,
                traces=elbos.traces if metric == "amortisation_gap" else {},
            )
            for metric, values in _gaps(log_p, elbos.means).items()
        ]

    def _log_likelihood(self, fit: Fit, x: Tensor, run: EvaluationRun) -> LogLikelihood:
        if isinstance(fit.model, HasEvidence):
            log_p = fit.model.log_evidence(x).double()
            method = "closed form" if isinstance(fit.model, HasClosedForm) else "known to the model"
            return LogLikelihood(log_p, torch.zeros_like(log_p), True, {"log_likelihood": method})

        def told(part: float, acceptance: float, running: float) -> None:
            run.progress(0.5 + part / 2, f"acceptance {acceptance:.2f}, log p(x) so far {running:.2f}")

        weights = self.annealed(fit, run, told)
        estimate = weights.estimate()
        settings = {"log_likelihood": "annealed importance sampling", **self.settings(), **weights.diagnostics()}
        return LogLikelihood(estimate.value(), estimate.stderr(), False, settings)

    def _bounded(self, fit: Fit, run: EvaluationRun) -> ELBOs:
        """The bound on the ELBO of a posterior that can only be sampled."""

        def told(part: float, loss: float) -> None:
            run.progress(part / 2, f"discriminator's loss {loss:.4f}")

        check = discrimination.Check(observations=self.observations, steps=self.discriminator_steps)
        found = discrimination.checked(fit, check, run, told)
        settings = {**found.settings(check), "elbo": "NWJ, from a Gaussian with the moments of q"}
        return ELBOs({"amortised": found.means["elbo_bound"]}, settings, upper=True)

    def _amortised(self, model: LatentModel, posterior: HasDensity, x: Tensor, run: EvaluationRun) -> ELBOs:
        """The ELBO of a posterior whose density is known."""
        stream = run.generator(self.name, "evaluation")

        def terms(x: Tensor, n: int) -> Mapping[str, Tensor]:
            z, log_q = posterior.sample_and_log_prob(x, n, stream)
            return {"amortised": model.log_joint(x, z) - log_q}

        settings = {"evaluation_samples": self.evaluation_samples}
        return ELBOs(posterior_means(x, self.evaluation_samples, terms), settings)

    def _optimised(self, model: LatentModel, posterior: HasLocalFamily, x: Tensor, run: EvaluationRun) -> ELBOs:
        """The ELBOs of a posterior and of the best members of its family, with common noise."""
        blocks, noise = observation_blocks(x), run.generator(self.name, "optimisation")
        choosing, evaluating = (_Twins(run, self.name, purpose) for purpose in ("choice", "evaluation"))
        means: list[Means] = []
        trace, kept = torch.zeros(self.steps, dtype=torch.float64, device=x.device), 0
        for i, block in enumerate(blocks):

            def told(step: int, elbo: float, done: int = i) -> None:
                run.progress((done + step / self.steps) / len(blocks) / 2, f"optimised ELBO so far {elbo:.2f}")

            start = posterior.local(block)
            best, elbos = optimised(model, block, start, self.steps, self.samples, self.lr, noise, told)
            choice = elbos_of(model, block, start, best, self.evaluation_samples, choosing)
            worse = ~(choice["difference"][0] > 0)  # one that is not a number is worse too
            _restore(best, start, worse)
            means.append(elbos_of(model, block, start, best, self.evaluation_samples, evaluating))
            trace += elbos * (len(block) / len(x))
            kept += int(worse.sum())
        settings = {
            "evaluation_samples": self.evaluation_samples,
            "steps": self.steps,
            "samples": self.samples,
            "lr": self.lr,
            "kept_amortised": kept / len(x),
            "rise_at_end": _rise_at_end(trace),
        }
        return ELBOs(_joined(means), settings, {"optimisation": trace.cpu().numpy()})


class _Twins:
    """Two random streams with the same numbers, for two members of a family that are compared."""

    def __init__(self, run: EvaluationRun, evaluator: str, purpose: str) -> None:
        self.one, self.other = run.generator(evaluator, purpose), run.generator(evaluator, purpose)


def optimised(
    model: LatentModel,
    x: Tensor,
    start: LocalFamily,
    steps: int,
    samples: int,
    lr: float,
    noise: torch.Generator,
    told: Callable[[int, float], None] = lambda step, elbo: None,
) -> tuple[LocalFamily, Tensor]:
    """Members of a family with the highest ELBO for each observation of a block x (B, *E), from where they start.

    Adam on fresh draws, with a learning rate that falls linearly to zero; the result is the mean of the parameters over
    the second half of the steps (Polyak and Juditsky 1992, https://doi.org/10.1137/0330046). On linear-Gaussian models
    of 2 to 50 dimensions, from starts as bad as 3 standard deviations off, that leaves half of the error of the last
    parameters, and several times less for the worst observation.

    Args:
        told: Of the step and the mean ELBO there, twenty times.

    Returns:
        The members, and the mean ELBO over observations at each step, shape (steps,), float64.
    """
    members = copy.deepcopy(start)
    parameters = list(members.parameters())
    optimiser = torch.optim.Adam(parameters, lr=lr, fused=True)
    rate, average = LinearLR(optimiser, 1.0, 0.0, total_iters=steps), AveragedModel(members)
    trace = torch.zeros(steps, dtype=torch.float64, device=x.device)
    for step in range(steps):
        optimiser.zero_grad()
        for n in sample_blocks(x, samples):
            with torch.enable_grad():
                z, log_q = members.sample_and_log_prob(n, noise)
                elbo = (model.log_joint(x, z) - log_q).sum() / samples
                (-elbo).backward(inputs=parameters)
            trace[step] += elbo.detach() / len(x)
        optimiser.step()
        rate.step()
        if step >= steps // 2:
            average.update_parameters(members)
        if (step + 1) % max(1, steps // 20) == 0:
            told(step + 1, float(trace[step]))
    members.load_state_dict(average.module.state_dict())
    return members, trace


def elbos_of(
    model: LatentModel, x: Tensor, start: LocalFamily, best: LocalFamily, samples: int, streams: _Twins
) -> Means:
    """ELBOs of two members for each observation of a block x (B, *E) with the same noise, and their difference."""

    def terms(x: Tensor, n: int) -> Mapping[str, Tensor]:
        drawn = (start.sample_and_log_prob(n, streams.one), best.sample_and_log_prob(n, streams.other))
        amortised, optimal = ((model.log_joint(x, z) - log_q).double() for z, log_q in drawn)
        return {"amortised": amortised, "optimised": optimal, "difference": optimal - amortised}

    return posterior_means(x, samples, terms)


def _restore(members: LocalFamily, start: LocalFamily, rows: Tensor) -> None:
    """Put the members of some observations back to where they started: rows (B,)."""
    for moved, first in zip(members.parameters(), start.parameters(), strict=True):
        moved.data[rows] = first.data[rows]


def _joined(blocks: list[Means]) -> Means:
    return {
        name: (torch.cat([block[name][0] for block in blocks]), torch.cat([block[name][1] for block in blocks]))
        for name in blocks[0]
    }


def _kinds(log_p: LogLikelihood, elbos: ELBOs) -> dict[str, Kind]:
    """See the table above."""
    unbiased = log_p.exact and not elbos.upper
    return {
        "approximation_gap": "stochastic upper bound" if log_p.exact else "consistent",
        "amortisation_gap": "stochastic lower bound",
        "kl_to_posterior": "unbiased" if unbiased else "stochastic lower bound",
    }


def _gaps(log_p: LogLikelihood, means: Means) -> Means:
    """The gaps that the ELBOs at hand give; errors of log p(x) and of ELBOs are independent."""

    def below(name: str) -> tuple[Tensor, Tensor]:
        value, stderr = means[name]
        return log_p.value - value, torch.hypot(log_p.stderr, stderr)

    if "optimised" not in means:
        return {"kl_to_posterior": below("amortised")}
    return {
        "approximation_gap": below("optimised"),
        "amortisation_gap": means["difference"],
        "kl_to_posterior": below("amortised"),
    }


def _rise_at_end(trace: Tensor) -> float:
    """By how much the ELBO rose from one to the other of the last two tenths of the steps, nats: zero at an optimum."""
    tenth = max(1, len(trace) // 10)
    return float(trace[-tenth:].mean() - trace[-2 * tenth : -tenth].mean())


@hookimpl
def harness_evaluators() -> list[Gaps]:
    return [Gaps()]

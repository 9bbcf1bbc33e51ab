r"""Bidirectional Monte Carlo: how far annealed importance sampling with given settings is from log p(x).

.. math:: E[\log \hat p_{forward}(x)] \le \log p(x) \le E[-\log \hat p^{-1}_{reverse}(x)]

on observations x that are simulated from the fitted model together with their z, which is an exact draw of p(z|x): the
reverse chains set out from it. Both directions use the same kernels, tuned without a look at that z. The gap bounds
the error of both on simulated x; that it is no larger on real ones is an assumption, which no certificate covers.
Grosse, Ghahramani, Adams 2015, https://arxiv.org/abs/1511.02543; Grosse, Ancha, Roy 2016,
https://arxiv.org/abs/1606.02275
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from pydantic import PositiveFloat
from torch import Tensor

from harness import hookimpl
from harness.annealed import AnnealedEvaluator
from harness.annealing import OnMove
from harness.evaluator import EvaluationRun, Kind, Measurement
from harness.method import Fit
from harness.model import CanSimulate, HasEvidence
from harness.problem import Problem, loaded

SIMULATED = "simulated"
GAP = "stochastic upper bound on log p(x) less the forward estimate, for simulated x"


@dataclass(frozen=True, kw_only=True)
class BDMC(AnnealedEvaluator):
    """`bdmc_gap` on simulated observations, and the two bounds whose distance it is; the truth where it is known.

    Where there is one observation only, from the prior alone: any other start is for that one.

    Args:
        threshold: Gap above which estimates with these settings are marked untrusted, nats.
    """

    name: str = "bdmc"
    threshold: PositiveFloat = 1.0

    def undefined(self, fit: Fit, problem: Problem) -> str | None:
        if not isinstance(fit.model, CanSimulate):
            return "model cannot simulate observations"
        if self.start != "prior" and len(loaded(problem).train) == 1:
            return f"start={self.start} belongs to the observation that there is, and others are simulated; use prior"
        return self.unstartable(fit)

    def measure(self, fit: Fit, problem: Problem, run: EvaluationRun) -> list[Measurement]:
        if not isinstance(fit.model, CanSimulate):
            raise TypeError("model cannot simulate observations")
        simulation = run.generator(self.name, "simulation")
        z = fit.model.sample_prior(self.observations, simulation)
        x = fit.model.sample_observation(z, simulation)
        path = self.path(fit, x, run)
        kernels = self.kernels(path, run.generator(self.name, "pilot"))
        forward = path.forward(kernels, run.generator(self.name, "forward"), _told(run, 0.0))
        reverse = path.reverse(kernels, z, run.generator(self.name, "reverse"), _told(run, 0.5))
        lower, upper = forward.estimate(), reverse.estimate()
        error = torch.hypot(lower.stderr(), upper.stderr())
        settings = {**self.settings(), **forward.diagnostics(), "threshold": self.threshold}
        settings["acceptance_reverse"] = float(reverse.acceptance.mean())
        indices = torch.arange(len(x))
        measured: list[tuple[str, Tensor, Tensor, Kind, str]] = [
            ("bdmc_gap", -upper.value() - lower.value(), error, "stochastic upper bound", GAP),
            ("simulated_log_likelihood", lower.value(), lower.stderr(), "stochastic lower bound", ""),
            ("simulated_log_likelihood_upper", -upper.value(), upper.stderr(), "stochastic upper bound", ""),
        ]
        if isinstance(fit.model, HasEvidence):
            exact = fit.model.log_evidence(x).double()
            measured.append(("simulated_log_likelihood_exact", exact, torch.zeros_like(exact), "exact", ""))
        return [
            run.measurement(metric, value, stderr, kind, indices, bounds=bounds, split=SIMULATED, settings=settings)
            for metric, value, stderr, kind, bounds in measured
        ]


def _told(run: EvaluationRun, done: float) -> OnMove:
    def told(part: float, acceptance: float, running: float) -> None:
        run.progress(done + part / 2, f"{'reverse' if done else 'forward'}, acceptance {acceptance:.2f}")

    return told


@hookimpl
def harness_evaluators() -> list[BDMC]:
    return [BDMC()]

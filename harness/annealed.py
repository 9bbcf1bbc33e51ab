"""What evaluators that anneal have in common: their settings, the start of the path, and the estimate of log p(x)."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor

from harness import annealing, hmc, pull_back, starts
from harness.annealing import Annealing, Forces, Kernels, OnMove, Schedule, Weights, force_precision
from harness.estimators import observation_blocks, posterior_moments
from harness.evaluator import EvaluationRun, Evaluator
from harness.method import Fit
from harness.posterior import HasPointDensity
from harness.problem import ScoredSplit
from harness.starts import NO_DENSITY, GaussianStart, PosteriorStart, PriorStart, Start

StartName = Literal["moments", "prior", "q"]

PRIOR_DRAWS = 4096  # that a prior's scale is estimated from


@dataclass(frozen=True, kw_only=True)
class AnnealedEvaluator(Evaluator):
    """Settings of annealed importance sampling, and the estimate of log p(x) that follows from them.

    Args:
        observations: How many of the fixed scored test observations.
        chains: S, independent chains for each observation.
        temperatures: T, the number of intervals between beta = 0 and 1.
        leapfrog: Leapfrog steps of a transition.
        schedule: ``sigmoid`` (fine steps at both ends) or ``linear``.
        start: ``moments`` (a Gaussian with the fitted posterior's per-x mean and widened scale), ``prior``, or ``q``
            (the posterior itself, where its density is known at every point).
        widening: Factor on the posterior's standard deviations; for ``moments``.
        moment_samples: Draws from the posterior that its moments are computed from.
        acceptance: What the step sizes are tuned to; 0.65 is best for many dimensions (Beskos et al. 2013,
            https://arxiv.org/abs/1001.4460).
        memory_mib: What chains and gradients may take; more observations are worked on in blocks.
        forces: Precision of the gradients within a trajectory: ``full``, ``bf16``, or ``auto``, which is bf16 for a
            large decoder in float32 where the processor multiplies in it. The estimate is valid with either, see
            `harness.hmc`; the record says which it was.
    """

    by_default: ClassVar[bool] = False
    modules: ClassVar[tuple[ModuleType, ...]] = (annealing, hmc, pull_back, starts)

    observations: PositiveInt = 100
    chains: Annotated[int, Field(ge=2)] = 16
    temperatures: Annotated[int, Field(ge=2)] = 1000
    leapfrog: PositiveInt = 10
    schedule: Schedule = "sigmoid"
    start: StartName = "moments"
    widening: PositiveFloat = 1.2
    moment_samples: Annotated[int, Field(ge=2)] = 512
    acceptance: Annotated[float, Field(gt=0, lt=1)] = 0.65
    memory_mib: PositiveInt = 1024
    forces: Forces = "auto"

    def unstartable(self, fit: Fit) -> str | None:
        """Why a path cannot start where it is asked to, or None."""
        implicit = self.start == "q" and not isinstance(fit.posterior, HasPointDensity)
        return NO_DENSITY if implicit else None

    def path(self, fit: Fit, x: Tensor, run: EvaluationRun) -> Annealing:
        """The path for observations x (N, *E)."""
        start, forces = self._start(fit, x, run), force_precision(self.forces, fit.model, run.dtype, run.device)
        return Annealing(fit.model, x, start, self.chains, self.leapfrog, self.memory_mib * 2**20, forces)

    def _start(self, fit: Fit, x: Tensor, run: EvaluationRun) -> Start:
        stream = run.generator("start", self.start)
        if self.start == "prior":
            scale = fit.model.sample_prior(PRIOR_DRAWS, stream).std(0)
            return PriorStart(scale.expand(len(x), -1), fit.model)
        moments = [
            posterior_moments(fit.posterior, block, self.moment_samples, stream) for block in observation_blocks(x)
        ]
        mean, sd = (torch.cat(part) for part in zip(*moments, strict=True))
        if self.start == "q":
            return PosteriorStart(sd, fit.posterior, x)
        return GaussianStart(self.widening * sd, mean)

    def annealed(
        self, fit: Fit, run: EvaluationRun, told: OnMove = lambda *facts: None, split: ScoredSplit = "test"
    ) -> Weights:
        """Weights of the scored observations; all evaluators of a fit with these settings share one run."""
        key = ("annealed", split, self.observations, *self.settings().values())
        return run.once(key, lambda: self._annealed(fit, run.data.scored(self.observations, split)[0], run, told))

    def _annealed(self, fit: Fit, x: Tensor, run: EvaluationRun, told: OnMove) -> Weights:
        path = self.path(fit, x, run)
        kernels = self.kernels(path, run.generator("ais", "pilot"))
        return path.forward(kernels, run.generator("ais", "chains"), told)

    def kernels(self, path: Annealing, stream: torch.Generator) -> Kernels:
        return path.tuned(self.schedule, self.temperatures, self.acceptance, stream)

    def settings(self) -> dict[str, Any]:
        """What a certificate must have in common with what it certifies."""
        return {
            "chains": self.chains,
            "temperatures": self.temperatures,
            "leapfrog": self.leapfrog,
            "schedule": self.schedule,
            "start": self.start,
            "widening": self.widening,
            "moment_samples": self.moment_samples,
            "target_acceptance": self.acceptance,
            "forces": self.forces,
        }

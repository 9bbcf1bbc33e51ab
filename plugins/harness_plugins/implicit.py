r"""Implicit posteriors, checked independently of their own adversary: an estimate and two bounds, from draws alone.

.. math:: E_q[\log p(x, z_0)] - E \log \frac{1}{K+1} \sum_{k=0}^K N(z_0; \psi_k, \sigma^2 s(x)^2)
          \le \mathrm{ELBO}(q_\sigma), \qquad \mathrm{ELBO}(q) \le E_q[\log p(x|z)] - \mathrm{NWJ}(x)

(a) `adversarial_elbo`, `adversarial_kl`: a fresh, larger discriminator, trained on new draws at the scored observations
themselves, in the place of the method's own. Where the two disagree, the method's own was not optimal.
Mescheder, Nowozin, Geiger 2017, https://arxiv.org/abs/1701.04722

(b) `kl_to_prior`, `elbo`: with that discriminator the lower bound of Nguyen, Wainwright, Jordan 2010 on KL(q || p(z)),
https://arxiv.org/abs/0809.0853, hence an upper bound on the ELBO (`harness.discrimination.estimate`).

(c) `smoothed_elbo`: the semi-implicit lower bound of Yin and Zhou 2018, https://arxiv.org/abs/1805.11183, for q
smoothed by Gaussian noise (the left side above: psi_0 ... psi_K from q, z_0 from the Gaussian around psi_0).
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from types import ModuleType
from typing import Annotated, ClassVar

import torch
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor

from harness import discrimination, hookimpl
from harness.discrimination import Check, Contrast
from harness.estimators import BLOCK_ELEMENTS, StreamedMean, sample_blocks
from harness.evaluator import EvaluationRun, Evaluator, Measurement
from harness.method import Fit
from harness.model import LOG_2PI, LatentModel
from harness.posterior import NO_FRESH_DRAWS, HasChains, Posterior
from harness.problem import Problem

NOISE_SCALES = (0.02, 0.03, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 0.7, 1.0)
"""What the noise's scale is chosen from, in standard deviations of q(z|x)."""

VACUOUS = 5.0
"""A lower bound so many nats below the upper one says nothing."""


@dataclass(frozen=True, kw_only=True)
class Implicit(Evaluator):
    """Three checks of a posterior that need only its draws; defined for every posterior.

    Args:
        observations: How many of the fixed scored test observations.
        samples: Draws of z per observation for each of the expectations.
        moment_samples: Draws per observation for q's moments, which standardise it.
        steps, batch_size, lr: Training of the discriminator, see `harness.discrimination.Training`; the defaults are
            those of `harness.discrimination.Check`.
        width, blocks: Size of the discriminator, a residual network on x and z.
        components: K, the further draws of q that one of the smoothed posterior's is compared with.
        repetitions: Independent sets of K + 1 draws; the ``samples`` are spread over them.
        validation: How many validation observations choose the noise's scale.
    """

    by_default: ClassVar[bool] = False
    modules: ClassVar[tuple[ModuleType, ...]] = (discrimination,)

    name: str = "implicit"
    observations: PositiveInt = Check.observations
    samples: Annotated[int, Field(ge=2)] = Check.samples
    moment_samples: Annotated[int, Field(ge=2)] = Check.moment_samples
    steps: PositiveInt = Check.steps
    batch_size: PositiveInt = Check.batch_size
    lr: PositiveFloat = Check.lr
    width: PositiveInt = Check.width
    blocks: PositiveInt = Check.blocks
    components: PositiveInt = 1000
    repetitions: Annotated[int, Field(ge=2)] = 10
    validation: PositiveInt = 50

    def undefined(self, fit: Fit, problem: Problem) -> str | None:
        return NO_FRESH_DRAWS if isinstance(fit.posterior, HasChains) else None

    def measure(self, fit: Fit, problem: Problem, run: EvaluationRun) -> list[Measurement]:
        _, indices = run.data.scored(self.observations)
        found = discrimination.checked(
            fit, self._check, run, lambda part, loss: run.progress(0.8 * part, f"discriminator's loss {loss:.4f}")
        )
        means, settings = found.means, found.settings(self._check)
        bounded = {**settings, "bound": "NWJ, from a Gaussian with the moments of q"}
        estimate, upper = "density ratio", "stochastic upper bound"
        traces = {"loss": found.losses.double().cpu().numpy()}
        elbo = run.measurement("elbo", *means["elbo_bound"], upper, indices, settings=bounded)
        return [
            run.measurement("adversarial_elbo", *means["elbo"], estimate, indices, settings=settings, traces=traces),
            run.measurement("adversarial_kl", *means["kl"], estimate, indices, settings=settings),
            run.measurement("kl_to_prior", *means["kl_bound"], "stochastic lower bound", indices, settings=bounded),
            elbo,
            self._smoothed(fit, found.contrast, run, indices, elbo.value),
        ]

    @property
    def _check(self) -> Check:
        return Check(**{field.name: getattr(self, field.name) for field in dataclasses.fields(Check)})

    def _smoothed(self, fit: Fit, contrast: Contrast, run: EvaluationRun, indices: Tensor, upper: float) -> Measurement:
        scale = self._noise_scale(fit, run)
        values, stderrs = self._bound(fit, contrast, scale, self.repetitions, run.generator(self.name, "components"))
        settings = {
            "of": "q smoothed by Gaussian noise",
            "noise_scale": scale,
            "components": self.components,
            "samples": self.repetitions * self._each,
            "repetitions": self.repetitions,
            "vacuous": bool(values.mean() < upper - VACUOUS),
        }
        return run.measurement(
            "smoothed_elbo",
            values,
            stderrs,
            "stochastic lower bound",
            indices,
            bounds="stochastic lower bound on log_likelihood",
            settings=settings,
        )

    def _noise_scale(self, fit: Fit, run: EvaluationRun) -> float:
        """The scale with the highest bound on validation data; all are tried with the same draws, hence with few."""
        x, moments = run.data.validation[: self.validation], run.generator(self.name, "validation moments")
        contrast = Contrast.of(fit.posterior, x, self.moment_samples, moments)
        tried: dict[float, float] = {}
        for scale in NOISE_SCALES:
            stream = run.generator(self.name, "validation components")
            tried[scale] = float(self._bound(fit, contrast, scale, 2, stream)[0].mean())
        return max(tried, key=lambda scale: tried[scale])

    @property
    def _each(self) -> int:
        """Draws of the smoothed posterior with one set of K + 1 components."""
        return min(-(-self.samples // self.repetitions), self.components + 1)

    def _bound(
        self, fit: Fit, contrast: Contrast, scale: float, repetitions: int, stream: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        return semi_implicit_bound(
            fit.model, fit.posterior, contrast, scale, self.components, self._each, repetitions, stream
        )


@torch.no_grad()
def semi_implicit_bound(
    model: LatentModel,
    posterior: Posterior,
    contrast: Contrast,
    noise_scale: float,
    components: int,
    samples: int,
    repetitions: int,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    r"""Lower bound on the ELBO of q smoothed by Gaussian noise of ``noise_scale`` standard deviations of q(z|x).

    .. math:: E \log p(x, z_i) - \log \frac{1}{K+1} \sum_{k=0}^K N(z_i; \psi_k, \sigma^2 s(x)^2),
              \quad z_i \sim N(\psi_i, \sigma^2 s(x)^2)

    Yin and Zhou 2018, Theorem 1, https://arxiv.org/abs/1805.11183. The K + 1 components are exchangeable, so that any
    of them may have the place of psi_0: one set serves ``samples`` of them, i = 0 ... samples - 1. These share the set,
    so they are not independent; the error is that of the mean over independent sets.

    Args:
        components: K.
        samples: Draws of z for each set, at most K + 1.
        repetitions: Independent sets, at least 2.

    Returns:
        Bound and standard error per observation, two of shape (N,), float64, nats.
    """
    parts: list[StreamedMean] = []
    for at in contrast.blocks():
        mean = StreamedMean()
        for _ in range(repetitions):
            drawn = [posterior.sample(at.x, n, generator) for n in sample_blocks(at.x, components + 1)]
            psi = at.standardised(torch.cat(drawn))
            u = psi[:samples] + noise_scale * at.draws(samples, generator)
            z = at.mean + at.sd * u
            log_joint = torch.cat([model.log_joint(at.x, part) for part in z.split(list(sample_blocks(at.x, samples)))])
            log_q = log_mixture(u, psi, noise_scale) - at.sd.double().log().sum(-1)
            mean.add((log_joint - log_q).mean(0, keepdim=True))
        parts.append(mean)
    return torch.cat([mean.value() for mean in parts]), torch.cat([mean.stderr() for mean in parts])


def log_mixture(u: Tensor, psi: Tensor, sd: float) -> Tensor:
    """Log density at u (S, N, D) of the equal mixture of N(psi_k, sd^2 I), psi (K + 1, N, D): (S, N), nats.

    Squared distances as matrix products, in float64: where sd is small, they are small differences of large numbers.
    """
    u, psi = u.double() / sd, psi.double() / sd
    columns, offset = psi.permute(1, 2, 0), -0.5 * psi.square().sum(-1).T[:, None]
    parts = [
        torch.baddbmm(offset, part.transpose(0, 1), columns).logsumexp(-1).T
        for part in u.split(max(1, BLOCK_ELEMENTS // offset.numel()))
    ]
    constant = math.log(len(psi)) + u.shape[-1] * (math.log(sd) + 0.5 * LOG_2PI)
    return torch.cat(parts) - 0.5 * u.square().sum(-1) - constant


@hookimpl
def harness_evaluators() -> list[Implicit]:
    return [Implicit()]

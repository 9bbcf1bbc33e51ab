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

import math
from dataclasses import dataclass
from types import ModuleType
from typing import Annotated, ClassVar

import torch
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor

from harness import discrimination, hookimpl
from harness.discrimination import Contrast, Discriminator, Training
from harness.estimators import BLOCK_ELEMENTS, StreamedMean, sample_blocks
from harness.evaluator import EvaluationRun, Evaluator, Measurement
from harness.method import Fit
from harness.model import LOG_2PI, LatentModel
from harness.posterior import Posterior
from harness.problem import Problem
from harness.seeding import Streams

NOISE_SCALES = (0.02, 0.03, 0.05, 0.07, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0)
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
        steps, batch_size, lr: Training of the discriminator, see `harness.discrimination.Training`.
        width, blocks: Size of the discriminator, a residual network on x and z.
        components: K, the further draws of q that one of the smoothed posterior's is compared with.
        repetitions: Independent sets of K + 1 draws; the ``samples`` are spread over them.
        validation: How many validation observations choose the noise's scale.
    """

    by_default: ClassVar[bool] = False
    modules: ClassVar[tuple[ModuleType, ...]] = (discrimination,)

    name: str = "implicit"
    observations: PositiveInt = 100
    samples: Annotated[int, Field(ge=2)] = 500
    moment_samples: Annotated[int, Field(ge=2)] = 1000
    steps: PositiveInt = 600
    batch_size: PositiveInt = 128
    lr: PositiveFloat = 1e-3
    width: PositiveInt = 512
    blocks: PositiveInt = 3
    components: PositiveInt = 1000
    repetitions: Annotated[int, Field(ge=2)] = 10
    validation: PositiveInt = 50

    def measure(self, fit: Fit, problem: Problem, run: EvaluationRun) -> list[Measurement]:
        x, indices = run.data.scored(self.observations)
        contrast = self._contrast(fit, x, run, "moments")
        discriminator, losses = self._trained(fit, contrast, run)
        found = discrimination.estimate(
            fit.model, fit.posterior, discriminator, contrast, self.samples, lambda name: run.generator(self.name, name)
        )
        settings = {
            "samples": self.samples,
            "steps": self.steps,
            "batch_size": self.batch_size,
            "width": self.width,
            "blocks": self.blocks,
            "loss": float(losses[-max(1, self.steps // 20) :].mean()),
        }
        estimated = {"settings": settings, "traces": {"loss": losses.double().cpu().numpy()}}
        bounded = {"settings": {**settings, "bound": "NWJ, from a Gaussian with the moments of q"}}
        elbo = run.measurement("elbo", *found["elbo_bound"], "stochastic upper bound", indices, **bounded)
        return [
            run.measurement("adversarial_elbo", *found["elbo"], "density ratio", indices, **estimated),
            run.measurement("adversarial_kl", *found["kl"], "density ratio", indices, settings=settings),
            run.measurement("kl_to_prior", *found["kl_bound"], "stochastic lower bound", indices, **bounded),
            elbo,
            self._smoothed(fit, contrast, run, indices, elbo.value),
        ]

    def _contrast(self, fit: Fit, x: Tensor, run: EvaluationRun, purpose: str) -> Contrast:
        return Contrast.of(fit.posterior, x, self.moment_samples, run.generator(self.name, purpose))

    def _trained(self, fit: Fit, contrast: Contrast, run: EvaluationRun) -> tuple[Discriminator, Tensor]:
        streams = Streams(run.seed, run.problem.label, f"evaluator {self.name}", run.device)
        with streams.initial_weights(shared=False):
            discriminator = Discriminator(contrast, self.width, self.blocks)
        losses = discrimination.train(
            discriminator,
            fit.posterior,
            contrast,
            Training(steps=self.steps, batch_size=self.batch_size, lr=self.lr),
            run.generator(self.name, "training"),
            lambda fraction, loss: run.progress(0.8 * fraction, f"discriminator's loss {loss:.4f}"),
        )
        return discriminator, losses

    def _smoothed(self, fit: Fit, contrast: Contrast, run: EvaluationRun, indices: Tensor, upper: float) -> Measurement:
        scale = self._noise_scale(fit, run)
        values, stderrs = self._bound(fit, contrast, scale, run.generator(self.name, "components"))
        settings = {
            "of": "q smoothed by Gaussian noise",
            "noise_scale": scale,
            "components": self.components,
            "samples": self.repetitions * self._from_each,
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
        """The scale with the highest bound on validation data; all are tried with the same draws."""
        contrast = self._contrast(fit, run.data.validation[: self.validation], run, "validation moments")
        tried: dict[float, float] = {}
        for scale in NOISE_SCALES:
            stream = run.generator(self.name, "validation components")
            tried[scale] = float(self._bound(fit, contrast, scale, stream)[0].mean())
        return max(tried, key=lambda scale: tried[scale])

    @property
    def _from_each(self) -> int:
        """Draws of the smoothed posterior around a set of K + 1 components."""
        return min(-(-self.samples // self.repetitions), self.components + 1)

    def _bound(self, fit: Fit, contrast: Contrast, scale: float, stream: torch.Generator) -> tuple[Tensor, Tensor]:
        return semi_implicit_bound(
            fit.model, fit.posterior, contrast, scale, self.components, self._from_each, self.repetitions, stream
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
            log_q = _log_mixture(u, psi, noise_scale) - at.sd.double().log().sum(-1)
            mean.add((log_joint - log_q).mean(0, keepdim=True))
        parts.append(mean)
    return torch.cat([mean.value() for mean in parts]), torch.cat([mean.stderr() for mean in parts])


def _log_mixture(u: Tensor, psi: Tensor, sd: float) -> Tensor:
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

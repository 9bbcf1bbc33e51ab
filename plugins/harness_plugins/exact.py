r"""log p(x) without sampling: as the model knows it, or by quadrature in at most two latent dimensions.

.. math:: \log p(x) = \log \int p(x|z)\, p(z)\, dz \approx \log h^D \sum_c p(x|z_c)\, p(z_c)

over the centres z_c of cells of side h: spectrally accurate for a smooth integrand that decays towards the borders
(Trefethen and Weideman 2014, https://doi.org/10.1137/130932132). h is halved until no log p(x) changes any more, and
only cells that matter to some x are halved.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor
from torch.nn import functional as F

from harness import hookimpl
from harness.estimators import BLOCK_ELEMENTS, SMALLEST_EVENT, posterior_means
from harness.evaluator import EvaluationRun, Evaluator, Measurement
from harness.method import Diverged, Fit
from harness.model import HasClosedForm, HasEvidence, LatentModel, has_standard_normal_prior
from harness.posterior import HasDensity
from harness.problem import Problem, ScoredSplit
from harness.seeding import generator

HALF_WIDTH = 16.0  # of the box; a standard normal density falls by 128 nats from its centre to there
PRIOR_DRAWS, BEYOND_DRAWS = 1000, 3.0  # other priors: so many draws, and the box at least so many times as large
TOO_HIGH = math.log(2)  # nats; a coarse sum that is further above the next says nothing of what matters
COARSEST, FIRST_CHECKED = 64, 256  # cells a side: on the first grid, and on the first that may be the last


class NotConverged(ArithmeticError):
    """A quadrature that still changes, or whose integrand does not vanish at the borders: no value."""


@dataclass(frozen=True, kw_only=True)
class Exact(Evaluator):
    """`log_likelihood` without sampling error, and with it `kl_to_posterior` of posteriors whose density is known.

    Args:
        observations: How many of the fixed scored observations.
        split: Which these are from: ``test``, or ``validation``, to choose settings by.
        tolerance: Quadrature: the largest change of any log p(x) at the last doubling of the grid, nats.
        points: Quadrature: most cells along one axis.
        samples: Draws of z per observation for KL(q(z|x) || p(z|x)) = log p(x) - E_q[log p(x, z) - log q(z|x)].
    """

    name: str = "exact"
    observations: PositiveInt = 1000
    split: ScoredSplit = "test"
    tolerance: PositiveFloat = 1e-4
    points: Annotated[int, Field(ge=FIRST_CHECKED)] = 8192
    samples: Annotated[int, Field(ge=2)] = 100

    def undefined(self, fit: Fit, problem: Problem) -> str | None:
        if isinstance(fit.model, HasEvidence) or fit.model.latent_dim <= 2:
            return None
        return "needs a closed form or at most 2 latent dimensions"

    def measure(self, fit: Fit, problem: Problem, run: EvaluationRun) -> list[Measurement]:
        x, indices = run.data.scored(self.observations, self.split)
        if isinstance(fit.model, HasEvidence):
            method = "closed form" if isinstance(fit.model, HasClosedForm) else "known to the model"
            log_p, settings = fit.model.log_evidence(x).double(), {"method": method}
        else:
            log_p, settings = quadrature(fit.model, x, self.tolerance, self.points)
        zero = torch.zeros_like(log_p)
        measured = [
            run.measurement("log_likelihood", log_p, zero, "exact", indices, split=self.split, settings=settings)
        ]
        if isinstance(fit.posterior, HasDensity):
            stream = run.generator(self.name, "posterior")
            elbo, stderr = _elbo(fit.model, fit.posterior, x, self.samples, stream)
            settings = {"samples": self.samples, "log_likelihood": settings["method"]}
            measured.append(
                run.measurement(
                    "kl_to_posterior", log_p - elbo, stderr, "unbiased", indices, split=self.split, settings=settings
                )
            )
        return measured


def _elbo(
    model: LatentModel, posterior: HasDensity, x: Tensor, samples: int, stream: torch.Generator
) -> tuple[Tensor, Tensor]:
    def terms(x: Tensor, n: int) -> Mapping[str, Tensor]:
        z, log_q = posterior.sample_and_log_prob(x, n, stream)
        return {"elbo": model.log_joint(x, z) - log_q}

    return posterior_means(x, samples, terms)["elbo"]


@torch.no_grad()
def quadrature(
    model: LatentModel, x: Tensor, tolerance: float = 1e-4, points: int = 8192
) -> tuple[Tensor, dict[str, Any]]:
    """log p(x) by a sum over a grid, in float64 and in constant memory: x (N, *E) -> (N,), nats.

    A cell is left out of the next grid if neither it nor a neighbour matters to any x: all that is left out adds up to
    less than a hundredth of the tolerance, as seen at its own level. The box reaches to 16 from the origin, or further
    where draws of a prior that is not standard normal do.

    Args:
        points: Most cells along one axis.

    Returns:
        log p(x), shape (N,), and the settings that it was reached with.

    Raises:
        NotConverged: If log p(x) still changes by more than the tolerance, or is not negligible at the borders.
    """
    model, x = copy.deepcopy(model).double(), x.double()
    half_width = _half_width(model, x.device)
    cells = torch.ones((COARSEST,) * model.latent_dim, dtype=torch.bool, device=x.device)
    log_p, _ = _sum(model, x, cells, half_width, torch.zeros_like(x.flatten(1)[:, 0]))
    while True:
        cells = _halved(cells)
        refined, relevance = _sum(model, x, cells, half_width, log_p)
        if bool((refined < log_p - TOO_HIGH).any()):  # a peak near the centre of a wide cell was taken to be as wide
            _, relevance = _sum(model, x, cells, half_width, torch.minimum(refined, log_p))
        change, log_p, side = float((refined - log_p).abs().max()), refined, len(cells)
        if not math.isfinite(change):
            raise Diverged(f"quadrature: log p(x) is not finite with {side} points an axis")
        if change <= tolerance and side >= FIRST_CHECKED:
            break
        if 2 * side > points:
            raise NotConverged(
                f"quadrature with {side} points an axis still changes log p(x) by {change:.2g} nats, tolerance "
                f"{tolerance:g}; raise points"
            )
        cells = _relevant(cells, relevance, math.log(tolerance / 100 / len(relevance)) - TOO_HIGH, half_width)
    return log_p, {
        "method": "quadrature",
        "half_width": half_width,
        "points_per_axis": side,
        "evaluated_points": len(relevance),
        "largest_change": change,
    }


def _half_width(model: LatentModel, device: torch.device) -> float:
    """16, doubled until the box is well beyond all of some draws from the prior."""
    half_width = HALF_WIDTH
    if not has_standard_normal_prior(model):
        z = model.sample_prior(PRIOR_DRAWS, generator(device, "exact", "half width"))
        while half_width < BEYOND_DRAWS * float(z.abs().max()) < math.inf:
            half_width *= 2
    return half_width


def _sum(model: LatentModel, x: Tensor, cells: Tensor, half_width: float, reference: Tensor) -> tuple[Tensor, Tensor]:
    """log p(x) as the sum over cells, (N,), and each cell's largest log share of ``reference`` over all x, (C,)."""
    h = 2 * half_width / len(cells)
    log_volume = cells.ndim * math.log(h)
    log_p = torch.full_like(reference, -math.inf)
    relevance: list[Tensor] = []
    for part in cells.nonzero().split(max(1, BLOCK_ELEMENTS // max(x.numel() // len(x), len(x), SMALLEST_EVENT))):
        z = (part.to(x.dtype) + 0.5) * h - half_width
        log_joint = model.log_likelihood(x, z[:, None]) + model.log_prior(z)[:, None] + log_volume
        log_p = torch.logaddexp(log_p, log_joint.logsumexp(0))
        relevance.append((log_joint - reference).amax(1))
    return log_p, torch.cat(relevance)


def _relevant(cells: Tensor, relevance: Tensor, threshold: float, half_width: float) -> Tensor:
    """Cells whose relevance, shape (C,), is above the threshold, and all their neighbours.

    Raises:
        NotConverged: If a cell at the border is relevant.
    """
    kept = torch.zeros_like(cells)
    kept[cells] = relevance > threshold
    border = torch.ones_like(cells)
    border[(slice(1, -1),) * cells.ndim] = False
    if bool((kept & border).any()):
        raise NotConverged(f"quadrature: the integrand is not negligible at {half_width:g} from the origin")
    pool = F.max_pool1d if cells.ndim == 1 else F.max_pool2d
    return pool(kept.float()[None, None], kernel_size=3, stride=1, padding=1)[0, 0].bool()


def _halved(cells: Tensor) -> Tensor:
    """The same region in cells of half the side."""
    for axis in range(cells.ndim):
        cells = cells.repeat_interleave(2, dim=axis)
    return cells


@hookimpl
def harness_evaluators() -> list[Exact]:
    return [Exact()]

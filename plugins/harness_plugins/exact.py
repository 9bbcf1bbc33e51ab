r"""log p(x) without sampling: as the model knows it, or by quadrature in at most two latent dimensions.

.. math:: \log p(x) = \log \int p(x|z)\, p(z)\, dz \approx \log h^D \sum_c p(x|z_c)\, p(z_c)

over the centres z_c of cells of side h: spectrally accurate for a smooth integrand that decays towards the borders
(Trefethen and Weideman 2014, https://doi.org/10.1137/130932132). h is halved until no log p(x) changes any more, and
only cells that matter to some x are halved.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor

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
COARSEST = 0.5  # side of the first grid's cells; those of the first that may be the last have a quarter of that
MOST_AT_FIRST, MOST_CELLS = 256, 2**27  # a side of the first grid in two dimensions; in the part that is looked at


class NotConverged(ArithmeticError):
    """A quadrature that still changes, or whose integrand does not vanish at the borders: no value."""


@dataclass(frozen=True, kw_only=True)
class Exact(Evaluator):
    """`log_likelihood` without sampling error, and with it `kl_to_posterior` of posteriors whose density is known.

    Args:
        observations: How many of the fixed scored observations.
        split: Which these are from: ``test``, or ``validation``, to choose settings by.
        tolerance: Quadrature: the largest change of any log p(x) at the last doubling of the grid, nats.
        points: Quadrature: most cells along an axis from -16 to 16; a wider box has as many more.
        samples: Draws of z per observation for KL(q(z|x) || p(z|x)) = log p(x) - E_q[log p(x, z) - log q(z|x)].
    """

    name: str = "exact"
    observations: PositiveInt = 1000
    split: ScoredSplit = "test"
    tolerance: PositiveFloat = 1e-4
    points: Annotated[int, Field(ge=256)] = 8192
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
    """log p(x) by a sum over a grid, in float64 and in bounded memory: x (N, *E) -> (N,), nats.

    A cell is left out of the next grid if neither it nor a neighbour matters to any x: all that is left out adds up to
    less than a hundredth of the tolerance. What a cell may matter is taken from the integrand at its centre and the
    slope there, up to its border, so that a peak far narrower than a cell is not lost, whatever it is beside the
    centre. The box reaches to 16 from the origin, or further where draws of a prior that is not standard normal do.

    Args:
        points: Most cells along an axis from -16 to 16; a wider box has as many more of the same size.

    Returns:
        log p(x), shape (N,), and the settings that it was reached with.

    Raises:
        NotConverged: If log p(x) still changes by more than the tolerance, if it is not negligible at the borders, or
            if that needs more memory than there should be.
    """
    model, x = copy.deepcopy(model).double(), x.double()
    grid = _Grid.covering(_half_width(model, x.device), model.latent_dim, x.device)
    log_p, _ = _sum(model, x, grid, torch.zeros_like(x.flatten(1)[:, 0]))
    while True:
        grid = grid.halved()
        refined, relevance = _sum(model, x, grid, log_p)
        if bool((refined < log_p - TOO_HIGH).any()):  # a peak near the centre of a wide cell was taken to be as wide
            _, relevance = _sum(model, x, grid, torch.minimum(refined, log_p))
        change, log_p = float((refined - log_p).abs().max()), refined
        if not math.isfinite(change):
            raise Diverged(f"quadrature: log p(x) is not finite with {grid.side} points an axis")
        if change <= tolerance and grid.h <= COARSEST / 4:
            break
        if grid.h / 2 < 2 * HALF_WIDTH / points:
            raise NotConverged(
                f"quadrature with {grid.side} points an axis still changes log p(x) by {change:.2g} nats, tolerance "
                f"{tolerance:g}; raise points"
            )
        grid = grid.relevant(relevance, math.log(tolerance / 100 / len(relevance)) - TOO_HIGH)
    return log_p, {
        "method": "quadrature",
        "half_width": grid.half_width,
        "points_per_axis": grid.side,
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


@dataclass(frozen=True, eq=False)
class _Grid:
    """Cells of a box that are looked at.

    Args:
        cells: Which of a part of the box, shape (side, ...) of D axes.
        start: Where in the box that part begins, in cells, shape (D,).
        h: Side of a cell.
    """

    cells: Tensor
    start: Tensor
    h: float
    half_width: float

    @staticmethod
    def covering(half_width: float, latent_dim: int, device: torch.device) -> _Grid:
        side = min(round(2 * half_width / COARSEST), MOST_AT_FIRST ** (2 // latent_dim))
        cells = torch.ones((side,) * latent_dim, dtype=torch.bool, device=device)
        start = torch.zeros(latent_dim, dtype=torch.int64, device=device)
        return _Grid(cells, start, 2 * half_width / side, half_width)

    @property
    def side(self) -> int:
        """Cells along an axis of the whole box."""
        return round(2 * self.half_width / self.h)

    def halved(self) -> _Grid:
        """The same region in cells of half the side."""
        cells = self.cells
        if cells.numel() * 2**cells.ndim > MOST_CELLS:
            raise NotConverged(
                f"quadrature: {self.side} points an axis of the box from -{self.half_width:g} to {self.half_width:g} "
                "are too few, and more take too much memory"
            )
        for axis in range(cells.ndim):
            cells = cells.repeat_interleave(2, dim=axis)
        return dataclasses.replace(self, cells=cells, start=2 * self.start, h=self.h / 2)

    def relevant(self, relevance: Tensor, threshold: float) -> _Grid:
        """Cells whose relevance, shape (C,), is above the threshold, and all their neighbours.

        Raises:
            NotConverged: If a cell at the border of the box is relevant.
        """
        kept = torch.zeros_like(self.cells)
        kept[self.cells] = relevance > threshold
        found = kept.nonzero()
        first, last = found.amin(0) + self.start, found.amax(0) + self.start
        if bool((first == 0).any() or (last == self.side - 1).any()):
            raise NotConverged(f"quadrature: the integrand is not negligible at {self.half_width:g} from the origin")
        start = first - 1
        part = torch.zeros((last - first + 3).tolist(), dtype=torch.bool, device=kept.device)
        part[tuple((found + self.start - start).T)] = True
        for axis in range(part.ndim):
            n = part.shape[axis]
            below, above = part.narrow(axis, 0, n - 1), part.narrow(axis, 1, n - 1)
            wider = part.clone()
            wider.narrow(axis, 1, n - 1).logical_or_(below)
            wider.narrow(axis, 0, n - 1).logical_or_(above)
            part = wider
        return dataclasses.replace(self, cells=part, start=start)


def _sum(model: LatentModel, x: Tensor, grid: _Grid, reference: Tensor) -> tuple[Tensor, Tensor]:
    """log p(x) as the sum over cells, (N,), and how large a log share of ``reference`` each may have, (C,).

    That is the largest over all x, with the highest density in the cell by the tangent at its centre, which no
    log-concave one exceeds.
    """

    def log_joint(z: Tensor) -> Tensor:
        return model.log_likelihood(x, z[:, None]) + model.log_prior(z)[:, None]

    dimensions, step = grid.cells.ndim, grid.h / 1024
    log_volume = dimensions * math.log(grid.h)
    log_p = torch.full_like(reference, -math.inf)
    relevance: list[Tensor] = []
    for part in grid.cells.nonzero().split(max(1, BLOCK_ELEMENTS // max(x.numel() // len(x), len(x), SMALLEST_EVENT))):
        z = ((part + grid.start).to(x.dtype) + 0.5) * grid.h - grid.half_width
        centre = log_joint(z)
        log_p = torch.logaddexp(log_p, centre.logsumexp(0) + log_volume)
        highest = centre + log_volume
        for direction in torch.eye(dimensions, dtype=z.dtype, device=z.device):
            rise = (log_joint(z + step * direction) - centre).abs() * (grid.h / 2 / step)
            highest += rise.nan_to_num(0.0, math.inf)  # outside of the support there is none
        relevance.append((highest - reference).nan_to_num(math.inf, math.inf, -math.inf).amax(1))
    return log_p, torch.cat(relevance)


@hookimpl
def harness_evaluators() -> list[Exact]:
    return [Exact()]

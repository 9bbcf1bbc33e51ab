r"""Maximum likelihood by quadrature over one or two latent dimensions: what training with the exact posterior learns.

.. math:: \max_\theta E_{p_D(x)} \log \int p_\theta(x|z)\, p(z)\, dz, \quad
          \int p_\theta(x|z)\, p(z)\, dz \approx h^D \sum_c p_\theta(x|z_c + u)\, p(z_c + u)

over the centres z_c of cells of side h. All are shifted by the same u, uniform over a cell and drawn anew at every step
(Cranley and Patterson 1976, https://doi.org/10.1137/0713071): unbiased for the integral, so that its logarithm is too
small on average. In two dimensions that costs less than 0.001 nats where the posteriors' standard deviations are above
h / 2, and 0.03, 0.2 and 0.6 nats at h / 3, h / 4 and h / 5: narrow ones are avoided.

The gradient is that of variational inference with q(z|x) = p(z|x) (Fisher's identity), hence at its optimum no
method with the same decoder has a higher ELBO on the training data. On other data one may: the closest fit can be too
close.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field, PositiveFloat
from torch import Tensor, nn

from harness import hookimpl
from harness.model import LatentModel, has_standard_normal_prior
from harness.posterior import Posterior
from harness.problem import TrainingView
from harness.training import GradientMethod, Modules, Noise, Player

FINER = 4  # cells of the posterior to one of training, along an axis
CELLS = 4096  # decoded at once
NEGLIGIBLE = 30.0  # nats below the largest: smaller weights would end as denormal numbers, which are slow
PAIRS = 2**23  # of cells and observations at once


class Lattice(nn.Module):
    """Cells of equal size that fill a box around the origin, (C, D)."""

    centres: Tensor

    def __init__(self, latent_dim: int, points: int, half_width: float) -> None:
        super().__init__()
        self.side = 2 * half_width / points
        axis = (torch.arange(points) + 0.5) * self.side - half_width
        self.register_buffer("centres", torch.cartesian_prod(*[axis] * latent_dim).view(-1, latent_dim))
        self.log_volume = latent_dim * math.log(self.side)

    def log_masses(self, model: LatentModel, x: Tensor, shift: Tensor | float = 0.0) -> Tensor:
        """log of p(x, z) times the volume of a cell, at the shifted centres: x (N, *E) -> (C, N), nats."""
        parts = (self.centres + shift).split(CELLS)
        log_joint = [model.log_likelihood(x, z[:, None]) + model.log_prior(z)[:, None] for z in parts]
        return torch.cat(log_joint) + self.log_volume


class LatticePosterior(Posterior):
    """p(z|x) of the model, up to being constant within each cell of a lattice.

    What it is of the last observations is kept: evaluators ask for draws again and again.
    """

    def __init__(self, model: LatentModel, lattice: Lattice) -> None:
        self.model, self.lattice = model, lattice
        self.known: tuple[Tensor, Tensor] | None = None

    def sample(self, x: Tensor, n: int, generator: torch.Generator) -> Tensor:
        return self.sample_and_log_prob(x, n, generator)[0]

    def sample_and_log_prob(self, x: Tensor, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        blocks = x.split(max(1, PAIRS // len(self.lattice.centres)))
        drawn = [self._drawn(block, n, generator) for block in blocks]
        return torch.cat([z for z, _ in drawn], 1), torch.cat([log_q for _, log_q in drawn], 1)

    def _drawn(self, x: Tensor, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        log_masses = self._log_masses(x)
        cells = torch.multinomial(log_masses.exp(), n, replacement=True, generator=generator)
        centres = self.lattice.centres[cells.T]
        place = torch.rand(centres.shape, generator=generator, device=x.device, dtype=x.dtype) - 0.5
        return centres + self.lattice.side * place, log_masses.gather(1, cells).T - self.lattice.log_volume

    def _log_masses(self, x: Tensor) -> Tensor:
        """log of the probability of each cell, (N, C)."""
        if self.known is None or not torch.equal(self.known[0], x):
            self.known = x.clone(), self.lattice.log_masses(self.model, x).log_softmax(0).T.contiguous()
        return self.known[1]


@dataclass(frozen=True, kw_only=True)
class Quadrature(GradientMethod):
    """Maximum likelihood by quadrature, and the posterior of the learnt model, on a grid.

    Args:
        points: Cells along each axis, while training; h is 2 ``half_width`` / ``points``. The posterior has four times
            as many.
        half_width: Of the box around the origin, in standard deviations of the prior.
        lr: Learning rate of Adam.
    """

    per_replica: ClassVar[frozenset[str]] = frozenset({"lr"})

    name: str = "quadrature"
    points: Annotated[int, Field(ge=8, le=512)] = 64
    half_width: Annotated[float, Field(ge=3, allow_inf_nan=False)] = 5.0
    lr: PositiveFloat = 3e-3

    def unfit(self, view: TrainingView) -> str | None:
        if view.latent_dim > 2:
            return f"sums over a grid, in at most 2 latent dimensions, and this problem has {view.latent_dim}"
        if not has_standard_normal_prior(view.model):
            return "its grid is made for the prior N(0, I), and this problem has another one"
        return None if any(True for _ in view.model.parameters()) else "learns a model, and this one has no parameters"

    def build(self, view: TrainingView) -> Modules:
        return Modules({"model": view.model, "lattice": Lattice(view.latent_dim, self.points, self.half_width)})

    def players(self) -> list[Player]:
        return [Player("negative_log_likelihood", on=("model", "lattice"), lr=self.lr)]

    def noise(self, view: TrainingView) -> dict[str, tuple[int, ...]]:
        return {"shift": (view.latent_dim,)}

    def losses(self, modules: Modules, x: Tensor, noise: Noise) -> dict[str, Tensor]:
        lattice = modules["lattice"]
        # One for all observations, so that they share the decoder's outputs.
        shift = (torch.special.ndtr(noise["shift"][0]) - 0.5) * lattice.side
        log_masses = lattice.log_masses(modules["model"], x, shift)
        relevant = torch.maximum(log_masses, log_masses.detach().amax(0) - NEGLIGIBLE)
        return {"negative_log_likelihood": -relevant.logsumexp(0).mean()}

    def posterior(self, modules: Modules) -> Posterior:
        model, centres = modules["model"], modules["lattice"].centres
        lattice = Lattice(centres.shape[1], FINER * self.points, self.half_width).to(centres)
        return LatticePosterior(model, lattice)


@hookimpl
def harness_methods() -> list[Quadrature]:
    return [Quadrature()]

r"""Targets in the plane whose exact answers are known: a ring, a curved valley, two thin crescents.

.. math:: \log f_{torus}(z) = -(z_1^2 + z_2^2 - 2)^2, \qquad \log f_{banana}(z) = -(z_1 - 1)^2 - (z_2^2 - z_1)^2

Both are from the code of the AVB paper (Mescheder, Nowozin, Geiger 2017, https://arxiv.org/abs/1701.04722), which calls
the second one Rosenbrock. ``two-moons`` is the simulator

.. math:: x = (r \cos a + 1/4 - |\theta_1 + \theta_2| / \sqrt 2, \; r \sin a + (\theta_2 - \theta_1) / \sqrt 2), \quad
          a \sim U(-\pi/2, \pi/2), \quad r \sim N(0.1, 0.01^2), \quad \theta \sim U(-1, 1)^2

of Greenberg, Nonnenmacher, Macke 2019 (https://arxiv.org/abs/1905.07488) as in sbibm (Lueckmann et al. 2021,
https://arxiv.org/abs/2101.04653), with theta = erf(z / sqrt 2), so that z ~ N(0, I).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from harness import hookimpl
from harness.model import LOG_2PI, LatentModel, StandardNormalPrior
from harness.target import GridDensity, LogDensityModel, PosteriorProblem


class TorusModel(LogDensityModel):
    """Radial: the direction is uniform, and what is left is a density of log r on a line."""

    no_mode: ClassVar[str] = "its maxima are a circle"

    def __init__(self) -> None:
        super().__init__(latent_dim=2)

    def log_target(self, z: Tensor) -> Tensor:
        return -(z.square().sum(-1) - 2).square()

    def log_evidence(self, x: Tensor) -> Tensor:
        return self._log_radius(x).log_normaliser().expand(len(x))

    def sample_exact_posterior(self, x: Tensor, n: int, generator: torch.Generator) -> Tensor:
        radius = self._log_radius(x).sample(n * len(x), generator).exp().reshape(n, len(x))
        turn = torch.rand(radius.shape, generator=generator, device=x.device, dtype=radius.dtype)
        angle = 2 * math.pi * turn
        return torch.stack([radius * angle.cos(), radius * angle.sin()], dim=-1).to(x.dtype)

    def _log_radius(self, x: Tensor) -> GridDensity:
        """The density of log r, whose area element is 2 pi r^2."""
        points = torch.linspace(-20, 2, 4401, dtype=torch.float64, device=x.device)
        log_density = math.log(2 * math.pi) + 2 * points - (torch.exp(2 * points) - 2).square()
        return GridDensity(points, log_density[:, None])

    def quantities(self, z: Tensor) -> dict[str, Tensor]:
        return {"z[1]": z[..., 0], "z[2]": z[..., 1], "radius": z.square().sum(-1).sqrt()}

    def exact_moments(self, x: Tensor) -> dict[str, tuple[float, float]]:
        density = self._log_radius(x)
        first, second = (float(density.mean(torch.exp(power * density.points))) for power in (1, 2))
        coordinate = 0.0, math.sqrt(second / 2)
        return {"z[1]": coordinate, "z[2]": coordinate, "radius": (first, math.sqrt(second - first**2))}


class BananaModel(LogDensityModel):
    r"""Given z_2, z_1 is Gaussian, and what is left is a density of z_2 on a line.

    .. math:: \log f(z) = -2 \bigl(z_1 - (1 + z_2^2)/2\bigr)^2 - (z_2^2 - 1)^2 / 2
    """

    def __init__(self) -> None:
        super().__init__(latent_dim=2)

    def log_target(self, z: Tensor) -> Tensor:
        return -(z[..., 0] - 1).square() - (z[..., 1].square() - z[..., 0]).square()

    def log_evidence(self, x: Tensor) -> Tensor:
        return self._second(x).log_normaliser().expand(len(x))

    def sample_exact_posterior(self, x: Tensor, n: int, generator: torch.Generator) -> Tensor:
        second = self._second(x).sample(n * len(x), generator).reshape(n, len(x))
        noise = torch.randn(second.shape, generator=generator, device=x.device, dtype=second.dtype)
        return torch.stack([(1 + second.square()) / 2 + noise / 2, second], dim=-1).to(x.dtype)

    def _second(self, x: Tensor) -> GridDensity:
        """The density of z_2, with z_1 integrated out."""
        points = torch.linspace(-6, 6, 4801, dtype=torch.float64, device=x.device)
        log_density = 0.5 * math.log(math.pi / 2) - 0.5 * (points.square() - 1).square()
        return GridDensity(points, log_density[:, None])

    def quantities(self, z: Tensor) -> dict[str, Tensor]:
        return {"z[1]": z[..., 0], "z[2]": z[..., 1]}

    def exact_moments(self, x: Tensor) -> dict[str, tuple[float, float]]:
        density = self._second(x)
        square, fourth = (float(density.mean(density.points**power)) for power in (2, 4))
        first = (1 + square) / 2, math.sqrt((1 + fourth - square**2) / 4)
        return {"z[1]": first, "z[2]": (0.0, math.sqrt(square))}


class TwoMoonsModel(StandardNormalPrior):
    """theta = erf(z / sqrt 2); with a = (theta_1 + theta_2)/sqrt 2 and b = (theta_2 - theta_1)/sqrt 2, rotated.

    x + (|a|, -b) is then a point of the crescent around (1/4, 0), whose density in the plane is that of its angle and
    its distance r, divided by r. sbibm's likelihood leaves that division out, while its reference draws do not. r is a
    Gaussian and negative once in 10^23 draws: behind the centre the density is small, not zero, and log p(x|z) finite.
    """

    REACH = 0.19  # of a crescent from its centre, nine standard deviations beyond its radius
    RADIUS, WIDTH, CENTRE = 0.1, 0.01, 0.25
    mode_weights: ClassVar[dict[str, float]] = {"theta[1] + theta[2] > 0": 0.5, "theta[1] + theta[2] < 0": 0.5}
    no_mode: ClassVar[str] = "it is highest at the tips of the crescents, where it breaks off"

    reference: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.latent_dim = 2
        self.register_buffer("reference", torch.zeros(2), persistent=False)  # knows the model's precision

    def log_likelihood(self, x: Tensor, z: Tensor) -> Tensor:
        a, b = self._rotated(z)
        ahead, aside = x[:, 0] + a.abs() - self.CENTRE, x[:, 1] - b
        distance = torch.hypot(ahead, aside)
        r = torch.where(ahead > 0, distance, -distance)
        log_radial = -0.5 * (((r - self.RADIUS) / self.WIDTH).square() + LOG_2PI) - math.log(self.WIDTH)
        return log_radial - math.log(math.pi) - distance.log()

    def _rotated(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """a and b: (..., 2) -> two of (...)."""
        first, second = torch.erf(z / math.sqrt(2)).unbind(-1)
        return (second + first) / math.sqrt(2), (second - first) / math.sqrt(2)

    def log_evidence(self, x: Tensor) -> Tensor:
        """log 1/2, nats: the prior's density is 1/4, and each of two crescents has a mass of 1.

        Raises:
            ValueError: If the square of the prior cuts a crescent off.
        """
        nearest = self.CENTRE - x[:, 0]
        furthest = nearest + x[:, 1].abs() + math.sqrt(2) * self.REACH
        if bool((nearest < 0).any()) or bool((furthest > math.sqrt(2)).any()):
            raise ValueError("the exact answers are for crescents within the square of the prior; these are cut off")
        return torch.full((len(x),), -math.log(2), dtype=torch.float64, device=x.device)

    def sample_exact_posterior(self, x: Tensor, n: int, generator: torch.Generator) -> Tensor:
        """As the simulator run backwards: an angle, a radius and one of the two moons."""
        self.log_evidence(x)
        kwargs = {"generator": generator, "device": x.device, "dtype": torch.float64}
        angle = math.pi * (torch.rand((n, len(x)), **kwargs) - 0.5)
        radius = self.RADIUS + self.WIDTH * torch.randn((n, len(x)), **kwargs)
        sign = torch.where(torch.rand((n, len(x)), **kwargs) < 0.5, -1.0, 1.0)
        a = sign * (self.CENTRE + radius * angle.cos() - x[:, 0])
        b = x[:, 1] - radius * angle.sin()
        theta = torch.stack([a - b, a + b], dim=-1) / math.sqrt(2)
        return (math.sqrt(2) * torch.erfinv(theta)).to(x.dtype)

    def quantities(self, z: Tensor) -> dict[str, Tensor]:
        theta = torch.erf(z / math.sqrt(2))
        return {"theta[1]": theta[..., 0], "theta[2]": theta[..., 1], "|theta[1] + theta[2]|": theta.sum(-1).abs()}

    def exact_moments(self, x: Tensor) -> dict[str, tuple[float, float]]:
        """E cos a = 2 / pi and E cos^2 a = E sin^2 a = 1/2."""
        self.log_evidence(x)
        first, second = x[0].tolist()
        square = (self.RADIUS**2 + self.WIDTH**2) / 2
        ahead, spread = self.RADIUS * 2 / math.pi, square - (self.RADIUS * 2 / math.pi) ** 2
        distance = self.CENTRE - first + ahead  # the mean of |a|
        sd = math.sqrt((distance**2 + spread + square) / 2)
        return {
            "theta[1]": (0 - second / math.sqrt(2), sd),
            "theta[2]": (second / math.sqrt(2), sd),
            "|theta[1] + theta[2]|": (math.sqrt(2) * distance, math.sqrt(2 * spread)),
        }

    def mode_of(self, z: Tensor) -> Tensor:
        return (z.sum(-1) < 0).long()


@dataclass(frozen=True, kw_only=True)
class Torus(PosteriorProblem):
    """The AVB code's ring; log Z = 1.714753."""

    name: str = "torus"

    def target(self) -> LatentModel:
        return TorusModel()


@dataclass(frozen=True, kw_only=True)
class Banana(PosteriorProblem):
    """The AVB code's curved valley; log Z = 1.152687."""

    name: str = "banana"

    def target(self) -> LatentModel:
        return BananaModel()


@dataclass(frozen=True, kw_only=True)
class TwoMoons(PosteriorProblem):
    """Two thin crescents, given the observation (0, 0); log p(x) = -log 2."""

    name: str = "two-moons"

    def observation(self) -> np.ndarray:
        return np.zeros(2)

    def target(self) -> LatentModel:
        return TwoMoonsModel()


@hookimpl
def harness_problems() -> list[PosteriorProblem]:
    return [Torus(), Banana(), TwoMoons()]

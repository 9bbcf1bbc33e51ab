"""The test of normalisation: right densities of every form pass, and what is off by a few per cent is found."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

from harness.posterior import Posterior
from harness.pyro_problem import PyroProblem
from harness.testing import ConformanceError, SmallProblem, check_posterior, check_problem
from harness.testing.laws import require_mean
from harness.testing.normalisation import COMPONENTS, Density, fitted, require_normalised
from harness.testing.small import view_of

Law = Callable[[int, torch.Generator], Tensor]
SHARP, SKEW = 0.1, 0.05


def noise(n: int, dimensions: int, generator: torch.Generator) -> Tensor:
    return torch.randn(n, dimensions, generator=generator, dtype=torch.float64)


def uniform(n: int, dimensions: int, generator: torch.Generator) -> Tensor:
    return torch.rand(n, dimensions, generator=generator, dtype=torch.float64)


def log_normal(z: Tensor, mean: Tensor | float, sd: Tensor | float) -> Tensor:
    return Normal(mean, sd, validate_args=False).log_prob(z).sum(-1)


def gaussian(dimensions: int) -> tuple[Law, Density]:
    return lambda n, generator: noise(n, dimensions, generator), lambda z: log_normal(z, 0.0, 1.0)


def two_modes(dimensions: int, share: float) -> tuple[Law, Density]:
    """Twenty standard deviations apart."""

    def draw(n: int, generator: torch.Generator) -> Tensor:
        sign = 2 * (uniform(n, 1, generator) < share).double() - 1
        return sign + SHARP * noise(n, dimensions, generator)

    def log_p(z: Tensor) -> Tensor:
        parts = [log_normal(z, sign, SHARP) + math.log(w) for sign, w in ((1.0, share), (-1.0, 1 - share))]
        return torch.logaddexp(*parts)

    return draw, log_p


def funnel(dimensions: int) -> tuple[Law, Density]:
    """The scale of all others is the exponential of the first, over many orders of magnitude."""

    def draw(n: int, generator: torch.Generator) -> Tensor:
        eps = noise(n, dimensions, generator)
        return torch.cat([1.5 * eps[:, :1], torch.exp(1.5 * eps[:, :1]) * eps[:, 1:]], dim=1)

    def log_p(z: Tensor) -> Tensor:
        return log_normal(z[:, :1], 0.0, 1.5) + log_normal(z[:, 1:], 0.0, z[:, :1].exp())

    return draw, log_p


def banana() -> tuple[Law, Density]:
    def draw(n: int, generator: torch.Generator) -> Tensor:
        eps = noise(n, 2, generator)
        return torch.stack([eps[:, 0], 2 * eps[:, 0] ** 2 + 0.2 * eps[:, 1]], dim=1)

    return draw, lambda z: log_normal(z[:, :1], 0.0, 1.0) + log_normal(z[:, 1:] - 2 * z[:, :1] ** 2, 0.0, 0.2)


def box(dimensions: int) -> tuple[Law, Density]:
    """Nothing beyond its edges."""

    def log_p(z: Tensor) -> Tensor:
        return z.new_zeros(len(z)).where(((z > 0) & (z < 1)).all(1), -math.inf)

    return lambda n, generator: uniform(n, dimensions, generator), log_p


def cauchy(dimensions: int) -> tuple[Law, Density]:
    """No moments."""

    def log_p(z: Tensor) -> Tensor:
        return (-math.log(math.pi) - torch.log1p(z**2)).sum(-1)

    return lambda n, generator: torch.tan(math.pi * (uniform(n, dimensions, generator) - 0.5)), log_p


LAWS: Mapping[str, tuple[Law, Density]] = {
    "Gaussian in 1 dimension": gaussian(1),
    "Gaussian in 3": gaussian(3),
    "Gaussian in 32": gaussian(32),
    "two modes": two_modes(2, 0.5),
    "two modes, one with a twentieth": two_modes(3, SKEW),
    "funnel in 2": funnel(2),
    "funnel in 10": funnel(10),
    "banana": banana(),
    "box": box(3),
    "Cauchy": cauchy(3),
}


def judge(name: str, known: bool, off: float, seed: int) -> None:
    draw, log_p = LAWS[name]

    def with_density(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        z = draw(n, generator)
        return z, log_p(z) + math.log(off)

    require_normalised(with_density, (lambda z: log_p(z) + math.log(off)) if known else None, seed, "the density")


@pytest.mark.parametrize("known", [True, False], ids=["known anywhere", "known at draws"])
@pytest.mark.parametrize("name", LAWS)
def test_a_right_density_passes_and_one_off_by_5_percent_does_not(name: str, known: bool) -> None:
    for seed in (0, 1):
        judge(name, known, 1.0, seed)
    if known or LAWS[name][0](1, torch.Generator()).shape[1] <= 3:
        for off in (0.93, 1.07) if not known else (0.95, 1.05):
            with pytest.raises(ConformanceError, match="the density does not integrate to 1 where its draws are"):
                judge(name, known, off, 0)


def test_what_cannot_be_told_is_not_asked() -> None:
    """A density that is known for draws alone, in many dimensions."""
    judge("Gaussian in 32", False, 2.0, 0)


def test_the_verdict_tells_the_integral() -> None:
    for off in (0.5, 1.3):
        with pytest.raises(ConformanceError, match=f"but to about {off}"):
            judge("Gaussian in 1 dimension", True, off, 0)


def test_draws_from_a_density_of_another_shape_are_found() -> None:
    """With the right normaliser, a tenth too wide: the density does not integrate to 1 where the draws are."""

    def draw(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        z = 1.1 * noise(n, 2, generator)
        return z, log_normal(z, 0.0, 1.0)

    with pytest.raises(ConformanceError, match="the density does not integrate to 1"):
        require_normalised(draw, lambda z: log_normal(z, 0.0, 1.0), 0, "the density")


def test_a_fitted_mixture_has_the_density_of_its_own_draws() -> None:
    """E[h(z)] over its draws, for an h whose integral against its density is known by quadrature."""
    draw, _ = two_modes(1, 0.3)
    mixture = fitted(draw(2000, torch.Generator().manual_seed(0)), COMPONENTS)
    grid = torch.linspace(-3, 3, 6001, dtype=torch.float64)[:, None]
    density = mixture.log_prob(grid).exp()
    assert float(density.sum() * 1e-3) == pytest.approx(1, abs=1e-6)
    upper = float(density[grid[:, 0] > 0].sum() * 1e-3)
    assert upper == pytest.approx(0.3, abs=0.05)  # five standard errors of 2000 draws
    own = mixture.sample(20_000, torch.Generator().manual_seed(1))
    require_mean((own > 0).double(), upper, "the share of the upper mode")


class Mixture(Posterior):
    """0.5 N(-1, s^2 I) + 0.5 N(1, s^2 I), moved by x.

    Args:
        off: What the density is too large by.
    """

    def __init__(self, sd: float, off: float = 1.0) -> None:
        self.sd, self.off = sd, off

    def _law(self, x: Tensor) -> MixtureSameFamily:
        moved = (x.flatten(1) @ torch.linspace(0, 0.3, 6, dtype=x.dtype))[:, None, None]
        centres = moved + torch.tensor([-1.0, 1.0], dtype=x.dtype)[:, None].expand(2, 2)
        return MixtureSameFamily(
            Categorical(torch.ones(len(x), 2, dtype=x.dtype)), Independent(Normal(centres, self.sd), 1)
        )

    def sample(self, x: Tensor, n: int, generator: torch.Generator) -> Tensor:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(torch.randint(2**62, (), generator=generator)))
            return self._law(x).sample(torch.Size([n]))

    def log_prob(self, x: Tensor, z: Tensor) -> Tensor:
        return self._law(x).log_prob(z) + math.log(self.off)


class AtDraws(Posterior):
    """The same, of which the density is known at its own draws only."""

    def __init__(self, sd: float, off: float = 1.0) -> None:
        self.own = Mixture(sd, off)

    def sample(self, x: Tensor, n: int, generator: torch.Generator) -> Tensor:
        return self.own.sample(x, n, generator)

    def sample_and_log_prob(self, x: Tensor, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        z = self.own.sample(x, n, generator)
        return z, self.own.log_prob(x, z)


@pytest.mark.parametrize("family", [Mixture, AtDraws])
@pytest.mark.parametrize("sd", [1.0, 0.3, 0.1])
def test_a_mixture_is_a_posterior(sd: float, family: type[Mixture] | type[AtDraws]) -> None:
    view = view_of(SmallProblem())
    check_posterior(family(sd), view.model, view.validation)
    with pytest.raises(ConformanceError, match="the posterior's density does not integrate to 1 where its draws are"):
        check_posterior(family(sd, off=0.93), view.model, view.validation)


@dataclass(frozen=True, kw_only=True)
class Centred(PyroProblem):
    """Eight Schools as in every textbook, not reparameterised: its prior is a funnel in ten dimensions."""

    name: str = "centred"

    def observed(self) -> dict[str, np.ndarray]:
        return {"y": np.array([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])}

    def pyro_model(self) -> None:
        import pyro
        import pyro.distributions as dist

        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        tau = pyro.sample("tau", dist.HalfNormal(5.0))
        with pyro.plate("schools", 8):
            theta = pyro.sample("theta", dist.Normal(mu, tau))
            pyro.sample("y", dist.Normal(theta, torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])))


def test_a_hierarchical_model_is_a_problem() -> None:
    check_problem(Centred())

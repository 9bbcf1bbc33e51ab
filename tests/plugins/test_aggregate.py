"""The aggregate posterior against closed forms: mixtures whose density is known, and what neighbours tell of draws."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from harness import estimators
from harness.evaluator import EvaluationRun, Measurement
from harness.method import Fit
from harness.model import LOG_2PI, log_normal
from harness.posterior import Posterior
from harness.problem import DatasetSpec, DeviceData
from harness.testing.small import SmallProblem, view_of
from harness_plugins.aggregate import UNKNOWN, Aggregate, log_by_neighbours, log_of_mixture

CPU = torch.device("cpu")
SHARED, SHARED_SD = 0.4, 0.7
GRID_SD = 0.02  # a fiftieth of the distance between neighbours
Mean = Callable[[Tensor], Tensor]  # of the encoding of each number x, (N, 1) -> (N, D)


class Drawn(Posterior):
    """q(z|x) = N(mean(x), sd^2 I), known through its draws alone."""

    def __init__(self, mean: Mean, sd: float) -> None:
        self.mean, self.sd = mean, sd

    def sample(self, x: Tensor, n: int, generator: torch.Generator) -> Tensor:
        mean = self.mean(x)
        return mean + self.sd * torch.randn((n, *mean.shape), generator=generator, dtype=mean.dtype)


class Known(Drawn):
    """The same, with its density at any point."""

    def log_prob(self, x: Tensor, z: Tensor) -> Tensor:
        return log_normal(z, self.mean(x), math.log(self.sd))


class Wrong(Known):
    """The same, with a density of its own draws that is three times that at any point."""

    def sample_and_log_prob(self, x: Tensor, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        z = self.sample(x, n, generator)
        return z, self.log_prob(x, z) + math.log(3)


class Tiles(Posterior):
    """q(z|x) uniform on the x-th interval of a given width, in one dimension; its density is known at its own draws."""

    WIDTH = 0.1

    def sample(self, x: Tensor, n: int, generator: torch.Generator) -> Tensor:
        return self.WIDTH * (x + torch.rand((n, *x.shape), generator=generator, dtype=x.dtype))

    def sample_and_log_prob(self, x: Tensor, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        z = self.sample(x, n, generator)
        return z, torch.full_like(z[..., 0], -math.log(self.WIDTH))


def shared(dims: int) -> Mean:
    """All encodings are the same, hence q(z) is."""
    return lambda x: torch.full((len(x), dims), SHARED, dtype=x.dtype)


def grid(x: Tensor) -> Tensor:
    """A hundred corners of squares, row by row: (N, 2)."""
    return torch.cat([x % 10, torch.div(x, 10, rounding_mode="floor")], dim=1)


def numbers(n: int) -> Tensor:
    """Observations 0, 1, 2 ..., shape (n, 1)."""
    return torch.arange(n, dtype=torch.float64)[:, None]


def measured(
    posterior: Posterior, dims: int, n: int, evaluator: Aggregate | None = None, seed: int = 0
) -> dict[str, Measurement]:
    """By metric, of n encodings under a standard normal prior."""
    evaluator, x, problem = evaluator or Aggregate(), numbers(n).numpy(), SmallProblem(latent_dim=dims)
    data = DeviceData.place(DatasetSpec("numbers", x, x, x), CPU, torch.float64)
    run = EvaluationRun(data, problem, CPU, torch.float64, seed)
    with torch.no_grad():
        found = evaluator.measure(Fit(view_of(problem).model, posterior, {}), problem, run)
    return {each.metric: each for each in found}


def kl_to_prior(mean: Tensor, sd: float) -> Tensor:
    """KL(N(mean, sd^2 I) || N(0, I)): (N, D) -> (N,)."""
    return kl_divergence(Normal(mean, sd), Normal(0.0, 1.0)).sum(-1)


def sd_of_log_ratio(mean: Tensor, sd: float) -> Tensor:
    """Of log N(z; mean, sd^2 I) / N(z; 0, I) over z from the first: with z = mean + sd eps it is a quadratic in eps."""
    return ((1 - sd**2) ** 2 / 2 + (sd * mean).square()).sum(-1).sqrt()


@pytest.mark.parametrize("blocks", [(2**21, 64), (6 * 256, 3), (256, 64)], ids=str)
def test_the_mixture_is_the_mean_of_the_densities(blocks: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """In one block, in blocks of two draws and three encodings, and one by one; a draw that is far from all of them."""
    monkeypatch.setattr(estimators, "BLOCK_ELEMENTS", blocks[0])
    monkeypatch.setattr(estimators, "BLOCK_OBSERVATIONS", blocks[1])
    z = 5 * torch.randn(3, 7, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    z[1, 2] = 200.0

    def by_hand(point: list[float]) -> float:
        exponents = [-0.5 * ((point[0] - i) ** 2 + point[1] ** 2) / 0.8**2 for i in range(7)]
        total = math.fsum(math.exp(each - max(exponents)) for each in exponents)
        return max(exponents) + math.log(total) - math.log(7) - math.log(2 * math.pi * 0.8**2)

    expected = [[by_hand(point) for point in row] for row in z.tolist()]
    np.testing.assert_allclose(log_of_mixture(Known(grid, 0.8), numbers(7), z), expected, rtol=1e-12)


@pytest.mark.parametrize("dims", [1, 3, 6])
def test_equal_encodings_are_the_aggregate(dims: int) -> None:
    found = measured(Known(shared(dims), SHARED_SD), dims, 8)
    kl, information, mean = found["aggregate_kl"], found["mutual_information"], torch.full((dims,), SHARED)
    # Draws are independent: beyond four errors once in 16,000 times. The error itself is known to within a fiftieth.
    assert abs(kl.value - float(kl_to_prior(mean, SHARED_SD))) < 4 * kl.stderr
    assert kl.stderr == pytest.approx(float(sd_of_log_ratio(mean, SHARED_SD)) / math.sqrt(10_000), rel=0.1)
    assert np.abs([information.values, information.stderrs]).max() < 1e-12
    assert (kl.kind, kl.settings["density"], kl.settings["draws"]) == ("unbiased", "known", 10_000)


def test_encodings_that_are_told_apart_have_all_the_information() -> None:
    """Of each observation, too: the hundred are encoded in two blocks."""
    found = measured(Known(grid, GRID_SD), 2, 100)
    kl, information, mean = found["aggregate_kl"], found["mutual_information"], grid(numbers(100))
    np.testing.assert_allclose(information.values, math.log(100), atol=1e-9)
    assert not information.warning
    exact, sd = kl_to_prior(mean, GRID_SD).numpy(), sd_of_log_ratio(mean, GRID_SD).numpy()
    assert abs(kl.value + information.value - exact.mean()) < 4 * kl.stderr
    # Five errors for a hundred means of a hundred draws each: one of them is beyond that once in thousands of times.
    assert (np.abs(kl.values + math.log(100) - exact) < 5 * kl.stderrs).all()
    assert kl.stderr == pytest.approx(math.sqrt((sd**2).sum() / 100) / 100, rel=0.1)


def test_more_information_than_there_are_encodings_is_marked() -> None:
    information = measured(Wrong(grid, GRID_SD), 2, 100)["mutual_information"]
    assert information.value == pytest.approx(math.log(300), abs=1e-9)
    assert information.warning == "I(x; z) of 100 encodings is 1.1 nats above log N"  # log 3


@pytest.mark.parametrize(("dims", "ball"), [(1, 2.0), (2, math.pi), (3, 4 * math.pi / 3)])
def test_density_by_neighbours_is_the_formula(dims: int, ball: float) -> None:
    """Draws at 0, 1, 3, 7 on a line: digamma(m) is the sum of 1/i below m, less the same constant for all m."""
    z = torch.tensor([0.0, 1.0, 3.0, 7.0], dtype=torch.float64)[:, None] * torch.eye(dims, dtype=torch.float64)[-1]
    for k, rho in (1, [1, 1, 2, 4]), (2, [3, 2, 3, 6]):
        expected = [-sum(1 / i for i in range(k, 4)) - math.log(ball * distance**dims) for distance in rho]
        np.testing.assert_allclose(log_by_neighbours(z.reshape(2, 2, dims), k).flatten(), expected, rtol=1e-12)


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize(("dims", "bias"), [(1, 0.0), (2, 0.01), (3, 0.03)])
def test_neighbours_estimate_the_divergence(dims: int, bias: float, k: int) -> None:
    """Within four errors, as above, and the bias that the module states for half as many draws."""
    found = measured(Drawn(shared(dims), SHARED_SD), dims, 20, Aggregate(draws=4000, k=k))
    assert found.keys() == {"aggregate_kl"}  # without a density there is no information
    kl = found["aggregate_kl"]
    tolerance = bias + 4 * kl.stderr
    assert abs(kl.value - float(kl_to_prior(torch.full((dims,), SHARED), SHARED_SD))) < tolerance
    # It tells each term apart: a neighbour more is 1/k, log c_D at least 0.69, digamma(n) 8, and log rho -2 to -8.
    assert tolerance < min(0.5 / k, 0.2)
    assert (kl.kind, kl.settings["density"], kl.settings["k"]) == ("consistent", "by neighbours", k)


def test_neighbours_estimate_what_tiles_are_worth() -> None:
    """Twenty intervals side by side: q(z) is uniform on (0, 2); its edges matter to less than a draw in a thousand."""
    found, length = measured(Tiles(), 1, 20, Aggregate(draws=4000)), 20 * Tiles.WIDTH
    kl = -math.log(length) + 0.5 * (LOG_2PI + length**2 / 3)
    for metric, exact in ("aggregate_kl", kl), ("mutual_information", math.log(20)):
        assert abs(found[metric].value - exact) < 4 * found[metric].stderr  # as above
        assert found[metric].stderr < 0.03


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_stated_errors_are_those_of_repetitions(dims: int) -> None:
    """A spread of 20 repetitions is known to within a sixth: a factor of two is four of its errors."""
    evaluator, posterior = Aggregate(draws=1000), Drawn(shared(dims), SHARED_SD)
    found = [measured(posterior, dims, 20, evaluator, seed)["aggregate_kl"] for seed in range(20)]
    stated = float(np.mean([each.stderr for each in found]))
    assert 0.5 < np.std([each.value for each in found], ddof=1) / stated < 2


def test_more_than_three_dimensions_need_a_density_at_every_point() -> None:
    """A density at the posterior's own draws, which `Tiles` have, is not enough."""
    assert UNKNOWN == "density is not known at every point; without it at most 3 latent dimensions"
    cases = [(3, Drawn(shared(3), 1.0), None), (4, Known(shared(4), 1.0), None)]
    for dims, posterior, reason in [*cases, (4, Drawn(shared(4), 1.0), UNKNOWN), (4, Tiles(), UNKNOWN)]:
        problem = SmallProblem(latent_dim=dims)
        assert Aggregate().undefined(Fit(view_of(problem).model, posterior, {}), problem) == reason

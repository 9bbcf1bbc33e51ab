"""What is kept of a fit for figures, where a problem is one posterior."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from harness.gallery import POSTERIOR_DRAWS, gallery
from harness.method import Fit
from harness.model import StandardNormalPrior
from harness.posterior import Posterior
from harness.problem import DatasetSpec, DeviceData
from harness.store import Store
from harness.testing.small import KnownPosterior

CPU = torch.device("cpu")


class NoLikelihood(StandardNormalPrior):
    """x says nothing about z, so that p(z|x) = N(0, I)."""

    def __init__(self, latent_dim: int) -> None:
        super().__init__()
        self.latent_dim = latent_dim

    def log_likelihood(self, x: Tensor, z: Tensor) -> Tensor:
        return (0 * z.sum(-1)).expand(*z.shape[:-2], len(x))


class WithExactDraws(NoLikelihood):
    """Its quantities are the first latent and that latent's square."""

    def sample_exact_posterior(self, x: Tensor, n: int, generator: torch.Generator) -> Tensor:
        return torch.randn((n, len(x), self.latent_dim), generator=generator, dtype=x.dtype)

    def quantities(self, z: Tensor) -> dict[str, Tensor]:
        return {"first": z[..., 0], "square": z[..., 0].square()}

    def exact_moments(self, x: Tensor) -> dict[str, tuple[float, float]]:
        return {"first": (0.0, 1.0), "square": (1.0, 2**0.5)}


def shown(model: NoLikelihood, observations: int = 1) -> dict[str, np.ndarray]:
    x = np.zeros((observations, 5), dtype=np.float32)
    data = DeviceData.place(DatasetSpec("one", x, x, x, exhaustive=True), CPU, torch.float64)
    posterior: Posterior = KnownPosterior(model.latent_dim)
    return gallery(Fit(model, posterior, {}), data, seed=0)


def test_draws_of_one_posterior_are_kept_by_the_names_of_its_quantities() -> None:
    """The posterior is N(0, 0.8^2), the exact one N(0, 1): means within five standard errors of theirs."""
    arrays = shown(WithExactDraws(3))
    assert arrays["quantity_names"].tolist() == ["first", "square"]
    for name, sd in (("quantities", 0.8), ("exact_quantities", 1.0)):
        first, square = arrays[name].T
        assert len(first) == POSTERIOR_DRAWS
        assert np.array_equal(square, first**2)
        assert square.mean() == pytest.approx(sd**2, abs=5 * 2**0.5 * sd**2 / POSTERIOR_DRAWS**0.5)


class WithPlane(WithExactDraws):
    """The density at hand is not that of the draws, so that it can be told from an estimate."""

    planes = (("first", "square"),)

    def log_density_in_plane(self, x: Tensor, plane: tuple[str, str], points: Tensor) -> Tensor:
        assert plane == ("first", "square")
        return (points[..., 0] - 10 * points[..., 1]).double()


def test_the_density_in_a_plane_is_kept_around_the_exact_draws() -> None:
    arrays = shown(WithPlane(3))
    assert arrays["planes"].tolist() == [["first", "square"]]
    [[first, square]], [density] = arrays["plane_axes"], arrays["plane_density"]
    low, high = arrays["exact_quantities"].min(0), arrays["exact_quantities"].max(0)
    reach = 0.1 * (high - low)
    assert [first[0], square[0]] == pytest.approx(low - reach)
    assert [first[-1], square[-1]] == pytest.approx(high + reach)
    assert np.log(density) == pytest.approx(first[None, :] - 10 * square[:, None])
    assert "planes" not in shown(WithExactDraws(3))


def test_latents_without_names_are_numbered() -> None:
    arrays = shown(NoLikelihood(3))
    assert arrays["quantity_names"].tolist() == ["z1", "z2", "z3"]
    assert arrays["quantities"].shape == (POSTERIOR_DRAWS, 3)
    assert "exact_quantities" not in arrays


@pytest.mark.parametrize(("latent_dim", "observations"), [(17, 1), (3, 2)])
def test_nothing_is_kept_of_many_dimensions_or_of_several_posteriors(latent_dim: int, observations: int) -> None:
    assert "quantities" not in shown(WithExactDraws(latent_dim), observations)


def test_a_gallery_goes_through_the_store(tmp_path: Path) -> None:
    arrays, store = shown(WithExactDraws(3)), Store.create(tmp_path)
    store.write_fit("a-job", {"weight": np.zeros(1)}, [], arrays, {})
    stored = store.gallery("a-job")
    assert stored.keys() == arrays.keys()
    assert all(np.array_equal(stored[name], arrays[name]) for name in arrays)

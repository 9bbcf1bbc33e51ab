"""Posterior problems: sums over a grid against closed forms, densities as models, trunks that do not look at x."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributions import Normal
from torch.func import vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.functional import elu

from harness.model import HasEvidence, LatentModel, StandardNormalPrior, has_standard_normal_prior
from harness.nn import EncoderTrunk, ResidualPairTrunk, count_parameters
from harness.problem import Problem
from harness.registry import Registry
from harness.target import GridDensity, LogDensityModel, PosteriorProblem, WithoutObservation
from harness.testing import check_problem
from harness.testing.small import view_of

POINTS = torch.linspace(-12, 14, 1301, dtype=torch.float64)
MEANS, SDS = torch.tensor([0.0, 1.5, -2.0]).double(), torch.tensor([1.0, 0.5, 0.8]).double()


def gaussians(log_factor: float = 0.7) -> GridDensity:
    """Three unnormalised Gaussians."""
    return GridDensity(POINTS, Normal(MEANS, SDS).log_prob(POINTS[:, None]) + log_factor)


def test_sums_over_a_grid_are_integrals() -> None:
    density = gaussians()
    torch.testing.assert_close(density.log_normaliser(), torch.full((3,), 0.7, dtype=torch.float64), rtol=0, atol=1e-13)
    torch.testing.assert_close(density.mean(POINTS), MEANS, rtol=0, atol=1e-13)
    torch.testing.assert_close(density.mean((POINTS[:, None] - MEANS).square()), SDS**2, rtol=0, atol=1e-12)


def test_draws_have_the_distribution_function_of_the_density(generator: torch.Generator) -> None:
    draws = gaussians().sample(20_000, generator)
    assert draws.shape == (20_000, 3)
    levels = Normal(MEANS, SDS).cdf(draws).sort(0).values
    distance = (levels - torch.arange(20_000)[:, None] / 20_000).abs().amax(0)
    # Kolmogorov's statistic times the root of n is above 2 once in 1500 times; the grid's own error is below 1e-4.
    assert (distance * 20_000**0.5 < 2).all()


def test_draws_do_not_keep_to_the_points() -> None:
    coarse = GridDensity(
        torch.linspace(-16, 16, 33).double(), Normal(0.0, 1.0).log_prob(torch.arange(-16.0, 17)[:, None])
    )
    draws = coarse.sample(1000, torch.Generator().manual_seed(0))
    assert len((draws - draws.floor()).unique()) > 900


@pytest.mark.parametrize("mean", [-11.0, 13.0])
def test_a_grid_that_cuts_a_density_off_is_refused(mean: float) -> None:
    with pytest.raises(ArithmeticError, match="not negligible at the ends of its grid, which goes from -12 to 14"):
        GridDensity(POINTS, Normal(torch.tensor([0.0, mean]), 1.0).log_prob(POINTS[:, None]))


class Known(LogDensityModel):
    """exp(0.3) N(z; 1, 0.5^2 I)."""

    def log_target(self, z: Tensor) -> Tensor:
        return Normal(1.0, 0.5).log_prob(z).sum(-1) + 0.3

    def log_evidence(self, x: Tensor) -> Tensor:
        return torch.full((len(x),), 0.3, dtype=torch.float64)


class Wrong(Known):
    def log_evidence(self, x: Tensor) -> Tensor:
        return super().log_evidence(x) + 0.1


class Learnt(StandardNormalPrior):
    latent_dim = 1

    def __init__(self) -> None:
        super().__init__()
        self.shift = torch.nn.Parameter(torch.zeros(()))

    def log_likelihood(self, x: Tensor, z: Tensor) -> Tensor:
        return z[..., 0] + self.shift


@dataclass(frozen=True, kw_only=True)
class Target(PosteriorProblem):
    """All that a third party writes."""

    name: str = "target"
    of: str = "known"

    def target(self) -> LatentModel:
        return {"known": Known, "wrong": Wrong}[self.of](1) if self.of != "learnt" else Learnt()


def test_a_log_density_is_a_model_with_a_reference_prior() -> None:
    model, z = Known(2).double(), torch.randn(5, 1, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert has_standard_normal_prior(model)
    assert isinstance(model, HasEvidence)
    for n in (1, 4):
        x = torch.ones(n, 1).double()
        torch.testing.assert_close(model.log_joint(x, z), model.log_target(z).expand(5, n))
        torch.testing.assert_close(model.log_joint(x, z.expand(5, n, 2)), model.log_target(z).expand(5, n))
    for dtype in (torch.float32, torch.float64):
        assert model.to(dtype).sample_prior(3, torch.Generator()).dtype == dtype
    assert dict(model.state_dict()) == {}


class Misshapen(LogDensityModel):
    """Something else than one number for each z."""

    def __init__(self, latent_dim: int, how: str) -> None:
        super().__init__(latent_dim)
        self.how = how

    def log_target(self, z: Tensor) -> Tensor:
        each = -0.5 * z.square()
        return {"kept": each.sum(-1, keepdim=True), "each": each, "all": each.sum(), "rows": each.sum(-1)}[self.how]


@pytest.mark.parametrize(("how", "got"), [("kept", "(5, 4, 1)"), ("each", "(5, 4, 2)"), ("all", "()")])
def test_a_density_that_is_not_one_number_for_each_z_is_refused(how: str, got: str) -> None:
    x, z = torch.ones(4, 1), torch.zeros(5, 4, 2)
    told = "Misshapen.log_target must return one number for each z: expected the shape (5, 4) for z of shape (5, 4, 2)"
    with pytest.raises(ValueError, match=f"^{re.escape(f'{told}, got {got}')}$"):
        Misshapen(2, how).log_joint(x, z)


def test_the_shape_of_a_density_is_looked_at_where_it_is_mapped_and_recorded_too() -> None:
    x, z = torch.ones(1, 1), torch.linspace(-1, 1, 30).view(5, 3, 1, 2)
    good, bad = (Misshapen(2, how) for how in ("rows", "kept"))
    expected = good.log_likelihood(x, z)
    torch.testing.assert_close(vmap(lambda z: good.log_likelihood(x, z))(z), expected)
    recorded = make_fx(lambda z: good.log_likelihood(x, z))(z)
    torch.testing.assert_close(recorded(z + 1), good.log_likelihood(x, z + 1))
    with pytest.raises(ValueError, match=r"expected the shape \(3, 1\) for z of shape \(3, 1, 2\), got \(3, 1, 1\)"):
        vmap(lambda z: bad.log_likelihood(x, z))(z)
    with pytest.raises(ValueError, match=r"expected the shape \(5, 3, 1\)"):
        make_fx(lambda z: bad.log_likelihood(x, z))(z)


def test_a_target_and_a_name_make_a_problem() -> None:
    check_problem(Target())
    data = Target().dataset()
    assert data.exhaustive
    assert np.array_equal(data.train, data.test)
    assert data.train.shape == (1, 1)
    with pytest.raises(AssertionError, match="log_evidence against the mean of p\\(x\\|z\\) over the prior"):
        check_problem(Target(of="wrong"))


def test_the_authors_guide_has_a_posterior_problem_that_works(tmp_path: Path) -> None:
    guide = (Path(__file__).parents[2] / "plugins/README.md").read_text()
    (example,) = [block for block in re.findall(r"```python\n(.*?)```", guide, re.DOTALL) if "RingModel" in block]
    (tmp_path / "ring_example.py").write_text(example)
    ring = Registry.discover((str(tmp_path / "ring_example.py"),)).problems["ring"].thing
    check_problem(ring)


def test_a_model_that_learns_is_refused() -> None:
    with pytest.raises(TypeError, match=r"fixed, but it has the parameters \['shift'\]"):
        Target(of="learnt").model_spec()


def test_what_a_method_is_shown_does_not_hold_the_problem() -> None:
    spec = view_of(Target()).spec
    assert not any(isinstance(value, Problem) for value in vars(spec).values())


def test_options_and_target_define_the_problem() -> None:
    problems = [Target(), Target(of="wrong"), Target(width=5), Target(pair_branch=1.0)]
    hashes = {problem.spec_hash for problem in problems}
    assert len(hashes) == 4
    assert Target().spec_hash == Target().spec_hash


def test_networks_have_the_sizes_of_the_released_code() -> None:
    view = view_of(Target())
    encoder, pair = view.encoder_trunk(10), view.pair_trunk()
    assert (encoder.features, pair.features) == (128, 256)
    # Two layers of 128 on one input, the noise added to both; z and a one to 256, and five blocks of two layers.
    assert count_parameters(encoder) == 2 * 128 + 128 * 129 + 10 * 256
    assert count_parameters(pair) == 2 * 256 + 256 + 5 * 2 * 256 * 257


def test_trunks_see_a_one_in_the_place_of_x() -> None:
    trunk = WithoutObservation(EncoderTrunk(1, 8, 1, "elu", centre=False, noise_dim=3)).double()
    noise = torch.randn(4, 2, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    zeros, others = torch.zeros(2, 5).double(), torch.full((2, 5), math.pi).double()
    features = trunk(zeros, noise)
    assert features.shape == (4, 2, 8)
    assert bool(features.any())
    assert torch.equal(features, trunk(others, noise))


@pytest.mark.parametrize("branch", [1.0, 0.3])
def test_what_each_block_adds_has_a_factor(branch: float) -> None:
    pair = ResidualPairTrunk(3, 2, 8, 2, "elu", centre=False, branch=branch)
    with torch.no_grad():
        for parameter in pair.parameters():
            parameter.copy_(torch.linspace(-1, 1, parameter.numel()).view_as(parameter))
    x, z = torch.ones(1, 3), torch.tensor([[0.3, -0.2]])
    hidden = pair.from_x(x) + pair.from_z(z)
    for first, second in zip(pair.first, pair.second, strict=True):
        hidden = hidden + branch * second(elu(first(elu(hidden))))
    torch.testing.assert_close(pair(x, z), elu(hidden))

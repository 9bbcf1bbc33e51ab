"""Streamed sums equal direct ones however they are cut; the proposal's density is that of its draws."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from harness import estimators
from harness.estimators import (
    DefensiveProposal,
    LogMeanExp,
    StreamedBounds,
    StreamedLargest,
    StreamedLogMeanExp,
    StreamedMean,
    observation_blocks,
    posterior_means,
    posterior_moments,
    sample_blocks,
)
from harness.model import LatentModel, log_normal
from harness.posterior import Posterior

CUTS = [[40], [1] * 40, [7, 7, 7, 7, 7, 5], [39, 1]]


@pytest.fixture
def stream() -> torch.Generator:
    return torch.Generator().manual_seed(2)


class ShiftedPrior(LatentModel):
    """p(z) = N(3, 0.5^2) in one dimension: unlike the standard normal in place and scale."""

    latent_dim = 1

    def sample_prior(self, n: int, generator: torch.Generator) -> Tensor:
        return 3 + 0.5 * torch.randn(n, 1, generator=generator, dtype=torch.float64)

    def log_prior(self, z: Tensor) -> Tensor:
        return log_normal(z, 3.0, math.log(0.5))

    def log_likelihood(self, x: Tensor, z: Tensor) -> Tensor:
        return log_normal(x - z)


@pytest.mark.parametrize("sizes", CUTS)
@pytest.mark.parametrize("offset", [0.0, -1e4, 1e4])
def test_log_mean_exp_is_the_direct_one_however_it_is_cut(
    sizes: list[int], offset: float, stream: torch.Generator
) -> None:
    log_w = 2 * torch.randn(40, 6, generator=stream, dtype=torch.float64) + offset
    log_w[3, :4] = -math.inf  # a weight of zero is a sample like any other
    estimate = StreamedLogMeanExp()
    for part in log_w.split(sizes):
        estimate.add(part)
    w = torch.exp(log_w - offset)
    torch.testing.assert_close(estimate.value(), w.mean(0).log() + offset)
    torch.testing.assert_close(estimate.stderr(), w.std(0) / math.sqrt(40) / w.mean(0))
    torch.testing.assert_close(estimate.effective_sample_size(), w.sum(0).square() / w.square().sum(0))


@pytest.mark.parametrize("n", [2, 16])
@pytest.mark.parametrize("sd", [0.3, 2.0, 4.0])
def test_errors_of_few_weights_are_those_of_repetitions(n: int, sd: float, stream: torch.Generator) -> None:
    """Nats apart too, where the delta method's error stops at 1. Two weights have it a seventh too small at most."""
    estimate = LogMeanExp(sd * torch.randn(n, 20_000, generator=stream, dtype=torch.float64))
    ratio = float(estimate.stderr().square().mean().sqrt() / estimate.value().std())
    assert 0.85 < ratio < 1.1
    assert (estimate.stderr() <= 1).all() == (sd < 1)


def test_errors_of_few_weights_are_the_jackknifes(stream: torch.Generator) -> None:
    log_w = 3 * torch.randn(5, 4, generator=stream, dtype=torch.float64) - 1e4
    log_w[0, 1] = -math.inf  # a weight of zero is one that can be left out
    log_w[1:, 2] = -math.inf  # leaving out the only one leaves nothing
    without = torch.stack([log_w[[t for t in range(5) if t != s]].logsumexp(0) for s in range(5)])
    expected = (4 / 5 * (without - without.mean(0)).square().sum(0)).sqrt()
    found = LogMeanExp(log_w).stderr()
    kept = torch.tensor([0, 1, 3])
    torch.testing.assert_close(found[kept], expected[kept])
    assert found[2] == pytest.approx(1)
    assert LogMeanExp(log_w[:1]).stderr().isnan().all()


def test_effective_sample_size_lies_between_one_and_the_number_of_samples(stream: torch.Generator) -> None:
    equal, single, mixed = torch.zeros(50), torch.tensor([0.0] + [-1e3] * 49), torch.randn(50, generator=stream)
    estimate = StreamedLogMeanExp()
    estimate.add(torch.stack([equal, single, mixed], dim=1))
    sizes = estimate.effective_sample_size()
    assert sizes[0] == pytest.approx(50)
    assert sizes[1] == pytest.approx(1)
    assert 1 < sizes[2] < 50
    assert estimate.stderr()[0] == pytest.approx(0, abs=1e-7)


def test_estimates_that_do_not_exist_are_not_numbers() -> None:
    with pytest.raises(ValueError, match="no weights"):
        StreamedLogMeanExp().value()
    with pytest.raises(ValueError, match="no weights"):
        StreamedBounds().curve()
    for empty in (StreamedMean(), StreamedLargest(3)):
        with pytest.raises(ValueError, match="no values"):
            empty.value()
    estimate, mean = StreamedLogMeanExp(), StreamedMean()
    estimate.add(torch.zeros(1, 2))
    mean.add(torch.zeros(1, 2))
    assert estimate.stderr().isnan().all()
    assert mean.stderr().isnan().all()
    impossible = StreamedLogMeanExp()
    impossible.add(torch.full((3, 1), -math.inf))
    assert not impossible.value().isfinite().any()


@pytest.mark.parametrize("sizes", CUTS)
def test_mean_is_the_direct_one_however_it_is_cut(sizes: list[int], stream: torch.Generator) -> None:
    # The mean is a billion times the spread, where a difference of sums of squares would have no correct digit.
    values = 1e6 + 1e-3 * torch.randn(40, 3, 2, generator=stream, dtype=torch.float64)
    mean = StreamedMean()
    for part in values.split(sizes):
        mean.add(part)
    torch.testing.assert_close(mean.value(), values.mean(0), rtol=1e-14, atol=0)
    torch.testing.assert_close(mean.sd(), values.std(0), rtol=1e-6, atol=0)
    torch.testing.assert_close(mean.stderr(), values.std(0) / math.sqrt(40), rtol=1e-6, atol=0)


def cuts(samples: int) -> list[list[int]]:
    return [[samples], [1] * samples, [min(7, samples - i) for i in range(0, samples, 7)], [samples - 1, 1]]


@pytest.mark.parametrize("samples", [2, 9, 10, 11, 100, 345, 1000])
@pytest.mark.parametrize("cut", range(4))
def test_bounds_are_the_direct_ones_however_the_stream_is_cut(samples: int, cut: int, stream: torch.Generator) -> None:
    log_w = 2 * torch.randn(samples, 3, generator=stream, dtype=torch.float64)
    log_w[:, 1] += 1e4
    log_w[1, 2] = -math.inf
    bounds = StreamedBounds()
    for part in log_w.split(cuts(samples)[cut]):
        bounds.add(part)
    curve = bounds.curve()
    expected = [k for k in (1, 10, 100) if k < samples] + [samples]
    assert curve.k == tuple(expected)
    for k, bound, stderr in zip(curve.k, curve.bound, curve.stderr, strict=True):
        columns = slice(2) if k == 1 else slice(3)  # a single weight of zero has no logarithm
        groups = log_w[: samples // k * k].unflatten(0, (-1, k)).logsumexp(1)[:, columns] - math.log(k)
        torch.testing.assert_close(bound[columns], groups.mean(0))
        w = torch.exp(log_w[:k, columns] - groups[0])
        error = groups.std(0) / math.sqrt(len(groups)) if len(groups) > 1 else w.std(0) / math.sqrt(k)
        torch.testing.assert_close(stderr[columns], error)
    assert torch.equal(curve.bound[-1], bounds.total.value())
    assert torch.equal(curve.stderr[-1], bounds.total.stderr())


def test_bounds_of_complete_groups_increase_in_every_sample(stream: torch.Generator) -> None:
    bounds = StreamedBounds()
    for part in (3 * torch.randn(10_000, 50, generator=stream)).split(128):
        bounds.add(part)
    curve = bounds.curve()
    assert curve.k == (1, 10, 100, 1000, 10_000)
    assert (curve.bound.diff(dim=0) > 0).all()
    # E log w = 0 and log E w = 4.5: so that there is something to increase.
    assert curve.bound[0].mean() == pytest.approx(0, abs=4 * 3 / math.sqrt(500_000))
    assert curve.bound[-1].mean() > 3


@pytest.mark.parametrize("count", [1, 10, 40, 50])
@pytest.mark.parametrize("sizes", CUTS)
def test_largest_are_the_direct_ones_however_the_stream_is_cut(
    sizes: list[int], count: int, stream: torch.Generator
) -> None:
    values = torch.randn(40, 6, generator=stream)
    values[:, 5] = values[0, 5]
    largest = StreamedLargest(count)
    for part in values.split(sizes):
        largest.add(part)
    torch.testing.assert_close(largest.value(), values.sort(dim=0, descending=True).values[:count], rtol=0, atol=0)


def held(kept: object) -> int:
    """Bytes of all tensors that an object keeps alive, whole storages where it keeps views."""
    if isinstance(kept, Tensor):
        return kept.untyped_storage().nbytes()
    parts = kept if isinstance(kept, list | tuple) else vars(kept).values() if hasattr(kept, "__dict__") else ()
    return sum(held(part) for part in parts)


def most_held(kept: StreamedBounds | StreamedLargest, blocks: int) -> int:
    stream, most = torch.Generator().manual_seed(5), 0
    for _ in range(blocks):
        kept.add(torch.randn(50, 4, generator=stream))
        most = max(most, held(kept))
    return most


def test_streams_keep_no_more_of_many_values_than_of_few() -> None:
    few, many = (most_held(StreamedBounds(), blocks) for blocks in (20, 200))
    # Ten times the values are one level more: at most nine groups that wait, the last one, and the two moments.
    assert few < many <= few + (9 * 2 + 2 + 2) * 4 * 8
    few, many = (most_held(StreamedLargest(30), blocks) for blocks in (20, 200))
    assert few == many <= (2 * 30 + 50) * 4 * 4


@pytest.mark.parametrize("event", [1, 784, 3 * 64 * 64, 2**22])
@pytest.mark.parametrize("samples", [1, 1000, 1003, 4096])
def test_blocks_cover_everything_once_and_are_small(event: int, samples: int) -> None:
    x = torch.arange(150.0)[:, None].expand(150, event)
    blocks = observation_blocks(x)
    assert torch.equal(torch.cat([block[:, 0] for block in blocks]), x[:, 0])
    for block in blocks:
        sizes = list(sample_blocks(block, samples))
        assert sum(sizes) == samples
        assert max(sizes) * len(block) * event <= max(estimators.BLOCK_ELEMENTS, event)


def test_posterior_means_use_exactly_the_samples_asked_for(
    monkeypatch: pytest.MonkeyPatch, stream: torch.Generator
) -> None:
    monkeypatch.setattr(estimators, "BLOCK_ELEMENTS", 3 * 256 * estimators.BLOCK_OBSERVATIONS)
    drawn: list[Tensor] = []

    def terms(x: Tensor, n: int) -> dict[str, Tensor]:
        drawn.append(x.sum(1).repeat(n))
        values = x.sum(1) + torch.randn(n, len(x), generator=stream)
        return {"value": values, "negative": -values}

    x = torch.arange(100.0)[:, None]
    means = posterior_means(x, 50, terms)
    assert torch.equal(torch.cat(drawn).unique(return_counts=True)[1], torch.full((100,), 50))
    value, stderr = means["value"]
    torch.testing.assert_close(means["negative"][0], -value)
    # 50 draws of unit variance: the error of the mean is 0.14 +- 0.014, and 100 z-scores have mean square 1 +- 0.15.
    assert stderr.mean() == pytest.approx(50**-0.5, rel=0.05)
    assert ((value - x[:, 0]) / stderr).square().mean() == pytest.approx(1, abs=0.6)


class TwoPoints(Posterior):
    """q(z|x) puts half its mass on x and half on x + 2."""

    def sample(self, x: Tensor, n: int, generator: torch.Generator) -> Tensor:
        return x + 2 * torch.randint(2, (n, *x.shape), generator=generator)


class Point(Posterior):
    def sample(self, x: Tensor, n: int, generator: torch.Generator) -> Tensor:
        return x.expand(n, *x.shape)


def test_moments_are_those_of_the_posterior(stream: torch.Generator) -> None:
    x = torch.tensor([[-5.0], [0.0], [7.0]])
    mean, sd = posterior_moments(TwoPoints(), x, 10_000, stream)
    # Mean x + 1 and standard deviation 1; four standard errors of the mean are 0.04.
    torch.testing.assert_close(mean, x + 1, rtol=0, atol=0.04)
    torch.testing.assert_close(sd, torch.ones(3, 1), rtol=0.01, atol=0)


def test_a_collapsed_posterior_still_has_a_density(stream: torch.Generator) -> None:
    mean, sd = posterior_moments(Point(), torch.tensor([[2.0]]), 16, stream)
    assert (float(mean), float(sd)) == (2.0, pytest.approx(1e-4))


@pytest.mark.parametrize(("dtype", "scale"), [(torch.float64, 1e-9), (torch.float32, 1e-3)])
def test_a_narrow_posterior_is_not_taken_for_a_wide_one(
    dtype: torch.dtype, scale: float, stream: torch.Generator
) -> None:
    """Of any unit: what is one in metres is a thousand in millimetres."""

    class Scaled(TwoPoints):
        def sample(self, x: Tensor, n: int, generator: torch.Generator) -> Tensor:
            return scale * super().sample(x, n, generator).to(dtype)

    mean, sd = posterior_moments(Scaled(), torch.tensor([[-5.0], [7.0]], dtype=dtype), 10_000, stream)
    torch.testing.assert_close(mean / scale, torch.tensor([[-4.0], [8.0]], dtype=dtype), rtol=0, atol=0.04)
    torch.testing.assert_close(sd / scale, torch.ones(2, 1, dtype=dtype), rtol=0.01, atol=0)


def proposal(prior_weight: float) -> DefensiveProposal:
    mean, sd = torch.tensor([[-1.0], [4.0]]).double(), torch.tensor([[0.3], [0.8]]).double()
    return DefensiveProposal(ShiftedPrior(), mean, sd, widening=1.5, prior_weight=prior_weight)


@pytest.mark.parametrize("prior_weight", [0.0, 0.1, 0.7])
def test_the_proposals_density_integrates_to_one(prior_weight: float) -> None:
    z = torch.linspace(-20, 20, 20_001, dtype=torch.float64)
    density = proposal(prior_weight).log_prob(z[:, None, None].expand(-1, 2, 1)).exp()
    torch.testing.assert_close(torch.trapezoid(density, z, dim=0), torch.ones(2).double(), rtol=1e-9, atol=0)


@pytest.mark.parametrize("prior_weight", [0.0, 0.1, 0.7])
def test_the_proposals_draws_have_its_density(prior_weight: float, stream: torch.Generator) -> None:
    z, log_r = proposal(prior_weight).sample_and_log_prob(40_000, stream)
    # First and second moments of the mixture; a wrong weight, place or scale of either part moves one of them.
    parts = torch.tensor([[-1.0, 4.0], [3.0, 3.0]]), torch.tensor([[0.45, 1.2], [0.5, 0.5]])
    weights = torch.tensor([[1 - prior_weight], [prior_weight]])
    for power, expected in [(1, (weights * parts[0]).sum(0)), (2, (weights * (parts[0] ** 2 + parts[1] ** 2)).sum(0))]:
        values = z[..., 0] ** power
        # Four standard errors, in each of 6 comparisons a parameter: a chance of 1 in 2600 that any fails.
        assert ((values.mean(0) - expected).abs() < 4 * values.std(0) / 200).all()
    # E_r[f / r] = 1 for any density f within reach: here uniform over one unit upwards of the Gaussian part's mean.
    above = z[..., 0] - parts[0][0]
    w = torch.where((above > 0) & (above < 1), torch.exp(-log_r), 0.0)
    assert ((w.mean(0) - 1).abs() < 4 * w.std(0) / 200).all()

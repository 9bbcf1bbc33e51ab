"""Stored draws of Markov chains as a posterior: which of them are given, and how often."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from harness.posterior import ChainPosterior, HasChains

X = torch.zeros(1, 3, dtype=torch.float64)
CHAINS, DRAWS = 3, 8


def posterior() -> ChainPosterior:
    """Draw t of chain c is 10 c + t, in both dimensions."""
    values = 10 * torch.arange(CHAINS)[:, None] + torch.arange(DRAWS)
    return ChainPosterior(
        values[:, :, None, None].double().expand(-1, -1, 1, 2), torch.zeros(CHAINS, dtype=torch.int64)
    )


def given(n: int, generator: torch.Generator) -> list[int]:
    z = posterior().sample(X, n, generator)
    assert z.shape == (n, 1, 2)
    assert torch.equal(z[..., 0], z[..., 1])
    return z[:, 0, 0].int().tolist()


def places(found: list[int]) -> Tensor:
    """Where values are along the chains, one after another, in ascending order."""
    return torch.tensor(sorted(value // 10 * DRAWS + value % 10 for value in found))


@pytest.mark.parametrize("n", [1, 2, 5, 12, 23])
def test_fewer_draws_than_there_are_come_evenly_spaced_and_never_twice(n: int, generator: torch.Generator) -> None:
    total = CHAINS * DRAWS
    for _ in range(20):
        found = given(n, generator)
        assert len(set(found)) == n
        where = places(found)
        steps = torch.diff(torch.cat([where, where[:1] + total]))  # around the circle of all draws
        assert int(steps.min()) >= total // n
        assert int(steps.max()) <= -(-total // n)


def test_each_draw_is_given_equally_often(generator: torch.Generator) -> None:
    """A draw's count over 2,000 subsets of 5 of 24 is binomial with p = 5/24: 417, standard deviation 18."""
    counts = torch.zeros(CHAINS * DRAWS)
    for _ in range(2000):
        counts[places(given(5, generator))] += 1
    assert float((counts - 2000 * 5 / 24).abs().max()) < 5 * 18.2


def test_more_draws_than_there_are_repeat_all_of_them_equally_often(generator: torch.Generator) -> None:
    counts = torch.bincount(places(given(2 * CHAINS * DRAWS + 7, generator)))
    assert counts.tolist().count(3) == 7
    assert counts.tolist().count(2) == CHAINS * DRAWS - 7


def test_the_order_is_random(generator: torch.Generator) -> None:
    orders = [given(24, generator) for _ in range(3)]
    assert sorted(orders[0]) == sorted(orders[1])
    assert orders[0] != orders[1] != orders[2]
    assert all(found != sorted(found) for found in orders)


def test_every_copy_of_the_observation_has_a_subset_of_its_own(generator: torch.Generator) -> None:
    z = posterior().sample(X.expand(4, -1).float(), 6, generator)
    assert z.shape == (6, 4, 2)
    assert z.dtype == torch.float32
    assert len({tuple(column) for column in z[..., 0].T.tolist()}) > 1


def test_chains_are_kept_in_their_order() -> None:
    assert isinstance(posterior(), HasChains)
    assert posterior().chains()[1, :, 0, 0].tolist() == [10.0 + t for t in range(DRAWS)]
    assert posterior().divergences().tolist() == [0, 0, 0]

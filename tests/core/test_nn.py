"""Laws of the shared networks: initial weights, shapes, where noise enters, what a pair trunk can express."""

from __future__ import annotations

from typing import get_args

import pytest
import torch

from harness.nn import (
    MLP,
    Activation,
    EncoderTrunk,
    InnerProductPairTrunk,
    ResidualPairTrunk,
    Trunk,
    count_parameters,
    linear,
)


def randn(*shape: int, generator: torch.Generator) -> torch.Tensor:
    return torch.randn(shape, generator=generator)


def test_linear_layers_start_glorot_uniform_with_zero_bias() -> None:
    """Glorot and Bengio 2010: uniform within sqrt(6 / (fan in + fan out)), so the variance is a third of its square."""
    layer = linear(300, 500)
    bound = (6 / 800) ** 0.5
    weights = layer.weight.detach()
    assert float(weights.abs().max()) <= bound
    # 150,000 weights: the variance of a uniform has a relative standard error of sqrt(0.8 / n) = 0.23 %; 5 of them
    assert float(weights.var()) == pytest.approx(2 / 800, rel=5 * 0.0023)
    assert not bool(layer.bias.any())
    assert not bool(linear(3, 4, zero=True).weight.any())
    assert linear(3, 4, bias=False).bias is None


@pytest.mark.parametrize("activation", get_args(Activation))
def test_an_mlp_has_as_many_hidden_layers_as_said(activation: Activation, generator: torch.Generator) -> None:
    net = MLP(3, 5, 7, 2, activation)
    assert count_parameters(net) == (3 * 7 + 7) + (7 * 7 + 7) + (7 * 5 + 5)
    assert net(randn(4, 2, 3, generator=generator)).shape == (4, 2, 5)
    without = MLP(3, 5, 7, 0, activation)
    x, y = randn(2, 3, generator=generator), randn(2, 3, generator=generator)
    torch.testing.assert_close(without(x + y), without(x) + without(y))  # linear, and the bias starts at zero


@pytest.mark.parametrize("depth", [1, 2])
def test_noise_enters_before_every_activation(depth: int, generator: torch.Generator) -> None:
    """A layer's own part of the injection matters, and it starts as a layer of its own would."""
    trunk = EncoderTrunk(6, 8, depth, "softplus", centre=True, noise_dim=3)
    x, noise = randn(4, 2, 3, generator=generator), randn(5, 4, 3, generator=generator)
    features = trunk(x, noise)
    assert features.shape == (5, 4, trunk.features)
    assert trunk.injection is not None
    assert float(trunk.injection.weight.detach().abs().max()) <= (6 / (3 + 8)) ** 0.5
    for part in trunk.injection.weight.detach().split(8):
        kept = part.clone()
        part.zero_()
        assert bool((trunk(x, noise) != features).any())
        part.copy_(kept)
    assert torch.equal(trunk(x, noise), features)


def test_a_trunk_says_when_noise_is_missing_or_not_wanted(generator: torch.Generator) -> None:
    x, noise = randn(4, 6, generator=generator), randn(4, 3, generator=generator)
    with pytest.raises(ValueError, match="noise_dim=3, called with noise=False"):
        EncoderTrunk(6, 8, 1, "elu", centre=False, noise_dim=3)(x)
    with pytest.raises(ValueError, match="noise_dim=0, called with noise=True"):
        EncoderTrunk(6, 8, 1, "elu", centre=False, noise_dim=0)(x, noise)


def test_a_trunk_without_layers_passes_x_on(generator: torch.Generator) -> None:
    x = randn(4, 2, 3, generator=generator)
    trunk = EncoderTrunk(6, 8, 0, "elu", centre=False, noise_dim=0)
    assert trunk.features == 6
    assert torch.equal(trunk(x), x.flatten(1))
    assert torch.equal(EncoderTrunk(6, 8, 0, "elu", centre=True, noise_dim=0)(x), 2 * x.flatten(1) - 1)


PAIRS = [
    pytest.param(lambda centre: ResidualPairTrunk(6, 2, 8, 2, "elu", centre=centre), id="residual"),
    pytest.param(lambda centre: InnerProductPairTrunk(6, 2, 8, 1, 4, "elu", centre=centre), id="inner-product"),
]


@pytest.mark.parametrize("make", PAIRS)
def test_a_pair_trunk_sees_each_pair_by_itself(make, generator: torch.Generator) -> None:
    trunk: Trunk = make(True)
    x, z = randn(4, 2, 3, generator=generator), randn(5, 4, 2, generator=generator)
    features = trunk(x, z)
    assert features.shape == (5, 4, trunk.features)
    alone = torch.stack([torch.cat([trunk(x[j : j + 1], z[i, j : j + 1]) for j in range(4)]) for i in range(5)])
    torch.testing.assert_close(alone, features)
    assert bool((trunk(x.flip(0), z) != features).any())
    assert bool((trunk(x, z.flip(0)) != features).any())


def test_residual_blocks_start_as_the_identity(generator: torch.Generator) -> None:
    """Their second layers start at zero: two blocks and none are the same function."""
    deep = ResidualPairTrunk(6, 2, 8, 2, "elu", centre=False)
    shallow = ResidualPairTrunk(6, 2, 8, 0, "elu", centre=False)
    shallow.load_state_dict({name: t for name, t in deep.state_dict().items() if name.startswith("from_")})
    x, z = randn(4, 6, generator=generator), randn(4, 2, generator=generator)
    assert torch.equal(deep(x, z), shallow(x, z))


def test_inner_product_features_are_products_and_both_sides(generator: torch.Generator) -> None:
    """Each feature is a function of x times a function of z, so a head gives <f(x), g(z)> + h(x) + k(z)."""
    trunk = InnerProductPairTrunk(6, 2, 8, 1, 4, "elu", centre=False)
    x, z = randn(2, 6, generator=generator), randn(2, 2, generator=generator)
    same, crossed = trunk(x, z), trunk(x, z.flip(0))
    torch.testing.assert_close(same[0] * same[1], crossed[0] * crossed[1])
    only_x = (same == crossed).all(0)
    only_z = (same == trunk(x.flip(0), z)).all(0)
    assert bool(only_x.any())
    assert bool(only_z.any())
    assert int((~only_x & ~only_z).sum()) == 4  # the rank of the product
    assert trunk.features == same.shape[-1]

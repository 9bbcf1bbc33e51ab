"""Laws of the convolutional networks: shapes, each sample by itself, what reaches what, pieces of bounded memory."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from harness.annealing import Annealing, Kernels
from harness.convolutions import ConvolutionalDecoder, ConvolutionalTrunk, map_sizes
from harness.hmc import DecoderDensity, joint_density
from harness.model import BernoulliLikelihood, DecoderModel, GaussianLikelihood, Likelihood
from harness.starts import GaussianStart

DOUBLE = torch.float64
SIZES = [(8, 8), (9, 13), (28, 28), (64, 61)]
STRIDES = [(2, 2, 2), (1, 2, 2), (1, 1, 1)]
CHANNELS = (2, 3, 4)


@pytest.fixture(autouse=True)
def _weights():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        yield


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def bits(n: int, size: tuple[int, int] = (9, 13)) -> Tensor:
    return (randn(n, *size, seed=1) > 0).double()


def decoder(
    size: tuple[int, int] = (9, 13), strides: tuple[int, ...] = (1, 2, 2), dense: int = 6
) -> ConvolutionalDecoder:
    return ConvolutionalDecoder(2, size, CHANNELS, strides, dense, "softplus").double()


def trunk(
    size: tuple[int, int] = (9, 13), strides: tuple[int, ...] = (1, 2, 2), dense: int = 6, injected: int = 3
) -> ConvolutionalTrunk:
    return ConvolutionalTrunk(size, CHANNELS, strides, dense, "elu", centre=True, injected=injected).double()


# Shapes


@pytest.mark.parametrize("dense", [0, 6])
@pytest.mark.parametrize("strides", STRIDES)
@pytest.mark.parametrize("size", SIZES)
def test_images_of_any_size_go_through_both_ways(size: tuple[int, int], strides: tuple[int, ...], dense: int) -> None:
    x, z, eps = bits(2, size), randn(3, 2, 2), randn(3, 2, 3)
    assert decoder(size, strides, dense)(z).shape == (3, 2, math.prod(size))
    noisy, plain = trunk(size, strides, dense), trunk(size, strides, dense, injected=0)
    last = math.prod(map_sizes(size, strides)[-1])
    assert noisy.features == plain.features == (dense or 4 * last)
    assert noisy(x, eps).shape == (3, 2, noisy.features)
    assert plain(x).shape == (2, plain.features)


def test_sides_are_halved_and_rounded_up() -> None:
    assert map_sizes((28, 28), (2, 2, 2)) == [(28, 28), (14, 14), (7, 7), (4, 4)]
    assert map_sizes((9, 61), (1, 2, 2)) == [(9, 61), (9, 61), (5, 31), (3, 16)]


@pytest.mark.parametrize("leading", [(), (1,), (5,), (2, 3)])
def test_leading_axes_are_kept(leading: tuple[int, ...]) -> None:
    x, network, injected = bits(4), trunk(), trunk().injected
    assert network(x, randn(*leading, 4, injected)).shape == (*leading, 4, network.features)
    assert decoder()(randn(*leading, 4, 2)).shape == (*leading, 4, 9 * 13)


def test_a_trunk_says_when_what_it_needs_is_missing_or_not_wanted() -> None:
    with pytest.raises(ValueError, match="injected=3, called with injected=False"):
        trunk()(bits(2))
    with pytest.raises(ValueError, match="injected=0, called with injected=True"):
        trunk(injected=0)(bits(2), randn(2, 3))


# Each by itself


def test_each_latent_is_decoded_by_itself() -> None:
    network, z = decoder(), randn(5, 4, 2)
    alone = torch.stack([torch.stack([network(z[i, j]) for j in range(4)]) for i in range(5)])
    torch.testing.assert_close(network(z), alone)
    assert bool((network(z.flip(0)) != network(z)).any())


def test_each_pair_has_features_of_its_own() -> None:
    network, x, eps = trunk(), bits(4), randn(5, 4, 3)
    features = network(x, eps)
    alone = torch.stack([torch.cat([network(x[j : j + 1], eps[i, j : j + 1]) for j in range(4)]) for i in range(5)])
    torch.testing.assert_close(features, alone)
    assert bool((network(x.flip(0), eps) != features).any())
    assert bool((network(x, eps.flip(0)) != features).any())


def test_a_plain_trunk_sees_each_observation_by_itself() -> None:
    network, x = trunk(injected=0), bits(4)
    torch.testing.assert_close(network(x), torch.cat([network(x[j : j + 1]) for j in range(4)]))


# What reaches what


def test_what_is_injected_enters_at_every_convolution() -> None:
    """A layer's own part matters; nothing injected is the trunk without injection; each part starts Glorot-uniform."""
    network, x, eps = trunk(), bits(4), randn(5, 4, 3)
    features = network(x, eps)
    for parameter in network.injections.parameters():
        weight = parameter.detach()
        assert float(weight.abs().max()) <= (6 / sum(weight.shape)) ** 0.5
        kept = weight.clone()
        weight.zero_()
        assert bool((network(x, eps) != features).any())
        weight.copy_(kept)
    plain = trunk(injected=0)
    plain.load_state_dict({name: t for name, t in network.state_dict().items() if not name.startswith("injections")})
    torch.testing.assert_close(network(x, 0 * eps), plain(x).expand(5, -1, -1))


def test_images_are_centred_where_asked() -> None:
    network, x = trunk(injected=0), bits(4)
    centred = network(x)
    network.centre = False
    torch.testing.assert_close(network(2 * x - 1), centred)
    assert bool((network(x) != centred).any())


def test_a_pixel_reaches_what_is_within_two_pixels_of_it() -> None:
    network = ConvolutionalTrunk((9, 13), (2,), (1,), 0, "tanh", centre=False, injected=0).double()
    x = bits(1)
    other = x.clone()
    other[0, 4, 7] = 1 - x[0, 4, 7]
    changed = (network(other) != network(x)).reshape(2, 9, 13).all(0)
    expected = torch.zeros(9, 13, dtype=torch.bool)
    expected[2:7, 5:10] = True
    assert torch.equal(changed, expected)


@pytest.mark.parametrize(("stride", "rows", "columns"), [(1, slice(1, 6), slice(3, 8)), (2, slice(4, 9), slice(8, 13))])
def test_a_decoders_first_map_is_the_image_in_small(stride: int, rows: slice, columns: slice) -> None:
    """What one place of the first map says is seen around the same place of the image."""
    network = ConvolutionalDecoder(1, (9, 13), (2,), (stride,), 0, "tanh").double()
    _, _, width = network.smallest
    weight = network.get_parameter("dense.layers.0.weight").detach()
    weight *= (torch.arange(len(weight)) == 3 * width + 5)[:, None]
    changed = (network(randn(1)) != network(randn(1, seed=5))).reshape(9, 13)
    expected = torch.zeros(9, 13, dtype=torch.bool)
    expected[rows, columns] = True
    assert torch.equal(changed, expected)


# Gradients


def test_every_parameter_gets_a_gradient() -> None:
    for network, *inputs in ((decoder(), randn(4, 2)), (trunk(), bits(4), randn(2, 4, 3))):
        network(*inputs).square().sum().backward()
        for name, parameter in network.named_parameters():
            assert parameter.grad is not None, name
            assert bool(parameter.grad.any()), name


@pytest.mark.parametrize("likelihood", [BernoulliLikelihood, GaussianLikelihood])
def test_gradients_in_latents_are_those_of_autograd(likelihood: type[Likelihood]) -> None:
    model = DecoderModel(2, (9, 13), decoder(), likelihood()).double().requires_grad_(False)
    x, z = bits(3), randn(4, 3, 2).requires_grad_()
    density = joint_density(model, x)
    assert isinstance(density, DecoderDensity)
    expected = model.log_joint(x, z)
    (slope,) = torch.autograd.grad(expected.sum(), z)
    with torch.no_grad():  # as evaluators are called
        value, gradient = density.value_and_gradient(z)
    torch.testing.assert_close(value, expected.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradient, slope, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(density.gradient(z), slope, rtol=1e-10, atol=1e-10)


# Pieces


@pytest.fixture
def rows_of() -> Callable[[nn.Module], list[int]]:
    """Keeps how many rows each later call of a layer works on."""

    def keep(layer: nn.Module) -> list[int]:
        rows: list[int] = []
        layer.register_forward_hook(lambda module, inputs, output: rows.append(len(output)))
        return rows

    return keep


@torch.no_grad()
def test_pieces_change_nothing(rows_of: Callable[[nn.Module], list[int]]) -> None:
    x, z, eps = bits(7), randn(5, 7, 2), randn(5, 7, 3)
    cases: list[Any] = [(decoder(), z), (trunk(), x, eps), (trunk(injected=0), x)]
    for network, *inputs in cases:
        rows, whole = rows_of(network.convolutions[-1]), network(*inputs)
        assert len(rows) == 1
        for piece in (1, 3, 7, 14, 35):
            network.piece = piece
            torch.testing.assert_close(network(*inputs), whole)
            assert max(rows[1:]) <= piece
            assert sum(rows[1:]) == rows[0]
            del rows[1:]


@torch.no_grad()
def test_the_first_convolution_is_done_once_for_all_samples(rows_of: Callable[[nn.Module], list[int]]) -> None:
    network, x, eps = trunk(), bits(7), randn(5, 7, 3)
    rows = rows_of(network.convolutions[0])
    for piece in (1, 3, 35):
        network.piece = piece
        network(x, eps)
        assert sum(rows) == 7
        rows.clear()


def test_what_is_recorded_for_a_gradient_is_done_in_one_piece(rows_of: Callable[[nn.Module], list[int]]) -> None:
    """In pieces it would take as much memory, and more time."""
    model, network = decoder(), trunk()
    rows = [rows_of(model.convolutions[0]), rows_of(network.convolutions[1])]
    model.piece = network.piece = 2
    x, z, eps = bits(7), randn(5, 7, 2), randn(5, 7, 3)
    model(z)
    network(x, eps)
    assert rows == [[35], [35]]
    for frozen in (model, network):
        frozen.requires_grad_(False)
    model(z)
    network(x, eps)
    assert all(max(of[1:]) <= 2 for of in rows)
    model(z.requires_grad_())
    network(x, eps.requires_grad_())
    assert (rows[0][-1], rows[1][-1]) == (35, 35)


def small_model(channels: int = 16) -> DecoderModel:
    network = ConvolutionalDecoder(8, (12, 12), (channels, channels), (1, 2), 0, "softplus")
    return DecoderModel(8, (12, 12), network, BernoulliLikelihood()).requires_grad_(False)


@torch.no_grad()
def test_many_latents_are_decoded_within_bounded_memory(peak: Callable[[Callable[[], object]], int]) -> None:
    """Only the images grow with the latents: their pieces, and these joined. A single map of all would be far more."""
    network, latents = small_model().decoder, (200, 400)
    assert isinstance(network, ConvolutionalDecoder)
    network.piece = 20
    few, many = (peak(lambda n=n: network(randn(n, 8).float())) for n in latents)
    images, largest_map = ([4 * n * 144 * channels for n in latents] for channels in (1, 16))
    assert many - few < 2.2 * (images[1] - images[0])
    assert many < 0.6 * largest_map[1]


@pytest.mark.parametrize("forces", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("channels", "memory"), [(3, 8 * 2**20), (16, 20 * 2**20)])
@torch.no_grad()
def test_annealing_stays_within_the_memory(
    peak: Callable[[Callable[[], object]], int], channels: int, memory: int, forces: torch.dtype | None
) -> None:
    """Also that of the libraries, which fill three channels up to sixteen."""
    x, scale = bits(30, (12, 12)).float(), torch.full((30, 8), 0.9)
    path = Annealing(small_model(channels), x, GaussianStart(scale, 0 * scale), 16, 2, memory, forces)
    assert 1 < path.blocks[0].stop < 30
    kernels = Kernels([0.0, 0.5, 1.0], torch.full((1, 30), 0.05), 2)
    used = peak(lambda: path.forward(kernels, torch.Generator().manual_seed(4)))
    assert 0.2 * memory < used <= memory

"""The named specs: the paper's sizes, networks that fit together, options that belong to a model, hashes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import harness
from harness import convolutions
from harness.convolutions import map_sizes
from harness.nn import count_parameters
from harness.options import UserError, configure
from harness.problem import DatasetSpec, MLPSpec, ModelSpec
from harness.sources import source_hash
from harness.specs import Conv0Spec, Conv1Spec, ConvolutionalSpec, NetworksProblem
from harness_plugins.digits import Digits
from harness_plugins.npz import ArraysFile

SPECS = [Conv1Spec(latent_dim=2), Conv0Spec(latent_dim=2)]


@dataclass(frozen=True, kw_only=True)
class Toy(NetworksProblem):
    name: str = "toy"
    width: int = 5

    @property
    def default_budget(self) -> str:
        return "steps=1"

    def dataset(self) -> DatasetSpec:
        images = np.zeros((4, 8, 8), dtype=np.float32)
        return DatasetSpec(self.name, images, images, images)

    def model_spec(self) -> ModelSpec:
        return self.networks("gaussian")


@pytest.mark.parametrize(
    ("side", "maps"),
    [(8, (8, 8, 8, 4)), (28, (28, 28, 14, 7)), (32, (32, 16, 8, 4)), (64, (32, 16, 8, 4)), (100, (50, 25, 13, 7))],
)
def test_conv0_has_the_maps_of_the_paper(side: int, maps: tuple[int, ...]) -> None:
    sizes = map_sizes((side, side), Conv0Spec(latent_dim=2).strides((side, side)))
    assert tuple(height for height, _ in sizes[1:]) == maps


def test_parameters_of_conv1_are_those_of_its_layers() -> None:
    spec, shape, d, eps = Conv1Spec(latent_dim=8), (28, 28), 8, 32
    convolutions = 25 * (1 * 16 + 16 * 32 + 32 * 32)
    encoder = convolutions + (16 + 32 + 32) + (4 * 4 * 32 + 1) * 800
    injected = eps * (14 * 14 * 16 + 7 * 7 * 32 + 4 * 4 * 32)
    decoder = convolutions + (32 + 16 + 1) + (d + 1) * 300 + 301 * 4 * 4 * 32
    pair = 25 * (16 + 16 * 32 + 32 * 64 + 64 * 128) + (16 + 32 + 64 + 128)
    pair += d * (14 * 14 * 16 + 7 * 7 * 32 + 4 * 4 * 64 + 2 * 2 * 128)
    assert count_parameters(spec.encoder_trunk(shape, 0)) == encoder
    assert count_parameters(spec.encoder_trunk(shape, eps)) == encoder + injected
    assert count_parameters(spec.new_model(shape)) == decoder
    assert count_parameters(spec.pair_trunk(shape)) == pair
    assert count_parameters(replace(spec, likelihood="gaussian").new_model(shape)) == decoder + 1


def test_parameters_of_conv0_are_those_of_its_layers() -> None:
    spec, shape, d, eps = Conv0Spec(latent_dim=8), (28, 28), 8, 32
    convolutions = 25 * (64 + 64 * 128 + 128 * 256 + 256 * 512)
    encoder = convolutions + 64 + 128 + 256 + 512
    maps = 28 * 28 * 64 + 28 * 28 * 128 + 14 * 14 * 256 + 7 * 7 * 512
    decoder = convolutions + (256 + 128 + 64 + 1) + (d + 1) * 7 * 7 * 512
    pair = (784 + d + 2) * 1024 + 4 * 1025 * 1024 + 2 * 1025 * 8193
    assert count_parameters(spec.encoder_trunk(shape, eps)) == encoder + eps * maps
    assert count_parameters(spec.new_model(shape)) == decoder
    assert count_parameters(spec.pair_trunk(shape)) == pair


@pytest.mark.parametrize("shape", [(8, 8), (28, 28), (9, 13), (64, 64)])
@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: type(spec).__name__)
@torch.no_grad()
def test_shapes_for_any_image(spec: ConvolutionalSpec, shape: tuple[int, int]) -> None:
    spec = replace(spec, pair_width=64, pair_rank=128) if isinstance(spec, Conv0Spec) else spec
    model, x, z = spec.new_model(shape), torch.ones(1, *shape), torch.ones(2, 1, 2)
    plain, noisy, pair = spec.encoder_trunk(shape, 0), spec.encoder_trunk(shape, 5), spec.pair_trunk(shape)
    assert model.log_likelihood(x, z).shape == (2, 1)
    assert plain(x).shape == (1, plain.features)
    assert noisy(x, torch.ones(2, 1, 5)).shape == (2, 1, noisy.features)
    assert pair(x, z).shape == (2, 1, pair.features)


@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian"])
@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: type(spec).__name__)
def test_networks_fit_together_and_every_parameter_is_used(spec: ConvolutionalSpec, likelihood: Any) -> None:
    """Also the smoke test of conv0, on the smallest images."""
    spec = replace(spec, likelihood=likelihood)
    if isinstance(spec, Conv0Spec):
        spec = replace(spec, pair_width=64, pair_rank=128)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, encoder, pair = spec.new_model((8, 8)), spec.encoder_trunk((8, 8), 5), spec.pair_trunk((8, 8))
        x, z, eps = torch.rand(2, 8, 8), torch.randn(2, 2), torch.randn(2, 5)
    loss = model.log_likelihood(x, z).sum() + encoder(x, eps).square().sum() + pair(x, z).square().sum()
    assert bool(loss.isfinite())
    loss.backward()
    for module in (model, encoder, pair):
        for name, parameter in module.named_parameters():
            assert parameter.grad is not None, name
            assert bool(parameter.grad.any()), name


@pytest.mark.parametrize("shape", [(64,), (7, 8), (8, 7), (8, 8, 3), (2, 2)])
@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: type(spec).__name__)
def test_what_is_no_image_is_refused(spec: ConvolutionalSpec, shape: tuple[int, ...]) -> None:
    reason = spec.unfit(shape)
    assert reason is not None
    assert str(shape) in reason
    assert "\n" not in reason
    for make in (spec.new_model, spec.pair_trunk, lambda shape: spec.encoder_trunk(shape, 0)):
        with pytest.raises(UserError, match="at least 8 pixels a side, got observations of shape"):
            make(shape)
    assert MLPSpec(latent_dim=2).unfit(shape) is None


def test_a_file_without_images_is_refused_before_anything_is_run(tmp_path: Path) -> None:
    np.savez(tmp_path / "table.npz", train=np.ones((20, 64), dtype=np.uint8), test=np.ones((5, 64), dtype=np.uint8))
    problem = ArraysFile(model="conv1").with_argument(str(tmp_path / "table.npz"))
    with pytest.raises(UserError, match=r"table\.npz\[model=conv1\]: .*shape \(64,\); use model=mlp"):
        harness.compare("vae", problem, 1, out=tmp_path / "results")
    assert not (tmp_path / "results").exists()


# Problems


def test_the_option_names_the_spec() -> None:
    assert Toy().model_spec() == MLPSpec(latent_dim=32, width=5, likelihood="gaussian")
    assert Toy(model="conv1", latent_dim=3).model_spec() == Conv1Spec(latent_dim=3, likelihood="gaussian")
    assert configure(Toy(), {"model": "conv0"}).model_spec() == Conv0Spec(latent_dim=32, likelihood="gaussian")
    assert Toy(latent_dim=3, model="conv1").label == "toy[model=conv1,latent_dim=3]"
    assert Digits().model_spec() == MLPSpec(latent_dim=2, width=128, pair_width=128)


@pytest.mark.parametrize(("key", "value"), [("width", 6), ("depth", 1), ("activation", "elu")])
@pytest.mark.parametrize("model", ["conv1", "conv0"])
def test_options_of_the_mlp_are_not_ignored(model: Any, key: str, value: Any) -> None:
    with pytest.raises(UserError, match=f"toy: option {key} belongs to model=mlp; leave it out, as model={model}"):
        Toy(model=model, **{key: value})
    assert getattr(Toy(**{key: value}), key) == value


def test_an_unknown_model_is_refused_with_those_that_there_are() -> None:
    with pytest.raises(UserError, match="option model='conv2': input should be 'mlp', 'conv1' or 'conv0'"):
        configure(Toy(), {"model": "conv2"})


def test_the_spec_hash_changes_with_the_model_and_with_the_convolutions_source(monkeypatch: pytest.MonkeyPatch) -> None:
    problems = [Toy(), Toy(model="conv1"), Toy(model="conv0")]
    before = [problem.spec_hash for problem in problems]
    assert len(set(before)) == 3

    def edited(thing: object) -> str:
        return "edited" if thing is convolutions else source_hash(thing)

    monkeypatch.setattr("harness.problem.source_hash", edited)
    after = [problem.spec_hash for problem in problems]
    assert [a == b for a, b in zip(after, before, strict=True)] == [True, False, False]

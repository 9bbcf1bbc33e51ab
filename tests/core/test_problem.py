"""Data, problems and what a method is shown of them: the laws that make a comparison a fair one."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from harness.problem import (
    DataError,
    DatasetSpec,
    DeviceData,
    MLPSpec,
    ModelSpec,
    Problem,
    Split,
    binarised_,
    check_data,
    check_suited,
    loaded,
    placed,
    random_bits,
)
from harness.seeding import Streams

CPU = torch.device("cpu")


def intensities(n: int, seed: int = 0) -> np.ndarray:
    return np.random.Generator(np.random.PCG64(seed)).integers(0, 17, (n, 2, 3), dtype=np.uint8)


def spec(**changes: Any) -> DatasetSpec:
    facts = {"levels": 16, "binarisation": "dynamic"} | changes
    return DatasetSpec("toy", intensities(50, 0), intensities(20, 1), intensities(40, 2), **facts)


@dataclass(frozen=True, kw_only=True)
class Toy(Problem):
    name: str = "toy"
    latent_dim: int = 3
    width: int = 5

    @property
    def default_budget(self) -> str:
        return "steps=1"

    def dataset(self) -> DatasetSpec:
        return spec()

    def model_spec(self) -> ModelSpec:
        return MLPSpec(latent_dim=self.latent_dim, width=self.width, depth=1)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_a_dynamic_read_is_a_fresh_bernoulli_draw_of_each_element() -> None:
    values = torch.arange(17, dtype=torch.uint8).reshape(17, 1)
    split = Split(values, 16, torch.float32, binarise=True)
    reads = 20_000
    stream = generator(0)
    draws = torch.stack([split.read(torch.arange(17), stream)[:, 0] for _ in range(reads)])
    assert set(draws.unique().tolist()) == {0.0, 1.0}
    p = torch.arange(17) / 16
    z = (draws.mean(0) - p) / (p * (1 - p) / reads).sqrt().clamp(min=1e-9)
    assert z[[0, 16]].eq(0).all()  # never and always
    assert z.abs().max() < 4.5  # 15 means: beyond 4.5 standard errors once in 10,000 seeds
    # Consecutive reads of one element are independent: 4.5 standard errors of a correlation are 4.5 / sqrt(reads).
    correlation = torch.corrcoef(torch.stack([draws[:-1, 8], draws[1:, 8]]))[0, 1]
    assert abs(correlation) < 4.5 / reads**0.5


def test_reads_are_the_same_from_the_same_stream_only() -> None:
    split = DeviceData.place(spec(), CPU, torch.float32).train
    rows = torch.arange(len(split))
    assert torch.equal(split.read(rows, generator(1)), split.read(rows, generator(1)))
    assert not torch.equal(split.read(rows, generator(1)), split.read(rows, generator(2)))


@pytest.mark.parametrize("levels", [1, 16, 254, 255])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_pixel_has_its_probability_to_the_nearest_65536th(levels: int, dtype: torch.dtype) -> None:
    """Over all bits that there are, each once; 0 and 1 are never and always."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16)[:, None].expand(-1, levels + 1)
    p = torch.arange(levels + 1, dtype=torch.float64) / levels
    pixels = binarised_(torch.arange(levels + 1, dtype=dtype).repeat(2**16, 1), every, levels)
    assert set(pixels.unique().tolist()) == {0.0, 1.0}
    assert torch.equal(pixels.sum(0, dtype=torch.float64), (p * 2**16).round())


def test_all_sixteen_bits_are_random_and_independent() -> None:
    """Of each element of an odd number of them, and between neighbours, which come out of one draw."""
    n = 100_003
    bits = random_bits(torch.Size([n, 1]), generator(0)).flatten().numpy().view(np.uint16)
    every = (bits[:, None] >> np.arange(16) & 1).astype(float)
    for k in (1, 2, 3, 4):
        every = np.concatenate([every, np.roll(bits, k)[:, None] >> np.arange(16) & 1], axis=1)
    assert abs(every.mean(0) - 0.5).max() < 5 * 0.5 / n**0.5
    correlations = np.corrcoef(every, rowvar=False) - np.eye(80)
    assert abs(correlations).max() < 5.5 / n**0.5  # 3160 pairs: beyond 5.5 standard errors once in 8,000 seeds


@pytest.mark.parametrize(("levels", "binarisation"), [(16, "none"), (None, "static"), (None, "none")])
def test_other_reads_are_the_values_and_use_up_no_randomness(levels: int | None, binarisation: Any) -> None:
    data = spec(levels=levels, binarisation=binarisation)
    split = DeviceData.place(data, CPU, torch.float64).train
    stream = generator(0)
    before = stream.get_state()
    rows = torch.tensor([7, 7, 0])
    expected = torch.from_numpy(data.train[rows] / (levels or 1))
    torch.testing.assert_close(split.read(rows, stream), expected.double(), rtol=0, atol=0)
    assert torch.equal(stream.get_state(), before)


def test_validation_and_test_are_drawn_once_for_all() -> None:
    first, second = (DeviceData.place(spec(), CPU, dtype) for dtype in (torch.float32, torch.float64))
    for name in ("validation", "test"):
        one, other = getattr(first, name), getattr(second, name)
        assert one.dtype == torch.float32
        assert other.dtype == torch.float64
        assert torch.equal(one.double(), other)  # whatever the precision
        assert set(one.unique().tolist()) == {0.0, 1.0}
    n = min(len(first.validation), len(first.test))
    assert not torch.equal(first.validation[:n], first.test[:n])
    # Possible draws of these intensities, too: never 1 at 0, always 1 at 16.
    test = torch.from_numpy(spec().test)
    assert first.test[test == 0].eq(0).all()
    assert first.test[test == 16].eq(1).all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_every_device_scores_the_same_images() -> None:
    host, device = (DeviceData.place(spec(), torch.device(name), torch.float32) for name in ("cpu", "cuda"))
    assert torch.equal(host.test, device.test.cpu())
    assert torch.equal(host.validation, device.validation.cpu())
    assert torch.equal(host.scored(10)[1], device.scored(10)[1].cpu())


def test_scored_subsets_are_nested_fixed_and_without_repetition() -> None:
    data = DeviceData.place(spec(), CPU, torch.float32)
    previous: set[int] = set()
    for n in range(1, 41):
        observations, indices = data.scored(n)
        assert torch.equal(observations, data.test[indices])
        chosen = set(indices.tolist())
        assert len(chosen) == n
        assert previous < chosen
        previous = chosen
    assert torch.equal(data.scored(1000)[1], torch.arange(40))
    assert data.scored(10)[1].tolist() != list(range(10))  # the data may be in the order of their classes


def test_the_content_hash_sees_everything_that_a_method_or_an_evaluator_sees() -> None:
    original = spec()
    flipped = original.test.copy()
    flipped[3, 1, 2] ^= 1
    others = [
        dataclasses.replace(original, test=flipped),
        dataclasses.replace(original, train=original.train[::-1]),
        dataclasses.replace(original, train=original.train.astype(np.uint16)),
        dataclasses.replace(original, train=original.train.reshape(50, 3, 2)),
        dataclasses.replace(original, train=original.train[:-1], validation=original.train),
        dataclasses.replace(original, train=original.validation, validation=original.train),
        dataclasses.replace(original, levels=17),
        dataclasses.replace(original, binarisation="none"),
        dataclasses.replace(original, exhaustive=True),
    ]
    hashes = [original.content_hash, *(other.content_hash for other in others)]
    assert len(set(hashes)) == len(hashes)


def test_the_content_hash_sees_nothing_else() -> None:
    original = spec()
    shuffled = np.asfortranarray(original.train)
    same = dataclasses.replace(original, name="other", train=shuffled, test_labels=np.arange(40))
    assert same.content_hash == original.content_hash == spec().content_hash


ONES = np.ones((3, 2))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"binarisation": "binary"}, "toy: unknown binarisation 'binary'; known: dynamic, none, static"),
        ({"levels": 0}, "toy: levels=0; expected the intensity that stands for probability 1"),
        (
            {"levels": None},
            r"train has values from 0 to 16, but binarisation='dynamic' needs probabilities in \[0, 1\];",
        ),
        ({"levels": 15}, r"probabilities in \[0, 1\] after division by levels=15; rescale them"),
        ({"train": -intensities(50).astype(float)}, "train has values from -16.0 to -0.0"),
        ({"binarisation": "static"}, "train has values besides 0 and 16, but binarisation='static'"),
        ({"binarisation": "static", "levels": None, "train": ONES / 2}, "validation has observations of shape"),
        ({"validation": [[1, 0]]}, "validation is a list; expected a numpy array"),
        ({"test": intensities(0)}, r"test has shape \(0, 2, 3\); expected \(observations, ...\) with at least one"),
        ({"test": intensities(9)[:, :1]}, r"test has observations of shape \(1, 3\), train of \(2, 3\)"),
        ({"train": np.array(["a"])}, "train has dtype <U1; expected whole numbers or floats"),
        ({"train": intensities(5).astype(">f4")}, "train has dtype >f4; .* in the machine's byte order"),
        ({"test_labels": np.arange(3)}, r"test_labels has shape \(3,\); expected \(40,\)"),
        *(
            (
                {"binarisation": "none", "test": np.where(intensities(40) == 3, value, 0.0)},
                "test has values that are not",
            )
            for value in (np.nan, np.inf, -np.inf)
        ),
    ],
)
def test_what_is_said_of_data_is_true(changed: dict[str, Any], message: str) -> None:
    check_data(spec())
    with pytest.raises(DataError, match=message) as caught:
        check_data(replaced(changed))
    assert "\n" not in str(caught.value)


def replaced(changed: dict[str, Any]) -> DatasetSpec:
    return dataclasses.replace(spec(), **changed)


@pytest.mark.parametrize(
    "changed",
    [
        {"binarisation": "none"},
        {"binarisation": "none", "levels": None, "train": -9.5 * intensities(50)},
        {"levels": None, "train": ONES / 3, "validation": ONES, "test": 0 * ONES},
        {"levels": 16, "binarisation": "static", "train": 16 * ONES, "validation": ONES * 0, "test": ONES * 16},
        *(
            {"levels": None, "binarisation": "static"}
            | dict.fromkeys(["train", "validation", "test"], ONES.astype(dtype))
            for dtype in ("?", "uint8", "int64", "float16", "float64")
        ),
    ],
)
def test_what_is_right_is_let_through_and_keeps_its_hash(changed: dict[str, Any]) -> None:
    before = replaced(changed).content_hash
    data = replaced(changed)
    check_data(data)
    assert data.content_hash == before


@dataclass(frozen=True, kw_only=True)
class Doubtful(Toy):
    """Numbers that are no probabilities, taken as they are."""

    likelihood: Any = "bernoulli"
    binarisation: Any = "none"
    levels: int | None = None

    def dataset(self) -> DatasetSpec:
        return spec(binarisation=self.binarisation, levels=self.levels)

    def model_spec(self) -> ModelSpec:
        return MLPSpec(latent_dim=2, likelihood=self.likelihood)


def test_data_are_checked_where_they_are_read_and_suit_the_likelihood() -> None:
    check_suited(Doubtful(likelihood="gaussian"))
    check_suited(Doubtful(levels=16))
    loaded(Doubtful())
    with pytest.raises(DataError, match="train has values from 0 to 16, but a Bernoulli likelihood needs values in"):
        check_suited(Doubtful())
    with pytest.raises(DataError, match="needs probabilities in"):
        loaded(Doubtful(binarisation="dynamic"))


def test_decoder_weights_do_not_depend_on_the_method_or_on_what_was_drawn_before() -> None:
    problem = Toy()
    data = placed(problem, CPU, torch.float32)

    def weights(seed: int, method: str) -> Tensor:
        view = problem.training_view(data, Streams(seed, problem.label, method, CPU))
        return torch.cat([parameter.detach().flatten() for parameter in view.model.parameters()])

    first = weights(0, "vae")
    torch.rand(3)
    assert torch.equal(first, weights(0, "avb"))
    assert not torch.equal(first, weights(1, "vae"))


def test_drawing_initial_weights_leaves_the_global_stream_alone() -> None:
    problem = Toy()
    data = placed(problem, CPU, torch.float32)
    before = torch.get_rng_state()
    problem.training_view(data, Streams(0, problem.label, "vae", CPU))
    assert torch.equal(torch.get_rng_state(), before)


def reachable(thing: object, seen: dict[int, object]) -> dict[int, object]:
    """Everything that can be had from an object through attributes, items and elements."""
    if id(thing) in seen or isinstance(thing, str | int | float | type | None):
        return seen
    seen[id(thing)] = thing
    inner: list[object] = list(getattr(thing, "__dict__", {}).values())
    if isinstance(thing, dict):
        inner += thing.values()
    elif isinstance(thing, list | tuple | set):
        inner += thing
    for item in inner:
        reachable(item, seen)
    return seen


def test_a_method_is_shown_no_test_data() -> None:
    problem = Toy()
    data = placed(problem, CPU, torch.float32)
    view = problem.training_view(data, Streams(0, problem.label, "vae", CPU))
    found = list(reachable(view, {}).values())
    assert any(thing is data.train.values for thing in found)  # shared, not copied; and the search does search
    for thing in found:
        assert not isinstance(thing, DatasetSpec | DeviceData | Problem | np.ndarray)
        if isinstance(thing, Tensor):
            assert thing.data_ptr() != data.test.data_ptr()
            assert thing.shape != data.test.shape


def test_equal_problems_share_one_copy_of_the_data() -> None:
    assert loaded(Toy()) is loaded(Toy())
    assert placed(Toy(), CPU, torch.float32) is placed(Toy(), CPU, torch.float32)
    assert placed(Toy(), CPU, torch.float32) is not placed(Toy(), CPU, torch.float64)


def test_the_spec_hash_tells_problems_apart_by_what_they_are() -> None:
    assert Toy().spec_hash == Toy(latent_dim=3).spec_hash
    assert len({Toy().spec_hash, Toy(latent_dim=4).spec_hash, Toy(width=6).spec_hash}) == 3


class Plain:
    """Its repr() is where it is in memory."""


@pytest.mark.parametrize(
    "part",
    [Plain(), np.zeros(2000), (np.array(0.123456789),), torch.ones(1)],
    ids=["address", "array", "few", "tensor"],
)
def test_a_spec_whose_repr_does_not_tell_what_it_is_has_no_hash(part: object) -> None:
    @dataclass(frozen=True, kw_only=True)
    class Spec(MLPSpec):
        part: Any

    @dataclass(frozen=True, kw_only=True)
    class Other(Toy):
        def model_spec(self) -> ModelSpec:
            return Spec(latent_dim=2, width=5, depth=1, part=part)

    with pytest.raises(TypeError, match="toy: a model spec is known by its repr"):
        _ = Other().spec_hash
    part = "see the paper ..."
    assert len(Other().spec_hash) == len(Toy().spec_hash)


def test_a_class_that_was_typed_in_has_no_source() -> None:
    script = """
        from harness.sources import class_sources
        class Typed: ...
        try:
            class_sources(Typed)
        except TypeError as error:
            print(error)
    """
    for words, text in (["-c", textwrap.dedent(script)], None), (["-"], textwrap.dedent(script)):
        done = subprocess.run([sys.executable, *words], input=text, capture_output=True, text=True, check=True)
        assert "has no source file, without which its results cannot be identified: put it into one" in done.stdout


@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian"])
@pytest.mark.parametrize("pair", ["residual", "inner-product"])
def test_networks_of_a_spec_fit_together_and_every_parameter_is_used(likelihood: Any, pair: Any) -> None:
    latent_dim, noise_dim, n, samples = 3, 4, 6, 5
    networks = MLPSpec(latent_dim=latent_dim, width=7, depth=2, likelihood=likelihood, pair=pair, pair_width=8)
    x = torch.rand(n, 2, 3)
    model = networks.new_model((2, 3))
    encoder, pair_trunk = networks.encoder_trunk((2, 3), noise_dim), networks.pair_trunk((2, 3))
    z = torch.randn(samples, n, latent_dim)
    features: Tensor = encoder(x, torch.randn(samples, n, noise_dim))
    pairs: Tensor = pair_trunk(x, z)
    assert features.shape == (samples, n, encoder.features)
    assert pairs.shape == (samples, n, pair_trunk.features)
    log_likelihood = model.log_likelihood(x, z)
    assert log_likelihood.shape == (samples, n)
    # The second layers of residual blocks start at zero: disturb them, else what is below gets no gradient.
    with torch.no_grad():
        for parameter in pair_trunk.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    (features.square().sum() + pair_trunk(x, z).square().sum() + log_likelihood.sum()).backward()
    for module in (model, encoder, pair_trunk):
        for name, parameter in module.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.abs().sum() > 0, name

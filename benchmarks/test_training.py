"""Speed of a training step of every amortised method, and how much of what this machine can do it is.

Run with ``pytest benchmarks/test_training.py --log-cli-level=INFO``. Steps of the harness's own loop take turns with
products of large matrices: the ratio is of floating-point operations a second. Those of a step are its matrix products
and convolutions; activations, likelihoods, random numbers and Adam are in its time but not in its operations.
"""

from __future__ import annotations

import statistics
from dataclasses import replace
from functools import partial
from typing import Literal

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.mnist_sized import LOOPS, Looped, MNISTShaped, begun, operations
from benchmarks.turns import DEVICE, MatrixProduct, seconds, share_of_peak, take_turns, tell, times_as_fast
from harness.precision import Precision
from harness.registry import Registry
from harness.seeding import flushed
from harness.stepping import Step
from harness.training import GradientMethod
from harness_plugins.digits import Digits


def fits(method: GradientMethod) -> bool:
    view, _ = begun(method, MNISTShaped(images=1))
    return method.one_by_one() is None and method.unfit(view) is None


METHODS = {
    name: entry.thing
    for name, entry in Registry.discover().methods.items()
    if isinstance(entry.thing, GradientMethod) and fits(entry.thing)
}
TURN = 0.3  # seconds of steps, about
LATE = 15_000


def steps_of_a_turn(take: Looped) -> int:
    return max(1, round(TURN / seconds(lambda: take(1))))


@pytest.mark.parametrize("batch_size", [128, 512])
@pytest.mark.parametrize("model", ["mlp", "conv1"])
@pytest.mark.parametrize("name", METHODS)
def test_step(benchmark: BenchmarkFixture, name: str, model: Literal["mlp", "conv1"], batch_size: int) -> None:
    method = replace(METHODS[name], batch_size=batch_size)
    take, product = Looped(method, MNISTShaped(model=model), device=DEVICE), MatrixProduct(torch.float32, DEVICE)
    of_a_step = operations(lambda: take(1))
    steps = steps_of_a_turn(take)
    times = take_turns(benchmark, {"steps": lambda: take(steps), "product": product}, rounds=9)
    tell(
        benchmark,
        f"training step, {name}, {model}, batch {batch_size}",
        device=DEVICE.type,
        steps_per_second=steps / statistics.median(times["steps"]),
        gflop_per_step=of_a_step / 1e9,
        peak_gflop_per_second=product.peak,
        ratios=[share_of_peak("harness", steps * of_a_step, times["steps"], product, times["product"])],
    )


@pytest.mark.parametrize("batch_size", [128, 512])
def test_bf16(benchmark: BenchmarkFixture, batch_size: int) -> None:
    """Against float32, both by default and both compiled, which fuses the conversions."""
    method = replace(METHODS["vae"], batch_size=batch_size)
    precisions: list[Precision] = ["bf16", "float32"]
    take = {
        (precision, way): Looped(method, MNISTShaped(), device=DEVICE, step=step, precision=precision)
        for way, step in LOOPS.items()
        for precision in precisions
    }
    steps = steps_of_a_turn(take["float32", "harness"])
    ways = {way.replace("harness", precision): partial(loop, steps) for (precision, way), loop in take.items()}
    times = take_turns(benchmark, ways, rounds=21)
    pairs = [[way.replace("harness", precision) for precision in precisions] for way in LOOPS]
    tell(
        benchmark,
        f"training step, vae, mlp, batch {batch_size}, precisions",
        device=DEVICE.type,
        ratios=[
            ratio
            for ours, theirs in pairs
            for ratio in times_as_fast({name: times[name] for name in (ours, theirs)}, ours, of_one=steps)
        ],
    )


@pytest.mark.parametrize("name", METHODS)
def test_ways_of_taking_a_step(benchmark: BenchmarkFixture, name: str) -> None:
    """By default and compiled, against steps that are taken as they are written."""
    ways: dict[str, Step] = {**LOOPS, "as written": "eager"}
    loops = {way: Looped(METHODS[name], MNISTShaped(), device=DEVICE, step=step) for way, step in ways.items()}
    steps = steps_of_a_turn(loops["harness"])
    times = take_turns(benchmark, {way: partial(loop, steps) for way, loop in loops.items()}, rounds=21)
    tell(
        benchmark,
        f"ways of taking a training step, {name}",
        device=DEVICE.type,
        compile_seconds={way: loop.compile_seconds for way, loop in loops.items()},
        ratios=times_as_fast(times, *LOOPS, of_one=steps),
    )


@pytest.mark.parametrize("name", ["vae", "avb"])
def test_late_steps(benchmark: BenchmarkFixture, name: str) -> None:
    """A fit becomes no slower as it goes on, though its decoder learns which pixels are always black."""
    loops = {when: Looped(METHODS[name], Digits(), device=DEVICE) for when in ("late", "early")}
    with flushed():  # as in a fit
        loops["late"](LATE)
    steps = steps_of_a_turn(loops["early"])
    times = take_turns(benchmark, {when: partial(loop, steps) for when, loop in loops.items()}, rounds=21)
    tell(
        benchmark,
        f"training step after {LATE:,} others, {name} on digits",
        device=DEVICE.type,
        ratios=times_as_fast(times, "late", of_one=steps),
    )


def test_operations_of_the_vae_are_those_of_its_layers() -> None:
    """Two for each weight and observation forwards, four backwards, but for the first layer: x needs no gradient."""
    first, others = 784 * 300, 300 * 300 + 300 * 64 + 32 * 300 + 300 * 300 + 300 * 784
    take = Looped(METHODS["vae"], MNISTShaped())
    assert operations(lambda: take(1)) == 128 * (4 * first + 6 * others)

"""How cost grows: log-log slopes of seconds against data, latent dimensions, chains, temperatures, seeds at once.

Run with ``pytest benchmarks/test_scaling.py --log-cli-level=INFO``. A slope of 1 is proportional growth, 0 none. All
sizes take turns; a slope is that of each round, and their median is told.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

import harness
from benchmarks.mnist_sized import Looped, MNISTShaped, annealed, annealing_path
from benchmarks.turns import CPU, DEVICE, Work, slope, take_turns, tell, times_as_fast
from harness.evaluator import EvaluationRun, Evaluator
from harness.problem import placed
from harness.registry import Registry
from harness.training import GradientMethod
from harness_plugins.avb import AVB
from harness_plugins.vae import VAE

REGISTRY = Registry.discover()
METHODS = [pytest.param(method, id=method.name) for method in (VAE(), AVB())]
STEPS = 10  # of a turn
SAMPLES = 20  # of each observation


def grown(
    benchmark: BenchmarkFixture, what: str, against: str, sizes: list[int], work_of: Callable[[int], Work], rounds: int
) -> dict[str, list[float]]:
    """Tell the slope; seconds of each size in every round."""
    times = take_turns(benchmark, {str(size): work_of(size) for size in sizes}, rounds=rounds)
    tell(
        benchmark,
        f"{what}, growth with {against}",
        seconds={size: statistics.median(found) for size, found in times.items()},
        measures={"log-log slope": slope(sizes, [*times.values()])},
    )
    return times


@pytest.mark.parametrize("method", METHODS)
def test_step_with_data(benchmark: BenchmarkFixture, method: GradientMethod) -> None:
    def work_of(images: int) -> Work:
        take = Looped(method, MNISTShaped(images=images))
        return lambda: take(STEPS)

    grown(benchmark, f"training step, {method.name}", "training images", [2_000, 16_000, 128_000], work_of, rounds=9)


@pytest.mark.parametrize("method", METHODS)
def test_step_with_latent_dimensions(benchmark: BenchmarkFixture, method: GradientMethod) -> None:
    def work_of(dimensions: int) -> Work:
        take = Looped(method, MNISTShaped(latent_dim=dimensions))
        return lambda: take(STEPS)

    grown(benchmark, f"training step, {method.name}", "latent dimensions", [8, 32, 128, 512], work_of, rounds=9)


@pytest.mark.parametrize("name", ["elbo", "importance"])
def test_evaluation_with_data(benchmark: BenchmarkFixture, name: str) -> None:
    fit, problem = harness.fit("vae", MNISTShaped(), budget="steps=1"), MNISTShaped()

    def work_of(observations: int) -> Work:
        evaluator: Evaluator
        [evaluator] = REGISTRY.select("evaluators", f"{name}[observations={observations},samples={SAMPLES}]")
        run = EvaluationRun(placed(problem, CPU, torch.float32), problem, CPU, torch.float32, 0)

        def measure() -> Any:
            with torch.no_grad():
                return evaluator.measure(fit, problem, run)

        return measure

    grown(benchmark, f"evaluation by {name}", "observations", [125, 250, 500, 1000], work_of, rounds=5)


ANNEALING = {
    "temperatures": [(100, 16, n) for n in (2, 4, 8)],
    "images": [(n, 16, 4) for n in (50, 100, 200)],
    "chains": [(100, n, 4) for n in (8, 16, 32)],
}
"""Images, chains and temperatures, by what is varied."""


@pytest.mark.parametrize("what", ANNEALING)
def test_annealing(benchmark: BenchmarkFixture, what: str) -> None:
    varied = ["images", "chains", "temperatures"].index(what)
    settings = {setting[varied]: setting for setting in ANNEALING[what]}

    def work_of(size: int) -> Work:
        images, chains, transitions = settings[size]
        path, _, _ = annealing_path(images, chains)
        return lambda: annealed(path, transitions)

    grown(benchmark, "annealing", what, [*settings], work_of, rounds=5)


@pytest.mark.parametrize(("name", "counts"), [("four-points", [1, 2, 5, 10]), ("mnist", [1, 2, 4])])
@pytest.mark.parametrize("method", METHODS)
def test_step_with_seeds_at_once(
    benchmark: BenchmarkFixture, method: GradientMethod, name: str, counts: list[int]
) -> None:
    """On networks so small that they leave room for it, and on others; against one seed after another."""
    problem = MNISTShaped() if name == "mnist" else REGISTRY.select("problems", name)[0]

    def work_of(seeds: int) -> Work:
        take = Looped(method, problem, seeds=range(seeds), device=DEVICE)
        return lambda: take(STEPS)

    times = grown(
        benchmark, f"training step, {method.name} on {problem.label}", "seeds at once", counts, work_of, rounds=9
    )
    most = counts[-1]
    at_once, one = f"{most} seeds at once", "one after another"
    tell(
        benchmark,
        f"training step, {method.name} on {problem.label}, seeds at once",
        device=DEVICE.type,
        ratios=times_as_fast({at_once: times[str(most)], one: [most * each for each in times["1"]]}, at_once),
    )

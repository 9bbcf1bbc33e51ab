"""What the harness costs: its loop against one written by hand, its start against that of torch, a job among others.

Run with ``pytest benchmarks/test_overhead.py --log-cli-level=INFO``. Loops take turns in one process, starts in new
ones. The harness's loop does what it does at every step of a fit: schedule, clock, training curve. Checks on the
validation split, off the fit clock in any fit, are left out, and the learning rates of these first steps do not fall.
"""

from __future__ import annotations

import itertools
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

import harness
from benchmarks import by_hand
from benchmarks.by_hand import ByHand, Images, Loop
from benchmarks.mnist_sized import LOOPS, Looped, MNISTShaped, begun
from benchmarks.turns import CPU, Median, take_turns, tell, times_as_fast
from harness.nn import count_parameters
from harness.players import Modules, NoiseStreams
from harness.problem import placed
from harness.stepping import Step
from harness.training import GradientMethod, stepper
from harness_plugins.avb import AVB
from harness_plugins.vae import VAE

METHODS: dict[str, GradientMethod] = {"vae": VAE(), "avb": AVB(clip_norm=0)}  # as it is written by hand
PROBLEM = MNISTShaped()
HERE = Path(__file__).parent


def networks_by_hand(method: GradientMethod) -> ByHand:
    """With the learning rates of a method's options."""
    if isinstance(method, AVB):
        return by_hand.SharedForwardAVB(method.lr, method.adversary_lr, method.beta1)
    return by_hand.VAE(method.config["lr"])


# The loop


@pytest.mark.parametrize("batch_size", [128, 512])
@pytest.mark.parametrize("name", METHODS)
def test_loop(benchmark: BenchmarkFixture, name: str, batch_size: int) -> None:
    method = replace(METHODS[name], batch_size=batch_size)
    loops = {name: Looped(method, PROBLEM, step=step) for name, step in LOOPS.items()}
    theirs = Loop(networks_by_hand(method), Images(placed(PROBLEM, CPU, torch.float32).train.values, batch_size))
    steps = {128: 20, 512: 10}[batch_size]
    ways = {**{name: partial(loop, steps) for name, loop in loops.items()}, "by hand": lambda: theirs.take(steps)}
    times = take_turns(benchmark, ways, rounds=60, warm_up=3)
    tell(
        benchmark,
        f"training loop, {name}, batch {batch_size}",
        steps_per_second={way: steps / statistics.median(found) for way, found in times.items()},
        compile_seconds={name: loop.compile_seconds for name, loop in loops.items()},
        ratios=times_as_fast(times, *LOOPS, of_one=steps),
    )


def perturbed(modules: Modules) -> Modules:
    """No bias is zero any more: what leaves one out is found out."""
    stream = torch.Generator()
    with torch.no_grad():
        for parameter in modules.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=stream, dtype=parameter.dtype)
    return modules


@pytest.mark.parametrize("name", METHODS)
def test_losses_by_hand_are_the_harnesss(name: str) -> None:
    """On the same weights, minibatch and noise; in float64, where sums in another order differ by rounding only."""
    method = METHODS[name]
    view, run = begun(method, PROBLEM, dtype=torch.float64)
    modules = perturbed(method.build(view).double())
    hand = networks_by_hand(method).double()
    hand.take_over(modules)
    assert count_parameters(hand) == count_parameters(modules)
    x = next(run.batches(view.train, 16))
    noise = NoiseStreams(run, method.noise(view), "noise").draw(16)
    found, expected = hand.losses(x.flatten(1), [*noise.values()]), method.losses(modules, x, noise)
    torch.testing.assert_close([*found], [*expected.values()], rtol=1e-12, atol=0)


@pytest.mark.parametrize("step", ["eager", "graph"])
@pytest.mark.parametrize("name", METHODS)
def test_steps_by_hand_are_the_harnesss(name: str, step: Step) -> None:
    """From the same weights and with the same draws the decoder ends where the harness's does.

    In float64: five steps of Adam move weights by more than 1e-3, and make less than 1e-7 of a difference by rounding.
    """
    method = replace(METHODS[name], batch_size=16)
    view, run = begun(method, PROBLEM, dtype=torch.float64, step=step)
    twin, again = begun(method, PROBLEM, dtype=torch.float64)
    with again.streams.initial_weights(shared=False):
        modules = method.build(twin).double()
    hand = networks_by_hand(method).double()
    hand.take_over(modules)
    batches, noise = again.batches(twin.train, 16), NoiseStreams(again, method.noise(twin), "noise")
    before = [parameter.detach().clone() for parameter in view.model.parameters()]
    for _ in itertools.islice(stepper([method], [view], [run]), 5):
        hand.step(next(batches).flatten(1), [*noise.draw(16).values()])
    after = [parameter.detach() for parameter in view.model.parameters()]
    torch.testing.assert_close(list(hand.decoder.parameters()), after, rtol=0, atol=1e-7)
    assert all(float((a - b).abs().max()) > 1e-3 for a, b in zip(before, after, strict=True))


# The start, and jobs


IMPORT = "import torch"
OPTIMISER = "torch.optim.Adam([torch.zeros(1, requires_grad=True)])"  # the first one that is made imports the compiler


def test_start(benchmark: BenchmarkFixture, tmp_path: Path) -> None:
    """From the start of a new process with `harness compare` to the end of its first training step.

    Beside it the import of torch alone, and that with the first of its optimisers, as most training has one.
    """
    words = ["compare", "--methods", "vae", "--problems", "four-points", "--seeds", "1", "--budget", "steps=2"]
    numbers = itertools.count()

    def compare() -> None:
        """Into a new folder, where nothing is done yet."""
        ended([HERE / "first_step.py", *words, "--out", tmp_path / str(next(numbers))])

    ways = {
        "harness": compare,
        "torch": lambda: ended(["-c", IMPORT]),
        "torch with an optimiser": lambda: ended(["-c", f"{IMPORT}; {OPTIMISER}"]),
    }
    times = take_turns(benchmark, ways, rounds=15)
    tell(
        benchmark,
        "start, to the first training step",
        measures={
            f"seconds more than {way}": Median.of([a - b for a, b in zip(times["harness"], found, strict=True)])
            for way, found in times.items()
            if way != "harness"
        },
        ratios=times_as_fast(times, "harness"),
    )


def ended(arguments: Sequence[str | Path]) -> None:
    """Python with these arguments, to its end."""
    subprocess.run([sys.executable, *map(str, arguments)], check=True, capture_output=True)


JOBS = [2, 8, 16]


def test_seconds_per_job(benchmark: BenchmarkFixture, tmp_path: Path) -> None:
    """The slope of the seconds of comparisons of one-step fits against their number."""
    numbers = itertools.count()

    def compare(jobs: int) -> None:
        out = tmp_path / str(next(numbers))
        records = harness.compare(
            "vae", "four-points", seeds=jobs, budget="steps=1", evaluators="reconstruction", out=out
        )
        assert list(records["status"]) == ["ok"] * jobs

    times = take_turns(benchmark, {str(jobs): lambda jobs=jobs: compare(jobs) for jobs in JOBS}, rounds=7)
    slopes = [statistics.linear_regression(JOBS, found).slope for found in zip(*times.values(), strict=True)]
    tell(
        benchmark,
        "one job among many, of one step and one evaluation",
        jobs=JOBS,
        measures={"seconds a job": Median.of(slopes)},
        seconds={jobs: statistics.median(found) for jobs, found in times.items()},
    )

"""What benchmarks of the size of MNIST have in common: noise in its shape, the harness's loop on it, annealing.

Weights are random, since times do not depend on them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from pydantic import PositiveInt
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.turns import CPU
from harness.annealing import Annealing, Forces, Kernels, force_precision, schedule
from harness.clock import Clock
from harness.cuda_graph import WARM_UP_STEPS
from harness.memory import keep_freed
from harness.method import Budget, Run
from harness.model import LatentModel
from harness.precision import Precision, products_of
from harness.problem import DatasetSpec, MLPSpec, ModelSpec, Problem, TrainingView, placed
from harness.seeding import Streams
from harness.specs import NetworksProblem
from harness.starts import GaussianStart
from harness.stepping import Step
from harness.training import GradientMethod, stepper

CHAINS, LEAPFROG = 16, 10
ENDLESS = Budget("steps", 1e9)  # learning rates do not fall yet, and nothing is checked on the validation split


@dataclass(frozen=True, kw_only=True)
class MNISTShaped(NetworksProblem):
    """Noise in the shape of MNIST, with the networks of the paper's experiment on it: for times only.

    Args:
        images: In the training split.
    """

    name: str = "mnist-shaped-noise"
    images: PositiveInt = 10_240

    @property
    def default_budget(self) -> str:
        return "steps=300"

    def dataset(self) -> DatasetSpec:
        parts = [self.images, self.images + 1000]
        stream = np.random.default_rng(0)
        pixels = stream.integers(0, 256, size=(self.images + 2000, 28, 28), dtype=np.uint8)
        return DatasetSpec(self.name, *np.split(pixels, parts), levels=255, binarisation="dynamic")

    def model_spec(self) -> ModelSpec:
        return self.networks("bernoulli")


def begun(
    method: GradientMethod,
    problem: Problem,
    *,
    seed: int = 0,
    device: torch.device = CPU,
    dtype: torch.dtype = torch.float32,
    clock: Clock | None = None,
    step: Step = "graph",
    precision: Precision = "float32",
) -> tuple[TrainingView, Run]:
    """What a fit without end is handed. Its steps are recorded at once, not after the first hundred."""
    streams = Streams(seed, problem.label, method.name, device)
    view = problem.training_view(placed(problem, device, dtype), streams)
    return view, Run(
        device, dtype, ENDLESS, streams, clock or Clock(device), step=step, products=products_of(precision)
    )


LOOPS: dict[str, Step] = {"harness": "graph", "harness, compiled": "compile"}


class Looped:
    """The harness's own loop, of all seeds at once: so many steps of it when called."""

    def __init__(
        self,
        method: GradientMethod,
        problem: Problem,
        *,
        seeds: Sequence[int] = (0,),
        device: torch.device = CPU,
        step: Step = "graph",
        precision: Precision = "float32",
    ) -> None:
        keep_freed()  # as in a fit
        self.clock = Clock(device)
        settings: dict[str, Any] = {"device": device, "clock": self.clock, "step": step, "precision": precision}
        fits = [begun(method, problem, seed=seed, **settings) for seed in seeds]
        self.steps = stepper([method] * len(fits), [view for view, _ in fits], [run for _, run in fits])
        self(2 + WARM_UP_STEPS)  # recorded, and captured where there is CUDA

    def __call__(self, count: int) -> None:
        for _ in range(count):
            next(self.steps)

    @property
    def compile_seconds(self) -> float:
        """Of recording its steps, and compiling what was recorded."""
        return self.clock.seconds.get("compile", 0.0)


def operations(work: Callable[[], Any]) -> int:
    """Floating-point operations of the matrix products and convolutions in it; nothing else is counted."""
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def stream(seed: int, device: torch.device = CPU) -> torch.Generator:
    found = torch.Generator(device)
    found.manual_seed(seed)
    return found


def annealing_path(
    images: int, chains: int = CHAINS, forces: Forces = "auto", device: torch.device = CPU
) -> tuple[Annealing, LatentModel, torch.Tensor]:
    """From a Gaussian to the posterior of a decoder of that size; with the decoder and the images."""
    with torch.random.fork_rng(devices=[]):
        model = MLPSpec(latent_dim=32).new_model((28, 28)).to(device)
    x = (torch.rand(images, 28, 28, generator=stream(0)) < 0.2).float().to(device)
    start = GaussianStart(torch.ones(images, 32, device=device), torch.zeros(images, 32, device=device))
    precision = force_precision(forces, model, torch.float32, device)
    return Annealing(model, x, start, chains, LEAPFROG, 2**30, precision), model, x


def annealed(path: Annealing, transitions: int, device: torch.device = CPU) -> None:
    steps = torch.full((transitions, path.observations), 0.05, device=device)
    with torch.no_grad():
        path.forward(Kernels(schedule("linear", transitions + 1), steps, LEAPFROG), stream(0, device))

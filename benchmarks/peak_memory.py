"""By how much work raises the peak of a process's memory; to be run in a fresh process.

``python peak_memory.py annealing ours|naive IMAGES MEMORY_MIB`` and ``python peak_memory.py evaluation METHOD PROBLEM
EVALUATOR SAMPLES`` write the bytes.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import psutil
import torch
from naive_ais import NaiveAIS

import harness
from harness.annealing import Annealing, Kernels, schedule
from harness.clock import Clock
from harness.evaluator import EvaluationRun, Evaluator
from harness.problem import MLPSpec, Problem, placed
from harness.registry import Registry
from harness.starts import GaussianStart

CHAINS, LEAPFROG, TEMPERATURES, LATENT = 16, 2, 3, 32
CPU = torch.device("cpu")
FEW_SAMPLES = 50


def annealing(who: str, images: int, memory: int) -> None:
    model = MLPSpec(latent_dim=LATENT).new_model((28, 28))
    x, stream = torch.zeros(images, 28, 28), torch.Generator()
    if who == "naive":
        NaiveAIS(temperatures=TEMPERATURES, chains=CHAINS, leapfrog=LEAPFROG).log_weights(model, x, stream)
        return
    start = GaussianStart(torch.ones(images, LATENT), torch.zeros(images, LATENT))
    steps = torch.full((TEMPERATURES - 1, images), 0.01)
    path = Annealing(model, x, start, CHAINS, LEAPFROG, memory)
    with torch.no_grad():
        path.forward(Kernels(schedule("linear", TEMPERATURES), steps, LEAPFROG), stream)


def evaluation(method: str, problem_name: str, evaluator_name: str) -> Callable[[int], None]:
    """What measures a fit with so many samples."""
    registry, problem = Registry.discover(), selected_problem(problem_name)
    fit = harness.fit(method, problem, budget="steps=1")
    run = EvaluationRun(placed(problem, CPU, torch.float32), problem, CPU, torch.float32, 0)

    def measure(samples: int) -> None:
        evaluator: Evaluator
        [evaluator] = registry.select("evaluators", f"{evaluator_name}[observations=1,samples={samples}]")
        with torch.no_grad():
            evaluator.measure(fit, problem, run)

    return measure


def selected_problem(name: str) -> Problem:
    [found] = Registry.discover().select("problems", name)
    return found


def raised(first: Callable[[], Any], work: Callable[[], Any]) -> int:
    """Bytes by which work raises the peak, after what libraries set up at their first use."""
    first()
    before = psutil.Process().memory_info().rss
    clock = Clock(CPU)
    with clock.phase("run"):
        work()
    return clock.peak_bytes["run"] - before


def main(what: str, *words: str) -> None:
    if what == "annealing":
        who, images, memory = words[0], int(words[1]), int(words[2]) * 2**20
        found = raised(lambda: annealing(who, 1, memory), lambda: annealing(who, images, memory))
    else:
        measure = evaluation(*words[:3])
        found = raised(lambda: measure(FEW_SAMPLES), lambda: measure(int(words[3])))
    sys.stdout.write(str(found))


if __name__ == "__main__":
    main(*sys.argv[1:])

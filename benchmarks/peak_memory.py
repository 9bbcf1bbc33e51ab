"""By how much annealed importance sampling raises the peak of a process's memory; to be run in a fresh process.

``python peak_memory.py ours|naive IMAGES MEMORY_MIB`` writes the bytes.
"""

from __future__ import annotations

import sys

import psutil
import torch
from naive_ais import NaiveAIS

from harness.annealing import Annealing, Kernels, schedule
from harness.clock import Clock
from harness.problem import MLPSpec
from harness.starts import GaussianStart

CHAINS, LEAPFROG, TEMPERATURES, LATENT = 16, 2, 3, 32


def run(who: str, images: int, memory: int) -> None:
    model = MLPSpec(latent_dim=LATENT).new_model((28, 28))
    x, stream = torch.zeros(images, 28, 28), torch.Generator()
    if who == "naive":
        NaiveAIS(temperatures=TEMPERATURES, chains=CHAINS, leapfrog=LEAPFROG).log_weights(model, x, stream)
        return
    start = GaussianStart(torch.ones(images, LATENT), torch.zeros(images, LATENT))
    steps = torch.full((TEMPERATURES - 1, images), 0.01)
    path = Annealing(model, x, start, CHAINS, LEAPFROG, memory)
    path.forward(Kernels(schedule("linear", TEMPERATURES), steps, LEAPFROG), stream)


def main(who: str, images: str, memory_mib: str) -> None:
    memory = int(memory_mib) * 2**20
    with torch.set_grad_enabled(who == "naive"):
        run(who, 1, memory)  # what libraries set up at their first use
        before = psutil.Process().memory_info().rss
        clock = Clock(torch.device("cpu"))
        with clock.phase("run"):
            run(who, int(images), memory)
    sys.stdout.write(str(clock.peak_bytes["run"] - before))


if __name__ == "__main__":
    main(*sys.argv[1:])

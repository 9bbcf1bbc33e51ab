"""Speed of annealed importance sampling against a naive implementation: per transition, and at equal error.

Ours and the naive one take turns, so that whatever else the machine does falls on both. Ratios are kept in
``extra_info`` and shown by ``pytest benchmarks/test_ais.py --log-cli-level=INFO``.

A decoder of the size for MNIST with random weights, the embedded digits and a linear-Gaussian model need nothing. With
a folder for a VAE that is trained on MNIST once, the equal-error part is done for 100 of its test images too, at 100
and at 1,000 temperatures (an hour on one core)::

    harness data fetch mnist
    HARNESS_BENCHMARK_FITS=DIR pytest benchmarks/test_ais.py --log-cli-level=INFO
"""

from __future__ import annotations

import copy
import logging
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

import harness
from benchmarks.mnist_sized import CHAINS, LEAPFROG, annealed, annealing_path, stream
from benchmarks.naive_ais import LogLikelihood, NaiveAIS, elementary, own
from benchmarks.turns import CPU, DEVICE, Median, take_turns, tell, times_as_fast
from harness.annealing import Forces
from harness.estimators import StreamedLogMeanExp
from harness.evaluator import EvaluationRun, Measurement
from harness.method import Fit
from harness.model import HasClosedForm
from harness.problem import Problem, placed
from harness.registry import Registry

LOG = logging.getLogger("benchmarks.ais")
FITS = os.environ.get("HARNESS_BENCHMARK_FITS", "")
REGISTRY = Registry.discover()
NAIVE_STEPS = [0.01, 0.1]  # what public code sets out from, and what a patient user might find


# Seconds a transition, at the size of MNIST


@pytest.mark.parametrize("forces", ["auto", "full"])
def test_seconds_per_transition(benchmark: BenchmarkFixture, forces: Forces) -> None:
    """By default, and with nothing in lower precision; the naive one with our likelihood and with that of others.

    Ours works the density of the first states out once for a run: for so many transitions that it hardly counts, as in
    runs of hundreds of temperatures.
    """
    transitions = 20
    path, model, x = annealing_path(100, forces=forces, device=DEVICE)
    if forces == "auto" and path.forces == "float32":
        pytest.skip("nothing is in lower precision by default on this machine")

    def naive(likelihood: LogLikelihood) -> Callable[[], torch.Tensor]:
        written = NaiveAIS(temperatures=transitions, chains=CHAINS, leapfrog=LEAPFROG, likelihood=likelihood)
        return lambda: written.log_weights(model, x, stream(0, DEVICE))

    ways = {
        "harness": lambda: annealed(path, transitions, DEVICE),
        "naive": naive(own),
        "naive, likelihood as in public code": naive(elementary),
    }
    times = take_turns(benchmark, ways, rounds=7)
    tell(
        benchmark,
        f"annealing, 100 images of 784 pixels, 16 chains, 10 leapfrog steps, forces={forces}, in {path.forces}",
        device=DEVICE.type,
        ratios=times_as_fast(times, "harness", of_one=transitions),
    )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_seconds_of_a_thousand_images(benchmark: BenchmarkFixture) -> None:
    """At 1,000 temperatures: what takes hours on a few cores."""
    path, _, _ = annealing_path(1000, device=DEVICE)
    times = take_turns(benchmark, {"harness": lambda: annealed(path, 999, DEVICE)}, rounds=5)
    tell(
        benchmark,
        "annealing, 1,000 images of 784 pixels, 16 chains, 1,000 temperatures, 10 leapfrog steps",
        device=torch.cuda.get_device_name(DEVICE),
        measures={"seconds": Median.of(times["harness"])},
    )


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a process's own peak is read from /proc")
def test_memory(benchmark: BenchmarkFixture) -> None:
    """Where everything at once would take more than the budget."""
    budget_mib, images = 64, 400
    here = Path(__file__).parent

    def grown(who: str) -> float:
        command = [sys.executable, here / "peak_memory.py", "annealing", who, str(images), str(budget_mib)]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(here), os.environ.get("PYTHONPATH", "")])}
        return int(subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout) / 2**20

    ours = benchmark.pedantic(lambda: grown("ours"), rounds=1)
    naive = grown("naive")
    tell(benchmark, "annealing, memory", budget_mib=budget_mib, images=images, peak_mib=ours, naive_peak_mib=naive)
    assert ours < budget_mib < naive


# Time at equal error, error at equal time


@dataclass(frozen=True, kw_only=True)
class Case:
    """A VAE's fit whose log-likelihoods are estimated, and by how much work.

    Args:
        problem, budget: As on the command line.
        temperatures: Of ours.
        naive: Temperatures of the naive implementation, ascending.
        reference: Temperatures of the run of ours that stands for the truth where that has no closed form.
    """

    problem: str
    budget: str
    observations: int
    temperatures: tuple[int, ...]
    naive: tuple[int, ...]
    reference: int = 0

    def measure(self, evaluator: str, temperatures: int, seed: int) -> Measurement:
        """The first metric of an evaluator with the settings of this benchmark."""
        settings = {"observations": self.observations, "chains": CHAINS, "leapfrog": LEAPFROG}
        options = ",".join(f"{name}={value}" for name, value in {**settings, "temperatures": temperatures}.items())
        (chosen,) = REGISTRY.select("evaluators", f"{evaluator}[{options}]")
        with torch.no_grad():
            return chosen.measure(fitted(self), problem_of(self), self.run(seed))[0]

    def run(self, seed: int) -> EvaluationRun:
        problem = problem_of(self)
        return EvaluationRun(placed(problem, CPU, torch.float32), problem, CPU, torch.float32, seed)


CASES = [
    Case(
        problem="linear-gaussian[latent_dim=32,data_dim=64,noise=0.3]",
        budget="steps=4000",
        observations=50,
        temperatures=(100,),
        naive=(100, 500, 2500),
    ),
    Case(
        problem="digits[latent_dim=8]",
        budget="steps=2000",
        observations=20,
        temperatures=(100,),
        naive=(100, 300, 900),
        reference=500,
    ),
    Case(
        problem="mnist[latent_dim=32]",
        budget="steps=20000",
        observations=100,
        temperatures=(100, 1000),
        naive=(300, 1200),
        reference=2000,
    ),
]


@cache
def problem_of(case: Case) -> Problem:
    (found,) = REGISTRY.select("problems", case.problem)
    return found


@cache
def fitted(case: Case) -> Fit:
    if not case.problem.startswith("mnist"):
        return harness.fit("vae", case.problem, budget=case.budget)
    records = harness.compare("vae", case.problem, seeds=1, budget=case.budget, evaluators="elbo", out=FITS)
    return harness.load(FITS, records["job_id"].iloc[0])


@cache
def truth(case: Case) -> tuple[np.ndarray, Mapping[str, float]]:
    """log p(x) of the observations, shape (N,), and what is known of its error."""
    model = fitted(case).model
    if isinstance(model, HasClosedForm):
        return model.log_evidence(case.run(0).data.scored(case.observations)[0]).numpy(), {}
    reference = case.measure("ais", case.reference, seed=1)
    gap = case.measure("bdmc", case.reference // 4, seed=1)
    return reference.values, {"reference_stderr": reference.stderr, "bdmc_gap_at_a_quarter_of_reference": gap.value}


@dataclass(frozen=True)
class Outcome:
    """Seconds of a run, and the root of its mean squared error over the observations, nats."""

    temperatures: int
    seconds: float
    error: float

    @staticmethod
    def of(estimate: Callable[[], np.ndarray], case: Case, temperatures: int) -> Outcome:
        start = time.perf_counter()
        values = estimate()
        taken = time.perf_counter() - start
        return Outcome(temperatures, taken, float(np.sqrt(np.square(values - truth(case)[0]).mean())))

    @staticmethod
    def merged(outcomes: Sequence[Outcome]) -> Outcome:
        return Outcome(
            outcomes[0].temperatures,
            statistics.median(outcome.seconds for outcome in outcomes),
            math.sqrt(statistics.fmean(outcome.error**2 for outcome in outcomes)),
        )


def our_turn(case: Case, temperatures: int, seed: int) -> Outcome:
    """All of it: the moments of the posterior, the pilot and the run."""
    return Outcome.of(lambda: case.measure("ais", temperatures, seed).values, case, temperatures)


def naive_turn(case: Case, temperatures: int, step: float, seed: int) -> Outcome:
    model = copy.deepcopy(fitted(case).model).requires_grad_(True)
    x = case.run(seed).data.scored(case.observations)[0]
    naive = NaiveAIS(temperatures=temperatures, chains=CHAINS, leapfrog=LEAPFROG, step=step)
    return Outcome.of(lambda: log_mean(naive.log_weights(model, x, stream(seed))), case, temperatures)


def log_mean(log_w: torch.Tensor) -> np.ndarray:
    return estimated(log_w).value().numpy()


def estimated(log_w: torch.Tensor) -> StreamedLogMeanExp:
    found = StreamedLogMeanExp()
    found.add(log_w)
    return found


def against(ours: Outcome, naive: Sequence[Outcome]) -> dict[str, Any]:
    """Ratios at equal error and at equal time, on the naive runs' log-log curve; it is not continued beyond its ends.

    Where it does not reach our error, the ratio of times is a lower bound, from its longest run.
    """
    times, errors = np.log([run.seconds for run in naive]), np.log([run.error for run in naive])
    reached, is_bound = times[-1], "at least"
    for a, b in pairwise(range(len(naive))):
        if errors[b] <= math.log(ours.error) < errors[a]:
            part = (errors[a] - math.log(ours.error)) / (errors[a] - errors[b])
            reached, is_bound = times[a] + part * (times[b] - times[a]), "equal"
            break
    if errors[0] <= math.log(ours.error):
        reached, is_bound = times[0], "at most"
    equal_time = math.exp(np.interp(math.log(ours.seconds), times, errors))
    return {
        "temperatures": ours.temperatures,
        "seconds": ours.seconds,
        "error": ours.error,
        "time_ratio_at_equal_error": math.exp(reached) / ours.seconds,
        "time_ratio_is": is_bound,
        "error_ratio_at_equal_time": equal_time / ours.error,
    }


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.problem.partition("[")[0])
def test_equal_error(benchmark: BenchmarkFixture, case: Case) -> None:
    if case.problem.startswith("mnist") and not FITS:
        pytest.skip("HARNESS_BENCHMARK_FITS is not set: it is the folder that keeps the fit to MNIST")
    known = truth(case)[1]
    ours: list[list[Outcome]] = []
    naive: dict[float, list[Outcome]] = {step: [] for step in NAIVE_STEPS}

    def take_turns() -> None:
        for seed, temperatures in enumerate(case.naive):
            for step, outcomes in naive.items():
                outcomes.append(naive_turn(case, temperatures, step, seed))
                LOG.info("naive step %s: %s", step, outcomes[-1])
            ours.append([our_turn(case, n, seed) for n in case.temperatures])
            LOG.info("ours: %s", ours[-1])

    benchmark.pedantic(take_turns, rounds=1)
    merged = [Outcome.merged(outcomes) for outcomes in zip(*ours, strict=True)]
    tell(
        benchmark,
        f"annealing at equal error, {case.problem}",
        observations=case.observations,
        naive={step: [vars(run) for run in outcomes] for step, outcomes in naive.items()},
        ours={step: [against(run, outcomes) for run in merged] for step, outcomes in naive.items()},
        **known,
    )


# The naive implementation is correct


def test_the_naive_weights_are_unbiased() -> None:
    """On a linear-Gaussian model with few temperatures; four standard errors: one failure in 16,000 were it true."""
    problem = REGISTRY.select("problems", "linear-gaussian")[0]
    model = problem.model_spec().new_model((problem.data_dim,)).float()
    x = placed(problem, CPU, torch.float32).scored(4)[0]
    naive = NaiveAIS(temperatures=20, chains=4000, leapfrog=3, step=0.2)
    ratio = torch.exp(naive.log_weights(model, x, stream(0)).double() - model.log_evidence(x))
    stderr = ratio.std(0) / math.sqrt(naive.chains)
    assert (stderr < 0.1).all()
    assert ((ratio.mean(0) - 1).abs() < 4 * stderr).all()


def test_both_ways_to_write_the_likelihood_agree() -> None:
    _, model, x = annealing_path(5)
    z = torch.randn(5, 32, generator=stream(1))
    with torch.no_grad():
        torch.testing.assert_close(elementary(model, x, z), own(model, x, z), rtol=1e-5, atol=1e-3)


def test_the_naive_estimate_approaches_the_closed_form() -> None:
    problem = REGISTRY.select("problems", "linear-gaussian[noise=0.3]")[0]
    model = problem.model_spec().new_model((problem.data_dim,)).float()
    x = placed(problem, CPU, torch.float32).scored(10)[0]
    log_w = NaiveAIS(temperatures=1000, chains=CHAINS, leapfrog=5, step=0.1).log_weights(model, x, stream(0))
    found = estimated(log_w)
    assert (found.stderr() < 0.2).all()
    assert ((found.value() - model.log_evidence(x)).abs() < 4 * found.stderr() + 0.05).all()

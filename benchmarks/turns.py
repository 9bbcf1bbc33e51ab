"""Ways of doing the same thing, timed in turns, so that whatever else the machine does falls on all of them.

A ratio is the median of the ratios within rounds, with an interval of that median by order statistics, which assumes
nothing of how times are distributed. What is told of a benchmark is kept in ``extra_info``, for `benchmarks.table`, and
shown by ``--log-cli-level=INFO``. ``HARNESS_BENCHMARK_ROUNDS=2`` is enough to see whether benchmarks work.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import logging
import math
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from harness.memory import keep_freed
from harness.seeding import flushed, seeded

LOG = logging.getLogger("benchmarks")
ROUNDS = int(os.environ.get("HARNESS_BENCHMARK_ROUNDS", "0"))  # 0: as many as each benchmark needs
CPU = torch.device("cpu")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
LEVEL = 0.9

Work = Callable[[], Any]


@dataclass(frozen=True)
class Median:
    """The median of some rounds, and an interval that covers that of all possible ones with a probability of 90 %.

    The interval reaches from the k-th smallest value to the k-th largest, which covers with the probability that of n
    throws of a coin at least k and at most n - k are heads. Of fewer than five values none does: it is infinite.
    """

    median: float
    low: float
    high: float
    rounds: int

    @staticmethod
    def of(values: Sequence[float]) -> Median:
        found, n = sorted(values), len(values)
        k = rank(n)
        ends = (found[k - 1], found[n - k]) if k else (-math.inf, math.inf)
        return Median(statistics.median(found), *ends, n)


def rank(n: int) -> int:
    """The largest k with which the interval covers as often as it has to, or 0."""
    covered = [1 - 2 * sum(math.comb(n, i) for i in range(k)) / 2**n for k in range(1, n // 2 + 1)]
    return sum(probability >= LEVEL for probability in covered)


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """How much better ours is than a peer: more than 1 is better, whatever the unit.

    Args:
        ours, peer: What they are.
        our_value, peer_value: Their medians, in ``unit``.
    """

    ours: str
    peer: str
    unit: str
    our_value: float
    peer_value: float
    ratio: Median


def times_as_fast(times: Mapping[str, Sequence[float]], *ours: str, of_one: float = 1.0) -> list[Ratio]:
    """How many times as fast each of ours is as each of the others.

    Args:
        times: Seconds of each in every round.
        of_one: How much was done in these; values are of one.
    """
    return [
        Ratio(
            ours=own,
            peer=peer,
            unit="s",
            our_value=statistics.median(times[own]) / of_one,
            peer_value=statistics.median(theirs) / of_one,
            ratio=Median.of([b / a for a, b in zip(times[own], theirs, strict=True)]),
        )
        for own in ours
        for peer, theirs in times.items()
        if peer not in ours
    ]


def slope(sizes: Sequence[float], times: Sequence[Sequence[float]]) -> Median:
    """The log-log slope of seconds against sizes.

    Args:
        times: For each size the seconds of every round.
    """
    rounds = zip(*times, strict=True)
    return Median.of([float(np.polyfit(np.log(sizes), np.log(found), 1)[0]) for found in rounds])


def rounds_of(usual: int) -> int:
    return ROUNDS or usual


def seconds(work: Work) -> float:
    """Until it is done, also what is queued on a device."""
    start = _now()
    work()
    return _now() - start


def _now() -> float:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


def take_turns(
    benchmark: BenchmarkFixture, ways: Mapping[str, Work], *, rounds: int, warm_up: int = 1
) -> dict[str, list[float]]:
    """Seconds of each way in every round. Every other round goes through them backwards.

    Args:
        rounds: How many, unless ``HARNESS_BENCHMARK_ROUNDS`` says so.
        warm_up: Rounds that are not counted.
    """
    keep_freed()  # as in a fit, like `flushed`
    times: dict[str, list[float]] = {name: [] for name in ways}
    orders = itertools.cycle([[*ways], [*ways][::-1]])

    def take_turn() -> None:
        for name in next(orders):
            times[name].append(seconds(ways[name]))

    with flushed(), seeded(0):  # of what draws from process-wide generators
        benchmark.pedantic(take_turn, rounds=rounds_of(rounds), warmup_rounds=warm_up)
    uncounted = 0 if benchmark.disabled else warm_up
    return {name: found[uncounted:] for name, found in times.items()}


def tell(benchmark: BenchmarkFixture, what: str, **facts: Any) -> None:
    """Keep facts beside the times, and show them; what is a dataclass as its fields.

    Args:
        facts: Among them may be ``ratios``, a list of `Ratio`, and ``measures``, each a `Median` by its name.
    """
    benchmark.extra_info |= {"what": what, "threads": torch.get_num_threads(), **_plain(facts)}
    LOG.info("%s", json.dumps(benchmark.extra_info, indent=1))


def _plain(thing: Any) -> Any:
    if dataclasses.is_dataclass(thing) and not isinstance(thing, type):
        return dataclasses.asdict(thing)
    if isinstance(thing, Mapping):
        return {str(name): _plain(value) for name, value in thing.items()}
    return [_plain(each) for each in thing] if isinstance(thing, list | tuple) else thing


class MatrixProduct:
    """Products of two square matrices: as many operations a second as this machine has for anybody.

    Args:
        side: Large enough for full speed; on an accelerator eight times as many.
        times: Products of one call.
    """

    def __init__(
        self, dtype: torch.dtype = torch.float32, device: torch.device = CPU, side: int = 1024, times: int = 8
    ) -> None:
        side *= 1 if device.type == "cpu" else 8
        stream = torch.Generator(device)
        self.a, self.b = (torch.randn(side, side, generator=stream, device=device, dtype=dtype) for _ in range(2))
        self.product = torch.empty_like(self.a)
        self.times, self.fastest = times, math.inf

    @property
    def operations(self) -> float:
        """Of one call."""
        return self.times * 2 * float(len(self.a)) ** 3

    @property
    def peak(self) -> float:
        """GFLOP/s of the fastest product yet."""
        return self.operations / self.times / self.fastest / 1e9

    def __call__(self) -> None:
        for _ in range(self.times):
            self.fastest = min(self.fastest, seconds(lambda: torch.mm(self.a, self.b, out=self.product)))


def share_of_peak(
    ours: str, operations: float, times: Sequence[float], product: MatrixProduct, product_times: Sequence[float]
) -> Ratio:
    """The speed of work of so many operations, as a part of that of matrix products in the same rounds."""
    rates = [operations / 1e9 / each for each in times]
    theirs = [product.operations / 1e9 / each for each in product_times]
    return Ratio(
        ours=ours,
        peer="matrix product",
        unit="GFLOP/s",
        our_value=statistics.median(rates),
        peer_value=statistics.median(theirs),
        ratio=Median.of([a / b for a, b in zip(rates, theirs, strict=True)]),
    )

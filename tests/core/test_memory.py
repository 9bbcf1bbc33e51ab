"""Memory that is freed stays with the process for the next step, and does not count as taken by what comes next."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc's allocator")

WORK = """
import resource, torch
from harness.memory import hand_back_freed, keep_freed

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def work():
    return [torch.ones(2**18 + 2**10 * n) for n in range(8)]  # 8 MiB in all

def of_one(times=20):
    work()
    before = faults()
    for _ in range(times):
        work()
    return (faults() - before) / times
"""


def told(program: str, **variables: str) -> list[float]:
    """The numbers that a program prints in a new process, where nothing of the allocator has been set."""
    own = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    command = [sys.executable, "-c", WORK + program]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env={**own, **variables})
    return [float(word) for word in done.stdout.split()]


def test_the_pages_of_a_step_are_asked_for_once() -> None:
    before, after = told("print(of_one()); keep_freed(); print(of_one())")
    assert before > 100  # of the 2,000 that it has; how many depends on what else lies in memory
    assert after < 10


@pytest.mark.parametrize(
    "variables",
    [{"MALLOC_TRIM_THRESHOLD_": "131072"}, {"GLIBC_TUNABLES": "glibc.malloc.trim_threshold=131072"}],
    ids=str,
)
def test_whoever_has_set_the_allocator_is_left_alone(variables: dict[str, str]) -> None:
    [after] = told("keep_freed(); print(of_one())", **variables)
    assert after > 100


def test_what_is_kept_is_handed_back_before_a_phase() -> None:
    """The peak of a phase is what it takes itself, whatever was freed before."""
    before, kept, phase = told("""
import psutil
from harness.clock import Clock
keep_freed()
held = lambda: psutil.Process().memory_info().rss
first = torch.ones(1)
before = held()
big = [torch.ones(2**20) for _ in range(50)]  # 200 MiB
del big
print(before, held())
clock = Clock(torch.device("cpu"))
with clock.phase("fit"):
    first += 1
print(clock.peak_bytes["fit"])
""")
    assert kept - before > 150 * 2**20
    assert phase - before < 50 * 2**20

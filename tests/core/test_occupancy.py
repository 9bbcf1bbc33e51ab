"""The load of others: work of another program is seen, our own and that of our children is not."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from types import SimpleNamespace

import psutil
import pytest
import torch

from harness import occupancy
from harness.clock import Clock
from harness.occupancy import Elsewhere

WORK = "import time\nend = time.monotonic() + 60\nwhile time.monotonic() < end: pass"


def spin(seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pass


class Machine:
    """Two cores, this process and a child, by hand."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 50.0
        self.cores = [{"user": 10.0, "idle": 0.0, "steal": 0.0}, {"user": 20.0, "idle": 0.0, "steal": 0.0}]
        self.own, self.child = 3.0, 1.0
        self.usable = [0, 1]
        child = SimpleNamespace(cpu_times=lambda: self._times(self.child))
        process = SimpleNamespace(
            cpu_times=lambda: self._times(self.own),
            children=lambda recursive: [child],
            cpu_affinity=lambda: self.usable,
        )
        monkeypatch.setattr(occupancy.psutil, "Process", lambda: process)
        monkeypatch.setattr(occupancy.psutil, "cpu_times", lambda percpu: [SimpleNamespace(**c) for c in self.cores])
        monkeypatch.setattr(occupancy.time, "monotonic", lambda: self.now)

    @staticmethod
    def _times(user: float) -> SimpleNamespace:
        return SimpleNamespace(user=user, system=0.0, children_user=0.0, children_system=0.0)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(monkeypatch)


def test_what_is_neither_ours_nor_our_childrens_is_others(machine: Machine) -> None:
    watch = Elsewhere()
    machine.now += 10
    machine.cores[0]["user"] += 10
    machine.cores[1]["user"] += 5
    machine.own, machine.child = machine.own + 8, machine.child + 2
    assert watch.share() == pytest.approx(5 / 20)


def test_time_that_a_hypervisor_took_is_others(machine: Machine) -> None:
    watch = Elsewhere()
    machine.now += 10
    machine.cores[0]["steal"] += 2
    assert watch.share() == pytest.approx(2 / 20)


def test_cores_that_this_process_may_not_use_do_not_matter(machine: Machine) -> None:
    machine.usable = [1]
    watch = Elsewhere()
    machine.now += 10
    machine.cores[0]["user"] += 10
    machine.cores[1]["user"] += 4
    machine.own += 4
    assert watch.share() == 0.0


def test_a_moment_says_nothing(machine: Machine) -> None:
    watch = Elsewhere()
    machine.now += 0.5
    assert watch.share() is None


def test_a_system_that_does_not_tell_is_no_error(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(percpu: bool) -> None:
        raise PermissionError("/proc/stat")

    monkeypatch.setattr(occupancy.psutil, "cpu_times", refused)
    watch = Elsewhere()
    machine.now += 10
    assert watch.share() is None


def test_more_of_our_own_than_was_counted_is_no_negative_load(machine: Machine) -> None:
    watch = Elsewhere()
    machine.now += 10
    machine.own += 1
    assert watch.share() == 0.0


def test_the_work_of_a_child_is_our_own_while_it_lives_and_after() -> None:
    watch = Elsewhere()
    before = watch._own_seconds()
    child = subprocess.Popen([sys.executable, "-c", WORK])
    try:
        while psutil.Process(child.pid).cpu_times().user < 0.5:
            time.sleep(0.05)
        assert watch._own_seconds() - before >= 0.5
    finally:
        child.kill()
        child.wait()
    assert watch._own_seconds() - before >= 0.5


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a program that is no descendant")
def test_another_program_is_seen_by_the_clock() -> None:
    """A process whose parent has gone is nobody's child here: it works for a second while we wait."""
    child = f"subprocess.Popen([sys.executable, '-c', {WORK!r}], stdout=subprocess.DEVNULL).pid"
    script = f"import subprocess, sys; print({child})"
    printed = subprocess.run([sys.executable, "-c", script], stdout=subprocess.PIPE, check=True).stdout
    orphan = psutil.Process(int(printed))
    clock = Clock(torch.device("cpu"))
    try:
        with clock.phase("fit"):
            before, began = orphan.cpu_times().user, time.monotonic()
            while orphan.cpu_times().user - before < 1.0 or time.monotonic() - began < 2 * occupancy.SHORTEST:
                time.sleep(0.05)
            took = time.monotonic() - began
    finally:
        orphan.kill()
    share = clock.busy_elsewhere["fit"]
    assert share is not None
    assert share * took * len(Elsewhere()._cores()) >= 0.8


def test_our_own_work_is_not_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing else runs: the cores are made busy with this process alone."""
    monkeypatch.setattr(Elsewhere, "_busy_seconds", lambda self: time.process_time())
    watch = Elsewhere()
    spin(1.2)
    share = watch.share()
    assert share is not None
    assert share < 0.05

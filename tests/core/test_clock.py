"""The clock, driven by hand: phases add up, pauses do not count, an exception loses nothing."""

from __future__ import annotations

import os

import pytest
import torch

from harness import clock as clock_module
from harness.clock import Clock
from harness.memory import keep_freed


class Hand:
    """Seconds that pass only when told."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def hand(monkeypatch: pytest.MonkeyPatch) -> Hand:
    driven = Hand()
    monkeypatch.setattr(clock_module.time, "perf_counter", driven)
    return driven


@pytest.fixture
def clock(hand: Hand) -> Clock:
    return Clock(torch.device("cpu"))


def test_phases_of_one_name_add_up(clock: Clock, hand: Hand) -> None:
    for seconds in (2.0, 3.0):
        with clock.phase("fit"):
            hand.advance(seconds)
        hand.advance(50.0)
    with clock.phase("measure"):
        hand.advance(7.0)
    assert clock.seconds == {"fit": 5.0, "measure": 7.0}


def test_the_load_of_others_is_averaged_over_the_parts_of_a_phase(
    clock: Clock, hand: Hand, monkeypatch: pytest.MonkeyPatch
) -> None:
    shares: list[float | None] = [0.1]
    monkeypatch.setattr(clock_module.Elsewhere, "share", lambda self: shares[0])
    with clock.phase("fit"):
        clock.resume(30.0, 0, 0.5)
        hand.advance(10.0)
    assert clock.busy_elsewhere == {"fit": pytest.approx(0.4)}
    with clock.phase("fit"):
        clock.resume(30.0, 0, None)  # by a version that did not know
        hand.advance(10.0)
    assert clock.busy_elsewhere == {"fit": pytest.approx(0.1)}
    shares[0] = None
    with clock.phase("fit"):
        clock.resume(30.0, 0, 0.5)
        hand.advance(0.1)
    assert clock.busy_elsewhere == {"fit": 0.5}


def test_pauses_do_not_count(clock: Clock, hand: Hand) -> None:
    with clock.phase("fit"):
        hand.advance(1.0)
        with clock.paused():
            hand.advance(100.0)
        hand.advance(1.0)
        assert clock.elapsed() == 2.0
        with clock.paused():
            hand.advance(10.0)
    assert clock.seconds == {"fit": 2.0}


def test_a_phase_that_raises_is_recorded(clock: Clock, hand: Hand) -> None:
    def broken() -> None:
        with clock.phase("fit"), clock.paused():
            hand.advance(4.0)
            raise ValueError

    with pytest.raises(ValueError):
        broken()
    assert clock.seconds == {"fit": 0.0}
    with clock.phase("fit"):
        hand.advance(1.0)
    assert clock.seconds == {"fit": 1.0}


def test_a_phase_goes_on_where_an_earlier_part_of_it_stopped(clock: Clock, hand: Hand) -> None:
    with clock.phase("fit"):
        hand.advance(9.0)
        clock.resume(100.0, 2**50)
        assert clock.elapsed() == clock.elapsed_on_host() == 100.0
        hand.advance(1.0)
        assert clock.peak() == 2**50
    assert clock.seconds == {"fit": 101.0}
    assert clock.peak_bytes == {"fit": 2**50}
    with clock.phase("fit"):
        assert clock.elapsed() == 0.0
        assert clock.peak() < 2**50


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="the peak cannot be reset here")
def test_what_is_set_aside_costs_neither_time_nor_memory(clock: Clock, hand: Hand) -> None:
    keep_freed()
    with clock.phase("fit"):
        with clock.aside():
            before = clock.peak()
            hand.advance(5.0)
            size = sum(len(piece) for piece in [torch.ones(2**24, dtype=torch.uint8) for _ in range(4)])
            assert clock.peak() >= before + size / 2
        hand.advance(1.0)
    assert clock.seconds == {"fit": 1.0}
    assert clock.peak_bytes["fit"] < before + size / 2


def test_peak_memory_covers_what_was_allocated_and_freed() -> None:
    clock = Clock(torch.device("cpu"))
    with clock.phase("fit"):
        size = torch.ones(64 * 2**20, dtype=torch.uint8).sum().item()
    assert clock.peak_bytes["fit"] >= size == 64 * 2**20


@pytest.mark.gpu
def test_the_clock_waits_for_the_device() -> None:
    device = torch.device("cuda")
    clock = Clock(device)
    matrix = torch.randn(4096, 4096, device=device)
    with clock.phase("fit"):
        for _ in range(20):
            matrix = matrix @ matrix * 1e-4
        event = torch.cuda.Event()
        event.record()
    assert event.query()  # all work was done when the phase ended
    assert clock.peak_bytes["fit"] >= 3 * matrix.numel() * 4

"""A run ends when its time is up or at an interrupt, which waits for a checkpoint once somebody asks for it."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

import pytest

from harness.stopping import Stop, Stopped

SIGNALS = [signal.SIGINT, signal.SIGTERM]


@pytest.fixture(autouse=True)
def received() -> Iterator[list[int]]:
    """Signals that have come to whoever handles them usually."""
    seen: list[int] = []

    def handler(number: int, frame: FrameType | None) -> None:
        seen.append(number)

    usual = {number: signal.signal(number, handler) for number in SIGNALS}
    yield seen
    for number, usually in usual.items():
        assert signal.getsignal(number) in (handler, signal.SIG_IGN)
        signal.signal(number, usually)


def test_a_run_ends_when_its_time_is_up() -> None:
    assert not Stop().asked()
    unhurried = Stop(after=1e6)
    assert not unhurried.asked()
    unhurried.obey()
    hurried = Stop(after=0)
    assert hurried.asked()
    with pytest.raises(Stopped, match="stopped after 0 seconds"):
        hurried.obey()


def test_a_run_gets_something_done_however_short_its_time() -> None:
    stop = Stop(after=0)
    stop.before_job()
    with pytest.raises(Stopped):
        stop.before_job()


@pytest.mark.parametrize("number", SIGNALS)
def test_an_interrupt_waits_until_the_run_obeys(number: signal.Signals, received: list[int]) -> None:
    stop = Stop()

    def work() -> None:
        with stop.interrupts_wait():
            assert not stop.asked()
            signal.raise_signal(number)
            assert received == []
            assert stop.asked()
            stop.obey()

    with pytest.raises(Stopped, match="interrupted"):
        work()
    assert received == [number]
    assert not stop.asked()  # it is the usual handler's now


def test_an_interrupt_waits_until_the_work_is_over(received: list[int]) -> None:
    stop = Stop()
    with stop.interrupts_wait():
        stop.asked()
        signal.raise_signal(signal.SIGINT)
        assert received == []
    assert received == [signal.SIGINT]


def test_a_second_interrupt_does_not_wait(received: list[int]) -> None:
    stop = Stop()

    def work() -> None:
        with stop.interrupts_wait():
            stop.asked()
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
            pytest.fail("it did wait")

    with pytest.raises(KeyboardInterrupt):
        work()
    assert received == [signal.SIGINT]


def test_an_interrupt_that_nobody_asks_about_does_not_wait(received: list[int]) -> None:
    """The fit of a method without checkpoints, after that of one with them."""
    stop = Stop()
    with stop.interrupts_wait():
        stop.asked()

    def work() -> None:
        with stop.interrupts_wait():
            signal.raise_signal(signal.SIGTERM)
            pytest.fail("it did wait")

    with pytest.raises(KeyboardInterrupt):
        work()
    assert received == [signal.SIGTERM]


def test_what_was_ignored_stays_ignored(received: list[int]) -> None:
    """As in a job that a shell has put into the background."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    stop = Stop()
    with stop.interrupts_wait():
        stop.asked()
        signal.raise_signal(signal.SIGINT)
        assert not stop.asked()
    assert received == []
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_in_another_thread_interrupts_are_left_alone() -> None:
    entered: list[bool] = []

    def work() -> None:
        with Stop().interrupts_wait():
            entered.append(True)

    run_in_thread(work)
    assert entered == [True]


def run_in_thread(work: Callable[[], None]) -> None:
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()

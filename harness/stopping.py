"""When a run ends before its work is done: its time is up, or somebody interrupts it."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_INTERRUPTS = (signal.SIGINT, signal.SIGTERM)


class Stopped(KeyboardInterrupt):
    """A run has ended before its work was done; what is done is kept, and the same command goes on from there."""


class Stop:
    """Asked for by the clock or by a signal, obeyed where the work can be taken up again.

    Args:
        after: Seconds from now on.
    """

    def __init__(self, after: float = math.inf) -> None:
        self.after = after
        self.signal: int | None = None
        self._end = time.monotonic() + after
        self._watched = False
        self._begun = False

    def asked(self) -> bool:
        self._watched = True
        return self.signal is not None or self.left() <= 0

    def left(self) -> float:
        """Seconds until then; negative once they are over."""
        return self._end - time.monotonic()

    def obey(self) -> None:
        """End the run if that has been asked for.

        Raises:
            Stopped: If it has.
        """
        if self.asked():
            raise Stopped("interrupted" if self.signal is not None else f"stopped after {self.after:g} seconds")

    def before_job(self) -> None:
        """Obey, except before the first job: a run gets something done, however short its time.

        Raises:
            Stopped: If the run is to end.
        """
        if self._begun:
            self.obey()
        self._begun = True

    @contextmanager
    def interrupts_wait(self) -> Iterator[None]:
        """Inside, a SIGINT or SIGTERM waits until a `Stop` is obeyed or the work is over; then it takes its usual way.

        One that nobody has asked about so far, and a second one, do not wait. Only the main thread can have it so.
        """
        mine = threading.current_thread() is threading.main_thread()
        usual = {number: signal.getsignal(number) for number in _INTERRUPTS if mine}
        usual = {number: handler for number, handler in usual.items() if handler not in (signal.SIG_IGN, None)}
        self._watched = False
        for number in usual:
            signal.signal(number, self._interrupted)
        try:
            yield
        finally:
            for number, handler in usual.items():
                signal.signal(number, handler)
            if self.signal is not None:
                number, self.signal = self.signal, None
                signal.raise_signal(number)

    def _interrupted(self, number: int, frame: FrameType | None) -> None:
        waits = self._watched and self.signal is None
        self.signal = number
        if not waits:
            raise KeyboardInterrupt

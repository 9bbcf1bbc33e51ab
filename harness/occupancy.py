"""How busy other programs keep the cores: what seconds measured meanwhile are worth."""

from __future__ import annotations

import time
from contextlib import suppress
from typing import Any

import psutil

SHORTEST = 1.0
"""Seconds below which the kernel's ticks and the program's own start say more than the load of others."""


class Elsewhere:
    """The load of others on the cores that this process may use, from its construction on.

    Others are all programs but this process and its descendants; time that a hypervisor gave to other machines counts
    as theirs.
    """

    def __init__(self) -> None:
        self._process = psutil.Process()
        self._began = self._read()

    def share(self) -> float | None:
        """Part of the cores' time that others have had so far, 0 to 1.

        None within the first `SHORTEST` seconds, and where the system does not tell.
        """
        began, now = self._began, self._read()
        if began is None or now is None or now[0] - began[0] < SHORTEST:
            return None
        seconds, busy, own = (after - before for before, after in zip(began, now, strict=True))
        return min(1.0, max(0.0, (busy - own) / (seconds * len(self._cores()))))

    def _read(self) -> tuple[float, float, float] | None:
        """Monotonic seconds, and seconds for which cores were busy: with anything, and with what is our own."""
        with suppress(OSError, psutil.Error):
            return time.monotonic(), self._busy_seconds(), self._own_seconds()
        return None

    def _cores(self) -> list[Any]:
        """Times of the cores that this process may use, as psutil tells them."""
        cores = psutil.cpu_times(percpu=True)
        usable = self._process.cpu_affinity() if hasattr(self._process, "cpu_affinity") else None  # not on macOS
        return [cores[number] for number in usable or range(len(cores)) if number < len(cores)]

    def _busy_seconds(self) -> float:
        return sum(getattr(core, name, 0.0) for core in self._cores() for name in _BUSY)

    def _own_seconds(self) -> float:
        total = 0.0
        with suppress(psutil.Error):  # a child may end while it is asked
            for process in (self._process, *self._process.children(recursive=True)):
                with suppress(psutil.Error):
                    spent = process.cpu_times()
                    total += spent.user + spent.system + spent.children_user + spent.children_system
        return total


_BUSY = ("user", "nice", "system", "irq", "softirq", "steal", "interrupt", "dpc")
"""Fields of psutil's times of a core, as far as a system has them; those of guests are part of ``user``."""

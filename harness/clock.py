"""Timing of phases with the device synchronised at each edge, peak memory and the load of others per phase."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from harness.memory import hand_back_freed
from harness.occupancy import Elsewhere

_CLEAR_REFS = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")


class Clock:
    """Seconds and peak bytes of named phases (load, compile, warm-up, fit, measure ...), and how busy others were.

    Peak memory is the device's allocator peak on CUDA. On a CPU it is the process's peak resident set within the phase
    where the kernel lets it be reset (Linux), else the peak since the process started.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = {}
        self.peak_bytes: dict[str, int] = {}
        self.busy_elsewhere: dict[str, float | None] = {}
        """Part of the cores' time that other programs had in the latest phase of a name; None for a short one."""
        self._elsewhere = Elsewhere()
        self._earlier: tuple[float, float | None] = (0.0, None)
        self._started = 0.0
        self._paused = 0.0
        self._peak = 0

    def now(self) -> float:
        """Monotonic seconds after all work queued on the device is done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        hand_back_freed()
        _reset_peak(self.device)
        self._elsewhere, self._earlier = Elsewhere(), (0.0, None)
        self._started, self._paused, self._peak = self.now(), 0.0, 0
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + self.elapsed()
            self.peak_bytes[name] = max(self.peak_bytes.get(name, 0), self.peak())
            self.busy_elsewhere[name] = self.busy()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time spent inside is not counted in the current phase (validation during training)."""
        started = self.now()
        try:
            yield
        finally:
            self._paused += self.now() - started

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Neither the time spent nor the memory taken inside is counted in the current phase."""
        self._peak = self.peak()
        try:
            with self.paused():
                yield
        finally:
            hand_back_freed()
            _reset_peak(self.device)

    @contextmanager
    def phase_within(self, name: str) -> Iterator[None]:
        """A phase of its own, neither whose time nor whose memory is counted in the current one."""
        started = self.now()
        try:
            with self.aside():
                yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + self.now() - started

    def resume(self, seconds: float, peak_bytes: int, busy: float | None = None) -> None:
        """Let the current phase be the continuation of an earlier part that took so much; what it has had is void.

        Args:
            busy: Part of the cores' time that other programs had in the earlier part.
        """
        self._started, self._paused, self._peak = self.now() - seconds, 0.0, peak_bytes
        self._elsewhere, self._earlier = Elsewhere(), (seconds, busy)

    def elapsed(self) -> float:
        """Seconds of the current phase, pauses apart."""
        return self.now() - self._started - self._paused

    def elapsed_on_host(self) -> float:
        """The same as the host sees it: it does not wait for work queued on the device."""
        return time.perf_counter() - self._started - self._paused

    def busy(self) -> float | None:
        """Part of the cores' time that other programs have had in the current phase; None if it is short so far."""
        (before, then), now = self._earlier, self._elsewhere.share()
        if then is None or now is None:
            return then if now is None else now
        since = max(0.0, self.elapsed() - before)
        return (then * before + now * since) / (before + since) if before else now

    def peak(self) -> int:
        """Peak bytes of the current phase."""
        return max(self._peak, _peak(self.device))


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with suppress(OSError):
        _CLEAR_REFS.write_text("5")


def _peak(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with suppress(OSError):
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024

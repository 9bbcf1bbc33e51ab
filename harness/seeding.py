"""Random streams, each derived by name, and isolation of the process-wide generators."""

from __future__ import annotations

import hashlib
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch

_SUBNORMAL = 1e-310


def derive(*names: str | int) -> int:
    """A 63-bit seed that depends on every name and on their order."""
    digest = hashlib.sha256("\x1f".join(map(str, names)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def generator(device: torch.device, *names: str | int) -> torch.Generator:
    """A fresh generator on ``device`` for the stream called ``names``."""
    stream = torch.Generator(device=device)
    stream.manual_seed(derive(*names))
    return stream


@dataclass(frozen=True)
class Streams:
    """The named random streams of one job.

    A *shared* stream has no method in its name, so all methods of a comparison see the same minibatches, the same
    binarisation, the same initial decoder weights and the same evaluation noise. An *own* stream belongs to one method.
    """

    seed: int
    problem: str
    method: str
    device: torch.device

    def shared(self, purpose: str) -> torch.Generator:
        return generator(self.device, "shared", self.seed, self.problem, purpose)

    def own(self, purpose: str) -> torch.Generator:
        return generator(self.device, "own", self.seed, self.problem, self.method, purpose)

    @contextmanager
    def initial_weights(self, *, shared: bool) -> Iterator[None]:
        """Modules built inside draw their initial weights from the named stream, on the CPU whatever the device."""
        names = ("shared",) if shared else ("own", self.method)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive(*names, self.seed, self.problem, "weights"))
            yield


def process_wide(device: torch.device) -> torch.Generator:
    """The generator that torch draws from on a device where none is named."""
    if device.type == "cuda":
        return torch.cuda.default_generators[torch.cuda.current_device() if device.index is None else device.index]
    return torch.default_generator


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed the process-wide generators of random, numpy and torch; afterwards they are as before.

    Cheap enough for every step of a loop, as `torch.manual_seed` and `torch.random.fork_rng` are not.
    """
    python_state, numpy_state = random.getstate(), np.random.get_state()
    devices = torch.cuda.default_generators if torch.cuda.is_initialized() else ()
    states = [(stream, stream.get_state()) for stream in (torch.default_generator, *devices)]
    try:
        random.seed(seed)
        np.random.seed(seed % 2**32)
        for stream, _ in states:
            stream.manual_seed(seed)
        yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        for stream, state in states:
            stream.set_state(state)


@contextmanager
def drawing_from(generator: torch.Generator) -> Iterator[None]:
    """Libraries that know the process-wide generators only draw from ``generator``: one number of it seeds them all."""
    seed = int(torch.randint(2**63 - 1, (), generator=generator, device=generator.device))
    with seeded(seed):
        yield


@contextmanager
def isolated(seed: int) -> Iterator[None]:
    """Seed the process-wide generators for one job; restore them, the default dtype and Pyro's state afterwards.

    Meanwhile numbers too small for full precision count as zero (`flushed`), and convolutions on CUDA are of float32
    where they say so (`without_tf32`).
    """
    python_state, numpy_state, dtype = random.getstate(), np.random.get_state(), torch.get_default_dtype()
    pyro = sys.modules.get("pyro")
    pyro_state = (pyro.settings.get(), pyro.get_param_store().get_state()) if pyro else None
    gradients = torch.is_grad_enabled()
    with torch.random.fork_rng(), flushed(), without_tf32():
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)
            torch.set_default_dtype(dtype)
            torch.set_grad_enabled(gradients)
            _restore_pyro(pyro_state)


@contextmanager
def flushed() -> Iterator[None]:
    """Count numbers below 1e-38 (float32) as zero in this thread, and in those that torch makes meanwhile.

    With them operations take many times as long: a decoder that has learnt which pixels are always black passes ever
    smaller gradients, and without this a fit becomes slower as it goes on. Where the processor cannot do so, nothing
    changes.
    """
    before = float(torch.tensor(_SUBNORMAL, dtype=torch.float64) * 1.0) == 0.0
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(before)


@contextmanager
def without_tf32() -> Iterator[None]:
    """Convolutions on CUDA keep the precision of their numbers; torch lets them multiply with 10 bits of 23 else."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def _restore_pyro(state: tuple[dict, dict] | None) -> None:
    pyro = sys.modules.get("pyro")
    if pyro is None:
        return
    pyro.clear_param_store()
    if state is not None:
        pyro.settings.set(**state[0])
        pyro.get_param_store().set_state(state[1])

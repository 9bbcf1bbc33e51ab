"""How the gradients of a training step are computed: as they are written, or from a recording of their operations.

A recording is made once, of the losses and their derivatives together, down to tensor operations: what Python, autograd
and `vmap` cost at every step is then paid once. On a CPU it is replayed by the same kernels in the same order, so that
the numbers are the same to the last bit; on CUDA it becomes one CUDA graph, together with the draws before it and the
optimisers after it. Compiled, its operations are fused too.
"""

from __future__ import annotations

import itertools
import logging
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from harness import players
from harness.options import one_of
from harness.players import Owned
from harness.replicas import Drawn, Together

log = logging.getLogger(__name__)

Step = Literal["auto", "eager", "graph", "compile"]
"""``auto`` is ``graph`` for all but the first updates. What cannot be recorded is computed as it is written, whatever
was asked for; what cannot be compiled is replayed as it was recorded."""

Program = Callable[..., Sequence[Tensor]]
"""Of the tensors of all replicas and what was drawn: the objective (R,), the movers' losses (M, R), then the pieces of
each mover's gradient."""

INDEXING = (torch.ops.aten.index.Tensor, torch.ops.aten.index_put.default, torch.ops.aten.index_put_.default)
LOOKED_AT = (torch.ops.aten._linalg_check_errors.default,)  # by the host: whether a factorisation has succeeded
COMPILER: dict[str, Any] = {"compile_threads": 1}  # a pool of processes would outlive a run that is killed
FIRST_UPDATES = 100  # by auto: a fit of few steps is over before a recording would have paid
CLOSE = {False: 1e-3, True: 1e-2}  # whether products are of 8 bits; compiled sums are in another order
GRADIENTS_CLOSE = 0.1  # of their norm: they are sums of what cancels
REMEDY = (
    "what changes from step to step must be in buffers of the modules, and what is drawn in noise(); neither x nor "
    "noise may be changed in place; --step eager does without recording"
)


def parse_step(text: str) -> Step:
    """The mode of that name.

    Raises:
        UserError: If there is none.
    """
    return cast(Step, one_of("step", text, get_args(Step)))


class Gradients(ABC):
    """What computes the gradients of players from what was drawn.

    Args:
        used: How: ``eager``, ``graph`` or ``compile``.
    """

    used: str

    @abstractmethod
    def __call__(self, movers: Sequence[Owned], drawn: Drawn) -> tuple[Tensor, list[list[Tensor]]]:
        """The objective (R,), and of each of the players the gradient of its loss in pieces, until the next call."""

    @abstractmethod
    def give_up(self) -> None:
        """Compute gradients as they are written from now on."""

    @abstractmethod
    def check(self) -> None:
        """See that the numbers are still those of the losses as they are written.

        Raises:
            RuntimeError: If they are not.
        """


class Eager(Gradients):
    """As they are written."""

    used = "eager"

    def __init__(self, together: Together) -> None:
        self.together = together

    def __call__(self, movers: Sequence[Owned], drawn: Drawn) -> tuple[Tensor, list[list[Tensor]]]:
        losses = self.together.losses(drawn)
        return losses[self.together.objective].detach().reshape(-1), differentiated(losses, movers)

    def give_up(self) -> None: ...

    def check(self) -> None: ...


class Recorded(Gradients):
    """From a recording for each set of players that move together; as they are written, if that cannot be made.

    All tensors but what is drawn must stay where they are: parameters and buffers are changed in place.

    Args:
        after: How many updates are computed as they are written first.
    """

    used = "eager"

    def __init__(self, together: Together, mode: Literal["graph", "compile"], after: int) -> None:
        self.together, self.mode, self.after = together, mode, after
        self.eager, self.broken = Eager(together), False
        self.programs: dict[tuple[str, ...], Program] = {}
        self.last: dict[tuple[str, ...], tuple[Sequence[Owned], Drawn]] = {}

    def __call__(self, movers: Sequence[Owned], drawn: Drawn) -> tuple[Tensor, list[list[Tensor]]]:
        if self.broken or self.after > 0:
            self.after -= 1
            return self.eager(movers, drawn)
        names = tuple(owned.player.name for owned in movers)
        if names not in self.programs:
            try:
                with self.together.clock.phase_within("compile"), self.together.buffers_kept():
                    self.programs[names] = self._recorded(movers, drawn)
            except torch.OutOfMemoryError:  # pyright: ignore[reportPrivateImportUsage]
                raise
            except Exception as error:  # of the recorder or the compiler, or of the losses: then it comes again
                log.warning("steps are taken as they are written, not by %s: %s", self.mode, _first_line(error))
                self.give_up()
                return self.eager(movers, drawn)
            self.used = self.mode
        self.last[names] = movers, drawn
        objective, _, *pieces = self._replayed(names, drawn)
        return objective, _of_each(movers, pieces)

    def give_up(self) -> None:
        self.broken, self.used = True, "eager"

    def check(self) -> None:
        for names, (movers, drawn) in self.last.items() if not self.broken else ():
            with self.together.buffers_kept():
                losses = self.together.losses(drawn)
                expected, gradients = _of(names, losses).detach(), differentiated(losses, movers)
            with self.together.buffers_kept():
                _, found, *pieces = self._replayed(names, drawn)
            finite = expected.isfinite()  # what is not has diverged, in one way or another
            close = CLOSE[self.together.low_precision]
            same = torch.equal(found.isfinite(), finite)
            if not (same and torch.allclose(found[finite], expected[finite], rtol=close, atol=close)):
                raise RuntimeError(
                    f"losses {', '.join(names)} are {expected.tolist()} as they are written and {found.tolist()} as "
                    f"they were recorded: {REMEDY}"
                )
            for name, own, others in zip(names, gradients, _of_each(movers, pieces), strict=True):
                compare(name, own, others)

    def _replayed(self, names: tuple[str, ...], drawn: Drawn) -> Sequence[Tensor]:
        with torch.no_grad():
            return self.programs[names](*self.together.tensors.values(), *_flat(drawn))

    def _recorded(self, movers: Sequence[Owned], drawn: Drawn) -> Program:
        _, noise = drawn
        names = [*self.together.tensors]
        players = [owned.player.name for owned in movers]

        def step(*values: Tensor) -> Sequence[Tensor]:
            tensors = dict(zip(names, values[: len(names)], strict=True))
            x, *draws = values[len(names) :]
            losses = self.together.losses_at(tensors, (x, dict(zip(noise, draws, strict=True))))
            objective = losses[self.together.objective].detach().reshape(-1)
            gradients = differentiated(losses, movers, tensors)
            return objective, _of(players, losses).detach(), *itertools.chain.from_iterable(gradients)

        inputs = [*self.together.tensors.values(), *_flat(drawn)]
        with torch.autograd.set_multithreading_enabled(False):  # derivatives are recorded in this thread
            recording = make_fx(step)(*inputs)
        _refuse_what_varies(recording, inputs[-1].device)
        return self._compiled(recording, inputs) if self.mode == "compile" else recording

    def _compiled(self, recording: torch.fx.GraphModule, inputs: Sequence[Tensor]) -> Program:
        """Or as it was recorded, if it cannot be compiled."""
        try:
            with torch.no_grad(), warnings.catch_warnings():  # of the compiler's own code
                warnings.simplefilter("ignore", DeprecationWarning)
                warnings.filterwarnings("ignore", "TensorFloat32", UserWarning)
                return cast(Program, torch._inductor.compile(recording, [*inputs], options=COMPILER))
        except torch.OutOfMemoryError:  # pyright: ignore[reportPrivateImportUsage]
            raise
        except Exception as error:
            log.warning("steps are replayed as they were recorded, not compiled: %s", _first_line(error))
            self.mode = "graph"
            return recording


def compare(name: str, expected: Sequence[Tensor], found: Sequence[Tensor]) -> None:
    """Raise if the gradients of a loss, each in pieces (R, n), are further apart than rounding explains."""
    written, recorded = (torch.cat([*pieces], dim=1) for pieces in (expected, found))
    size, apart = (torch.linalg.vector_norm(each, dim=1) for each in (written, recorded - written))
    if not bool((apart <= GRADIENTS_CLOSE * size)[size.isfinite()].all()):
        raise RuntimeError(
            f"the gradient of {name} has a norm of {size.tolist()} as it is written and is {apart.tolist()} off as it "
            f"was recorded: {REMEDY}"
        )


def _of_each(movers: Sequence[Owned], pieces: Sequence[Tensor]) -> list[list[Tensor]]:
    rest = iter(pieces)
    return [[*itertools.islice(rest, owned.pieces)] for owned in movers]


def _refuse_what_varies(recording: torch.fx.GraphModule, device: torch.device) -> None:
    """Raise if shapes depend on values, or if tensors are elsewhere: neither is the same when it is replayed.

    And where whole steps become a graph, if the host has to look at values: it cannot then.
    """
    for node in recording.graph.nodes:
        masked, varies = _has_mask(node), torch.Tag.dynamic_output_shape in getattr(node.target, "tags", ())
        if varies and (masked or node.target not in INDEXING):
            raise RuntimeError(f"the shape of what {node.target} returns depends on values")
        if device.type in players.CAPTURED and (masked or node.target in LOOKED_AT):
            raise RuntimeError(f"{node.target} waits for the device")
        kept = getattr(recording, node.target) if node.op == "get_attr" else None
        places = [kept.device] if isinstance(kept, Tensor) else [node.kwargs.get("device") or device]
        if any(torch.device(place).type != device.type for place in places):
            raise RuntimeError(f"{node.name} is a tensor that is not on the device, {device}")


def _has_mask(node: torch.fx.Node) -> bool:
    """Whether it chooses elements by a mask, and not by their places."""
    if node.target not in INDEXING:
        return False
    indices = cast(Sequence[torch.fx.Node | None], node.args[1])
    return any(index is not None and index.meta["val"].dtype in (torch.bool, torch.uint8) for index in indices)


def gradients_by(step: str, together: Together) -> Gradients:
    if step == "eager":
        return Eager(together)
    mode = "compile" if step == "compile" else "graph"
    return Recorded(together, mode, after=FIRST_UPDATES if step == "auto" else 0)


def differentiated(
    losses: Mapping[str, Tensor], movers: Sequence[Owned], tensors: Mapping[str, Tensor] | None = None
) -> list[list[Tensor]]:
    """The gradient of each player's own loss, in pieces.

    Args:
        tensors: What the losses were computed from, by name, where that is not the players' own parameters.
    """
    last = len(movers) - 1
    return [
        owned.gradient(losses[owned.player.name], tensors, keep=number < last) for number, owned in enumerate(movers)
    ]


def _of(players: Sequence[str], losses: Mapping[str, Tensor]) -> Tensor:
    """The losses of some players: (M, R)."""
    return torch.stack([losses[name].reshape(-1) for name in players])


def _flat(drawn: Drawn) -> list[Tensor]:
    x, noise = drawn
    return [x, *noise.values()]


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]

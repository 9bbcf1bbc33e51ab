r"""Annealed importance sampling of log p(x), forwards and in reverse, with kernels that are tuned and then frozen.

.. math:: \log f_t(z) = (1 - \beta_t) \log q_0(z|x) + \beta_t \log p(x, z), \quad 0 = \beta_0 < \dots < \beta_T = 1

.. math:: \log w = \sum_{t=1}^T \log f_t(z_{t-1}) - \log f_{t-1}(z_{t-1}), \quad E[w] = p(x)

where z_0 ~ q0 and z_t follows from z_{t-1} by a transition that leaves f_t invariant (Neal 2001,
https://arxiv.org/abs/physics/9803008), so that log mean w is a stochastic lower bound on log p(x). The same kernels in
reverse order, from an exact draw of p(z|x), give weights with E[w] = 1/p(x), hence a stochastic upper bound (Grosse,
Ghahramani, Adams 2015, https://arxiv.org/abs/1511.02543).

Step sizes are found in a pilot run with chains of its own, for every observation and temperature, and are constants
afterwards. The released code of the AVB paper adapts them while it weighs: its kernels then depend on the chains'
past, leave no f_t invariant, and its estimate is no bound.

Shapes: S chains, N observations (B in one block), D latent dimensions, T temperatures, E event shape.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from harness.estimators import LogMeanExp
from harness.hmc import Path, Randomness, State, is_plain_decoder, joint_density, transition
from harness.memory import allocated
from harness.model import LatentModel
from harness.nn import count_parameters
from harness.starts import Start

Schedule = Literal["sigmoid", "linear"]
Forces = Literal["auto", "full", "bf16"]

SIGMOID_RANGE = 4.0  # the sigmoid runs from -4 to 4, as in Grosse et al. 2015, section 6
CHECKPOINTS = 40  # of the running estimate
STANDING_LATENTS = (
    9  # what is kept of all chains at once: states before and after a move with two gradients each, noise
)
PILOT_PART, PILOT_LEAST = 8, 64  # the pilot has an eighth of the temperatures, at least 64
PILOT_CHAINS = 4, 16  # as many as the run has, within these
BF16_PARAMETERS = 100_000  # of a decoder; below it is not the matrix products that take the time
SEARCH = 30  # transitions at the first temperature, to find the order of magnitude of the step
GAIN = 0.5  # of the pilot's adaptation, per transition


def schedule(kind: Schedule, temperatures: int) -> list[float]:
    """Inverse temperatures beta_0 = 0 to beta_T = 1, T + 1 of them, in float64."""
    position = torch.linspace(0, 1, temperatures + 1, dtype=torch.float64)
    if kind == "linear":
        return position.tolist()
    curve = torch.sigmoid(SIGMOID_RANGE * (2 * position - 1))
    return ((curve - curve[0]) / (curve[-1] - curve[0])).tolist()


# Kernels and weights


@dataclass(frozen=True, eq=False)
class Kernels:
    """What the transitions are, once and for all.

    Args:
        betas: beta_0 to beta_T.
        steps: Step size at beta_1 to beta_{T-1} for every observation, in units of the start's scale, (T - 1, N).
        leapfrog: Leapfrog steps of a transition.
    """

    betas: list[float]
    steps: Tensor
    leapfrog: int


@dataclass(frozen=True, eq=False)
class Weights:
    """The outcome of a run.

    Args:
        log_w: Shape (S, N), float64.
        acceptance: Mean probability of acceptance of each of the T - 1 transitions, in the order of the run.
        betas: Inverse temperatures of the checkpoints, shape (M,).
        running: The estimate so far at each checkpoint, shape (M, N): log of the mean weight.
        forces: Precision of the gradients within trajectories, for the record.
    """

    log_w: Tensor
    acceptance: Tensor
    betas: np.ndarray
    running: Tensor
    forces: str

    def estimate(self) -> LogMeanExp:
        """log mean w over the chains, with its error and the effective number of chains."""
        return LogMeanExp(self.log_w)

    def diagnostics(self) -> dict[str, float | str]:
        """Acceptance, the effective number of chains of the final weights, and the forces' precision."""
        sizes = self.estimate().effective_sample_size()
        return {
            "acceptance": float(self.acceptance.mean()),
            "acceptance_min": float(self.acceptance.min()),
            "ess_min": float(sizes.min()),
            "ess_median": float(sizes.median()),
            "force_precision": self.forces,
        }

    def traces(self) -> dict[str, np.ndarray]:
        """Acceptance by temperature, and the running estimate."""
        return {
            "acceptance": self.acceptance.double().cpu().numpy(),
            "temperature": self.betas,
            "running": self.running.cpu().numpy(),
        }


OnMove = Callable[[float, float, float], None]
"""Told of the part of a run that is done, its acceptance and its running estimate (mean over observations)."""


class Annealing:
    """The path from a start to p(x, z) for N observations, whose gradients are taken in blocks of bounded memory.

    Noise is drawn for all observations at once, so that the blocks' size changes nothing but rounding.

    Args:
        model: Copied and frozen; its parameters get no gradient.
        x: Observations, shape (N, *E).
        memory: In bytes; blocks fit what the chains' own states leave of it.
        forces: Precision of the gradients within a trajectory, see `harness.hmc`; None for the model's own.
    """

    def __init__(
        self,
        model: LatentModel,
        x: Tensor,
        start: Start,
        chains: int,
        leapfrog: int,
        memory: int,
        forces: torch.dtype | None = None,
    ) -> None:
        frozen = copy.deepcopy(model).eval().requires_grad_(False)
        self.start, self.chains, self.leapfrog, self.observations = start, chains, leapfrog, len(x)
        self.forces = str(forces or x.dtype).removeprefix("torch.")
        fewest, most = PILOT_CHAINS
        self.pilot_chains = min(most, max(fewest, chains))
        size = _block_size(frozen, x, start, max(chains, self.pilot_chains), memory)
        self.blocks = [slice(first, min(first + size, len(x))) for first in range(0, len(x), size)]
        self.paths = [Path(start.density(block), joint_density(frozen, x[block], forces)) for block in self.blocks]

    def tuned(self, kind: Schedule, temperatures: int, acceptance: float, stream: torch.Generator) -> Kernels:
        """Kernels from a pilot run along a coarser schedule of the same kind, which looks at no other draw.

        Stochastic approximation of the step at which transitions are accepted with the given probability on average
        over the chains of an observation (Andrieu and Thoms 2008, https://doi.org/10.1007/s11222-008-9110-y).
        """
        coarse = schedule(kind, max(PILOT_LEAST, temperatures // PILOT_PART))[1:-1]
        z = self.start.sample(self.pilot_chains, stream)
        states = self._states(z)
        log_step = torch.full_like(z[0, :, 0], math.log(0.5) - 0.25 * math.log(z.shape[-1]))
        found: list[Tensor] = []
        for beta in [coarse[0]] * SEARCH + coarse:
            alive = torch.cat([state.log_joint.isfinite() for state in states], dim=1)
            states, probability = self._move(states, beta, log_step.exp(), Randomness.draw(z, stream))
            # A chain where the joint density is zero weighs nothing, and no step is small enough for it.
            excess = (probability - acceptance).mul(alive).sum(0) / alive.sum(0).clamp(min=1)
            log_step = (log_step + GAIN * excess).clamp(-12, 6)
            found.append(log_step)
        position = torch.arange(1, temperatures, dtype=z.dtype, device=z.device) / temperatures
        at = (position * (len(coarse) + 1) - 1).clamp(0, len(coarse) - 1)
        return Kernels(
            schedule(kind, temperatures), _interpolated(torch.stack(found[SEARCH:]), at).exp(), self.leapfrog
        )

    def forward(self, kernels: Kernels, stream: torch.Generator, told: OnMove = lambda *facts: None) -> Weights:
        """Weights from independent draws of the start: E[w] = p(x)."""
        betas = kernels.betas
        moves = [(b - a, t) for t, (a, b) in enumerate(itertools.pairwise(betas), start=1)]
        return self._weigh(self.start.sample(self.chains, stream), kernels, moves, stream, told)

    def reverse(
        self, kernels: Kernels, z: Tensor, stream: torch.Generator, told: OnMove = lambda *facts: None
    ) -> Weights:
        """Weights from an exact draw z (N, D) of p(z|x), from which all chains set out: E[w] = 1/p(x)."""
        betas = kernels.betas
        moves = [(a - b, t) for t, (a, b) in enumerate(itertools.pairwise(betas))][::-1]
        return self._weigh(z.expand(self.chains, *z.shape).clone(), kernels, moves, stream, told)

    def _weigh(
        self, z: Tensor, kernels: Kernels, moves: list[tuple[float, int]], stream: torch.Generator, told: OnMove
    ) -> Weights:
        """Weigh, then move, along the schedule.

        Args:
            moves: Change of beta, and the index of the temperature whose kernel follows; the ends 0 and T have none.
        """
        states = self._states(z)
        log_w = torch.zeros(z.shape[:2], dtype=torch.float64, device=z.device)
        acceptance: list[Tensor] = []
        running: list[Tensor] = []
        betas: list[float] = []
        last = len(moves) - 1
        for i, (change, t) in enumerate(moves):
            log_w += change * torch.cat([state.log_joint - state.log_start for state in states], dim=1).double()
            if i < last:
                draws = Randomness.draw(z, stream)
                states, probability = self._move(states, kernels.betas[t], kernels.steps[t - 1], draws)
                acceptance.append(probability.mean())
            if i == last or (i + 1) * CHECKPOINTS // len(moves) > i * CHECKPOINTS // len(moves):
                running.append(log_w.logsumexp(0) - math.log(self.chains))
                betas.append(kernels.betas[t])
                told((i + 1) / len(moves), float(torch.stack(acceptance[-25:]).mean()), float(running[-1].mean()))
        return Weights(log_w, torch.stack(acceptance), np.array(betas), torch.stack(running), self.forces)

    def _states(self, z: Tensor) -> list[State]:
        return [path.at(z[:, block]) for path, block in zip(self.paths, self.blocks, strict=True)]

    def _move(self, states: list[State], beta: float, step: Tensor, draws: Randomness) -> tuple[list[State], Tensor]:
        """A transition of all chains: step (N,) -> the states, and the probabilities of acceptance (S, N)."""
        scaled = step[:, None] * self.start.scale
        moved = [
            transition(path, beta, state, scaled[block], self.leapfrog, draws.of(block))
            for path, state, block in zip(self.paths, states, self.blocks, strict=True)
        ]
        return [state for state, _ in moved], torch.cat([probability for _, probability in moved], dim=1)


def _interpolated(values: Tensor, at: Tensor) -> Tensor:
    """Rows of (P, N) at positions (M,) between 0 and P - 1, linear in between: (M, N)."""
    below = at.long().clamp(max=max(0, len(values) - 2))
    above = (below + 1).clamp(max=len(values) - 1)
    return torch.lerp(values[below], values[above], (at - below)[:, None])


def _block_size(model: LatentModel, x: Tensor, start: Start, chains: int, memory: int) -> int:
    """Observations of a block: everything that one gradient allocates, never mind what it frees, fits the memory."""
    z = start.scale[:1]
    path = Path(start.density(slice(0, 1)), joint_density(model, x[:1]))
    one, two = (allocated(lambda n=n: path.at(z.expand(n, *z.shape))) for n in (1, 2))
    standing = len(x) * chains * STANDING_LATENTS * z.numel() * z.element_size()
    return max(1, min(len(x), (memory - standing) // max(1, chains * (two - one))))


def force_precision(asked: Forces, model: LatentModel, dtype: torch.dtype, device: torch.device) -> torch.dtype | None:
    """Precision of the gradients within trajectories of a model in ``dtype``; None for the same."""
    if asked == "auto":
        large = is_plain_decoder(model) and count_parameters(model.decoder) >= BF16_PARAMETERS
        asked = "bf16" if large and dtype == torch.float32 and multiplies_bf16(device) else "full"
    return torch.bfloat16 if asked == "bf16" and is_plain_decoder(model) else None


def multiplies_bf16(device: torch.device) -> bool:
    """Whether the processor has instructions for matrix products in bfloat16."""
    supported = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)  # there is no public way to ask
    return device.type == "cpu" and torch.backends.mkldnn.is_available() and supported()

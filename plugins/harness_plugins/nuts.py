r"""NUTS: several Markov chains whose draws are those of p(z|x) in the long run, by Pyro.

Hamiltonian dynamics of the potential energy

.. math:: U(z) = -\log p(x, z)

are followed until they turn back; step size and mass matrix are adapted in the warm-up. Hoffman and Gelman 2014,
https://jmlr.org/papers/v15/hoffman14a.html, with multinomial draws from each trajectory: Betancourt 2017,
https://arxiv.org/abs/1701.02434
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, PositiveInt
from torch import Tensor

from harness import hookimpl
from harness.method import CurvePoint, Diverged, Fit, Method, Run, State, unfit_for_one_posterior
from harness.model import LatentModel
from harness.posterior import ChainPosterior
from harness.problem import TrainingView
from harness.seeding import drawing_from

log = logging.getLogger(__name__)

LOG_EVERY = 100  # transitions
STARTS = 100  # draws from the prior that a chain may try to start from
FEWEST_DRAWS = 4  # that R-hat asks for
NEGLIGIBLE = 0.05  # part of the draws that may be cut without a word


Drawn = tuple[Tensor, list[int]]
"""The draws of a chain, (n, D), and after which of them its integrator broke down."""


class Potential:
    """-log p(x, z) for one observation x (1, *E), and how often its gradient was asked for."""

    def __init__(self, model: LatentModel, x: Tensor) -> None:
        self.model, self.x, self.gradients = model, x, 0

    def __call__(self, sites: Mapping[str, Tensor]) -> Tensor:
        z = sites["z"]
        self.gradients += int(z.requires_grad)
        return -self.model.log_joint(self.x, z[None])[0]


@dataclass(frozen=True, kw_only=True)
class NUTS(Method):
    """Hamiltonian chains that choose the lengths of their trajectories themselves, one after another.

    Chains run for their own numbers of transitions, whatever the budget in steps, examples or checks: a transition is
    no update of a parameter, and a warm-up that is cut short adapts to nothing. What they cost is in the gradient
    evaluations and in the seconds. A budget in seconds is kept: each chain has an equal part of it, and ends early. An
    interrupted fit goes on with the chain that it was at.

    Args:
        chains: How many; each starts from a draw of its own from the prior.
        warmup: Transitions of each chain that adapt it, and are thrown away.
        draws: Transitions of each chain that are kept.
        max_tree_depth: A trajectory has at most 2^depth - 1 steps.
        target_acceptance: Mean acceptance that the step size is adapted to.
        mass: Form of the mass matrix that is adapted.
    """

    name: str = "nuts"
    chains: Annotated[int, Field(ge=2)] = 4
    warmup: PositiveInt = 1000
    draws: Annotated[int, Field(ge=FEWEST_DRAWS)] = 1000
    max_tree_depth: PositiveInt = 10
    target_acceptance: Annotated[float, Field(gt=0, lt=1)] = 0.8
    mass: Literal["diagonal", "dense"] = "diagonal"

    libraries: ClassVar[tuple[str, ...]] = ("pyro.infer",)

    def unfit(self, view: TrainingView) -> str | None:
        return unfit_for_one_posterior(view)

    def fit(self, view: TrainingView, run: Run) -> Fit:
        potential = Potential(view.model.eval().requires_grad_(False), view.validation[:1])
        found = self._taken_up(potential, run)
        while len(found) < self.chains:
            found.append(self._chain(len(found), potential, run))
            if len(found) < self.chains and run.checkpoint.due():
                self._keep(found, potential, run)
        lengths = [len(draws) for draws, _ in found]
        shortest = min(lengths)  # a budget in seconds may have ended them
        if len(lengths) * shortest < (1 - NEGLIGIBLE) * sum(lengths):
            log.warning("%s: chains of %s draws are cut to the shortest", self.label, ", ".join(map(str, lengths)))
        state = {
            "draws": torch.stack([draws[:shortest] for draws, _ in found])[:, :, None],
            "divergences": torch.tensor([sum(t < shortest for t in at) for _, at in found], device=run.device),
        }
        return self._fit(view, state, potential.gradients)

    def _taken_up(self, potential: Potential, run: Run) -> list[Drawn]:
        """The chains that an earlier run has ended; one that it was at starts anew, from its own streams."""
        state = run.checkpoint.load()
        if state is None:
            return []
        potential.gradients = state.facts["gradients"]
        divergences = enumerate(state.facts["divergences"])
        return [(state.tensors[f"chain {i}"].to(run.device), broken) for i, broken in divergences]

    def _keep(self, found: Sequence[Drawn], potential: Potential, run: Run) -> None:
        tensors = {f"chain {i}": draws for i, (draws, _) in enumerate(found)}
        facts = {"gradients": potential.gradients, "divergences": [broken for _, broken in found]}
        done = len(found)
        run.checkpoint.save(State(tensors, facts), done * (self.warmup + self.draws), self._fraction(done, 0, run))

    def restore(self, view: TrainingView, state: Mapping[str, Tensor]) -> Fit:
        return self._fit(view, state, 0)

    def _fit(self, view: TrainingView, state: Mapping[str, Tensor], gradients: int) -> Fit:
        model = view.model.eval().requires_grad_(False)
        posterior = ChainPosterior(state["draws"], state["divergences"])
        return Fit(model, posterior, state, gradient_evaluations=gradients)

    def _chain(self, i: int, potential: Potential, run: Run) -> Drawn:
        """One chain, from its start to its end.

        Raises:
            Diverged: If log p(x, z) is not finite.
            RuntimeError: If too few draws are made before the time is over.
        """
        import pyro

        start, transitions = _start(potential, run.generator(f"start {i}")), self.warmup + self.draws
        visited: list[Tensor] = []
        with drawing_from(run.generator(f"chain {i}")), pyro.validation_enabled(False):
            kernel = self._kernel(potential)
            kernel.initial_params = {"z": start}
            kernel.setup(self.warmup)
            sites = kernel.initial_params
            for t in range(transitions):
                if self._fraction(i, t, run) >= (i + 1) / self.chains:
                    break
                sites = kernel.sample(sites)
                visited.append(sites["z"].detach())
                if (t + 1) % LOG_EVERY == 0 or t + 1 == transitions:
                    self._log(i, t + 1, visited, potential, run)
            if len(visited) < self.warmup + FEWEST_DRAWS:
                made = f"{len(visited)} transitions, of which {self.warmup} are warm-up"
                raise RuntimeError(
                    f"the time of chain {i} was over after {made}: give it more seconds, or lower warmup"
                )
            divergences = kernel.diagnostics()["divergences"]
        return torch.stack(visited[self.warmup :]), divergences

    def _kernel(self, potential: Potential) -> Any:
        from pyro.infer import NUTS as Kernel

        return Kernel(
            potential_fn=potential,
            max_tree_depth=self.max_tree_depth,
            target_accept_prob=self.target_acceptance,
            full_mass=self.mass == "dense",
        )

    def _fraction(self, i: int, t: int, run: Run) -> float:
        """The part of all that is to be done, before transition ``t`` of chain ``i``."""
        if run.budget.unit == "seconds":
            return run.fraction(0, 0)
        return (i + t / (self.warmup + self.draws)) / self.chains

    def _log(self, i: int, t: int, visited: list[Tensor], potential: Potential, run: Run) -> None:
        """The mean of -log p(x, z) since the last point."""
        recent = torch.stack(visited[(t - 1) // LOG_EVERY * LOG_EVERY :])
        with torch.no_grad():
            energy = float(-potential.model.log_joint(potential.x, recent[:, None]).mean())
        step = i * (self.warmup + self.draws) + t
        run.log(CurvePoint(step, run.clock.elapsed(), energy), min(1.0, self._fraction(i, t, run)))


def _start(potential: Potential, stream: torch.Generator) -> Tensor:
    """A draw from the prior whose energy and gradient are finite, shape (D,).

    Raises:
        Diverged: If none is found.
    """
    for _ in range(STARTS):
        z = potential.model.sample_prior(1, stream)[0].to(potential.x.dtype)
        with torch.enable_grad():
            energy = potential({"z": z.requires_grad_()})
            (gradient,) = torch.autograd.grad(energy, z)
        if bool(energy.isfinite() & gradient.isfinite().all()):
            return z.detach()
    raise Diverged(f"log p(x, z) or its gradient is not finite for any of {STARTS} draws of z from the prior")


@hookimpl
def harness_methods() -> list[NUTS]:
    return [NUTS()]

"""Methods that are trained by stochastic gradients: what each of them writes, and fits of one or several of them.

A method states its modules, its *players* (who owns which parameters and how they are updated), the shapes of its noise
and its losses as a pure function; the loop (`harness.loop`) does the rest.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor

from harness.loop import Loop
from harness.method import Diverged, Fit, Method, Run
from harness.nn import count_parameters
from harness.players import Modules, Noise, Player
from harness.posterior import Posterior
from harness.problem import TrainingView
from harness.replicas import Replica

OF_ITS_OWN = {"converged": "each ends where it has converged", "seconds": "its seconds would be those of all"}
"""Budgets that fits cannot share, and why."""


@dataclass(frozen=True, kw_only=True)
class GradientMethod(Method):
    """A method that is trained by stochastic gradients: a subclass writes only the mathematics.

    Args:
        batch_size: Observations in a minibatch.
        lr_decay: Factor by which every learning rate falls over the last 60 % of the budget, geometrically; 1 for none.
            Without effect where convergence decides.
        clip_norm: Largest norm of a player's gradient; 0 for no clipping, as in the released code of the AVB paper.
    """

    per_replica: ClassVar[frozenset[str]] = frozenset()
    """Options that only `players` reads, as learning rates: fits may differ in these and still be trained at once."""

    batch_size: PositiveInt = 128
    lr_decay: PositiveFloat = 0.1
    clip_norm: NonNegativeFloat = 0.0

    @abstractmethod
    def build(self, view: TrainingView) -> Modules:
        """All modules by name, among them ``model``: the view's model, never another one."""

    @abstractmethod
    def players(self) -> list[Player]:
        """Who minimises what; the first player's loss is the objective of the training curve."""

    @abstractmethod
    def noise(self, view: TrainingView) -> dict[str, tuple[int, ...]]:
        """Shape, per observation, of each standard normal noise that `losses` uses."""

    @abstractmethod
    def losses(self, modules: Modules, x: Tensor, noise: Noise) -> dict[str, Tensor]:
        """The loss of each player: a pure function of its arguments.

        Args:
            x: Minibatch, shape (N, *E).
            noise: Standard normal draws, each of shape (N, *shape) with the shapes of `noise`.

        Returns:
            A scalar for each player, a mean over observations in nats.
        """

    @abstractmethod
    def posterior(self, modules: Modules) -> Posterior:
        """q(z|x) of the trained modules."""

    def schedule(self, modules: Modules, fraction: float) -> None:
        """Set what changes with the part of the budget that is spent, in [0, 1]: called before every step.

        What `losses` should know of it is put into buffers of the modules. Never called while convergence decides,
        where that part is not known.
        """

    def one_by_one(self) -> str | None:
        return self.full_precision_only()

    def full_precision_only(self) -> str | None:
        return None if type(self).fit is GradientMethod.fit else "it has a loop of its own"

    def fit(self, view: TrainingView, run: Run) -> Fit:
        [ended] = _trained([self], [_replica(self, view, run)])
        if isinstance(ended, Diverged):
            raise ended
        return ended

    def restore(self, view: TrainingView, state: Mapping[str, Tensor]) -> Fit:
        modules = _built(self, view)
        modules.load_state_dict(state)
        return self.fit_of(view, modules)

    def fit_of(self, view: TrainingView, modules: Modules, steps: int = 0, step_used: str = "") -> Fit:
        """The fit that trained modules are."""
        modules.eval().requires_grad_(False)
        state = {name: tensor.detach() for name, tensor in modules.state_dict().items()}
        parameters = count_parameters(modules) - count_parameters(view.model)
        evaluations = steps * sum(player.steps for player in self.players())
        return Fit(view.model, self.posterior(modules), state, parameters, steps, evaluations, step_used)


def fit_together(
    methods: Sequence[GradientMethod], views: Sequence[TrainingView], runs: Sequence[Run]
) -> list[Fit | Diverged]:
    """Fits of one method from several seeds, whose steps are one batched program; each is that of its seed alone.

    Minibatches, noise and initial weights of each are those of a single fit; sums are in another order, so that the
    results are not the same to the last bit. A fit that diverges does not end the others.

    Args:
        methods: One for each fit: the same but for options in `GradientMethod.per_replica`.
        views, runs: Those of each fit; the runs share their budget and their clock.

    Raises:
        ValueError: If these cannot be trained together.
    """
    return _trained(methods, _replicas(methods, views, runs))


def stepper(methods: Sequence[GradientMethod], views: Sequence[TrainingView], runs: Sequence[Run]) -> Iterator[None]:
    """The steps of a fit, or of several together, one at a time and with all that belongs to each: to time them.

    Args:
        methods, views, runs: As those of `fit_together`; one of each for a single fit.
    """
    return Loop(methods, _replicas(methods, views, runs)).train()


def _replicas(methods: Sequence[GradientMethod], views: Sequence[TrainingView], runs: Sequence[Run]) -> list[Replica]:
    if any(run.budget != runs[0].budget or run.clock is not runs[0].clock for run in runs):
        raise ValueError("fits that are trained together must share their budget and their clock")
    if runs[0].budget.unit in OF_ITS_OWN:
        raise ValueError(f"a budget of {runs[0].budget.unit} cannot be shared: {OF_ITS_OWN[runs[0].budget.unit]}")
    loops = [(method.batch_size, method.lr_decay, method.clip_norm) for method in methods]
    if len({*loops}) > 1 or len({type(method) for method in methods}) > 1:
        raise ValueError("fits that are trained together must be of one method, batch size, decay and clipping")
    replicas = []
    for method, view, run in zip(methods, views, runs, strict=True):
        with run.streams.initial_weights(shared=False):
            replicas.append(_replica(method, view, run))
    return replicas


def _trained(methods: Sequence[GradientMethod], replicas: Sequence[Replica]) -> list[Fit | Diverged]:
    loop = Loop(methods, replicas)
    loop.resume()
    for _ in loop.train():
        pass
    return [
        replica.diverged or method.fit_of(replica.view, replica.modules, loop.steps, loop.gradients.used)
        for method, replica in zip(methods, replicas, strict=True)
    ]


def _replica(method: GradientMethod, view: TrainingView, run: Run) -> Replica:
    objective = method.players()[0].name
    modules, shapes = _built(method, view), method.noise(view)
    return Replica(method.name, view, run, modules, method.losses, objective, shapes, method.batch_size)


def _built(method: GradientMethod, view: TrainingView) -> Modules:
    modules = method.build(view)
    if modules["model"] is not view.model:
        raise ValueError(f"{method.name}: build() must return the view's model under 'model'")
    owned = [name for player in method.players() for name in player.on]
    if sorted(owned) != sorted(modules):
        raise ValueError(f"{method.name}: players own {sorted(owned)}, build() returned {sorted(modules)}")
    return modules.to(device=view.validation.device, dtype=view.validation.dtype)

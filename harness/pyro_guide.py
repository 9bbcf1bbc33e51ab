r"""Pyro guides as methods: trained by Pyro's stochastic variational inference, in the loop of all gradient methods.

The problem's model is a Pyro program with one latent site, ``z``, within the plate ``observations``; a guide has the
same site, and

.. math:: \max_{\theta, \phi} E_{q_\phi(z|x)}[\log p_\theta(x, z) - \log q_\phi(z|x)]

Hoffman, Blei, Wang, Paisley 2013, https://jmlr.org/papers/v14/hoffman13a.html;
Bingham et al. 2019, https://jmlr.org/papers/v20/18-403.html

Shapes: P particles, n draws, N observations, D latent dimensions, E event shape of one observation.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

import torch
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor, nn

from harness.model import LatentModel
from harness.posterior import Posterior
from harness.problem import TrainingView
from harness.seeding import derive, drawing_from, process_wide, seeded
from harness.training import GradientMethod, Modules, Noise, Player

Program = Callable[[Tensor], object]
"""A Pyro program of a minibatch x (N, *E)."""
SEED = {"seed": (4,)}
"""The noise of a method whose draws are Pyro's: numbers for `seed_of`, enough to tell steps apart."""


def program_of(model: LatentModel, device: torch.device) -> Program:
    """The model as a Pyro program: the site ``z`` with the model's prior, its likelihood as a factor ``x``."""
    import pyro

    def program(x: Tensor) -> None:
        with pyro.plate("observations", len(x), dim=-1):
            z = pyro.sample("z", _prior_distribution()(model, device))
            pyro.factor("x", model.log_likelihood(x, z))

    return program


@cache
def _prior_distribution() -> Any:
    """The class of a model's prior as a distribution of Pyro's; not before it is needed: Pyro is slow."""
    from pyro.distributions import TorchDistribution, constraints

    class Prior(TorchDistribution):
        """p(z), independent over the batch shape."""

        def __init__(self, model: LatentModel, device: torch.device, batch_shape: tuple[int, ...] = ()) -> None:
            self.model, self.device = model, device
            super().__init__(torch.Size(batch_shape), torch.Size([model.latent_dim]), validate_args=False)

        @property
        def arg_constraints(self) -> dict[str, Any]:
            return {}

        @property
        def support(self) -> Any:
            return constraints.real_vector

        def expand(self, batch_shape: Any, _instance: object = None) -> Prior:
            return Prior(self.model, self.device, batch_shape)

        def sample(self, sample_shape: Any = ()) -> Tensor:
            shape = (*sample_shape, *self.batch_shape)
            return self.model.sample_prior(math.prod(shape), process_wide(self.device)).reshape(*shape, -1)

        def log_prob(self, value: Tensor) -> Tensor:
            return self.model.log_prior(value)

    return Prior


class Guide(nn.Module):
    """A Pyro guide with all its parameters, those of modules and those of `pyro.param` statements.

    Pyro's own store of parameters is another one while the guide runs, and afterwards as it was.

    Args:
        guide: A function or module of x (N, *E).
        x: Observations to try it with, shape (N, *E); kept.

    Raises:
        ValueError: If it has networks that are no members of it.
    """

    x: Tensor
    guide: Any

    def __init__(self, guide: Program, x: Tensor) -> None:
        import pyro

        super().__init__()
        self.register_buffer("x", x, persistent=False)
        if isinstance(guide, nn.Module):
            guide.to(device=x.device, dtype=x.dtype)
        self.guide = guide
        with pyro.get_param_store().scope() as store, pyro.validation_enabled(False):
            guide(x)
        own = {id(parameter) for parameter in self.parameters()}
        stated = {name: value for name, value in store["params"].items() if id(value) not in own}
        if any("$$$" in name for name in stated):  # how pyro.module names parameters
            raise ValueError("pyro.module is not needed: make the guide a module, and its networks members of it")
        self.names = list(stated)
        self.constraints = {name: store["constraints"][name] for name in stated}
        self.stated = nn.ParameterList(stated.values())

    def forward(self, x: Tensor) -> Any:
        import pyro

        stated = dict(zip(self.names, self.stated, strict=True))
        with pyro.get_param_store().scope({"params": stated, "constraints": dict(self.constraints)}):
            return self.guide(x)


def negative_elbo(model: LatentModel, guide: Guide, x: Tensor, particles: int, seed: int) -> Tensor:
    """-ELBO as Pyro estimates it, a mean over particles and over x (N, *E); nats. All its noise is that of the seed.

    Pyro's checks of values are off: they take time at every step, and what is not finite is found by the loop.
    """
    import pyro
    from pyro.infer import Trace_ELBO

    elbo = Trace_ELBO(num_particles=particles, max_plate_nesting=1, vectorize_particles=True)
    with seeded(seed), pyro.validation_enabled(False):
        return elbo.differentiable_loss(program_of(model, x.device), guide, x) / len(x)


def seed_of(noise: Tensor) -> int:
    """A seed from noise that a loop has drawn; Pyro draws from process-wide generators and takes no noise."""
    return derive(noise.cpu().numpy().tobytes().hex())


def site_of(guide: Program, x: Tensor, n: int, z: Tensor | None = None) -> dict[str, Any]:
    """The site ``z`` of n runs of a guide at once: its value (n, N, D), drawn unless it is given, and its distribution.

    Raises:
        ValueError: If the guide has another site, or ``z`` has another shape.
    """
    import pyro
    from pyro import poutine
    from pyro.poutine.util import prune_subsample_sites

    run = guide if z is None else poutine.condition(guide, data={"z": z})
    with pyro.plate("draws", n, dim=-2):
        trace = poutine.trace(run).get_trace(x)
    nodes: dict[str, Any] = dict(prune_subsample_sites(trace).nodes)
    names = [name for name, node in nodes.items() if node["type"] == "sample"]
    if names != ["z"]:
        raise ValueError(f"a guide samples the site 'z' and nothing else; this one samples {names}")
    site = nodes["z"]
    if site["value"].ndim != 3 or site["value"].shape[:2] != (n, len(x)):
        shape = tuple(site["value"].shape[1:])
        raise ValueError(f"a guide samples 'z' of shape ({len(x)}, D) within the plate 'observations'; got {shape}")
    return site


class GuidePosterior(Posterior):
    """q(z|x) of a guide: the density of its draws is known."""

    def __init__(self, guide: Guide) -> None:
        self.guide = guide

    def sample(self, x: Tensor, n: int, generator: torch.Generator) -> Tensor:
        return self.sample_and_log_prob(x, n, generator)[0]

    def sample_and_log_prob(self, x: Tensor, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        with drawing_from(generator):
            site = site_of(self.guide, x, n)
        return site["value"], site["fn"].log_prob(site["value"])


class PointGuidePosterior(GuidePosterior):
    """q(z|x) of a guide whose density is known at any point."""

    def log_prob(self, x: Tensor, z: Tensor) -> Tensor:
        with seeded(0):  # a guide may draw even so: initial values of parameters that it has long had
            return site_of(self.guide, x, len(z), z)["fn"].log_prob(z)


@dataclass(frozen=True, kw_only=True)
class SVIMethod(GradientMethod):
    """A method whose objective is the ELBO of a Pyro guide.

    Args:
        lr: Learning rate of Adam, for the guide and for the model.
    """

    lr: PositiveFloat = 1e-3

    libraries: ClassVar[tuple[str, ...]] = ("pyro.infer.autoguide",)

    def one_by_one(self) -> str:
        return "Pyro draws from one generator for all"

    def players(self) -> list[Player]:
        return [Player("negative_elbo", on=("model", "guide"), lr=self.lr)]


@dataclass(frozen=True, kw_only=True)
class GuideMethod(SVIMethod):
    """A method from a guide: a plugin writes `guide`.

    Args:
        num_particles: Draws of z for each observation of a minibatch, at each step.
    """

    num_particles: PositiveInt = 1

    point_density: ClassVar[bool] = True
    """Whether the distribution that the guide samples from knows its density at any point, or at its own draws alone
    (a flow without an inverse)."""

    @abstractmethod
    def guide(self, view: TrainingView) -> Program:
        """A guide of x (N, *E), that samples ``z`` (N, D) within the plate ``observations``: a module, or a function
        with `pyro.param` statements. Its trunks come from the view."""

    def build(self, view: TrainingView) -> Modules:
        x = view.validation[:2]
        guide = Guide(self.guide(view), x)
        site_of(guide, x, 1)
        return Modules({"model": view.model, "guide": guide})

    def noise(self, view: TrainingView) -> dict[str, tuple[int, ...]]:
        return SEED

    def losses(self, modules: Modules, x: Tensor, noise: Noise) -> dict[str, Tensor]:
        seed = seed_of(noise["seed"])
        return {"negative_elbo": negative_elbo(modules["model"], modules["guide"], x, self.num_particles, seed)}

    def posterior(self, modules: Modules) -> Posterior:
        return (PointGuidePosterior if self.point_density else GuidePosterior)(modules["guide"])

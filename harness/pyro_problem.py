r"""A Pyro program as a posterior problem: z are its latent sites, unconstrained and one after another.

A site with the support S has coordinates u in R^k, from which the bijection T: R^k -> S makes its value:

.. math:: \log p(z) = \sum_{sites} \log p(T(u) \mid \text{the sites before}) + \log |\det \partial T / \partial u|

Kucukelbir et al. 2017, Section 2.3, https://jmlr.org/papers/v18/16-107.html

Shapes: M latents at once, N observations, D latent dimensions, E elements of the observation.
"""

from __future__ import annotations

import itertools
import math
import warnings
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache, lru_cache
from types import ModuleType
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from harness import pyro_sites
from harness.model import LatentModel
from harness.options import UserError
from harness.pyro_sites import CHANGING, Site, bijection, element_names, faults, is_quantity, is_sample, log_prob
from harness.seeding import derive, drawing_from, generator, seeded
from harness.target import PosteriorProblem, PosteriorSpec

Program = Callable[[], object]
TRIED = 3  # latents, to see whether a program can be run for several at once
RUNS = 5  # to see whether it is always the same


@dataclass(frozen=True, kw_only=True, eq=False)
class PyroSpec(PosteriorSpec):
    """As of other posterior problems; what defines its densities is in one module more."""

    modules: ClassVar[tuple[ModuleType, ...]] = (pyro_sites,)


@dataclass(frozen=True, kw_only=True)
class PyroProblem(PosteriorProblem):
    """A posterior problem from a Pyro program: a plugin states the program and what was observed.

    Latent sites are continuous and the same in every run. Constants that the program makes itself are of torch's
    default dtype, which is the precision of the run (`torch.zeros(8)`, `torch.tensor([1.0, 2.0])`).
    """

    @abstractmethod
    def pyro_model(self) -> object:
        """The program: `pyro.sample` statements for latent and for observed sites; `pyro.factor` is allowed."""

    @abstractmethod
    def observed(self) -> Mapping[str, np.ndarray]:
        """What was observed, by the names of the sites. All of it together is the one observation."""

    def observation(self) -> np.ndarray:
        found = [np.asarray(value, dtype=np.float64).ravel() for value in self.observed().values()]
        return np.concatenate(found) if found else np.ones(1)

    def target(self) -> LatentModel:
        return _model_of(self)

    def model_spec(self) -> PyroSpec:
        return PyroSpec(**vars(super().model_spec()))


@lru_cache(maxsize=4)
def _model_of(problem: PyroProblem) -> PyroModel:
    """Made once per process: the program is run several times to see what it is."""
    return PyroModel(problem.name, problem.pyro_model, problem.observed())


class Place(NamedTuple):
    """Where a latent site is: its coordinates are ``z[first:last]``, in the given shape."""

    first: int
    last: int
    shape: tuple[int, ...]


class PyroModel(LatentModel):
    """A Pyro program as a fixed model.

    The program is run for many latents at once by `torch.func.vmap`. One that this cannot be done with (its control
    flow depends on values) is run for one latent after another, with a warning.

    Args:
        name: For messages.
        program: Called without arguments.
        observed: Values by the names of observed sites.

    Raises:
        UserError: If the program has no density in R^D, or another one at every run: no latent sites or discrete ones,
            sites that change, subsampled plates, parameters, values that were observed at no site, draws apart from
            sites that a density depends on.
    """

    x: Tensor

    def __init__(self, name: str, program: Program, observed: Mapping[str, np.ndarray]) -> None:
        super().__init__()
        self.name, self.program = name, program
        self.shapes = {site: np.shape(value) for site, value in observed.items()}
        flat = [np.asarray(value, dtype=np.float64).ravel() for value in observed.values()]
        self.register_buffer("x", torch.from_numpy(np.concatenate([np.empty(0), *flat])), persistent=False)
        sites = self._examined()
        self.places = _places({key: site for key, site in sites.items() if not site["is_observed"]})
        self.latent_dim = max(place.last for place in self.places.values())
        self.names = [text for site in sites.values() if is_quantity(site) for text in element_names(site)]
        frames = [frame for site in sites.values() for frame in site["cond_indep_stack"] if frame.vectorized]
        self.plates = max((-frame.dim for frame in frames), default=0)
        self.drawn_together = self._can_be_drawn_together()
        self.vectorised = self._can_be_vectorised()

    # Densities

    def log_prior(self, z: Tensor) -> Tensor:
        return self._each(self._log_prior, self.x, z.reshape(-1, self.latent_dim)).reshape(z.shape[:-1])

    def log_likelihood(self, x: Tensor, z: Tensor) -> Tensor:
        return self._of_pairs(self._log_likelihood, x, z)

    def log_joint(self, x: Tensor, z: Tensor) -> Tensor:
        """log p(x, z), shapes as in `log_likelihood`; from one run of the program instead of two."""
        return self._of_pairs(self._log_joint, x, z)

    def _of_pairs(self, part: Callable[[Tensor, Tensor], Tensor], x: Tensor, z: Tensor) -> Tensor:
        """x (N, E) and z (..., N, D) or (..., 1, D) -> (..., N)."""
        z = z.expand(*z.shape[:-2], len(x), self.latent_dim)
        latents = z.reshape(-1, self.latent_dim)
        observations = x[0] if len(x) == 1 else x.repeat(len(latents) // len(x), 1)
        return self._each(part, observations, latents).reshape(z.shape[:-1])

    def _log_prior(self, x: Tensor, z: Tensor) -> Tensor:
        return self._run(x, z)[0]

    def _log_likelihood(self, x: Tensor, z: Tensor) -> Tensor:
        return self._run(x, z)[1]

    def _log_joint(self, x: Tensor, z: Tensor) -> Tensor:
        log_prior, log_likelihood, _ = self._run(x, z)
        return log_prior + log_likelihood

    # Quantities

    def quantities(self, z: Tensor) -> dict[str, Tensor]:
        """The elements of all latent and deterministic sites, as the program sees them: (..., D) -> each (...)."""
        elements = self._each(self._quantities, self.x, z.reshape(-1, self.latent_dim))
        return dict(zip(self.names, elements.reshape(*z.shape[:-1], -1).unbind(-1), strict=True))

    def _quantities(self, x: Tensor, z: Tensor) -> Tensor:
        _, _, sites = self._run(x, z)
        return torch.cat([site["value"].reshape(-1) for site in sites.values() if is_quantity(site)])

    # Draws

    def sample_prior(self, n: int, generator: torch.Generator) -> Tensor:
        with drawing_from(generator), torch.no_grad(), _by_itself(self.x):
            if self.drawn_together:
                return self._together(n)[0]
            return torch.stack([self._coordinates(self._sites(self.x)) for _ in range(n)])

    def _together(self, n: int) -> tuple[Tensor, Tensor]:
        """Draws within a further plate, (n, D), and the log densities that the values of their sites have there."""
        import pyro

        with pyro.plate("several latents", n, dim=-1 - self.plates):
            sites = self._sites(self.x)
        log_p = [sites[name]["fn"].log_prob(sites[name]["value"]).reshape(n, -1).sum(1) for name in self.places]
        return self._coordinates(sites, n), torch.stack(log_p).sum(0).to(self.x.dtype)

    def _coordinates(self, sites: Mapping[str, Site], *n: int) -> Tensor:
        """The latents with these values of the sites: (*n, D)."""
        found = [bijection(sites[name]["fn"]).inv(sites[name]["value"]) for name in self.places]
        return torch.cat([u.reshape(*n, -1).to(self.x.dtype) for u in found], dim=-1)

    # Runs of the program

    def _each(self, part: Callable[[Tensor, Tensor], Tensor], x: Tensor, z: Tensor) -> Tensor:
        """A part of every run: x (M, E), or (E,) for all of them, and z (M, D) -> (M, ...)."""
        with _by_itself(z):
            if self.vectorised:
                return torch.func.vmap(part, in_dims=(0 if x.ndim == 2 else None, 0))(x, z)
            observations = x if x.ndim == 2 else itertools.repeat(x, len(z))
            return torch.stack([part(each, latent) for each, latent in zip(observations, z, strict=True)])

    def _run(self, x: Tensor, z: Tensor) -> tuple[Tensor, Tensor, dict[str, Site]]:
        """log p(z), log p(x|z) and the sites, for one x (E,) and one z (D,)."""
        with _coordinates_handler()(z, self.places) as handler:
            sites = self._sites(x)
        log_prior, log_likelihood = handler.log_jacobian, z.new_zeros(())
        for name, site in sites.items():
            if name in self.places:
                log_prior = log_prior + log_prob(site)
            elif not is_quantity(site):
                log_likelihood = log_likelihood + log_prob(site)
        return log_prior.to(z.dtype), log_likelihood.to(z.dtype), sites

    def _sites(self, x: Tensor) -> dict[str, Site]:
        """The sample sites of a run in which x (E,) was observed.

        Raises:
            UserError: If the latent ones are others than before: their values would be draws instead of being z's.
        """
        sites = {name: site for name, site in self._nodes(x).items() if is_sample(site)}
        latent = {name for name, site in sites.items() if not site["is_observed"]}
        if latent != self.places.keys():
            raise UserError(f"{self.name}: {CHANGING}: {', '.join(latent ^ self.places.keys())}")
        return sites

    def _nodes(self, x: Tensor) -> dict[str, Site]:
        """All that a run leaves: sample sites, parameters, plates."""
        from pyro import poutine

        ends = itertools.accumulate(map(math.prod, self.shapes.values()), initial=0)
        pieces = [x[first:last] for first, last in itertools.pairwise(ends)]
        data = {name: piece.reshape(self.shapes[name]) for name, piece in zip(self.shapes, pieces, strict=True)}
        with poutine.trace() as tracer, poutine.condition(data=data):
            self.program()
        nodes: Any = tracer.trace.nodes
        return dict(nodes)

    # What the program is

    def _examined(self) -> dict[str, Site]:
        """The sample sites, after a look at some runs with draws from the prior."""
        with seeded(derive("pyro program", self.name, "examined")), torch.no_grad(), _by_itself(self.x):
            try:
                runs = [self._nodes(self.x) for _ in range(RUNS)]
            except NotImplementedError as error:
                raise UserError(f"{self.name}: cannot be drawn from ({error}): give it proper priors") from error
        for fault in faults(runs, self.shapes):
            raise UserError(f"{self.name}: {fault}")
        return {name: site for name, site in runs[0].items() if is_sample(site)}

    def _can_be_drawn_together(self) -> bool:
        """Whether draws within a further plate have the densities there that they have alone.

        If they do, each comes from the distribution that it should come from, whatever the program does with shapes.
        """
        with seeded(derive("pyro program", self.name, "together")), torch.no_grad(), _by_itself(self.x):
            try:
                z, log_p = self._together(TRIED)
            except Exception:  # shapes that do not fit lead to errors of all kinds
                return False
            if z.shape != (TRIED, self.latent_dim):  # a site's own batch was taken for the draws
                return False
            alone: list[Tensor] = []
            for latent in z:
                with _coordinates_handler()(latent, self.places) as handler:
                    self._sites(self.x)
                alone.append(self._log_prior(self.x, latent) - handler.log_jacobian)
        return torch.allclose(torch.stack(alone), log_p)

    def _can_be_vectorised(self) -> bool:
        """Whether some latents together have the densities that they have one after another.

        Raises:
            UserError: If one after another they have other densities every time.
        """
        z = self.sample_prior(TRIED, generator(self.x.device, "pyro program", self.name, "vectorised"))
        self.vectorised = False
        with seeded(derive("pyro program", self.name, "repeated")):
            alone, again = (self._each(self._log_joint, self.x, z) for _ in range(2))
        if not torch.allclose(alone, again, equal_nan=True):
            raise UserError(f"{self.name}: its density at given latents changes: let it draw by pyro.sample only")
        self.vectorised = True
        try:
            if torch.allclose(self._each(self._log_joint, self.x, z), alone, equal_nan=True):
                return True
            why = "the numbers differ"
        except Exception as error:  # torch refuses what it cannot vectorise with errors of several kinds
            why = str(error).partition("\n")[0][:160]
        text = f"{self.name}: the Pyro program cannot be vectorised ({why}): latents are evaluated one after another"
        warnings.warn(text, RuntimeWarning, stacklevel=2)
        return False


class _FactorsOrNan(TorchFunctionMode):
    """Cholesky factors of matrices that are not positive definite are nan, as of other impossible numbers, no error.

    Far from the typical set, where trajectories may come, covariances are not positive definite in floating point.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is not torch.linalg.cholesky:
            return func(*args, **(kwargs or {}))
        root, failed = torch.linalg.cholesky_ex(*args, **(kwargs or {}))
        return torch.where(failed[..., None, None] == 0, root, math.nan)


@contextmanager
def _by_itself(like: Tensor) -> Iterator[None]:
    """A program runs for itself: nothing of Pyro that is active outside sees it, and its plates start anew.

    Its own constants have the precision and the device of ``like``. Pyro's checks, which look at values, are off.
    """
    import pyro
    from pyro.poutine import runtime

    dtype, allocator = torch.get_default_dtype(), runtime._DIM_ALLOCATOR  # there is no public way to plates' dimensions
    allocated, allocator._stack = allocator._stack, []
    torch.set_default_dtype(like.dtype)
    device = nullcontext() if like.device.type == "cpu" else like.device
    try:
        with (
            pyro.poutine.block(),
            pyro.get_param_store().scope(),
            pyro.validation_enabled(False),
            _FactorsOrNan(),
            device,
        ):
            yield
    finally:
        torch.set_default_dtype(dtype)
        allocator._stack = allocated


@cache
def _coordinates_handler() -> Any:
    """The class of the effect handler that makes values of latent sites from z; on first use, as Pyro is slow."""
    from pyro.poutine.messenger import Messenger

    class Coordinates(Messenger):
        def __init__(self, z: Tensor, places: Mapping[str, Place]) -> None:
            super().__init__()
            self.z, self.places, self.log_jacobian = z, places, z.new_zeros(())

        def _pyro_sample(self, msg: Any) -> None:
            place = self.places.get(msg["name"])
            if place is not None:
                transform = bijection(msg["fn"])
                u = self.z[place.first : place.last].reshape(place.shape)
                msg["value"] = transform(u)
                self.log_jacobian = self.log_jacobian + transform.log_abs_det_jacobian(u, msg["value"]).sum()

    return Coordinates


def _places(latent: Mapping[str, Site]) -> dict[str, Place]:
    places: dict[str, Place] = {}
    first = 0
    for name, site in latent.items():
        shape = tuple(bijection(site["fn"]).inverse_shape(site["value"].shape))
        places[name] = Place(first, first + math.prod(shape), shape)
        first += math.prod(shape)
    return places

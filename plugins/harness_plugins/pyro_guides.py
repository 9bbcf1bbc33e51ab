r"""Gaussian and flow approximations of a single posterior by Pyro's automatic guides; mean-field and full-rank ADVI.

.. math:: \max_\phi E_{q_\phi(z)}[\log p(x, z) - \log q_\phi(z)]

with q a diagonal Gaussian (`mean-field`), a Gaussian (`full-rank`) or another family (`pyro`), all in unconstrained
coordinates. Kucukelbir, Tran, Ranganath, Gelman, Blei 2017, https://jmlr.org/papers/v18/16-107.html

`laplace` is the Gaussian of the second-order expansion of log p(x, z) at a mode. Tierney and Kadane 1986,
https://doi.org/10.1080/01621459.1986.10478240
"""

from __future__ import annotations

import copy
import math
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor
from torch.autograd.functional import hessian
from torch.distributions import MultivariateNormal

from harness import hookimpl
from harness.method import Diverged, unfit_for_one_posterior
from harness.model import HasNoMode, LatentModel
from harness.posterior import LocalFamily, LocalGaussian, Posterior
from harness.problem import TrainingView
from harness.pyro_guide import SEED, Guide, SVIMethod, negative_elbo, program_of, seed_of
from harness.seeding import drawing_from, process_wide
from harness.training import Modules, Noise

Family = Literal[
    "AutoDiagonalNormal",
    "AutoMultivariateNormal",
    "AutoLowRankMultivariateNormal",
    "AutoLaplaceApproximation",
    "AutoIAFNormal",
]
NEWTON_STEPS, HALVINGS = 100, 20
PROMISE = 1e-8  # nats
ARMIJO = 1e-4
FLAT = 1e-4  # curvature; 1/FLAT is a variance, where latents are on a scale of about 1
PRIOR_DRAWS = 15  # whose median is where a guide starts: as many as Pyro takes for univariate sites


class AutoPosterior(Posterior):
    """q(z), the distribution that an automatic guide has come to; x says nothing that it has not been told.

    Its density is known for its own draws: of a flow, by what each was made from.

    Args:
        distribution: A Pyro distribution with the event shape (D,).
    """

    def __init__(self, distribution: Any) -> None:
        self.distribution = distribution

    def sample(self, x: Tensor, n: int, generator: torch.Generator) -> Tensor:
        with drawing_from(generator), torch.no_grad():
            return self.distribution.sample((n, len(x)))

    def sample_and_log_prob(self, x: Tensor, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        z = self.sample(x, n, generator)
        return z, self.distribution.log_prob(z)


class AutoGaussian(AutoPosterior):
    """A Gaussian, whose density is known everywhere."""

    def log_prob(self, x: Tensor, z: Tensor) -> Tensor:
        return self.distribution.log_prob(z)


class MeanFieldPosterior(AutoGaussian):
    """A diagonal Gaussian."""

    def local(self, x: Tensor) -> LocalFamily:
        mean, sd = self.distribution.mean, self.distribution.stddev
        return LocalGaussian(mean.expand(len(x), -1), sd.log().expand(len(x), -1))


@dataclass(frozen=True, kw_only=True)
class AutoGuideMethod(SVIMethod):
    """A method whose guide is one of Pyro's automatic ones: the same q(z) whatever x is, for the one observation.

    The learning rate is for latents on a scale of about 1; its decay over the last 60 % of the budget takes the noise
    of the gradients out of the result.

    Args:
        batch_size: A minibatch is that many copies of the one observation, each with draws of its own.
    """

    lr: PositiveFloat = 0.03
    lr_decay: PositiveFloat = 0.01
    batch_size: PositiveInt = 1

    @property
    @abstractmethod
    def family(self) -> Family:
        """Name of the guide in `pyro.infer.autoguide`."""

    @property
    def particles(self) -> int:
        """Draws of z for each copy of the observation, at each step."""
        return 1

    def unfit(self, view: TrainingView) -> str | None:
        if self.family == "AutoIAFNormal" and view.latent_dim == 1:
            return "an autoregressive flow needs at least two dimensions"
        if self.family == "AutoLaplaceApproximation" and isinstance(view.model, HasNoMode):
            return f"expands log p(x, z) at a mode, and there is none: {view.model.no_mode}"
        return unfit_for_one_posterior(view)

    def build(self, view: TrainingView) -> Modules:
        return Modules({"model": view.model, "guide": Guide(_guide(self.family, view), view.validation[:1])})

    def noise(self, view: TrainingView) -> dict[str, tuple[int, ...]]:
        return {} if self.family == "AutoLaplaceApproximation" else SEED

    def losses(self, modules: Modules, x: Tensor, noise: Noise) -> dict[str, Tensor]:
        seed = seed_of(noise["seed"]) if noise else 0
        loss = negative_elbo(modules["model"], modules["guide"], x[:1], self.particles * len(x), seed)
        return {"negative_elbo": loss}

    def posterior(self, modules: Modules) -> Posterior:
        guide = modules["guide"]
        if self.family == "AutoLaplaceApproximation":
            return AutoGaussian(_expansion(modules["model"], guide.x, guide.guide.loc))
        kinds = {"AutoIAFNormal": AutoPosterior, "AutoDiagonalNormal": MeanFieldPosterior}
        return kinds.get(self.family, AutoGaussian)(guide.guide.get_posterior())


def _guide(family: Family, view: TrainingView) -> Any:
    """A guide that starts at a median of draws from the prior, drawn like all initial weights."""
    from pyro.infer import autoguide
    from pyro.infer.autoguide.initialization import init_to_value

    device = view.validation.device
    program = program_of(view.model, device)
    if family == "AutoIAFNormal":  # starts as the standard normal distribution, slightly disturbed
        return autoguide.AutoIAFNormal(program)
    start = view.model.sample_prior(PRIOR_DRAWS, process_wide(device)).median(0).values
    return getattr(autoguide, family)(program, init_loc_fn=init_to_value(values={"z": start[None]}))


def _expansion(model: LatentModel, x: Tensor, z: Tensor) -> MultivariateNormal:
    r"""The Gaussian at a mode of log p(x, z), to which Newton's method, made to ascend, goes on from z (D,).

    The optimiser ends near a mode, at a distance that depends on the budget; what is left is taken off here, in double
    precision. With the eigenvalues of the Hessian H replaced by their absolute values every step is uphill; it is
    halved until it rises by a part of what it promises. The search ends where a step promises less than `PROMISE`:

    .. math:: z \leftarrow z + t |H|^{-1} g, \quad \tfrac12 g^T |H|^{-1} g < \epsilon

    Raises:
        Diverged: If the search does not end, or ends where log p(x, z) has no maximum.
    """

    dtype, x, z, model = z.dtype, x.double(), z.double(), copy.deepcopy(model).double()

    def log_joint(z: Tensor) -> Tensor:
        return model.log_joint(x, z[None]).sum()

    for _ in range(NEWTON_STEPS):
        height, gradient, (values, vectors) = _second_order(log_joint, z)
        step = vectors @ ((vectors.mT @ gradient) / values.abs())
        promise = float(0.5 * gradient @ step)
        if not math.isfinite(promise):
            break
        if promise < PROMISE:
            values, vectors = _second_order(log_joint, z := z + step)[2]
            if float(values.min()) < FLAT:
                raise Diverged(
                    "log p(x, z) rises or is flat in some direction where the search ended: no mode, or a standard "
                    f"deviation over {FLAT**-0.5:g}: state latents on a scale of about 1"
                )
            root, failure = torch.linalg.cholesky_ex((vectors / values) @ vectors.mT)
            if failure:
                raise Diverged("the covariance at the mode of log p(x, z) is singular")
            return MultivariateNormal(z.to(dtype), scale_tril=root.to(dtype))
        parts = (0.5**halvings for halvings in range(HALVINGS))
        part = next((t for t in parts if log_joint(z + t * step) >= height + ARMIJO * t * promise), 0.0)
        if not part:
            break
        z = z + part * step
    raise Diverged("the search for a mode of log p(x, z) has not ended: there may be none")


def _second_order(function: Callable[[Tensor], Tensor], z: Tensor) -> tuple[float, Tensor, tuple[Tensor, Tensor]]:
    """Value, gradient (D,), and eigenvalues (D,) and eigenvectors (D, D) of minus the Hessian, at z (D,)."""
    z = z.detach().requires_grad_(True)
    with torch.enable_grad():
        value = function(z)
        (gradient,) = torch.autograd.grad(value, z)
        curvature: Any = hessian(function, z)
    if not bool(curvature.isfinite().all()):
        raise Diverged("the Hessian of log p(x, z) is not finite where the search for a mode has come")
    values, vectors = torch.linalg.eigh(-0.5 * (curvature + curvature.mT))
    return float(value.detach()), gradient, (values, vectors)


@dataclass(frozen=True, kw_only=True)
class WithDraws(AutoGuideMethod):
    """A method whose guide is one that draws.

    Args:
        num_particles: Draws of z at each step.
    """

    num_particles: PositiveInt = 10

    @property
    def particles(self) -> int:
        return self.num_particles


@dataclass(frozen=True, kw_only=True)
class AutoGuide(WithDraws):
    """One of Pyro's automatic guides.

    Args:
        guide: Its name in Pyro. With AutoLaplaceApproximation nothing is drawn while the mode is searched for.
    """

    name: str = "pyro"
    guide: Family = "AutoDiagonalNormal"

    @property
    def family(self) -> Family:
        return self.guide


@dataclass(frozen=True, kw_only=True)
class MeanField(WithDraws):
    """The diagonal Gaussian with the highest ELBO (mean-field ADVI)."""

    name: str = "mean-field"

    @property
    def family(self) -> Family:
        return "AutoDiagonalNormal"


@dataclass(frozen=True, kw_only=True)
class FullRank(WithDraws):
    """The Gaussian with the highest ELBO (full-rank ADVI)."""

    name: str = "full-rank"

    @property
    def family(self) -> Family:
        return "AutoMultivariateNormal"


@dataclass(frozen=True, kw_only=True)
class Laplace(AutoGuideMethod):
    """The Gaussian at a mode of log p(x, z), with the covariance that its curvature there gives.

    The budget is the optimiser's; Newton's steps, which then end at the mode, are in the seconds of the fit only.
    """

    name: str = "laplace"

    @property
    def family(self) -> Family:
        return "AutoLaplaceApproximation"


@hookimpl
def harness_methods() -> list[AutoGuideMethod]:
    return [AutoGuide(), MeanField(), FullRank(), Laplace()]

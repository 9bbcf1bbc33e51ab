r"""AVB with adaptive contrast: the adversary compares q(z|x) with a Gaussian that has its moments, not with the prior.

.. math:: KL(q_\phi(z|x) \| p(z)) = E_{q_\phi(z|x)} [T^*(x, \tilde z) + \log r(z|x) - \log p(z)], \quad
          r(z|x) = N(z; m(x), L(x) L(x)^T), \quad \tilde z = L(x)^{-1} (z - m(x))

where T* tells normalised draws of q from N(0, I): it has to learn q's shape only, and p(z) may be any density. m and L
are estimates of q's mean and scale, through which no gradient goes. In the paper L is diagonal, q's standard
deviations; the root of q's whole covariance is another r of the same section. The released code divides by the root of
the variance plus 1e-4 and takes the variance alone into log r; here L is one scale for both, so that T + log r
estimates log q(z|x) whatever the floor.
Mescheder, Nowozin, Geiger 2017, section 3.3, https://arxiv.org/abs/1701.04722
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor, nn
from torch.nn import functional as F

from harness import adaptive_contrast, adversarial, hookimpl
from harness.adaptive_contrast import BasisEncoder, BasisNetworks, ContrastEncoder, Covariance, InjectedEncoder
from harness.adversarial import LogRatio, NoiseInjectedEncoder
from harness.model import LatentModel
from harness.options import UserError
from harness.posterior import Posterior
from harness.problem import TrainingView
from harness.training import Modules, Noise, Player
from harness.warm_up import WarmUpMethod


class AdaptiveContrastPosterior(Posterior):
    """The implicit q(z|x), with the estimate T + log r - log p of log q(z|x) - log p(z)."""

    def __init__(self, encoder: ContrastEncoder, adversary: nn.Module, model: LatentModel) -> None:
        self.encoder, self.adversary, self.model = encoder, adversary, model
        self.reference = encoder.reference()

    def sample(self, x: Tensor, n: int, generator: torch.Generator) -> Tensor:
        shape = (n, len(x), *self.encoder.eps_shape)
        return self.encoder(x, torch.randn(shape, generator=generator, device=x.device, dtype=x.dtype))

    def log_ratio(self, x: Tensor, z: Tensor) -> Tensor:
        r = self.reference(x)
        return self.adversary(x, r.normalised(z)) + r.log_prob(z) - self.model.log_prior(z)


@dataclass(frozen=True, kw_only=True)
class AVBAC(WarmUpMethod):
    """AVB with adaptive contrast, both players updated simultaneously from one shared forward pass.

    In training r(z|x) is estimated from the step's own noise, as in the released code; in validation and by evaluators
    from noise that is always the same, so that it does not matter which x are scored together.

    Args:
        encoder: ``basis`` (a sum of basis functions of noise, with moments in closed form) or ``injected`` (the
            encoder of AVB, with moments from ``moment_draws`` draws for each x).
        nbasis, basis_width, basis_depth: Number of basis networks, and size of each.
        noise_dim: Dimensions of the noise of one basis function, or of the injected noise.
        offset: Before the ELU of the amplitudes a_i, which start near exp(offset); the released code has -5, which
            starts too narrow for short runs.
        gaussian_part: A basis function more, the identity of Gaussian noise with an amplitude of its own: the posterior
            of the VAE is then a member of the family. Not in the paper.
        moment_draws: Draws for the moments of an injected encoder, at every step.
        covariance: Of r(z|x): ``diagonal``, as in the paper, or ``full``. With the former the adversary has to learn
            the correlations of q's dimensions; where q is narrow along oblique directions these are tens of nats, of
            which it sees few, because its loss is zero long before. With the latter log r knows them, down to widths of
            ``scale_floor``; n draws for the moments leave an error of about D (D + 3) / 4n nats;
            fewer than 4 D are refused.
        scale_floor: Standard deviation whose square is added to every variance of r(z|x).
        quadratic: The adversary is a network plus |zn|^2/2, as in the released code, so that the network learns the log
            density of q's shape; else the network alone, which learns log q - log r: a constant where q is Gaussian.
        clip_norm: Largest norm of a player's gradient, 0 for no clipping, as in the released code: there a single large
            gradient, tens of times the usual one, can undo a fit.
        lr, adversary_lr: Learning rates of Adam for encoder with decoder, and for the adversary.
        adversary_steps: Adversary updates per primal update; those after the first see fresh batches.
        beta1: Adam's decay rate of the first moment, of both players.
    """

    modules: ClassVar[tuple[ModuleType, ...]] = (adversarial, adaptive_contrast)
    per_replica: ClassVar[frozenset[str]] = frozenset({"lr", "adversary_lr", "beta1"})

    name: str = "avb-ac"
    encoder: Literal["basis", "injected"] = "basis"
    nbasis: PositiveInt = 8
    noise_dim: PositiveInt = 16
    basis_width: PositiveInt = 64
    basis_depth: NonNegativeInt = 2
    offset: float = -2.0
    gaussian_part: bool = False
    moment_draws: Annotated[int, Field(ge=2)] = 16
    covariance: Covariance = "diagonal"
    scale_floor: PositiveFloat = 1e-2
    quadratic: bool = True
    batch_size: Annotated[int, Field(ge=2)] = 128
    clip_norm: NonNegativeFloat = 50.0
    lr: PositiveFloat = 2e-3
    adversary_lr: PositiveFloat = 4e-3
    adversary_steps: PositiveInt = 1
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.encoder == "injected" and self.gaussian_part:
            raise UserError(f"{self.name}: option gaussian_part belongs to encoder=basis; leave it out")

    def unfit(self, view: TrainingView) -> str | None:
        draws, needed = self.moment_draws if self.encoder == "injected" else self.batch_size, 4 * view.latent_dim
        if self.covariance == "full" and draws < needed:
            option = "moment_draws" if self.encoder == "injected" else "batch_size"
            return f"covariance=full needs {option} of at least 4 x {view.latent_dim} dimensions, got {draws}"
        return super().unfit(view)

    def build(self, view: TrainingView) -> Modules:
        return Modules(
            {
                "model": view.model,
                "encoder": self._encoder(view),
                "adversary": LogRatio(view.pair_trunk(), quadratic=self.quadratic),
                "kl_weight": self.kl_weight(),
            }
        )

    def _encoder(self, view: TrainingView) -> ContrastEncoder:
        dim, floor, covariance = view.latent_dim, self.scale_floor, self.covariance
        if self.encoder == "injected":
            injected = NoiseInjectedEncoder(view.encoder_trunk(self.noise_dim), self.noise_dim, dim)
            return InjectedEncoder(injected, floor=floor, covariance=covariance)
        basis = BasisNetworks(self.nbasis, self.noise_dim, dim, self.basis_width, self.basis_depth)
        gaussian = self.gaussian_part
        trunk = view.encoder_trunk()
        return BasisEncoder(trunk, basis, dim, self.offset, gaussian=gaussian, floor=floor, covariance=covariance)

    def players(self) -> list[Player]:
        betas = (self.beta1, 0.999)
        return [
            Player("negative_elbo", on=("model", "encoder", "kl_weight"), lr=self.lr, betas=betas),
            Player("adversary", on=("adversary",), lr=self.adversary_lr, betas=betas, steps=self.adversary_steps),
        ]

    def noise(self, view: TrainingView) -> dict[str, tuple[int, ...]]:
        draws = {"contrast_z": (view.latent_dim,)}
        if self.encoder == "injected":
            return {"eps": (self.noise_dim,), "moment_eps": (self.moment_draws, self.noise_dim), **draws}
        return {"eps": (self.nbasis * self.noise_dim + (view.latent_dim if self.gaussian_part else 0),), **draws}

    def losses(self, modules: Modules, x: Tensor, noise: Noise) -> dict[str, Tensor]:
        model, encoder = modules["model"], modules["encoder"]
        z, r = encoder.contrasted(x, noise)
        r = r if modules.training else encoder.reference()(x)
        normalised = torch.stack([r.normalised(z), noise["contrast_z"]])
        t_posterior, t_contrast = modules["adversary"](x, normalised)
        kl = modules["kl_weight"](t_posterior + r.log_prob(z) - model.log_prior(z))
        return {
            "negative_elbo": (kl - model.log_likelihood(x, z)).mean(),
            "adversary": F.softplus(-t_posterior).mean() + F.softplus(t_contrast).mean(),
        }

    def posterior(self, modules: Modules) -> Posterior:
        return AdaptiveContrastPosterior(modules["encoder"], modules["adversary"], modules["model"])


@hookimpl
def harness_methods() -> list[AVBAC]:
    return [AVBAC()]

r"""Hamiltonian Monte Carlo for many chains at once, along the path from a start q0(z|x) to a joint density p(x, z).

.. math:: \log f_\beta(z) = (1 - \beta) \log q_0(z|x) + \beta \log p(x, z)

Duane et al. 1987, https://doi.org/10.1016/0370-2693(87)91197-X; Neal 2011, https://arxiv.org/abs/1206.1901

Forces, the gradients within a trajectory, may be of low precision: leapfrog steps keep volume and can be retraced
whatever function of z the force is, and acceptance goes by the density in full precision, which is therefore left
invariant. Only the rate of acceptance can suffer.

Shapes: S chains, B observations of one block, D latent dimensions, E event shape of one observation.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeGuard

import torch
from torch import Tensor, nn

from harness.model import DecoderModel, LatentModel, has_standard_normal_prior, log_normal
from harness.nn import MLP
from harness.pull_back import PullBack, forward_with_pull_back

JITTER = 0.2  # relative; trajectories of one fixed length may return to where they began


class Density(ABC):
    """A log density of z for each observation of a block, with its gradient in z."""

    @abstractmethod
    def value_and_gradient(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """(S, B, D) -> log density (S, B), nats, and its gradient (S, B, D)."""

    @abstractmethod
    def gradient(self, z: Tensor) -> Tensor:
        """(S, B, D) -> (S, B, D); cheaper where the value is not needed."""


@dataclass(frozen=True, eq=False)
class FunctionDensity(Density):
    """Any differentiable function (S, B, D) -> (S, B)."""

    log_prob: Callable[[Tensor], Tensor]

    def value_and_gradient(self, z: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            z = z.detach().requires_grad_()
            value = self.log_prob(z)
            if not value.requires_grad:
                return value, torch.zeros_like(z)
            (gradient,) = torch.autograd.grad(value.sum(), z)
        return value.detach(), gradient.contiguous()  # that of a linear function is one number, expanded

    def gradient(self, z: Tensor) -> Tensor:
        return self.value_and_gradient(z)[1]


@dataclass(frozen=True, eq=False)
class GaussianDensity(Density):
    """A diagonal Gaussian; mean and sd broadcast with (B, D)."""

    mean: Tensor
    sd: Tensor

    def value_and_gradient(self, z: Tensor) -> tuple[Tensor, Tensor]:
        return log_normal(z, self.mean, torch.log(self.sd)), self.gradient(z)

    def gradient(self, z: Tensor) -> Tensor:
        return (self.mean - z) / self.sd.square()


@dataclass(frozen=True, eq=False)
class DecoderDensity(Density):
    """log p(x, z) of a decoder with a standard normal prior.

    The likelihood is differentiated by hand, so that a gradient without a value costs no log-likelihood, and so is a
    fully connected decoder. The weights of others are constants, so that only the part of the graph that leads to z is
    made.

    Args:
        force_decoder, force_x: Gradients without a value are of these copies, which may be of lower precision.
    """

    model: DecoderModel
    x: Tensor
    force_decoder: nn.Module
    force_x: Tensor

    @torch.no_grad()
    def value_and_gradient(self, z: Tensor) -> tuple[Tensor, Tensor]:
        outputs, pull_back = _decoded(self.model.decoder, z)
        value = self.model.likelihood.log_prob(self.x, outputs) + self.model.log_prior(z)
        return value, pull_back(self.model.likelihood.score(self.x, outputs).to(outputs.dtype)).sub(z)

    @torch.no_grad()
    def gradient(self, z: Tensor) -> Tensor:
        outputs, pull_back = _decoded(self.force_decoder, z.to(self.force_x.dtype))
        score = self.model.likelihood.score(self.force_x, outputs)
        return pull_back(score.to(outputs.dtype)).to(z.dtype).sub(z)


def _decoded(decoder: nn.Module, z: Tensor) -> tuple[Tensor, PullBack]:
    """The outputs, and how a gradient in them leads to one in z: once."""
    if type(decoder) is MLP:
        return forward_with_pull_back(decoder, z)
    with torch.enable_grad():
        z = z.detach().requires_grad_()
        outputs = decoder(z)
    return outputs.detach(), lambda score: torch.autograd.grad(outputs, z, score)[0]


def joint_density(model: LatentModel, x: Tensor, forces: torch.dtype | None = None) -> Density:
    """log p(x, z) as a function of z, for a frozen model and a block x (B, *E).

    Args:
        forces: Precision of gradients without a value; None for the model's own. Only a decoder's can be another one.
    """
    if not is_plain_decoder(model):
        return FunctionDensity(lambda z: model.log_joint(x, z))
    x = x.flatten(1)
    if forces is None:
        return DecoderDensity(model, x, model.decoder, x)
    return DecoderDensity(model, x, copy.deepcopy(model.decoder).to(forces), x.to(forces))


def is_plain_decoder(model: LatentModel) -> TypeGuard[DecoderModel]:
    """Whether log p(x, z) is that of `DecoderModel`, with nothing of it replaced."""
    return (
        isinstance(model, DecoderModel)
        and type(model).log_likelihood is DecoderModel.log_likelihood
        and type(model).log_joint is LatentModel.log_joint
        and has_standard_normal_prior(model)
    )


def prior_density(model: LatentModel) -> Density:
    """log p(z) as a function of z."""
    if has_standard_normal_prior(model):
        one = torch.ones(())
        return GaussianDensity(0 * one, one)
    return FunctionDensity(model.log_prior)


@dataclass(frozen=True, eq=False)
class State:
    """Where the chains are, with both ends of the path and their gradients there: valid at every temperature."""

    z: Tensor
    log_start: Tensor
    log_joint: Tensor
    start_gradient: Tensor
    joint_gradient: Tensor

    def log_density(self, beta: float) -> Tensor:
        """log f_beta, shape (S, B)."""
        return (1 - beta) * self.log_start + beta * self.log_joint

    def gradient(self, beta: float) -> Tensor:
        """Gradient of log f_beta, shape (S, B, D)."""
        return (1 - beta) * self.start_gradient + beta * self.joint_gradient

    def replaced(self, where: Tensor, by: State) -> State:
        """The other state where (S, B) is true."""
        wide = where[..., None]
        return State(
            torch.where(wide, by.z, self.z),
            torch.where(where, by.log_start, self.log_start),
            torch.where(where, by.log_joint, self.log_joint),
            torch.where(wide, by.start_gradient, self.start_gradient),
            torch.where(wide, by.joint_gradient, self.joint_gradient),
        )


@dataclass(frozen=True, eq=False)
class Path:
    """The path between two densities of a block of observations."""

    start: Density
    joint: Density

    def at(self, z: Tensor) -> State:
        log_start, start_gradient = self.start.value_and_gradient(z)
        log_joint, joint_gradient = self.joint.value_and_gradient(z)
        return State(z, log_start, log_joint, start_gradient, joint_gradient)

    def gradient(self, z: Tensor, beta: float) -> Tensor:
        """Gradient of log f_beta: (S, B, D) -> (S, B, D)."""
        return self.joint.gradient(z).mul_(beta).add_(self.start.gradient(z), alpha=1 - beta)


@dataclass(frozen=True, eq=False)
class Randomness:
    """What one transition draws: standard normal momenta (S, B, D), and uniform numbers in [0, 1) twice, (S, B)."""

    momentum: Tensor
    jitter: Tensor
    acceptance: Tensor

    @staticmethod
    def draw(like: Tensor, generator: torch.Generator) -> Randomness:
        """For latents of the shape of ``like``, (S, N, D)."""
        kwargs = {"generator": generator, "device": like.device, "dtype": like.dtype}
        return Randomness(
            torch.randn(like.shape, **kwargs),
            torch.rand(like.shape[:2], **kwargs),
            torch.rand(like.shape[:2], **kwargs),
        )

    def of(self, block: slice) -> Randomness:
        """The part for some of the observations."""
        return Randomness(self.momentum[:, block], self.jitter[:, block], self.acceptance[:, block])


def leapfrog(path: Path, beta: float, state: State, momentum: Tensor, step: Tensor, steps: int) -> tuple[State, Tensor]:
    """Follow Hamilton's equations by ``steps`` leapfrog steps: one gradient each, as the first one is in the state.

    Args:
        step: Step size times the scale of each dimension, shape (S, B, D).

    Returns:
        The state and the momentum at the end.
    """
    momentum = torch.addcmul(momentum, step, state.gradient(beta), value=0.5)
    z = torch.addcmul(state.z, step, momentum)
    for _ in range(steps - 1):
        momentum = momentum.addcmul_(step, path.gradient(z, beta))
        z = z.addcmul_(step, momentum)
    end = path.at(z)
    return end, momentum.addcmul_(step, end.gradient(beta), value=0.5)


def transition(
    path: Path, beta: float, state: State, scaled_step: Tensor, steps: int, draws: Randomness
) -> tuple[State, Tensor]:
    """One transition that leaves f_beta invariant, for every chain and observation by itself.

    A step size that a chain's own position had no part in keeps it reversible; its jitter is drawn afresh, apart from
    the position. What is not finite is rejected.

    Args:
        scaled_step: Step size times the scale of each dimension, shape (B, D).

    Returns:
        The new state and the probabilities of acceptance, shape (S, B).
    """
    step = (1 + JITTER * (2 * draws.jitter[..., None] - 1)) * scaled_step
    end, momentum = leapfrog(path, beta, state, draws.momentum, step, steps)
    kinetic = 0.5 * (draws.momentum.square() - momentum.square()).sum(-1)
    log_ratio = end.log_density(beta) - state.log_density(beta) + kinetic
    probability = log_ratio.exp().clamp(max=1).nan_to_num(nan=0.0)
    return state.replaced(draws.acceptance < probability, end), probability

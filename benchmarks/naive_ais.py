r"""Annealed importance sampling as it is usually written, to compare the speed of `harness.annealing` with.

.. math:: \log f_t(z) = \log p(z) + \beta_t \log p(x|z), \quad \beta_t = t / T

Correct, but not clever: it starts from the prior, along a linear schedule, with Hamiltonian Monte Carlo of one fixed
step size. A transition of L leapfrog steps takes L + 1 gradients, each of a graph of its own through the
log-likelihood of a model whose weights require gradients, and four more passes: two for the change of the weight and
two for the energies at both ends. Weights are kept in the model's own precision. Public code (BDMC,
https://github.com/lxuechen/BDMC) takes as many of both, and writes the likelihood in elementary functions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from harness.model import DecoderModel, LatentModel

LogDensity = Callable[[Tensor], Tensor]
LogLikelihood = Callable[[LatentModel, Tensor, Tensor], Tensor]
"""log p(x|z) of a model for pairs: x (S, *E) and z (S, D) -> (S,)."""


def own(model: LatentModel, x: Tensor, z: Tensor) -> Tensor:
    """As the model has it."""
    return model.log_likelihood(x, z)


def elementary(model: LatentModel, x: Tensor, z: Tensor) -> Tensor:
    """Of binary elements, function by function: each is a pass over all logits, and another one for its derivative."""
    assert isinstance(model, DecoderModel)
    x, logits = x.flatten(1), model.decoder(z)
    return (x * logits - torch.relu(logits) - torch.log(1 + torch.exp(-logits.abs()))).sum(1)


@dataclass(frozen=True, kw_only=True)
class NaiveAIS:
    """Settings; the defaults are the usual ones.

    Args:
        temperatures: T; each has one transition.
        step: Step size, the same for all observations and temperatures.
        likelihood: How log p(x|z) is written.
    """

    temperatures: int
    chains: int = 16
    leapfrog: int = 10
    step: float = 0.01
    likelihood: LogLikelihood = own

    def log_weights(self, model: LatentModel, x: Tensor, stream: torch.Generator) -> Tensor:
        """log w with E[w] = p(x): x (N, *E) -> (chains, N), nats."""
        repeated = x.repeat(self.chains, *[1] * (x.ndim - 1))
        z = model.sample_prior(len(repeated), stream)
        log_w = torch.zeros(len(repeated), device=z.device, dtype=z.dtype)
        for t in range(self.temperatures):
            before = self.tempered(model, repeated, t / self.temperatures)
            after = self.tempered(model, repeated, (t + 1) / self.temperatures)
            log_w += (after(z) - before(z)).detach()
            z = self.transition(after, z, stream)
        return log_w.view(self.chains, -1)

    def tempered(self, model: LatentModel, x: Tensor, beta: float) -> LogDensity:
        """log p(z) + beta log p(x|z) for pairs of an observation and a latent: (S, D) -> (S,)."""
        return lambda z: model.log_prior(z) + beta * self.likelihood(model, x, z)

    def transition(self, log_f: LogDensity, z: Tensor, stream: torch.Generator) -> Tensor:
        """Hamiltonian Monte Carlo with log density log_f: z (S, D) -> (S, D)."""
        start = torch.randn(z.shape, generator=stream, device=z.device, dtype=z.dtype)
        end, momentum = z, start + 0.5 * self.step * gradient(log_f, z)
        for i in range(self.leapfrog):
            end = end + self.step * momentum
            last = i == self.leapfrog - 1
            momentum = momentum + (0.5 if last else 1.0) * self.step * gradient(log_f, end)
        kinetic = 0.5 * (start.square() - momentum.square()).sum(-1)
        log_ratio = (log_f(end) - log_f(z)).detach() + kinetic
        accepted = torch.rand(len(z), generator=stream, device=z.device, dtype=z.dtype) < log_ratio.exp()
        return torch.where(accepted[:, None], end, z)


def gradient(log_f: LogDensity, z: Tensor) -> Tensor:
    """Gradient of a log density, (S, D) -> (S, D)."""
    z = z.detach().requires_grad_()
    with torch.enable_grad():
        (found,) = torch.autograd.grad(log_f(z).sum(), z)
    return found

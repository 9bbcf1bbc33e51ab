r"""What a discriminator tells of an implicit q(z|x): its density ratio to a Gaussian r(z|x), and a bound on its KL.

A classifier T that tells draws of q (class 1) from draws of r (class 0) at the same x tends to log q(z|x) - log r(z|x).
With r the Gaussian that has q's mean and standard deviations, only q's shape is left to be learnt (adaptive contrast:
Mescheder, Nowozin, Geiger 2017, section 3.3, https://arxiv.org/abs/1701.04722), and log q - log p is estimated by
T + log r - log p.

Shapes: S samples, N observations, D latent dimensions, E event shape of one observation. z is a latent and u the same
one standardised by its observation's moments.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from harness.estimators import StreamedLogMeanExp, StreamedMean, observation_blocks, posterior_moments, sample_blocks
from harness.evaluator import EvaluationRun
from harness.method import Fit
from harness.model import LatentModel, log_normal
from harness.nn import ResidualPairTrunk, linear
from harness.posterior import Posterior
from harness.seeding import Streams


@dataclass(frozen=True, eq=False)
class Contrast:
    """Observations, and at each the Gaussian r(z|x) = N(mean, diag sd^2) that q(z|x) is contrasted with.

    Args:
        x: Shape (N, *E).
        mean, sd: Shape (N, D).
    """

    x: Tensor
    mean: Tensor
    sd: Tensor

    @staticmethod
    def of(posterior: Posterior, x: Tensor, n: int, generator: torch.Generator) -> Contrast:
        """The Gaussian whose moments are those of ``n`` draws from q at each observation."""
        moments = [posterior_moments(posterior, block, n, generator) for block in observation_blocks(x)]
        mean, sd = (torch.cat(column) for column in zip(*moments, strict=True))
        return Contrast(x, mean, sd)

    def at(self, rows: Tensor | slice) -> Contrast:
        """Some of the observations."""
        return Contrast(self.x[rows], self.mean[rows], self.sd[rows])

    def blocks(self) -> Iterator[Contrast]:
        """All observations, in blocks of bounded memory."""
        start = 0
        for block in observation_blocks(self.x):
            yield self.at(slice(start, start + len(block)))
            start += len(block)

    def standardised(self, z: Tensor) -> Tensor:
        """(S, N, D) -> (S, N, D)."""
        return (z - self.mean) / self.sd

    def log_prob(self, z: Tensor) -> Tensor:
        """log r(z|x): (S, N, D) -> (S, N), nats."""
        return log_normal(z, self.mean, self.sd.log())

    def draws(self, n: int, generator: torch.Generator) -> Tensor:
        """Standardised draws of r, shape (n, N, D)."""
        shape = (n, *self.mean.shape)
        return torch.randn(shape, generator=generator, device=self.mean.device, dtype=self.mean.dtype)


class Discriminator(nn.Module):
    """T: observations (N, *E) and standardised latents u (S, N, D) -> (S, N), nats; zero before it is trained.

    It sees u with all its products u_i u_j: ratios of densities are often quadratic where the draws thin out, which a
    piecewise linear network would have to learn from those few.

    Args:
        contrast: The observations that it is for; it sees them centred and scaled, with the moments of r.
    """

    location: Tensor
    scale: Tensor

    def __init__(self, contrast: Contrast, width: int, blocks: int) -> None:
        super().__init__()
        facts = _facts(contrast)
        scale = facts.std(0, correction=0)
        self.register_buffer("location", facts.mean(0))
        self.register_buffer("scale", torch.where(scale > 0, scale, torch.ones_like(scale)))
        features = _quadratic(contrast.mean).shape[1]
        self.trunk = ResidualPairTrunk(facts.shape[1], features, width, blocks, "leaky-relu", centre=False)
        self.head = linear(width, 1, zero=True)
        self.to(facts)

    def forward(self, at: Contrast, u: Tensor) -> Tensor:
        return self.head(self.trunk((_facts(at) - self.location) / self.scale, _quadratic(u))).squeeze(-1)


def _facts(contrast: Contrast) -> Tensor:
    return torch.cat([contrast.x.flatten(1), contrast.mean, contrast.sd.log()], dim=1)


def _quadratic(u: Tensor) -> Tensor:
    """u and its products less their mean under r: (..., D) -> (..., D + D (D + 1) / 2)."""
    i, j = torch.triu_indices(u.shape[-1], u.shape[-1], device=u.device)
    return torch.cat([u, u[..., i] * u[..., j] - (i == j).to(u.dtype)], dim=-1)


@dataclass(frozen=True, kw_only=True)
class Training:
    """How a discriminator is trained.

    Args:
        steps: Updates, each on draws that were never used before.
        batch_size: Pairs (x, z) of either class in an update.
        lr: Adam's learning rate at the start; it falls to zero along a cosine.
    """

    steps: int
    batch_size: int
    lr: float


def train(
    discriminator: Discriminator,
    posterior: Posterior,
    contrast: Contrast,
    training: Training,
    generator: torch.Generator,
    progress: Callable[[float, float], None] = lambda fraction, loss: None,
) -> Tensor:
    """Minimise the balanced logistic loss E_q[softplus(-T)] + E_r[softplus(T)] at the given observations.

    As every draw is fresh, nothing can be overfitted: the loss is that of unseen draws.

    Args:
        progress: Told the part done and the mean loss of late, twenty times.

    Returns:
        The loss of every step, shape (steps,), nats; 2 log 2 where q cannot be told from r.
    """
    parameters = list(discriminator.parameters())
    optimiser = torch.optim.Adam(parameters, lr=training.lr, fused=True)
    n = len(contrast.x)
    copies, every = max(1, training.batch_size // n), max(1, training.steps // 20)
    losses: list[Tensor] = []
    for step in range(1, training.steps + 1):
        at = contrast
        if n > training.batch_size:
            order = torch.randperm(n, generator=generator, device=contrast.x.device)
            at = contrast.at(order[: training.batch_size])
        with torch.no_grad():
            u = torch.stack([at.standardised(posterior.sample(at.x, copies, generator)), at.draws(copies, generator)])
        with torch.enable_grad():
            t_posterior, t_reference = discriminator(at, u)
            loss = softplus(-t_posterior).mean() + softplus(t_reference).mean()
            gradients = torch.autograd.grad(loss, parameters)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        optimiser.param_groups[0]["lr"] = training.lr * 0.5 * (1 + math.cos(math.pi * (step - 1) / training.steps))
        optimiser.step()
        losses.append(loss.detach())
        if step % every == 0:
            progress(step / training.steps, float(torch.stack(losses[-every:]).mean()))
    return torch.stack(losses)


@torch.no_grad()
def estimate(
    model: LatentModel,
    posterior: Posterior,
    discriminator: Discriminator,
    contrast: Contrast,
    samples: int,
    stream: Callable[[str], torch.Generator],
) -> dict[str, tuple[Tensor, Tensor]]:
    r"""What a discriminator says of KL(q || p) and of the ELBO, as estimates and as bounds, on draws it never saw.

    The estimates take T for log q - log r. The bounds are those of Nguyen, Wainwright, Jordan 2010
    (https://arxiv.org/abs/0809.0853): for any function f,

    .. math:: KL(q \| p) \ge E_q[f] + 1 - E_p[e^f].

    With f = T' + log r - log p the last term is exp(T') under r, so that

    .. math:: KL(q \| p) \ge E_q[T' + \log r - \log p] + 1 - E_r[e^{T'}]

    is the same bound without the variance of r/p: the step from p to r is exact, and only q's difference from r is
    bounded. T' = min(T + c(x), log S). The constant c = -log E_r[exp T], from draws of its own, makes the bound the
    tightest that T gives. The cap keeps the variance of exp(T') below S, hence its error below one nat per observation
    (S draws cannot certify more than about log S: McAllester, Stratos 2020, https://arxiv.org/abs/1811.04251). Whatever
    T, c and the cap are, the bound holds in expectation.

    Args:
        samples: S, the draws per observation of q, of r, and of r for c.
        stream: Random streams by purpose.

    Returns:
        Means and standard errors, two of shape (N,), float64, by name: ``kl`` and ``elbo`` are the estimates,
        ``kl_bound`` a stochastic lower bound and ``elbo_bound`` a stochastic upper bound.
    """
    streams = {purpose: stream(purpose) for purpose in ("calibration", "posterior", "reference")}
    parts = [_estimate_block(model, posterior, discriminator, at, samples, streams) for at in contrast.blocks()]
    return {
        name: (torch.cat([part[name][0] for part in parts]), torch.cat([part[name][1] for part in parts]))
        for name in parts[0]
    }


def _estimate_block(
    model: LatentModel,
    posterior: Posterior,
    discriminator: Discriminator,
    at: Contrast,
    samples: int,
    streams: Mapping[str, torch.Generator],
) -> dict[str, tuple[Tensor, Tensor]]:
    normaliser, weights = StreamedLogMeanExp(), StreamedMean()
    means = {name: StreamedMean() for name in ("kl", "elbo", "kl_bound", "elbo_bound")}
    for n in sample_blocks(at.x, samples):
        normaliser.add(discriminator(at, at.draws(n, streams["calibration"])))
    log_z = normaliser.value().to(at.x.dtype)
    cap = math.log(samples)
    for n in sample_blocks(at.x, samples):
        weights.add(torch.exp((discriminator(at, at.draws(n, streams["reference"])) - log_z).clamp(max=cap)))
    for n in sample_blocks(at.x, samples):
        z = posterior.sample(at.x, n, streams["posterior"])
        t = discriminator(at, at.standardised(z))
        to_prior, log_likelihood = at.log_prob(z) - model.log_prior(z), model.log_likelihood(at.x, z)
        for name, ratio in (("", t + to_prior), ("_bound", (t - log_z).clamp(max=cap) + to_prior)):
            means["kl" + name].add(ratio)
            means["elbo" + name].add(log_likelihood - ratio)
    estimates = {name: (mean.value(), mean.stderr()) for name, mean in means.items()}
    for name, sign in (("kl_bound", 1), ("elbo_bound", -1)):
        value, stderr = estimates[name]
        estimates[name] = (value + sign * (1 - weights.value()), torch.hypot(stderr, weights.stderr()))
    return estimates


# What evaluators share


@dataclass(frozen=True, kw_only=True)
class Check:
    """Settings of the check of a posterior by a fresh discriminator.

    Args:
        observations: How many of the fixed scored test observations.
        samples: Draws of z per observation for each of the expectations.
        moment_samples: Draws per observation for q's moments, which standardise it.
        steps, batch_size, lr: See `Training`.
        width, blocks: Size of the discriminator.
    """

    observations: int = 100
    samples: int = 500
    moment_samples: int = 1000
    steps: int = 600
    batch_size: int = 100
    lr: float = 1e-3
    width: int = 512
    blocks: int = 3


@dataclass(frozen=True, eq=False)
class Checked:
    """What a check found.

    Args:
        means: See `estimate`.
        losses: Of the discriminator's training, shape (steps,).
    """

    contrast: Contrast
    means: Mapping[str, tuple[Tensor, Tensor]]
    losses: Tensor

    def settings(self, check: Check) -> dict[str, float]:
        """Settings and diagnostics for a record."""
        names = ("samples", "steps", "batch_size", "width", "blocks")
        late = self.losses[-max(1, check.steps // 20) :]
        return {**{name: getattr(check, name) for name in names}, "loss": float(late.mean())}


def checked(
    fit: Fit, check: Check, run: EvaluationRun, told: Callable[[float, float], None] = lambda fraction, loss: None
) -> Checked:
    """Train a discriminator on the scored observations and measure with it; once for all evaluators of a fit.

    Args:
        told: The part of the training that is done, and the mean loss of late.
    """
    return run.once(("discriminated", check), lambda: _checked(fit, check, run, told))


def _checked(fit: Fit, check: Check, run: EvaluationRun, told: Callable[[float, float], None]) -> Checked:
    def stream(purpose: str) -> torch.Generator:
        return run.generator("implicit", purpose)

    x, _ = run.data.scored(check.observations)
    contrast = Contrast.of(fit.posterior, x, check.moment_samples, stream("moments"))
    weights = Streams(run.seed, run.problem.stream_name, "evaluator implicit", run.device)
    with weights.initial_weights(shared=False):
        discriminator = Discriminator(contrast, check.width, check.blocks)
    training = Training(steps=check.steps, batch_size=check.batch_size, lr=check.lr)
    losses = train(discriminator, fit.posterior, contrast, training, stream("training"), told)
    means = estimate(fit.model, fit.posterior, discriminator, contrast, check.samples, stream)
    return Checked(contrast, means, losses)

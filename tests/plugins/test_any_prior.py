"""avb and vae where the prior is no standard normal: a density with its terms elsewhere, and a prior that differs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import softplus

from harness.model import DecoderModel, LatentModel, has_standard_normal_prior, log_normal
from harness.posterior import HasAnalyticKL, HasLogRatio
from harness.problem import ModelSpec, TrainingView
from harness.testing import SmallProblem, check_method
from harness.testing.small import view_of
from harness.training import GradientMethod, Modules, Noise
from harness_plugins.avb import AVB
from harness_plugins.vae import VAE

SD = 2.0


class Unrecognised(DecoderModel):
    """p(z) = N(0, I), without anybody being able to tell."""

    def log_prior(self, z: Tensor) -> Tensor:
        return log_normal(z)


class Wide(DecoderModel):
    """p(z) = N(0, 2^2 I)."""

    def log_prior(self, z: Tensor) -> Tensor:
        return log_normal(z, log_sd=torch.full_like(z, math.log(SD)))

    def sample_prior(self, n: int, generator: torch.Generator) -> Tensor:
        return SD * super().sample_prior(n, generator)


@dataclass(frozen=True, kw_only=True)
class Recast(SmallProblem):
    """The small problem with a model of another class."""

    name: str = "recast"
    of: str = "DecoderModel"

    def model_spec(self) -> ModelSpec:
        spec = super().model_spec()

        def new_model(shape: tuple[int, ...]) -> LatentModel:
            model: Any = type(spec).new_model(spec, shape)
            model.__class__ = globals()[self.of]
            return model

        object.__setattr__(spec, "new_model", new_model)
        return spec


def built(method: GradientMethod, of: str) -> tuple[TrainingView, Modules]:
    """Modules with the same weights for every class of model."""
    view = view_of(SmallProblem())
    view.model.__class__ = globals()[of]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return view, method.build(view).double()


def noise_of(method: GradientMethod, view: TrainingView, copies: int = 1) -> tuple[Tensor, Noise]:
    x, stream = view.validation.repeat(copies, 1, 1), torch.Generator().manual_seed(1)
    shapes = method.noise(view).items()
    return x, {name: torch.randn(len(x), *shape, generator=stream).double() for name, shape in shapes}


@pytest.mark.parametrize("of", ["Unrecognised", "Wide"])
@pytest.mark.parametrize("method", [AVB(), VAE()], ids=["avb", "vae"])
def test_they_keep_the_laws_of_methods(method: GradientMethod, of: str) -> None:
    assert not has_standard_normal_prior(view_of(Recast(of=of)).model)
    check_method(method, Recast(of=of))


def test_avb_with_a_standard_normal_prior_is_algorithm_1_bit_for_bit() -> None:
    view, modules = built(AVB(), "DecoderModel")
    x, noise = noise_of(AVB(), view)
    z = modules["encoder"](x, noise["eps"])
    t_posterior, t_prior = modules["adversary"](x, torch.stack([z, noise["prior_z"]]))
    losses = AVB().losses(modules, x, noise)
    assert torch.equal(losses["negative_elbo"], (t_posterior - modules["model"].log_likelihood(x, z)).mean())
    assert torch.equal(losses["adversary"], softplus(-t_posterior).mean() + softplus(t_prior).mean())


def test_avb_does_not_depend_on_whether_a_standard_normal_is_recognised() -> None:
    view, modules = built(AVB(), "DecoderModel")
    _, others = built(AVB(), "Unrecognised")
    x, noise = noise_of(AVB(), view)
    first, second = AVB().losses(modules, x, noise), AVB().losses(others, x, noise)
    for name, loss in first.items():
        torch.testing.assert_close(second[name], loss, rtol=1e-12, atol=0)


def test_the_adversary_of_another_prior_still_tells_q_from_the_standard_normal() -> None:
    view, modules = built(AVB(), "Wide")
    _, standard = built(AVB(), "DecoderModel")
    x, noise = noise_of(AVB(), view)
    assert torch.equal(AVB().losses(modules, x, noise)["adversary"], AVB().losses(standard, x, noise)["adversary"])


def test_an_optimal_adversary_gives_the_negative_elbo_and_the_ratio_to_the_prior() -> None:
    """With z = eps / 2 and T = log q - log N(0, I) exactly, whatever the prior is."""
    for of in ("DecoderModel", "Unrecognised", "Wide"):
        view, modules = built(AVB(noise_dim=2), of)
        modules["encoder"].forward = lambda x, eps: eps / 2
        modules["adversary"].forward = lambda x, z: log_normal(z, log_sd=math.log(0.5)) - log_normal(z)
        x, noise = noise_of(AVB(noise_dim=2), view)
        z, model = noise["eps"] / 2, view.model
        log_q = log_normal(z, log_sd=math.log(0.5))
        posterior = AVB(noise_dim=2).posterior(modules)
        assert isinstance(posterior, HasLogRatio)
        torch.testing.assert_close(posterior.log_ratio(x, z[None]), (log_q - model.log_prior(z))[None])
        expected = (log_q - model.log_joint(x, z)).mean()
        torch.testing.assert_close(AVB(noise_dim=2).losses(modules, x, noise)["negative_elbo"], expected)


def test_the_kl_of_a_vae_is_analytic_where_it_can_be_and_a_mean_over_draws_elsewhere() -> None:
    view, modules = built(VAE(), "DecoderModel")
    _, others = built(VAE(), "Unrecognised")
    assert isinstance(VAE().posterior(modules), HasAnalyticKL)
    assert not isinstance(VAE().posterior(others), HasAnalyticKL)
    x, noise = noise_of(VAE(), view, copies=500)
    with torch.no_grad():
        analytic, sampled = (VAE().losses(found, x, noise)["negative_elbo"] for found in (modules, others))
        mean, log_sd = modules["encoder"](x)
        z = mean + log_sd.exp() * noise["eps"]
        # What the two differ by, for each draw: its mean is zero.
        kl = log_normal(z, mean, log_sd) - log_normal(z)
        exact = 0.5 * (mean.square() + torch.exp(2 * log_sd) - 1).sum(-1) - log_sd.sum(-1)
    torch.testing.assert_close(sampled - analytic, (kl - exact).mean())
    assert abs(float(sampled - analytic)) < 4 * float((kl - exact).std()) / len(x) ** 0.5  # 4,000 draws; four errors
    assert float((kl - exact).std()) > 0.1


def test_the_objective_of_a_vae_with_another_prior_is_its_own_elbo() -> None:
    view, modules = built(VAE(), "Wide")
    x, noise = noise_of(VAE(), view)
    mean, log_sd = modules["encoder"](x)
    z = mean + log_sd.exp() * noise["eps"]
    expected = (log_normal(z, mean, log_sd) - view.model.log_joint(x, z)).mean()
    torch.testing.assert_close(VAE().losses(modules, x, noise)["negative_elbo"], expected)

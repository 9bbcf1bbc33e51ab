"""Laws of the KL term's warm-up, for every method that has it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import harness
from harness import loop
from harness.options import UserError
from harness.testing import SmallProblem, check_method
from harness.testing.small import view_of
from harness.training import Modules, Noise
from harness.warm_up import WarmUpMethod
from harness_plugins.avb import AVB
from harness_plugins.avb_ac import AVBAC
from harness_plugins.funnel import Funnel
from harness_plugins.iaf import IAF
from harness_plugins.vae import VAE

METHODS: dict[type[WarmUpMethod], dict[str, Any]] = {
    VAE: {},
    IAF: {"hidden": 16},
    AVB: {"noise_dim": 4},
    AVBAC: {"nbasis": 3, "noise_dim": 2, "basis_width": 8},
}
DRAWN: dict[type[WarmUpMethod], Callable[[Modules, Tensor, Noise], Tensor]] = {
    VAE: lambda modules, x, noise: modules["encoder"](x)[0] + modules["encoder"](x)[1].exp() * noise["eps"],
    IAF: lambda modules, x, noise: modules["encoder"](x, noise["eps"])[0],
    AVB: lambda modules, x, noise: modules["encoder"](x, noise["eps"]),
    AVBAC: lambda modules, x, noise: modules["encoder"](x, noise["eps"]),
}
"""z of the posterior, written out."""


def method_of(kind: type[WarmUpMethod], kl_warmup: float) -> WarmUpMethod:
    return kind(**METHODS[kind], kl_warmup=kl_warmup)


@pytest.mark.parametrize("kind", METHODS)
def test_the_weight_of_the_kl_term_grows_in_training_only(kind: type[WarmUpMethod], generator: torch.Generator) -> None:
    method, view = method_of(kind, 0.4), view_of(SmallProblem())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        modules = method.build(view).double().requires_grad_(False)
    x, shapes = view.validation, method.noise(view)
    noise = {name: torch.randn((len(x), *shape), generator=generator, dtype=x.dtype) for name, shape in shapes.items()}

    def objective() -> float:
        return float(method.losses(modules, x, noise)["negative_elbo"])

    full = objective()
    method.schedule(modules, 0.0)
    reconstruction = -float(modules["model"].log_likelihood(x, DRAWN[kind](modules, x, noise)).mean())
    assert objective() == pytest.approx(reconstruction, abs=1e-12)
    assert abs(full - reconstruction) > 0.1
    for fraction, weight in ((0.1, 0.25), (0.4, 1.0), (0.9, 1.0)):
        method.schedule(modules, fraction)
        assert objective() == pytest.approx(reconstruction + weight * (full - reconstruction), abs=1e-6)
    modules.eval()
    whole = objective()
    method.schedule(modules, 0.0)
    assert objective() == whole
    assert not any("kl_weight" in name for name in modules.state_dict())


@pytest.mark.parametrize("kind", METHODS)
def test_a_warm_up_is_part_of_the_fit(kind: type[WarmUpMethod], monkeypatch: pytest.MonkeyPatch) -> None:
    problem = SmallProblem()
    monkeypatch.setattr(loop, "CONVERGENCE_CHECK_STEPS", 2)

    def state(kl_warmup: float, budget: str) -> dict[str, Tensor]:
        return dict(harness.fit(method_of(kind, kl_warmup), problem, budget=budget, device="cpu").state)

    def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
        return all(torch.equal(a[name], b[name]) for name in a)

    assert not same(state(0.0, "steps=4"), state(1.0, "steps=4"))
    assert same(state(0.0, "converged=1"), state(1.0, "converged=1"))  # what part is spent is not known there


@pytest.mark.parametrize("kind", METHODS)
def test_conformance_with_a_warm_up(kind: type[WarmUpMethod]) -> None:
    check_method(method_of(kind, 0.5), SmallProblem())


@pytest.mark.parametrize("kind", METHODS)
def test_parts_of_a_budget_are_between_nothing_and_all(kind: type[WarmUpMethod]) -> None:
    with pytest.raises(UserError, match=r"option kl_warmup=1\.5"):
        method_of(kind, 1.5)


@pytest.mark.parametrize("kind", METHODS)
def test_densities_without_a_likelihood_are_refused(kind: type[WarmUpMethod]) -> None:
    """With a weight of 0 the funnel's objective is that of f(z) / N(z; 0, I), which has no bound."""
    view = view_of(Funnel())
    assert method_of(kind, 0.0).unfit(view) is None
    assert "kl_warmup" in (method_of(kind, 0.3).unfit(view) or "")

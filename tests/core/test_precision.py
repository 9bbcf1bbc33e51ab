"""Laws of reduced precision: layers multiply in bfloat16 while they train, and nothing else does."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import harness
from harness.adaptive_contrast import BasisNetworks
from harness.options import UserError
from harness.players import Modules, Noise
from harness.precision import Products
from harness.store import Store
from harness.testing import SmallPosteriorProblem, SmallProblem
from harness.training import GradientMethod
from harness_plugins.avb import AVB
from harness_plugins.avb_ac import AVBAC
from harness_plugins.iaf import IAF
from harness_plugins.vae import VAE

BF16 = torch.bfloat16
PROBLEM = SmallProblem()
AMORTISED = [
    VAE(batch_size=16),
    IAF(batch_size=16, hidden=8, context_dim=3),
    AVB(batch_size=16, noise_dim=3, adversary_steps=2),
    AVBAC(batch_size=16, noise_dim=3),
]


def uniform(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("layer", "x"),
    [(nn.Linear(7, 5), uniform(4, 7)), (nn.Conv2d(1, 2, 3), uniform(4, 1, 5, 5)),
     (nn.ConvTranspose2d(1, 2, 3), uniform(4, 1, 5, 5)), (BasisNetworks(2, 3, 5, 4, 0), uniform(4, 2, 3))],
)  # fmt: skip
def test_a_layer_multiplies_in_bfloat16_and_gives_back_what_it_got(layer: nn.Module, x: Tensor) -> None:
    with Products(BF16):
        y = layer(x)
    expected = copy.deepcopy(layer).to(BF16)(x.to(BF16)).float()
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-2)  # its own products may be summed in another order
    assert bool((y.to(BF16).float() == y).all()), "rounded on the way"
    assert not bool((layer(x) == y).all())
    gradients = torch.autograd.grad(y.sum(), list(layer.parameters()))
    assert {gradient.dtype for gradient in gradients} == {torch.float32}


def test_products_that_are_written_out_are_left_alone() -> None:
    a, b = uniform(3, 4), uniform(4, 5)
    with Products(BF16):
        assert torch.equal(a @ b, torch.mm(a, b))
        rounded = F.linear(input=a, weight=b.T)
    assert torch.equal(a @ b, F.linear(a, b.T))
    assert not torch.equal(a @ b, rounded)


@pytest.mark.parametrize("method", AMORTISED, ids=lambda method: method.name)
def test_fits_are_close_to_those_of_float32(method: GradientMethod) -> None:
    """A product of numbers that are rounded to 8 bits is off by less than one part in 100."""
    exact, fast, again = (
        harness.fit(method, PROBLEM, budget="steps=20", precision=precision)
        for precision in ("float32", "bf16", "bf16")
    )
    assert {tensor.dtype for tensor in fast.state.values()} == {tensor.dtype for tensor in exact.state.values()}
    assert any(not torch.equal(tensor, exact.state[name]) for name, tensor in fast.state.items())
    assert all(torch.equal(tensor, again.state[name]) for name, tensor in fast.state.items())
    assert fast.curve[-1].objective == pytest.approx(exact.curve[-1].objective, rel=0.02)


@dataclass(frozen=True, kw_only=True)
class Probe(VAE):
    """Notes whether a layer rounds, and in which mode the modules are."""

    name: str = "probe"
    seen: ClassVar[set[tuple[bool, bool]]] = set()

    def losses(self, modules: Modules, x: Tensor, noise: Noise) -> dict[str, Tensor]:
        third = torch.full((1, 1), 1 / 3, dtype=x.dtype)
        rounds = bool(F.linear(third, torch.ones(1, 1, dtype=x.dtype)) != third)
        self.seen.add((modules["model"].training, rounds))
        return super().losses(modules, x, noise)


@pytest.mark.parametrize(("precision", "seen"), [("bf16", {(True, True), (False, False)}),
                                                 ("float32", {(True, False), (False, False)})])  # fmt: skip
def test_the_validation_objective_is_in_full(precision: str, seen: set[tuple[bool, bool]]) -> None:
    Probe.seen.clear()
    harness.fit(Probe(batch_size=16), PROBLEM, budget="steps=3", precision=precision)
    assert Probe.seen == seen


def test_seeds_at_once(tmp_path: Path) -> None:
    """Ten steps: batched products round as single ones do, but for sums that end on the other side of a step."""
    at_once = harness.compare(
        VAE(batch_size=16), PROBLEM, seeds=2, budget="steps=10", precision="bf16", evaluators="elbo",
        vectorize_seeds=True, out=tmp_path,
    )  # fmt: skip
    assert set(at_once["precision"]) == {"bf16"}
    for job, seed in {*zip(at_once["job_id"], at_once["seed"], strict=True)}:
        together = Store.open(tmp_path).state(job)
        alone = harness.fit(VAE(batch_size=16), PROBLEM, seed, budget="steps=10", precision="bf16")
        for name, tensor in alone.state.items():
            torch.testing.assert_close(torch.from_numpy(together[name]), tensor, rtol=0, atol=2e-3)


def test_methods_that_train_no_networks_are_skipped(tmp_path: Path) -> None:
    records = harness.compare(
        "nuts", SmallPosteriorProblem(), seeds=1, precision="bf16", evaluators="chains", out=tmp_path
    )
    assert list(records["status"]) == ["skipped"]
    assert records["reason"].iloc[0] == "precision bf16: it trains no networks"


def test_an_unknown_precision_is_named() -> None:
    with pytest.raises(UserError, match="precision 'fp16'"):
        harness.fit("vae", PROBLEM, precision="fp16")

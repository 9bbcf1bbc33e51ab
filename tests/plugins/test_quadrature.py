"""Maximum likelihood by quadrature: its objective is log p(x), its posterior that of the model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import harness
from harness.players import Modules
from harness.problem import Problem
from harness.testing import SmallPosteriorProblem, SmallProblem, check_method
from harness.testing.small import view_of
from harness_plugins.exact import quadrature
from harness_plugins.four_points import FourPoints
from harness_plugins.funnel import Funnel
from harness_plugins.quadrature import Lattice, LatticePosterior, Quadrature
from harness_plugins.vae import VAE

DOUBLE = torch.float64


def built(method: Quadrature, latent_dim: int) -> tuple[Modules, Tensor]:
    view = view_of(SmallProblem(latent_dim=latent_dim))
    with torch.no_grad():
        for parameter in view.model.parameters():
            parameter.mul_(2)
    return method.build(view).double(), view.validation.double()


def loss(method: Quadrature, modules: Modules, x: Tensor, shift: list[float]) -> Tensor:
    noise = {"shift": torch.tensor([shift] * len(x), dtype=DOUBLE)}
    return method.losses(modules, x, noise)["negative_log_likelihood"]


@pytest.mark.parametrize("latent_dim", [1, 2])
def test_the_objective_is_the_exact_log_likelihood_wherever_the_lattice_is(latent_dim: int) -> None:
    method = Quadrature(points=64, half_width=7.0)
    modules, x = built(method, latent_dim)
    expected, _ = quadrature(modules["model"], x)
    for shift in (-4.0, -0.3, 0.0, 1.7):
        found = loss(method, modules, x, [shift, -shift][:latent_dim])
        torch.testing.assert_close(-found, expected.mean(), rtol=0, atol=1e-6)


def test_shifts_fill_a_cell() -> None:
    """A sum over few cells is far from the integral; over uniform shifts, their mean is not."""
    method = Quadrature(points=8, half_width=8.0)
    modules, x = built(method, 1)
    model, lattice = modules["model"], modules["lattice"]
    for parameter in model.parameters():
        parameter.detach().mul_(3)
    levels = (torch.arange(400, dtype=DOUBLE) + 0.5) / 400
    shifts = torch.special.ndtri(levels)
    found = torch.stack([torch.exp(-loss(method, modules, x[:1], [float(shift)])).detach() for shift in shifts])
    expected, _ = quadrature(model, x[:1])
    assert float((found.log() - expected).abs().max()) > 0.1
    torch.testing.assert_close(found.mean().log(), expected[0], rtol=0, atol=1e-4)
    assert lattice.side == 2.0


@pytest.mark.parametrize("latent_dim", [1, 2])
def test_the_posterior_is_that_of_the_model(latent_dim: int, generator: torch.Generator) -> None:
    modules, x = built(Quadrature(), latent_dim)
    model = modules["model"]
    posterior = LatticePosterior(model, Lattice(latent_dim, 256, 6.0).double())
    with torch.no_grad():
        z, log_q = posterior.sample_and_log_prob(x, 20_000, generator)
        log_p, _ = quadrature(model, x)
        terms = model.log_joint(x, z) - log_q
    gap = log_p - terms.mean(0)
    error = terms.std(0) / len(z) ** 0.5
    assert bool((gap.abs() < 5 * error + 1e-3).all()), gap
    assert bool((terms.std(0) < 0.05).all())
    centres = posterior.lattice.centres
    share = posterior.lattice.log_masses(model, x).softmax(0)
    mean = torch.einsum("cn,cd->nd", share, centres)
    torch.testing.assert_close(z.mean(0), mean, rtol=0, atol=5 / len(z) ** 0.5)  # five errors: sds are below 1
    assert float(z.min()) > -6.0


def test_observations_are_drawn_for_in_blocks(generator: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    modules, x = built(Quadrature(), 2)
    posterior = LatticePosterior(modules["model"], Lattice(2, 64, 6.0).double())
    monkeypatch.setattr("harness_plugins.quadrature.PAIRS", 3 * 64**2)
    monkeypatch.setattr("harness_plugins.quadrature.CELLS", 1000)
    with torch.no_grad():
        z, log_q = posterior.sample_and_log_prob(x, 5000, generator)
        monkeypatch.undo()
        share = posterior.lattice.log_masses(modules["model"], x).softmax(0)
    assert z.shape == (5000, len(x), 2)
    assert log_q.shape == (5000, len(x))
    expected = torch.einsum("cn,cd->nd", share, posterior.lattice.centres)
    torch.testing.assert_close(z.mean(0), expected, rtol=0, atol=5 / 5000**0.5)  # five errors


def test_it_learns_a_better_model_than_a_vae(tmp_path: Path) -> None:
    """From the same decoder, minibatches and learning rate, where all that there is are the training data."""
    methods = [Quadrature(points=48), VAE()]
    records = harness.compare(methods, FourPoints(width=16), 2, budget="steps=300", evaluators="exact", out=tmp_path)
    log_p = records[records["metric"] == "log_likelihood"].pivot_table("value", "seed", "method")
    assert (log_p["quadrature"] > log_p["vae"]).all(), log_p
    gap = records[records["metric"] == "kl_to_posterior"].pivot_table("value", "seed", "method")
    assert (gap["quadrature"].abs() < 0.01).all()


@pytest.mark.parametrize(
    ("problem", "reason"),
    [
        (SmallProblem(latent_dim=3), "in at most 2 latent dimensions, and this problem has 3"),
        (SmallPosteriorProblem(), "learns a model, and this one has no parameters"),
        (Funnel(), "at most 2 latent dimensions"),
    ],
    ids=["three dimensions", "nothing to learn", "funnel"],
)
def test_what_it_is_not_for_is_met_by_a_reason(problem: Problem, reason: str) -> None:
    assert reason in (Quadrature().unfit(view_of(problem)) or "")


@pytest.mark.parametrize("latent_dim", [1, 2])
def test_one_dimension_or_two(latent_dim: int) -> None:
    check_method(Quadrature(points=16), SmallProblem(latent_dim=latent_dim))

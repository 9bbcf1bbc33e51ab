"""Pyro guides as methods: the objective against exact evidence, training of the model too, guides that are refused."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

import harness
from harness.posterior import HasDensity, HasPointDensity
from harness.problem import Problem, TrainingView
from harness.pyro_guide import Guide, GuideMethod, GuidePosterior, negative_elbo, program_of, seed_of
from harness.testing import SmallGaussianProblem, SmallProblem, check_method, check_problem
from harness.testing.small import SmallGaussianModel, view_of

CPU = torch.device("cpu")
EXAMPLE = Path(__file__).parents[1] / "distributions/harness_pyro_example.py"


def example() -> ModuleType:
    spec = spec_from_file_location("harness_pyro_example", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    sys.modules["harness_pyro_example"] = module
    spec.loader.exec_module(module)
    return module


def test_the_example_of_the_authors_guide_passes() -> None:
    check_method(example().StudentVAE())
    check_problem(example().Repeated())


def test_guide_and_model_are_trained_together() -> None:
    """The example on four points: its own and the model's parameters move, and the objective falls by far."""
    fit = harness.fit(example().StudentVAE(lr=0.01, num_particles=2), "four-points", budget="steps=100")
    first, last = fit.curve[0].validation, fit.curve[-1].validation
    assert first is not None
    assert last is not None
    assert last < first - 0.3
    biases = [tensor for name, tensor in fit.model.state_dict().items() if name.endswith("bias")]
    assert biases
    assert all(bool(bias.all()) for bias in biases)  # they start at zero
    freedom = float(fit.state["guide.stated.0"].exp()) + 2
    assert freedom != pytest.approx(10.0, abs=1e-3)


class ExactPosterior:
    """The guide of the small posterior problem that its evidence is known from."""

    def __init__(self, model: SmallGaussianModel) -> None:
        self.model = model

    def __call__(self, x: Tensor) -> None:
        mean, covariance = self.model.exact_posterior(x)
        with pyro.plate("observations", len(x)):
            pyro.sample("z", dist.MultivariateNormal(mean, covariance))


def small() -> tuple[SmallGaussianModel, Tensor]:
    view = view_of(SmallGaussianProblem())
    assert isinstance(view.model, SmallGaussianModel)
    return view.model, view.validation


@pytest.mark.parametrize("particles", [1, 3])
def test_the_elbo_of_the_exact_posterior_is_the_evidence_without_noise(particles: int) -> None:
    """log p(x, z) - log p(z|x) = log p(x) for each draw: whatever the seed, over two observations or one."""
    model, x = small()
    x = torch.cat([x, x + 1])
    guide = Guide(ExactPosterior(model), x)
    for seed in range(3):
        loss = negative_elbo(model, guide, x, particles, seed)
        torch.testing.assert_close(-loss, model.log_evidence(x).mean(), rtol=1e-12, atol=1e-12)


def test_the_objective_is_that_of_the_seed_alone() -> None:
    view = view_of(SmallProblem())
    guide = Guide(example().Guide(view.encoder_trunk(), view.latent_dim), view.validation)
    before = torch.get_rng_state()
    first, second, other = (negative_elbo(view.model, guide, view.validation, 2, seed) for seed in (1, 1, 2))
    assert first == second != other
    assert torch.equal(torch.get_rng_state(), before)
    noise = torch.randn(2, 4)
    assert seed_of(noise) == seed_of(noise.clone()) != seed_of(noise + 1)


def test_the_model_is_a_program_that_pyro_can_sample() -> None:
    """Within five standard errors of the prior's mean (1, -0.5), whose standard deviations are 1.5 and 0.9."""
    model, x = small()
    trace: Any = pyro.poutine.trace(program_of(model, CPU)).get_trace(x.expand(2000, -1))
    z = trace.nodes["z"]["value"]
    assert z.shape == (2000, 2)
    assert bool(((z.mean(0) - model.prior_mean).abs() < 5 * z.std(0) / 2000**0.5).all())
    log_joint = trace.log_prob_sum()
    torch.testing.assert_close(log_joint, model.log_joint(x.expand(2000, -1), z).sum())


@dataclass(frozen=True, kw_only=True)
class OneGuide(GuideMethod):
    """A method whose guide is one of the functions below."""

    name: str = "one-guide"
    which: str = "shifted"

    def guide(self, view: TrainingView) -> Callable[[Tensor], object]:
        return globals()[self.which]


def shifted(x: Tensor) -> None:
    """All that it learns are parameters of Pyro's; initial values may be drawn."""
    weight = pyro.param("weight", 0.1 * torch.randn(6, 2))
    sd = pyro.param("sd", torch.ones(2), constraint=dist.constraints.positive)
    with pyro.plate("observations", len(x)):
        pyro.sample("z", dist.Normal(x.flatten(1) @ weight.to(x.dtype), sd).to_event(1))


def test_a_function_with_parameters_of_pyros_is_a_guide() -> None:
    check_method(OneGuide())
    fit = harness.fit(OneGuide(), SmallProblem(), budget="steps=3")
    assert fit.parameters == 6 * 2 + 2
    assert isinstance(fit.posterior, HasPointDensity)


class PlanarGuide(nn.Module):
    """A flow without an inverse."""

    def __init__(self, view: TrainingView) -> None:
        super().__init__()
        self.flow = dist.transforms.Planar(view.latent_dim)

    def forward(self, x: Tensor) -> None:
        mean = x.flatten(1)[:, :2]
        flow = dist.TransformedDistribution(dist.Normal(mean, 1.0).to_event(1), [self.flow])
        with pyro.plate("observations", len(x)):
            pyro.sample("z", flow)


@dataclass(frozen=True, kw_only=True)
class PlanarMethod(GuideMethod):
    name: str = "planar"
    point_density: ClassVar[bool] = False

    def guide(self, view: TrainingView) -> PlanarGuide:
        return PlanarGuide(view)


def test_a_flow_without_an_inverse_knows_the_density_of_its_draws() -> None:
    check_method(PlanarMethod())
    posterior = harness.fit(PlanarMethod(), SmallProblem(), budget="steps=1").posterior
    assert isinstance(posterior, HasDensity)
    assert not isinstance(posterior, HasPointDensity)


def another_site(x: Tensor) -> None:
    pyro.sample("w", dist.Normal(0.0, 1.0))
    shifted(x)


def no_plate(x: Tensor) -> None:
    pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))


def stray_network(x: Tensor) -> None:
    pyro.module("network", NETWORK)
    shifted(x)


NETWORK = nn.Linear(2, 2)


@pytest.mark.parametrize(
    ("which", "reason"),
    [
        ("another_site", r"this one samples \['w', 'z'\]"),
        ("no_plate", "within the plate 'observations'"),
        ("stray_network", "pyro.module is not needed: make the guide a module"),
    ],
)
def test_guides_that_are_none_are_refused(which: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        OneGuide(which=which).build(view_of(SmallProblem()))


def test_pyro_is_left_as_it_was(generator: torch.Generator) -> None:
    pyro.clear_param_store()
    pyro.param("sd", torch.tensor(5.0))  # of the name that the guide uses
    settings = pyro.settings.get()
    problem: Problem = SmallProblem()
    view = view_of(problem)
    modules: Any = OneGuide().build(view)
    posterior = OneGuide().posterior(modules)
    assert isinstance(posterior, GuidePosterior)
    z, log_q = posterior.sample_and_log_prob(view.validation, 3, generator)
    torch.testing.assert_close(posterior.log_prob(view.validation, z), log_q)  # type: ignore[attr-defined]
    assert pyro.settings.get() == settings
    assert {name: value.item() for name, value in pyro.get_param_store().items()} == {"sd": 5.0}
    pyro.clear_param_store()

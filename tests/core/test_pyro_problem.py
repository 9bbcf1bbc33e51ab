"""Pyro programs as problems: densities against hand-written ones, draws, quantities, and programs that are refused."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import Tensor

from harness.model import HasQuantities, NamesQuantities
from harness.options import UserError
from harness.problem import loaded
from harness.pyro_problem import PyroModel, PyroProblem
from harness.testing import check_problem
from harness.testing.small import view_of

Y = np.array([0.3, -1.2, 2.0])


@dataclass(frozen=True, kw_only=True)
class Repeated(PyroProblem):
    """mu ~ N(1, 2^2), sigma ~ half-normal(1.5), y_i ~ N(mu, sigma^2)."""

    name: str = "repeated"

    def observed(self) -> Mapping[str, np.ndarray]:
        return {"y": Y}

    def pyro_model(self) -> None:
        mu = pyro.sample("mu", dist.Normal(1.0, 2.0))
        sigma = pyro.sample("sigma", dist.HalfNormal(1.5))
        pyro.deterministic("ratio", mu / sigma)
        with pyro.plate("measurements", 3):
            pyro.sample("y", dist.Normal(mu, sigma))


@dataclass(frozen=True, kw_only=True)
class Conjugate(PyroProblem):
    """theta ~ N(m, I), y ~ N(A theta, I): everything is known. Written for one latent only: nothing broadcasts."""

    name: str = "conjugate"

    def observed(self) -> Mapping[str, np.ndarray]:
        return {"y": Y}

    def pyro_model(self) -> None:
        mean = torch.tensor([1.0, -1.0])
        theta = pyro.sample("theta", dist.MultivariateNormal(mean, torch.eye(2)))
        pyro.sample("y", dist.Normal(torch.tensor(A) @ theta, 1.0).to_event(1))


A = [[1.0, 0.5], [0.0, 1.0], [-1.0, 2.0]]


def log_normal(value: Tensor, mean: Tensor | float, sd: Tensor | float) -> Tensor:
    return torch.distributions.Normal(torch.as_tensor(mean).double(), torch.as_tensor(sd).double()).log_prob(value)


def model_of(program: Callable[[], object], **observed: Any) -> PyroModel:
    return PyroModel("program", program, {name: np.asarray(value) for name, value in observed.items()})


def test_a_program_is_a_problem() -> None:
    check_problem(Repeated())


@pytest.mark.parametrize(("problem", "together"), [(Repeated(), True), (Conjugate(), False)])
def test_programs_are_run_for_many_latents_at_once_where_they_can_be(problem: PyroProblem, together: bool) -> None:
    model = problem.target()
    assert isinstance(model, PyroModel)
    assert (model.vectorised, model.drawn_together) == (True, together)


def test_the_observed_sites_are_the_one_observation() -> None:
    spec = loaded(Repeated())
    assert spec.exhaustive
    assert [getattr(spec, split).tolist() for split in ("train", "validation", "test")] == [[Y.tolist()]] * 3


def test_densities_of_a_constrained_site_have_the_jacobian(generator: torch.Generator) -> None:
    """sigma = e^u: p(u) = p(sigma) sigma, with the half-normal density 2 N(sigma; 0, 1.5^2)."""
    model = Repeated().target()
    z = torch.randn(5, 2, generator=generator, dtype=torch.float64)
    mu, sigma = z[:, 0], z[:, 1].exp()
    prior = log_normal(mu, 1.0, 2.0) + math.log(2) + log_normal(sigma, 0.0, 1.5) + z[:, 1]
    torch.testing.assert_close(model.log_prior(z), prior, rtol=1e-12, atol=1e-12)
    x = torch.tensor(Y)[None]
    likelihood = log_normal(x, mu[:, None], sigma[:, None]).sum(1)
    torch.testing.assert_close(model.log_likelihood(x, z[:, None])[:, 0], likelihood, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(model.log_joint(x, z[:, None])[:, 0], prior + likelihood, rtol=1e-12, atol=1e-12)


def test_the_likelihood_is_that_of_the_x_that_is_handed_in(generator: torch.Generator) -> None:
    model = Repeated().target()
    x = torch.randn(4, 3, generator=generator, dtype=torch.float64)
    z = torch.randn(2, 4, 2, generator=generator, dtype=torch.float64)
    expected = log_normal(x, z[..., :1], z[..., 1:].exp()).sum(-1)
    torch.testing.assert_close(model.log_likelihood(x, z), expected, rtol=1e-12, atol=1e-12)


def test_evidence_of_the_conjugate_program(generator: torch.Generator) -> None:
    """log p(x, z) - log p(z|x) is log p(x), whatever z is: Gaussians have a posterior in closed form."""
    model, x = Conjugate().target(), torch.tensor(Y)[None]
    a, mean = torch.tensor(A, dtype=torch.float64), torch.tensor([1.0, -1.0], dtype=torch.float64)
    covariance = torch.linalg.inv(torch.eye(2) + a.T @ a)
    posterior = torch.distributions.MultivariateNormal(covariance @ (mean + a.T @ x[0]), covariance)
    marginal = torch.distributions.MultivariateNormal(a @ mean, torch.eye(3) + a @ a.T)
    z = torch.randn(6, 1, 2, generator=generator, dtype=torch.float64)
    found = model.log_joint(x, z)[:, 0] - posterior.log_prob(z[:, 0])
    torch.testing.assert_close(found, marginal.log_prob(x[0]).expand(6), rtol=1e-12, atol=1e-12)


def test_a_support_may_depend_on_other_sites(generator: torch.Generator) -> None:
    """top ~ exponential(1), part ~ uniform(0, top): part = top s(v) with the logistic function s."""

    def program() -> None:
        top = pyro.sample("top", dist.Exponential(1.0))
        part = pyro.sample("part", dist.Uniform(0.0, top))
        pyro.sample("n", dist.Poisson(part))

    model = model_of(program, n=2.0)
    z = torch.randn(4, 2, generator=generator, dtype=torch.float64)
    top, share = z[:, 0].exp(), z[:, 1].sigmoid()
    jacobian = top.log() + top.log() + share.log() + (1 - share).log()
    torch.testing.assert_close(model.log_prior(z), -top - top.log() + jacobian, rtol=1e-10, atol=1e-10)
    likelihood = 2 * (top * share).log() - top * share - math.log(2)
    x = torch.tensor([[2.0]], dtype=torch.float64)
    torch.testing.assert_close(model.log_likelihood(x, z[:, None])[:, 0], likelihood, rtol=1e-10, atol=1e-10)
    quantities = model.quantities(z)
    torch.testing.assert_close(quantities["part"], top * share)


def test_draws_are_those_of_the_prior(generator: torch.Generator) -> None:
    """Within five standard errors of the mean and of the variance of mu and log sigma, which are independent.

    For a half-normal sigma with scale s, E log sigma = log s - (gamma + log 2) / 2 and Var log sigma = pi^2 / 8.
    """
    n = 4000
    z = Repeated().target().sample_prior(n, generator)
    mean = torch.tensor([1.0, math.log(1.5) - 0.5 * (0.5772156649 + math.log(2))], dtype=torch.float64)
    variance = torch.tensor([4.0, math.pi**2 / 8], dtype=torch.float64)
    squared = (z - mean).square()
    assert bool(((z.mean(0) - mean).abs() < 5 * (variance / n).sqrt()).all())
    assert bool(((squared.mean(0) - variance).abs() < 5 * squared.std(0) / math.sqrt(n)).all())
    assert float(torch.corrcoef(z.T)[0, 1].abs()) < 5 / math.sqrt(n)


def test_draws_one_after_another_are_those_of_the_prior_too(generator: torch.Generator) -> None:
    """Within five standard errors of the mean (1, -1) and of the squared deviations, whose mean is 1 and variance 2."""
    z = Conjugate().target().sample_prior(400, generator)
    deviation = z - torch.tensor([1.0, -1.0])
    assert bool((deviation.mean(0).abs() < 5 / math.sqrt(400)).all())
    assert bool(((deviation.square().mean(0) - 1).abs() < 5 * math.sqrt(2 / 400)).all())


@pytest.mark.parametrize("problem", [Repeated(), Conjugate()], ids=lambda problem: problem.name)
def test_draws_come_from_the_generator(problem: PyroProblem, generator: torch.Generator) -> None:
    model, before = problem.target(), torch.get_rng_state()
    first, second = model.sample_prior(3, generator), model.sample_prior(3, generator)
    assert not torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), before)


def test_quantities_have_the_names_of_sites_and_their_elements() -> None:
    def program() -> None:
        pyro.sample("shares", dist.Dirichlet(torch.ones(3)))
        scale = pyro.sample("scale", dist.Gamma(2.0, 1.0))
        pyro.deterministic("grid", scale * torch.arange(4.0).reshape(2, 2))
        pyro.factor("data", -scale)

    model = model_of(program)
    assert model.latent_dim == 3  # a simplex of three elements has two coordinates
    assert isinstance(model, NamesQuantities)
    assert not isinstance(model, HasQuantities)  # nobody knows their moments
    z = torch.tensor([[[0.0, 0.0, math.log(2)]]], dtype=torch.float64)
    quantities = model.quantities(z)
    assert list(quantities) == [*(f"shares[{i}]" for i in range(3)), "scale", "grid[0,0]", "grid[0,1]", "grid[1,0]",
                                "grid[1,1]"]  # fmt: skip
    assert all(value.shape == (1, 1) for value in quantities.values())
    assert float(quantities["grid[1,0]"]) == pytest.approx(4.0)
    assert sum(float(quantities[f"shares[{i}]"]) for i in range(3)) == pytest.approx(1.0)
    assert float(model.log_likelihood(torch.ones(1, 1, dtype=torch.float64), z)) == pytest.approx(-2.0)


def test_a_program_that_cannot_be_vectorised_is_run_for_one_latent_after_another() -> None:
    """Its control flow depends on a value; the numbers are those of its branches."""

    def program() -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(mu, 1.0 if bool(mu > 0) else 2.0))

    with pytest.warns(RuntimeWarning, match="program: the Pyro program cannot be vectorised"):
        model = model_of(program, y=0.5)
    assert not model.vectorised
    z, x = torch.tensor([[-1.0], [1.0]], dtype=torch.float64), torch.tensor([[0.5]], dtype=torch.float64)
    expected = log_normal(torch.tensor(0.5), z, torch.tensor([[2.0], [1.0]]))
    torch.testing.assert_close(model.log_likelihood(x, z[:, None]), expected)
    torch.testing.assert_close(model.log_prior(z), log_normal(z[:, 0], 0.0, 1.0))


def test_programs_are_not_drawn_together_where_that_would_be_wrong() -> None:
    """Three values side by side would pass for three draws: the densities of draws tell them apart."""

    def program() -> None:
        scale = pyro.sample("scale", dist.HalfNormal(1.0))
        effects = pyro.sample("effects", dist.Normal(0.0, scale * torch.tensor([1.0, 2.0, 3.0])).to_event(1))
        pyro.factor("data", -effects.square().sum(-1))

    assert not model_of(program).drawn_together


def test_a_covariance_that_is_none_makes_a_log_density_that_is_none() -> None:
    """As where a trajectory has gone too far: it is rejected there, and what else is evaluated with it is not lost."""

    def program() -> None:
        length = pyro.sample("length", dist.Normal(0.0, 1.0))
        places = torch.arange(4.0)
        covariance = torch.exp(-0.5 * ((places[:, None] - places) / length.exp()).square()) - 1e-4 * torch.eye(4)
        pyro.sample("y", dist.MultivariateNormal(torch.zeros(4), covariance_matrix=covariance))

    model = model_of(program, y=np.array([0.1, 0.2, 0.0, -0.3]))
    x, z = model.x[None], torch.tensor([[-1.0], [3.0], [0.0]], dtype=torch.float64)
    for vectorised in (True, False):
        model.vectorised = vectorised
        log_p = model.log_joint(x, z[:, None])[:, 0]
        assert log_p.isfinite().tolist() == [True, False, True]
        latent = z.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(model.log_joint(x, latent[:, None])[[0, 2]].sum(), latent)
        assert gradient[[0, 2]].isfinite().all()


def test_a_mixture_has_the_support_of_its_components() -> None:
    of = torch.distributions.Categorical(torch.tensor([0.3, 0.7]))
    means, scales = torch.tensor([-2.0, 3.0]), torch.tensor([0.5, 2.0])  # in single precision, whatever the run is in

    def program() -> None:
        with pyro.plate("twice", 2):
            mu = pyro.sample("mu", dist.MixtureSameFamily(of, dist.Normal(means, 1.0)))
        sigma = pyro.sample("sigma", dist.MixtureSameFamily(of, dist.HalfNormal(scales)))
        pyro.sample("y", dist.Normal(mu.sum(), sigma))

    model = model_of(program, y=0.5)
    z = torch.tensor([[-1.9, 2.5, 0.3], [0.0, -4.0, -1.0]], dtype=torch.float64)
    mu, sigma = z[:, :2], z[:, 2].exp()
    of_mu = (0.3 * log_normal(mu, -2.0, 1.0).exp() + 0.7 * log_normal(mu, 3.0, 1.0).exp()).log().sum(-1)
    of_sigma = (0.6 * log_normal(sigma, 0.0, 0.5).exp() + 1.4 * log_normal(sigma, 0.0, 2.0).exp()).log()
    torch.testing.assert_close(model.log_prior(z), of_mu + of_sigma + z[:, 2], rtol=0, atol=1e-5)
    draws = model.sample_prior(2000, torch.Generator().manual_seed(1))[:, 0]
    assert abs((draws > 0.5).double().mean() - (0.3 * 0.0062 + 0.7 * 0.9938)) < 5 * (0.7 * 0.3 / 2000) ** 0.5


@pytest.mark.parametrize("size", [2, 3, 4])
def test_a_site_may_have_a_batch_of_its_own_of_any_size(size: int) -> None:
    """Outside of any plate, and as large as what is drawn to find out, too."""

    def program() -> None:
        z = pyro.sample("z", dist.Normal(torch.zeros(size), 1.0))
        y(z.sum())

    model = model_of(program, y=0.3)
    z = model.sample_prior(5, torch.Generator().manual_seed(0))
    assert z.shape == (5, size)
    expected = dist.Normal(0.0, 1.0).log_prob(z).sum(-1)
    torch.testing.assert_close(model.log_prior(z), expected.to(z.dtype))


def test_a_program_does_not_notice_where_it_is_called_from() -> None:
    """Neither plates nor traces around it: its own plates start from the right, and its sites stay its own."""
    model, x = Repeated().target(), torch.tensor(Y)[None]
    z = torch.tensor([[[0.1, 0.2]], [[0.3, 0.4]]], dtype=torch.float64)
    alone = model.log_joint(x, z)
    with poutine.trace() as tracer, pyro.plate("outer", 2, dim=-1):
        assert torch.equal(model.log_joint(x, z), alone)
        assert model.sample_prior(3, torch.Generator()).shape == (3, 2)
    assert set(tracer.trace.nodes) == {"outer"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_constants_have_the_precision_of_the_run(dtype: torch.dtype) -> None:
    def program() -> None:
        mu = pyro.sample("mu", dist.Normal(0.1, torch.tensor(0.7)))
        pyro.sample("y", dist.Normal(mu, 0.3))

    model = model_of(program, y=0.2).to(dtype)
    z = torch.tensor([[0.4]], dtype=dtype)
    assert model.log_prior(z).dtype == model.sample_prior(2, torch.Generator()).dtype == dtype
    exact = -0.5 * (0.3 / 0.7) ** 2 - math.log(0.7) - 0.5 * math.log(2 * math.pi)
    assert float(model.log_prior(z)) == pytest.approx(exact, rel=1e-14 if dtype == torch.float64 else 1e-6)
    assert torch.get_default_dtype() == torch.float32


def test_another_observation_is_another_problem() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Other(Repeated):
        def observed(self) -> Mapping[str, np.ndarray]:
            return {"y": Y + 1}

    assert Other().spec_hash != Repeated().spec_hash
    assert view_of(Other()).train.values.tolist() == [(Y + 1).tolist()]


def test_a_site_that_turns_up_later_is_no_draw_in_disguise() -> None:
    more: list[str] = []

    def program() -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        y(sum(pyro.sample(name, dist.Normal(0.0, 1.0)) for name in more) + mu)

    model = model_of(program, y=0.5)
    x, z = torch.ones(1, 1, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64)
    more.append("late")
    with pytest.raises(RuntimeError, match="random operation"):  # torch lets nothing be drawn within vmap
        model.log_joint(x, z)
    model.vectorised = False
    with pytest.raises(UserError, match="its sites change from run to run: late"):
        model.log_joint(x, z)


def y(mean: Any) -> None:
    pyro.sample("y", dist.Normal(mean, 1.0))


def discrete() -> None:
    y(pyro.sample("switch", dist.Bernoulli(0.5)))


RUNS = itertools.count()


def changing() -> None:
    y(pyro.sample("odd" if next(RUNS) % 2 else "even", dist.Normal(0.0, 1.0)))


def drawing_apart() -> None:
    y(pyro.sample("mu", dist.Normal(0.0, 1.0)) + torch.randn(()))


def parameter() -> None:
    y(pyro.param("slope", torch.tensor(1.0)) * pyro.sample("mu", dist.Normal(0.0, 1.0)))


def subsampled() -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", 10, subsample_size=2):
        pyro.sample("row", dist.Normal(mu, 1.0), obs=torch.zeros(2))
    y(mu)


def scaled() -> None:
    with poutine.scale(scale=0.5):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    y(mu)


def masked() -> None:
    y(pyro.sample("mu", dist.Normal(torch.zeros(2), 1.0).mask(False).to_event(1)).sum())


def concentrated() -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    y(pyro.sample("twice", dist.Delta(2 * mu)))


def without_bijection() -> None:
    components = dist.Uniform(torch.zeros(2), torch.tensor([1.0, 2.0]))
    y(pyro.sample("mu", dist.MixtureSameFamily(torch.distributions.Categorical(torch.ones(2)), components)))


def boxes() -> None:
    low = torch.tensor([[0.0, 0.0], [2.0, 2.0]])
    components = dist.Uniform(low, low + 1).to_event(1)
    y(pyro.sample("mu", dist.MixtureSameFamily(torch.distributions.Categorical(torch.ones(2)), components)).sum())


def improper() -> None:
    y(pyro.sample("mu", dist.ImproperUniform(dist.constraints.real, (), ())))


def circular() -> None:
    with pyro.plate("angles", 2):
        y_mean = pyro.sample("angle", dist.VonMises(0.0, 2.0)).sum()
    y(y_mean)


def fixed() -> None:
    y(0.0)


def misnamed() -> None:
    pyro.sample("mu", dist.Normal(0.0, 1.0))


def longer() -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", 2):
        y(mu)


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        (discrete, "the latent site 'switch' is discrete: sum it out"),
        (changing, "its sites change from run to run"),
        (drawing_apart, "its density at given latents changes: let it draw by pyro.sample only"),
        (parameter, "it has the parameter 'slope': give it a prior"),
        (subsampled, "plate 'rows' is subsampled"),
        (scaled, "the latent site 'mu' is scaled or masked"),
        (masked, "the latent site 'mu' has a masked distribution, which is no density"),
        (concentrated, "the latent site 'twice' has a delta distribution, which is no density"),
        (without_bijection, "the support of the latent site 'mu'"),
        (boxes, "the support of the latent site 'mu'"),
        (improper, r"cannot be drawn from \(.*\): give it proper priors"),
        (circular, "the latent site 'angle' has a distribution on the circle, which is no density on R"),
        (fixed, "it has no latent site"),
        (misnamed, "there is no site 'y' for what was observed; its sites are mu"),
        (longer, r"site 'y' has the shape \(2,\); what was observed has \(\)"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_a_program_that_is_no_problem_is_refused_in_one_line(program: Callable[[], object], reason: str) -> None:
    with pytest.raises(UserError, match=reason) as caught:
        model_of(program, y=0.3)
    assert str(caught.value).startswith("program: ")
    assert "\n" not in str(caught.value)
    assert not dict(pyro.get_param_store().named_parameters())

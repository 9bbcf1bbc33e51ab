"""`ais` against exact answers: closed forms, quadrature, any prior, a single observation, every start.

Tolerances are in stated errors of the mean over observations, apart from the bias of a logarithm, -Var/2, which follows
from the same errors. A right number is beyond three of them once in 400 times, beyond four once in 16,000.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from harness import compare
from harness.clock import Clock
from harness.evaluator import EvaluationRun, Measurement
from harness.method import Budget, Fit, Run
from harness.model import LatentModel, log_normal
from harness.options import UserError
from harness.posterior import Posterior
from harness.problem import DatasetSpec, DeviceData, ModelSpec, Problem, Trunk, placed
from harness.registry import Registry
from harness.seeding import Streams
from harness_plugins.ais import AIS
from harness_plugins.exact import quadrature
from harness_plugins.four_points import FourPoints
from harness_plugins.vae import VAE

CPU, DOUBLE = torch.device("cpu"), torch.float64


@torch.no_grad()
def measure(fit: Fit, problem: Problem, run: EvaluationRun, **settings: Any) -> Measurement:
    (measured,) = AIS(**settings).measure(fit, problem, run)
    return measured


def off_by(measured: Measurement, exact: np.ndarray) -> float:
    """Stated errors between the mean over observations and the truth, once the bias of the logarithm is taken off."""
    error = measured.values - exact + np.square(measured.stderrs) / 2
    return abs(float(error.mean())) / measured.stderr


# A linear-Gaussian model with correlated posteriors

SIZES = [  # dimensions, start, temperatures, observations; nats
    (2, "moments", 60, 100, 0.02),
    (2, "prior", 200, 100, 0.05),
    (2, "q", 60, 100, 0.02),
    (10, "moments", 120, 100, 0.05),
    (10, "prior", 400, 50, 0.15),
    (50, "moments", 200, 40, 0.1),
    (50, "prior", 800, 20, 0.3),
]


class WithDensity(Posterior):
    """A posterior whose density is known at every point."""

    def __init__(self, posterior: Any) -> None:
        self.posterior = posterior

    def sample(self, x: Tensor, n: int, generator: torch.Generator) -> Tensor:
        return self.posterior.sample(x, n, generator)

    def log_prob(self, x: Tensor, z: Tensor) -> Tensor:
        return log_normal(z, self.posterior.mean(x), self.posterior.sd.log())


@pytest.mark.parametrize(("latent_dim", "start", "temperatures", "observations", "nats"), SIZES)
def test_log_p_of_a_linear_gaussian_model(
    oracle_of, latent_dim: int, start: str, temperatures: int, observations: int, nats: float
) -> None:
    oracle = oracle_of(latent_dim=latent_dim, data_dim=latent_dim + 5, noise=0.3, n_test=observations)
    posterior = WithDensity(oracle.mean_field(widening=1.2 if start == "q" else 1.0))
    settings = {"start": start, "temperatures": temperatures, "leapfrog": 5}
    measured = measure(oracle.fit(posterior), oracle.problem, oracle.run, **settings)
    exact = oracle.model.log_evidence(oracle.x).numpy()
    assert off_by(measured, exact) < 3
    assert abs(measured.value - exact.mean()) < nats
    assert measured.settings["acceptance"] == pytest.approx(0.65, abs=0.03)


@pytest.mark.parametrize("posterior", ["implicit", "far off", "collapsed"])
def test_a_bad_start_gives_a_lower_bound_and_a_large_error(oracle, posterior: str) -> None:
    """Few temperatures from the wrong place: on average below the truth, by more where it is worse."""
    fits = {
        "implicit": oracle.implicit(),
        "far off": oracle.mean_field(shift=4.0),
        "collapsed": oracle.mean_field(widening=1e-9),
    }
    measured = measure(
        oracle.fit(fits[posterior]), oracle.problem, oracle.run, temperatures=10, leapfrog=3, chains=4, observations=300
    )
    error = measured.values - oracle.model.log_evidence(oracle.run.data.scored(300)[0]).numpy()
    stderr = error.std(ddof=1) / math.sqrt(len(error))
    if posterior == "implicit":
        assert abs(error.mean()) < 0.1
    else:
        assert error.mean() < -0.3
    assert error.mean() < 3 * stderr
    w = np.exp(error)
    assert w.mean() < 1 + 4 * w.std(ddof=1) / math.sqrt(len(w))


# A hierarchical model: a prior that is no standard normal, no parameters, one observation


class Schools(LatentModel):
    r"""mu ~ N(m, s^2), theta_j ~ N(mu, tau^2), y_j ~ N(theta_j, sigma_j^2); z = (mu, theta_1, ..., theta_J)."""

    MEAN, SPREAD, BETWEEN = 5.0, 3.0, 2.0

    def __init__(self, sigma: Tensor) -> None:
        super().__init__()
        self.latent_dim = len(sigma) + 1
        self.sigma: Tensor
        self.register_buffer("sigma", sigma)

    def sample_prior(self, n: int, generator: torch.Generator) -> Tensor:
        z = torch.randn(n, self.latent_dim, generator=generator, dtype=self.sigma.dtype)
        mu = self.MEAN + self.SPREAD * z[:, :1]
        return torch.cat([mu, mu + self.BETWEEN * z[:, 1:]], dim=1)

    def log_prior(self, z: Tensor) -> Tensor:
        mu, theta = z[..., :1], z[..., 1:]
        return log_normal(mu, self.MEAN, math.log(self.SPREAD)) + log_normal(theta, mu, math.log(self.BETWEEN))

    def log_likelihood(self, x: Tensor, z: Tensor) -> Tensor:
        return log_normal(x, z[..., 1:], self.sigma.log())

    def marginal(self) -> torch.distributions.MultivariateNormal:
        """p(y), a Gaussian, in float64."""
        ones = torch.ones(len(self.sigma), len(self.sigma), dtype=DOUBLE)
        covariance = self.SPREAD**2 * ones + torch.diag(self.BETWEEN**2 + self.sigma.double().square())
        return torch.distributions.MultivariateNormal(self.MEAN * ones[0], covariance)


@dataclass(frozen=True)
class SchoolsSpec(ModelSpec):
    sigma: tuple[float, ...]

    def new_model(self, event_shape: tuple[int, ...]) -> LatentModel:
        return Schools(torch.tensor(self.sigma))

    def encoder_trunk(self, event_shape: tuple[int, ...], noise_dim: int) -> Trunk:
        raise NotImplementedError

    def pair_trunk(self, event_shape: tuple[int, ...]) -> Trunk:
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class SchoolsProblem(Problem):
    name: str = "schools"

    @property
    def default_budget(self) -> str:
        return "steps=1"

    def dataset(self) -> DatasetSpec:
        y = np.array([[28.0, 8.0, -3.0, 7.0]])
        return DatasetSpec(self.name, y, y, y, exhaustive=True)

    def model_spec(self) -> ModelSpec:
        return SchoolsSpec((5.0, 3.0, 4.0, 2.0))


class Rough(Posterior):
    """Independent normals, roughly where the posterior is."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.mean = torch.tensor([6.0, 10.0, 7.0, 3.0, 6.5], dtype=dtype)
        self.sd = torch.tensor([2.0, 2.5, 2.0, 2.0, 1.5], dtype=dtype)

    def sample(self, x: Tensor, n: int, generator: torch.Generator) -> Tensor:
        return self.mean + self.sd * torch.randn(n, len(x), 5, generator=generator, dtype=self.mean.dtype)


@pytest.mark.parametrize("start", ["prior", "moments"])
@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
def test_evidence_of_a_hierarchical_model_from_one_observation(start: str, dtype: torch.dtype) -> None:
    problem = SchoolsProblem()
    data = DeviceData.place(problem.dataset(), CPU, dtype)
    run = EvaluationRun(data, problem, CPU, dtype, 0)
    model = problem.model_spec().new_model((4,)).to(dtype)
    assert isinstance(model, Schools)
    settings = {"start": start, "temperatures": 100, "chains": 200, "leapfrog": 4}
    measured = measure(Fit(model, Rough(dtype), {}), problem, run, **settings)
    exact = model.marginal().log_prob(data.test.double()).numpy()
    assert off_by(measured, exact) < 3
    assert 0 < measured.stderr < 0.1
    assert measured.stderr_test == 0


# The toy of the paper


@pytest.mark.parametrize("steps", [0, 400])
def test_four_points_agree_with_quadrature(steps: int) -> None:
    problem, streams = FourPoints(width=16), Streams(0, "four-points", "vae", CPU)
    view = problem.training_view(placed(problem, CPU, torch.float32), streams)
    run = Run(CPU, torch.float32, Budget.parse(f"steps={max(1, steps)}"), streams, Clock(CPU))
    method = VAE(lr=1e-12) if steps == 0 else VAE(lr=1e-2)
    with run.clock.phase("fit"), streams.initial_weights(shared=False):
        fit = method.fit(view, run)
    evaluation = EvaluationRun(placed(problem, CPU, torch.float32), problem, CPU, torch.float32, 0)
    measured = measure(fit, problem, evaluation, temperatures=250, chains=1000, leapfrog=5)
    exact = quadrature(fit.model, evaluation.data.test)[0].numpy()
    assert abs(exact.mean() + math.log(4)) < 0.3 if steps else exact.mean() < -2.5
    assert measured.stderr < 0.004
    assert abs(measured.value - exact.mean()) < 0.01
    assert (np.abs(measured.values - exact) < 4 * measured.stderrs).all()


# What is recorded

QUICK: dict[str, Any] = {"temperatures": 20, "leapfrog": 2, "chains": 4, "observations": 10, "moment_samples": 32}


def test_settings_diagnostics_and_traces_are_recorded(oracle) -> None:
    measured = measure(oracle.fit(oracle.implicit()), oracle.problem, oracle.run, **QUICK)
    assert (measured.metric, measured.kind, measured.bounds, measured.split) == (
        "log_likelihood",
        "stochastic lower bound",
        "",
        "test",
    )
    settings = dict(measured.settings)
    json.dumps(settings, allow_nan=False)
    asked = {"chains": 4, "temperatures": 20, "leapfrog": 2, "schedule": "sigmoid", "start": "moments"}
    assert settings.items() >= {**asked, "widening": 1.2, "moment_samples": 32, "target_acceptance": 0.65}.items()
    assert 1 <= settings["ess_min"] <= settings["ess_median"] <= 4
    assert settings["force_precision"] == "float32"  # of a small decoder, on whatever processor
    traces = measured.traces
    assert {name: trace.shape for name, trace in traces.items()} == {
        "acceptance": (19,),
        "temperature": (20,),
        "running": (20, 10),
    }
    assert settings["acceptance"] == pytest.approx(traces["acceptance"].mean())
    assert settings["acceptance_min"] == pytest.approx(traces["acceptance"].min())
    np.testing.assert_allclose(traces["running"][-1], measured.values)
    assert measured.indices.tolist() == oracle.run.data.scored(10)[1].tolist()


def test_evaluators_of_a_fit_share_one_run_and_other_settings_have_their_own(oracle) -> None:
    fit, told = oracle.fit(oracle.implicit()), []
    run = replace(oracle.run, progress=lambda part, facts: told.append((part, facts)))
    first = measure(fit, oracle.problem, run, **QUICK)
    assert [part for part, _ in told] == pytest.approx([i / 20 for i in range(1, 21)])
    assert all("acceptance 0." in facts and "log p(x) so far -" in facts for _, facts in told)
    again = measure(fit, oracle.problem, run, **QUICK)
    assert len(told) == 20
    assert np.array_equal(first.values, again.values)
    for change in ({"chains": 5}, {"widening": 2.0}, {"acceptance": 0.5}, {"observations": 9}, {"schedule": "linear"}):
        other = measure(fit, oracle.problem, run, **{**QUICK, **change})
        assert not np.array_equal(other.values[:9], first.values[:9])


def test_noise_is_the_same_for_all_methods_and_another_for_another_seed(oracle) -> None:
    """Posteriors that give the same draws are the same to `ais`, whatever else they know."""
    posterior = oracle.mean_field()
    one, two = (
        measure(oracle.fit(q), oracle.problem, replace(oracle.run, found={}), **QUICK).values
        for q in (posterior, WithDensity(posterior))
    )
    other = measure(oracle.fit(posterior), oracle.problem, replace(oracle.run, found={}, seed=1), **QUICK).values
    assert np.array_equal(one, two)
    assert not np.isin(other, one).any()


# What a user may get wrong


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("ais[chains=1]", "greater than or equal to 2"),
        ("ais[temperatures=1]", "greater than or equal to 2"),
        ("ais[leapfrog=0]", "greater than 0"),
        ("ais[schedule=cosine]", "'sigmoid' or 'linear'"),
        ("ais[start=posterior]", "'moments', 'prior' or 'q'"),
        ("ais[widening=0]", "greater than 0"),
        ("ais[widening=inf]", "finite"),
        ("ais[acceptance=1]", "less than 1"),
        ("ais[moment_samples=1]", "greater than or equal to 2"),
        ("ais[memory_mib=0]", "greater than 0"),
        ("ais[steps=3]", r"unknown option of ais 'steps'; known: acceptance, chains"),
        ("bdmc[threshold=0]", "greater than 0"),
        ("bdmc[temperature=10]", "did you mean 'temperatures'"),
    ],
)
def test_mistakes_are_met_with_what_was_expected(text: str, reason: str) -> None:
    with pytest.raises(UserError, match=reason) as raised:
        Registry.discover().select("evaluators", text)
    assert "\n" not in str(raised.value)


def test_a_start_without_a_density_is_a_skipped_row_with_its_reason(tmp_path) -> None:
    quick = "temperatures=3,leapfrog=1,chains=2,observations=4,moment_samples=8"
    evaluators = f"ais[start=q,{quick}],bdmc[start=q,{quick}]"
    found = compare(
        methods="avb,vae", problems="four-points", seeds=1, budget="steps=2", evaluators=evaluators, out=tmp_path
    )
    implicit, explicit = found[found["method"] == "avb"], found[found["method"] == "vae"]
    assert implicit["status"].tolist() == ["skipped", "skipped"]  # one row for each evaluator
    assert implicit["reason"].str.contains("start=moments").all()
    assert set(explicit["status"]) == {"ok"}

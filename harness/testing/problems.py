"""Laws of data sets and problems: what is said of the data is true, and the model is a density with gradients."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor

from harness.method import Budget
from harness.model import CanSimulate, LatentModel
from harness.options import UserError
from harness.problem import (
    DataError,
    Dataset,
    DatasetSpec,
    DeviceData,
    Problem,
    TrainingView,
    check_data,
    check_suited,
)
from harness.seeding import Streams
from harness.testing.exact import check_exact_answers
from harness.testing.laws import (
    ConformanceError,
    check_options,
    in_single_precision,
    require,
    require_close,
    require_equal,
    require_mean,
    require_shape,
    require_single,
    untouched,
)
from harness.testing.normalisation import require_normalised
from harness.testing.posteriors import DRAWS, stream

CPU = torch.device("cpu")
NEAR = 0.05  # of the way from one draw of z to another: so near that p(x|z') / p(x|z) has no heavy tail


def check_dataset(dataset: Dataset) -> None:
    """Everything that the harness asks of a data set that is embedded or has been fetched.

    Raises:
        ConformanceError: If a law does not hold.
        DataError: If the data have not been fetched.
    """
    check_options(dataset, Dataset)
    with untouched(f"{dataset.name}: load"):
        spec = dataset.load()
    _check_spec(spec)
    require(dataset.load().content_hash == spec.content_hash, f"{dataset.name}: loading twice gives different data")


def check_problem(problem: Problem) -> None:
    """Everything that the harness asks of a problem.

    Raises:
        ConformanceError: If a law does not hold.
        DataError: If its data have not been fetched.
    """
    check_options(problem, Problem)
    Budget.parse(problem.default_budget)
    require(problem.optimum is None or math.isfinite(problem.optimum), f"{problem.name}: optimum {problem.optimum}")
    spec = problem.dataset()
    _check_spec(spec)
    require(problem.dataset().content_hash == spec.content_hash, f"{problem.name}: loading twice gives different data")
    _check_suited(problem)
    data = DeviceData.place(spec, CPU, torch.float64)
    with untouched(f"{problem.name}: training_view"):
        view = problem.training_view(data, Streams(0, problem.label, "one-method", CPU))
        other = problem.training_view(data, Streams(0, problem.label, "another-method", CPU))
    for key, tensor in view.model.state_dict().items():
        require_equal(other.model.state_dict()[key], tensor, f"{problem.name}: initial {key!r} for two methods")
    _check_trunks(view)
    _check_model(view.model, view.validation[:3])
    data = DeviceData.place(spec, CPU, torch.float32)
    view = problem.training_view(data, Streams(0, problem.label, "one-method", CPU))
    _check_single_precision(view.model, view.validation[:3])


def _check_spec(spec: DatasetSpec) -> None:
    try:
        check_data(spec)
    except DataError as error:
        raise ConformanceError(str(error)) from None


def _check_suited(problem: Problem) -> None:
    try:
        check_suited(problem)
    except (DataError, UserError) as error:
        raise ConformanceError(str(error)) from None


def _check_trunks(view: TrainingView) -> None:
    x = view.validation[:3]
    z = torch.zeros(2, len(x), view.latent_dim, dtype=x.dtype)
    plain, noisy, pair = view.encoder_trunk().to(x), view.encoder_trunk(5).to(x), view.pair_trunk().to(x)
    require_shape(plain(x), (len(x), plain.features), "encoder_trunk()(x)")
    features = noisy(x, torch.ones(2, len(x), 5, dtype=x.dtype))  # a trunk without layers has nowhere to inject it
    require_shape(features.expand(2, -1, -1), (2, len(x), noisy.features), "encoder_trunk(5)(x, noise)")
    require_shape(pair(x, z), (2, len(x), pair.features), "pair_trunk()(x, z)")


def _check_model(model: LatentModel, x: Tensor) -> None:
    with untouched("LatentModel.sample_prior"):
        prior = model.sample_prior(DRAWS, stream(0))
    require_shape(prior, (DRAWS, model.latent_dim), "sample_prior")
    require_equal(model.sample_prior(DRAWS, stream(0)), prior, "sample_prior from the same generator twice")
    require_shape(model.log_prior(prior), (DRAWS,), "log_prior")
    require_normalised(partial(_prior_draws, model), model.log_prior, 5, "log_prior")
    _check_likelihood(model, x if len(x) > 1 else x.expand(3, *x.shape[1:]))
    if isinstance(model, CanSimulate):
        z = model.sample_prior(2, stream(1))
        require_shape(model.mean(z), (2, *x.shape[1:]), "mean")
        require_shape(model.sample_observation(z, stream(2)), (2, *x.shape[1:]), "sample_observation")
        _check_simulation(model)
    check_exact_answers(model, x)


@torch.no_grad()
def _check_single_precision(model: LatentModel, x: Tensor) -> None:
    """What a run in float32 asks of the model is finite and of that precision."""
    with in_single_precision("sample_prior"):
        z = model.sample_prior(DRAWS, stream(0))
    require_single(z, (DRAWS, model.latent_dim), "sample_prior")
    with in_single_precision("log_prior"):
        log_prior = model.log_prior(z)
    require_single(log_prior, (DRAWS,), "log_prior")
    with in_single_precision("log_likelihood"):
        log_likelihood = model.log_likelihood(x, z[:6, None])
    require_single(log_likelihood, (6, len(x)), "log_likelihood")
    if isinstance(model, CanSimulate):
        with in_single_precision("mean and sample_observation"):
            mean, observed = model.mean(z[:2]), model.sample_observation(z[:2], stream(2))
        require_single(mean, (2, *x.shape[1:]), "mean")
        require_single(observed, (2, *x.shape[1:]), "sample_observation")


@torch.no_grad()
def _check_simulation(model: Any) -> None:
    """E_{p(x|z)}[p(x|z') / p(x|z)] = 1 for z' near z; and x lies around its mean."""
    z = model.sample_prior(2, stream(3))
    for latent in z:
        many = latent.expand(DRAWS, -1)
        x = model.sample_observation(many, stream(4))
        average = x.flatten(1).mean(1, keepdim=True)
        require_mean(average, model.mean(latent[None]).mean(), "sample_observation against mean")
        near = latent + NEAR * (z[0] - z[1])
        ratio = model.log_likelihood(x, near.expand(1, DRAWS, -1)) - model.log_likelihood(x, many[None])
        require_mean(
            torch.exp(ratio[0])[:, None], 1.0, "p(x|z') / p(x|z) of x that sample_observation draws from p(x|z)"
        )


def _prior_draws(model: LatentModel, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    z = model.sample_prior(n, generator)
    return z, model.log_prior(z)


def _check_likelihood(model: LatentModel, x: Tensor) -> None:
    z = model.sample_prior(2 * len(x), stream(1)).unflatten(0, (2, len(x)))
    with untouched("log_likelihood"):
        paired = model.log_likelihood(x, z)
    require_shape(paired, (2, len(x)), "log_likelihood(x, z) of paired (N, *E) and (S, N, D)")
    require_close(model.log_joint(x, z), paired + model.log_prior(z), "log_joint and log_likelihood + log_prior")
    crossed = model.log_likelihood(x, z[:, :1])
    require_shape(crossed, (2, len(x)), "log_likelihood(x, z) of every z with every x, z of shape (S, 1, D)")
    require_close(crossed, model.log_likelihood(x, z[:, :1].expand_as(z)), "log_likelihood crossed and paired")
    named = dict(model.named_parameters())
    if named:
        gradients = torch.autograd.grad(paired.sum(), list(named.values()), allow_unused=True)
        missing = [key for key, gradient in zip(named, gradients, strict=True) if gradient is None]
        require(not missing, f"log_likelihood gives no gradient to {missing}")

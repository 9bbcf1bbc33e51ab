"""What becomes of what a method of one's own returns: it is kept whole, or the fit fails and says what is wrong."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pandas as pd
import pytest
import torch
from torch import Tensor

import harness
from harness.method import Fit, Method, Run
from harness.model import log_normal
from harness.options import UserError
from harness.posterior import Posterior
from harness.problem import TrainingView
from harness.pyro_problem import PyroProblem
from harness.report.build import tables_of
from harness.report.notes import notes
from harness.report.tables import Table
from harness.store import Store
from harness_plugins.four_points import FourPoints
from harness_plugins.vae import VAE

SMALL: dict[str, Any] = {"problems": [FourPoints(width=8)], "seeds": 1, "evaluators": "exact,elbo[samples=3]"}


class Gaussian(Posterior):
    """The same for every x."""

    def __init__(self, mean: Tensor) -> None:
        self.mean = mean

    def sample(self, x: Tensor, n: int, generator: torch.Generator) -> Tensor:
        eps = torch.randn((n, len(x), len(self.mean)), generator=generator, device=x.device, dtype=x.dtype)
        return self.mean.to(x.dtype) + eps

    def sample_and_log_prob(self, x: Tensor, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        z = self.sample(x, n, generator)
        return z, log_normal(z, self.mean.to(x.dtype))


@dataclass(frozen=True, kw_only=True)
class Own(Method):
    """Moves the model and its mean by one, in as many steps and seconds as it is told."""

    name: str = "own"
    form: str = ""
    steps: int = 5
    seconds: float = 0.0

    def fit(self, view: TrainingView, run: Run) -> Fit:
        time.sleep(self.seconds)
        with torch.no_grad():
            for parameter in view.model.parameters():
                parameter.add_(0.1)
        mean = torch.ones(view.latent_dim, dtype=run.dtype)
        learned = dict(view.model.named_parameters())
        state: dict[str, Any] = {
            "": lambda: {"mean": mean, **{name: tensor.detach() for name, tensor in learned.items()}},
            "with gradients": lambda: {"mean": mean.requires_grad_(), **learned},
            "half": lambda: {"mean": mean.bfloat16(), **learned},
            "without the model": lambda: {"mean": mean},
            "without the posterior": lambda: {"mean": 0 * mean, **learned},
            "no tensors": lambda: {"mean": mean.numpy(), **learned},
            "none": dict,
        }[self.form]()
        if self.form == "none":
            return cast(Fit, None)
        return Fit(model=view.model, posterior=Gaussian(mean), state=state, steps=self.steps)

    def restore(self, view: TrainingView, state: Mapping[str, Tensor]) -> Fit:
        learned = {name: tensor for name, tensor in state.items() if name != "mean"}
        if learned:
            view.model.load_state_dict(learned)
        return Fit(model=view.model, posterior=Gaussian(state["mean"]), state=state)


def of(records: pd.DataFrame, column: str) -> list[Any]:
    return records[column].unique().tolist()


@pytest.mark.parametrize("form", ["", "with gradients", "half"])
def test_a_state_of_tensors_of_any_kind_is_kept(form: str, tmp_path: Path) -> None:
    records = harness.compare(Own(form=form), budget="steps=5", out=tmp_path, **SMALL)
    assert of(records, "status") == ["ok"], of(records, "reason")
    [job_id] = of(records, "job_id")
    assert Store(tmp_path).state(job_id)["mean"].tolist() == [1.0, 1.0]


@pytest.mark.parametrize(
    ("form", "reason"),
    [
        ("without the model", "ValueError: own: restore(view, state) gives another fit back, the model's "),
        ("without the posterior", "ValueError: own: restore(view, state) gives another fit back, the posterior being "),
        ("no tensors", "TypeError: the state of a fit is of tensors; 'mean' is a ndarray"),
        ("none", "TypeError: own: fit must return a harness.method.Fit; got NoneType"),
    ],
)
def test_a_fit_that_cannot_be_given_back_is_a_failed_one(form: str, reason: str, tmp_path: Path) -> None:
    """Else what is measured later would be another fit than what was measured at once."""
    records = harness.compare([Own(form=form), VAE(batch_size=4)], budget="steps=5", out=tmp_path, **SMALL)
    own, vae = (records[records["method"] == name] for name in ("own", "vae"))
    assert of(own, "status") == ["failed"]
    assert own["reason"].iloc[0].startswith(reason), own["reason"].iloc[0]
    assert of(vae, "status") == ["ok"]


def table(out: Path, *methods: Method, budget: str) -> Table:
    options = {**SMALL, "seeds": 2, "evaluators": "exact"}
    harness.compare(methods, budget=budget, out=out, **options)
    store = Store(out)
    [found] = tables_of(store.records(), store.examples())
    return found


@pytest.mark.parametrize(
    ("budget", "method", "told"),
    [
        ("steps=5", Own(), ""),
        ("steps=5", Own(steps=1234), "own: took 1,234 steps, more than its budget: not ranked"),
        ("seconds=0.2", Own(seconds=0.01), ""),
        ("seconds=0.2", Own(seconds=0.5), "own: took 0.5"),
    ],
)
def test_who_takes_more_than_the_budget_is_told_of(budget: str, method: Own, told: str, tmp_path: Path) -> None:
    found = table(tmp_path, method, VAE(batch_size=4), budget=budget)
    lines = [line for line in notes(found) if "more than its budget" in line]
    assert len(lines) == bool(told)
    assert all(line.startswith(told) for line in lines)
    assert not any(row.best for row in found.rows if row.beyond)


def test_a_job_may_be_named_by_the_beginning_of_its_id(tmp_path: Path) -> None:
    records = harness.compare("vae", budget="steps=5", out=tmp_path, **{**SMALL, "problems": "four-points", "seeds": 2})
    first, second = of(records, "job_id")
    common = next(n for n in range(17) if first[: n + 1] != second[: n + 1])
    assert harness.load(tmp_path, first[: common + 1]).state
    with pytest.raises(UserError, match="2 jobs begin with ''"):
        harness.load(tmp_path, "")
    with pytest.raises(UserError, match="unknown job 'xyz'"):
        harness.load(tmp_path, "xyz")


@dataclass(frozen=True, kw_only=True)
class FactorAlone(PyroProblem):
    """w ~ N(0, 1) with a factor exp(-(w - 1)^2): nothing is observed."""

    name: str = "factor-alone"

    def observed(self) -> dict[str, Any]:
        return {}

    def pyro_model(self) -> None:
        import pyro
        import pyro.distributions as dist

        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        pyro.factor("f", -(w - 1).square())


def test_a_program_of_which_nothing_is_observed_is_measured(tmp_path: Path) -> None:
    """log Z = log of the integral of N(w; 0, 1) exp(-(w - 1)^2) = -1/3 - log(3)/2."""
    records = harness.compare("full-rank", [FactorAlone()], 1, budget="steps=50", evaluators="exact,elbo", out=tmp_path)
    assert of(records, "status") == ["ok"], of(records, "reason")
    [exact] = records.loc[records["metric"] == "log_likelihood", "value"]
    assert exact == pytest.approx(-1 / 3 - 0.5 * torch.tensor(3.0).log().item(), abs=1e-5)

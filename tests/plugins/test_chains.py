"""Diagnostics of Markov chains: what they find, what they leave out, and the warnings that they carry."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from harness.evaluator import EvaluationRun, Measurement
from harness.method import Fit
from harness.mixing import diagnostics
from harness.model import LatentModel
from harness.posterior import ChainPosterior
from harness.problem import placed
from harness.testing import SmallGaussianProblem
from harness.testing.small import SmallGaussianModel, known_fit, view_of
from harness_plugins.chains import Chains

CPU = torch.device("cpu")


def independent(generator: torch.Generator, *shift: float) -> Tensor:
    """Four chains of 400 independent draws in two dimensions, each moved by its shift: (4, 400, 1, 2)."""
    draws = torch.randn(4, 400, 1, 2, generator=generator, dtype=torch.float64)
    return draws + torch.tensor([*shift, *[0.0] * (4 - len(shift))], dtype=torch.float64)[:, None, None, None]


def measured(draws: Tensor, divergences: Tensor | None = None, model: LatentModel | None = None, **settings: float):
    problem = SmallGaussianProblem()
    run = EvaluationRun(placed(problem, CPU, torch.float64), problem, CPU, torch.float64, 0)
    divergences = torch.zeros(len(draws), dtype=torch.int64) if divergences is None else divergences
    fit = Fit(model or SmallGaussianModel(), ChainPosterior(draws, divergences), {})
    found = {each.metric: each for each in Chains(**settings).measure(fit, problem, run)}  # type: ignore[arg-type]
    assert list(found) == ["r_hat_max", "ess_bulk_min", "ess_tail_min", "divergences"]
    return found


def warnings(found: dict[str, Measurement]) -> list[str]:
    return [each.warning for each in found.values() if each.warning]


def test_independent_draws_carry_no_warning(generator: torch.Generator) -> None:
    """R-hat - 1 is of the order of 1/400; of 1,600 draws all are effective, up to the noise of the estimate."""
    found = measured(independent(generator))
    assert warnings(found) == []
    assert found["r_hat_max"].value < 1.01
    assert 1200 < found["ess_bulk_min"].value < 2000
    assert found["divergences"].value == 0
    assert all(each.kind == "exact" and not each.stderrs.any() and each.exhaustive for each in found.values())


def test_a_chain_that_is_elsewhere_is_found_in_the_quantity_where_it_is(generator: torch.Generator) -> None:
    draws = independent(generator)
    draws[2, :, :, 1] += 3
    found = measured(draws)
    r_hat = found["r_hat_max"]
    assert r_hat.value > 1.1
    assert r_hat.settings["quantity"] == "z[1]"
    assert r_hat.settings["quantities"]["z[0]"] < 1.01
    assert r_hat.warning == f"R-hat of z[1] is {r_hat.value:.3f}, above 1.01: chains disagree"
    assert warnings(measured(draws, r_hat=100.0, ess_per_chain=0.0)) == []


def test_chains_of_one_mean_and_other_scales_disagree_too(generator: torch.Generator) -> None:
    """What the rank-normalised R-hat of distances to the median is for: means alone do not tell."""
    draws = independent(generator)
    draws[0] *= 10
    assert measured(draws)["r_hat_max"].value > 1.05


def test_draws_that_resemble_each_other_are_worth_fewer(generator: torch.Generator) -> None:
    """An autoregression with coefficient 0.5 is worth (1 - 0.5) / (1 + 0.5) of its draws: 533 of 1,600.

    The estimate has an error of 14 % (standard deviation of twenty simulations): within four of them.
    """
    noise, draws = independent(generator), torch.zeros(4, 400, 1, 2, dtype=torch.float64)
    for t in range(1, 400):
        draws[:, t] = 0.5 * draws[:, t - 1] + noise[:, t]
    found = measured(draws, ess_per_chain=250.0)
    assert abs(found["ess_bulk_min"].value / 533 - 1) < 4 * 0.14
    assert found["ess_bulk_min"].warning.endswith("for its bulk, fewer than 1000")


def test_divergences_are_told(generator: torch.Generator) -> None:
    found = measured(independent(generator), torch.tensor([0, 2, 0, 1]))
    assert found["divergences"].value == 3
    assert found["divergences"].settings["of_each_chain"] == [0, 2, 0, 1]
    assert found["divergences"].warning == "transitions that diverged: 3; a part may be left out"


class Named(SmallGaussianModel):
    """Quantities of which one never changes."""

    def quantities(self, z: Tensor) -> dict[str, Tensor]:
        return {"scale": z[..., 0].exp(), "one": torch.ones_like(z[..., 0])}


def test_quantities_are_those_of_the_model_and_what_never_changes_is_left_out(generator: torch.Generator) -> None:
    found = measured(independent(generator, 0.0, 3.0), model=Named())
    assert list(found["r_hat_max"].settings["quantities"]) == ["scale"]
    with pytest.raises(ArithmeticError, match="not finite for some draws: scale"):
        measured(independent(generator, 1000.0), model=Named())


def test_chains_that_do_not_move_give_no_number() -> None:
    for place in (torch.zeros(4), torch.arange(4.0)):
        with pytest.raises(ArithmeticError, match="no chain has moved"):
            measured(place.double()[:, None, None, None].expand(4, 20, 1, 2))


def test_r_hat_is_that_of_its_definition(generator: torch.Generator) -> None:
    """Of normal scores of ranks, in halves of chains: Vehtari et al. 2021."""
    from scipy.stats import norm, rankdata

    def r_hat(values: np.ndarray) -> float:
        ranks = rankdata(values).reshape(values.shape)
        scores, n = np.asarray(norm.ppf((ranks - 3 / 8) / (values.size + 1 / 4))), values.shape[1]
        between, within = n * scores.mean(1).var(ddof=1), scores.var(1, ddof=1).mean()
        return float(np.sqrt((between / within + n - 1) / n))

    draws = independent(generator, 0.3)[:, :, 0, 0].numpy()
    halves = np.concatenate([draws[:, :200], draws[:, 200:]])
    expected = max(r_hat(halves), r_hat(np.abs(halves - np.median(halves))))
    assert diagnostics({"z": draws})["r_hat"]["z"] == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(("chains", "draws"), [(2, 4), (4, 1000), (8, 100)])
def test_chains_that_stand_still_apart_disagree_by_a_finite_number(chains: int, draws: int) -> None:
    """So that what else is known of them is told too."""
    moving = np.random.default_rng(0).normal(size=(chains, draws))
    still = np.repeat(np.arange(chains, dtype=float)[:, None], draws, axis=1)
    found = diagnostics({"mode": still, "z": moving})
    assert found["r_hat"]["mode"] == 1000
    assert found["r_hat"]["z"] < 3


def test_other_posteriors_are_skipped_with_the_reason() -> None:
    fit = known_fit(view_of(SmallGaussianProblem()))
    assert Chains().undefined(fit, SmallGaussianProblem()) == "the posterior has no Markov chains"

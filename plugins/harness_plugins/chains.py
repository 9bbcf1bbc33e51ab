"""Diagnostics of Markov chains: whether they agree, and how many independent draws theirs are worth.

What they are is in `harness.mixing`; the limits are what Vehtari et al. 2021 recommend, https://doi.org/10.1214/20-BA1221.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, ClassVar

import torch
from pydantic import NonNegativeFloat, PositiveFloat

from harness import hookimpl, mixing
from harness.evaluator import EvaluationRun, Evaluator, Measurement
from harness.method import Fit
from harness.mixing import diagnostics, quantities
from harness.posterior import HasChains
from harness.problem import Problem


@dataclass(frozen=True, kw_only=True)
class Chains(Evaluator):
    """`r_hat_max`, `ess_bulk_min` and `ess_tail_min` over all quantities, and `divergences` of all chains together.

    Quantities are those that the model names, else the coordinates of z; what never changes is left out. Each metric
    carries a warning where chains are not to be believed.

    Args:
        r_hat: The largest R-hat without a warning.
        ess_per_chain: The smallest effective sample size without a warning, for each chain; R-hat is not to be believed
            either where there is less.
    """

    modules: ClassVar[tuple[ModuleType, ...]] = (mixing,)

    name: str = "chains"
    r_hat: PositiveFloat = 1.01
    ess_per_chain: NonNegativeFloat = 100.0

    def undefined(self, fit: Fit, problem: Problem) -> str | None:
        return None if isinstance(fit.posterior, HasChains) else "the posterior has no Markov chains"

    def measure(self, fit: Fit, problem: Problem, run: EvaluationRun) -> list[Measurement]:
        assert isinstance(fit.posterior, HasChains)
        chains, diverged = fit.posterior.chains(), fit.posterior.divergences()
        found = [diagnostics(quantities(fit.model, chains[:, :, i])) for i in range(chains.shape[2])]
        sizes = {"chains": chains.shape[0], "draws": chains.shape[1]}
        total = [int(diverged.sum())] * len(found)
        return [
            self._extreme("r_hat_max", [each["r_hat"] for each in found], sizes, run),
            self._extreme("ess_bulk_min", [each["ess_bulk"] for each in found], sizes, run),
            self._extreme("ess_tail_min", [each["ess_tail"] for each in found], sizes, run),
            _measurement(
                run,
                "divergences",
                total,
                unit="transitions",
                settings={**sizes, "of_each_chain": diverged.tolist()},
                warning=f"transitions that diverged: {total[0]}; a part may be left out" if total[0] else "",
            ),
        ]

    def _extreme(
        self, metric: str, of_each: Sequence[Mapping[str, float]], sizes: Mapping[str, int], run: EvaluationRun
    ) -> Measurement:
        """The worst value over quantities, for each observation."""
        pick = max if metric == "r_hat_max" else min
        names = [pick(found, key=found.__getitem__) for found in of_each]
        values = [found[name] for found, name in zip(of_each, names, strict=True)]
        name, value = names[values.index(pick(values))], pick(values)
        return _measurement(
            run,
            metric,
            values,
            unit="" if metric == "r_hat_max" else "draws",
            settings={**sizes, "quantity": name, "quantities": dict(of_each[0])},
            warning=self._warning(metric, name, value, sizes["chains"]),
        )

    def _warning(self, metric: str, name: str, value: float, chains: int) -> str:
        fewest = self.ess_per_chain * chains
        if metric == "r_hat_max":
            return (
                f"R-hat of {name} is {value:.3f}, above {self.r_hat:g}: chains disagree" if value > self.r_hat else ""
            )
        part = "bulk" if metric == "ess_bulk_min" else "tails"
        return f"draws of {name} are worth {value:.0f} for its {part}, fewer than {fewest:g}" if value < fewest else ""


def _measurement(run: EvaluationRun, metric: str, values: Sequence[float], **extra: Any) -> Measurement:
    """Numbers that are what they say, as functions of the draws."""
    found = torch.tensor(values, dtype=torch.float64)
    return run.measurement(metric, found, torch.zeros_like(found), "exact", torch.arange(len(found)), **extra)


@hookimpl
def harness_evaluators() -> list[Chains]:
    return [Chains()]

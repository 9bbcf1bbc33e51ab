r"""Draws of q(z|x) held against the exact posterior, and the floor: what as many exact draws give in their place.

Evaluators of this kind need nothing of a posterior but draws, so that implicit ones and chains are measured like any
other. They derive from `DrawsEvaluator` and say how far one set of draws is from p(z|x). Each observation is asked for
twice, with n draws of q(z|x) and with n exact draws in their place, both against the same n further exact draws. The
second answer is the *floor*: nothing below it can be told apart from the exact posterior with n draws, and what a
statistic owes to its own bias can be read from it. It has a row of its own beside the metric's, named with `FLOOR`.

Exact draws come from streams without a method's name: all methods of a comparison are held against the same ones.

Shapes: n draws, D latent dimensions, E event shape of one observation. One observation is drawn for at a time, by one
call each, since a posterior made of stored draws can keep them distinct within a call only; in float64 from there on.
"""

from __future__ import annotations

import dataclasses
import math
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
from pydantic import Field, PositiveInt
from torch import Tensor

from harness.evaluator import EvaluationRun, Evaluator, Kind, Measurement
from harness.method import Diverged, Fit
from harness.model import HasExactDraws, LatentModel
from harness.posterior import HasChains
from harness.problem import Problem

FLOOR = "_floor"
"""What a metric's name ends with where exact draws have the place of the posterior's."""

NO_EXACT_DRAWS = "model has no exact draws of its posterior"

BLOCKS = 20
APART = 4
"""Of so many draws of a chain one is compared, or the report says so."""


@dataclass(frozen=True, kw_only=True)
class Distance:
    """How far n draws are from the exact posterior of one observation, by one metric.

    Args:
        stderr: Standard error of the value over draws of either kind.
        facts: Numbers, or numbers by name, for the record's settings.
    """

    metric: str
    value: float
    stderr: float
    kind: Kind
    unit: str = "nats"
    bounds: str = ""
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Target:
    """p(z|x) of one observation, with two independent sets of exact draws where the model has them.

    Args:
        x: Shape (1, *E).
        draws: What other draws are compared with, shape (n, D).
        scale: What units and kernels are taken from, shape (n, D). Neither `draws` nor what is compared with them
            enters, so that a statistic stays unbiased, and the same for all.
        chains: Where what is compared are draws of Markov chains: all that these have kept, shape (C, m, D).
    """

    model: LatentModel
    x: Tensor
    draws: Tensor | None
    scale: Tensor | None
    chains: Tensor | None = None

    def standardised(self, z: Tensor) -> Tensor:
        """(n, D) in units of the exact posterior: less its mean, over its standard deviations; float64, on the CPU."""
        sd, mean = torch.std_mean(_known(self.scale), dim=0)
        return (z.double().cpu() - mean) / sd

    @property
    def reference(self) -> Tensor:
        """The exact draws that others are compared with, standardised, shape (n, D)."""
        return self.standardised(_known(self.draws))

    @property
    def units(self) -> Tensor:
        """The draws that units and kernels are taken from, standardised, shape (n, D)."""
        return self.standardised(_known(self.scale))


def _known(draws: Tensor | None) -> Tensor:
    if draws is None:
        raise TypeError(NO_EXACT_DRAWS)
    return draws.double().cpu()


@dataclass(frozen=True, kw_only=True)
class DrawsEvaluator(Evaluator):
    """Measures how far draws are from the exact posterior; a plugin writes `compare`.

    Args:
        observations: How many of the fixed scored test observations.
        samples: n, the draws of z per observation, of q and of every set of exact ones.
    """

    by_default: ClassVar[bool] = False
    needs: ClassVar[tuple[type, str]] = (HasExactDraws, NO_EXACT_DRAWS)
    """A capability of the model, and the reason where it is missing."""
    independent: ClassVar[bool] = True
    """Whether the value itself, not its error alone, is another one where draws resemble one another."""

    observations: PositiveInt = 5
    samples: Annotated[int, Field(ge=20)] = 10_000

    @abstractmethod
    def compare(self, z: Tensor, target: Target, stream: torch.Generator) -> Sequence[Distance]:
        """How far draws are from the exact posterior, by one metric or several, the same ones for any draws.

        Args:
            z: Draws of q(z|x), or for the floor exact ones, shape (n, D); independent of those of the target.
            stream: For what the statistic draws itself; the same for both, and for all methods.
        """

    def _crowded(self, chains: Tensor | None) -> str:
        """Why draws of chains are not to be believed as independent ones, or nothing."""
        kept = math.inf if chains is None else chains.shape[:2].numel()
        if not self.independent or kept >= APART * self.samples:
            return ""
        return (
            f"{self.samples:,} draws of chains that have kept {kept:,}: they resemble one another, which looks like a "
            f"distance; keep {APART * self.samples:,} or compare fewer (samples={kept // APART})"
        )

    def undefined(self, fit: Fit, problem: Problem) -> str | None:
        capability, reason = self.needs
        return None if isinstance(fit.model, capability) else reason

    def measure(self, fit: Fit, problem: Problem, run: EvaluationRun) -> list[Measurement]:
        x, indices = run.data.scored(self.observations)
        posterior_stream = run.generator("draws", "posterior")
        exact_streams = [run.generator("draws", purpose) for purpose in ("reference", "scale", "floor")]
        chains = fit.posterior.chains() if isinstance(fit.posterior, HasChains) else None
        found: list[Sequence[Distance]] = []
        floors: list[Sequence[Distance]] = []
        for i, one in enumerate(x.split(1)):
            draws, scale, again = (_exact(fit, one, self.samples, stream) for stream in exact_streams)
            target = Target(fit.model, one, draws, scale)
            z = _finite(fit.posterior.sample(one, self.samples, posterior_stream)[:, 0])
            own = target if chains is None else dataclasses.replace(target, chains=chains[:, :, i])
            found.append(self.compare(z, own, run.generator(self.name, f"statistic {i}")))
            if again is not None:
                floors.append(self.compare(again, target, run.generator(self.name, f"statistic {i}")))
            run.progress((i + 1) / len(x), f"{found[-1][0].metric} {found[-1][0].value:.3g}")
        warning = self._crowded(chains)
        return self._rows(run, indices, list(zip(*found, strict=True)), list(zip(*floors, strict=True)), warning)

    def _rows(
        self,
        run: EvaluationRun,
        indices: Tensor,
        found: Sequence[Sequence[Distance]],
        floors: Sequence[Sequence[Distance]],
        warning: str,
    ) -> list[Measurement]:
        """Each metric over all observations, followed by its floor, which its settings repeat."""
        settings = {name: value for name, value in self.config.items() if name != "observations"}
        measured: list[Measurement] = []
        for j, distances in enumerate(found):
            if not floors:
                measured.append(_measurement(run, indices, distances, "", settings, warning))
                continue
            floor = _measurement(run, indices, floors[j], FLOOR, settings)
            known = {"floor": floor.value, "floor_stderr": floor.stderr}
            measured += [_measurement(run, indices, distances, "", {**settings, **known}, warning), floor]
        return measured


def _exact(fit: Fit, x: Tensor, n: int, stream: torch.Generator) -> Tensor | None:
    if not isinstance(fit.model, HasExactDraws):
        return None
    return _finite(fit.model.sample_exact_posterior(x, n, stream)[:, 0])


def _finite(z: Tensor) -> Tensor:
    bad = int((~z.isfinite()).any(1).sum())
    if bad:
        raise Diverged(f"{bad:,} of {len(z):,} draws are not finite")
    return z


def _measurement(
    run: EvaluationRun,
    indices: Tensor,
    found: Sequence[Distance],
    suffix: str,
    settings: Mapping[str, Any],
    warning: str = "",
) -> Measurement:
    first = found[0]
    values, stderrs = (
        torch.tensor([getattr(each, name) for each in found], dtype=torch.float64) for name in ("value", "stderr")
    )
    return run.measurement(
        first.metric + suffix,
        values,
        stderrs,
        first.kind,
        indices,
        unit=first.unit,
        bounds=first.bounds,
        settings={**settings, **_averaged([each.facts for each in found])},
        warning=warning,
    )


def _averaged(facts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Numbers, or numbers by name, as their means over observations."""
    return {
        name: _averaged([each[name] for each in facts])
        if isinstance(value, Mapping)
        else float(np.mean([each[name] for each in facts]))
        for name, value in facts[0].items()
    }


def over_blocks(
    statistic: Callable[[Tensor, Tensor], float], first: Tensor, second: Tensor, blocks: int
) -> tuple[float, float]:
    """Standard error of a statistic of two sets of draws by subsampling, and the mean of the statistic over the blocks.

    Both sets are cut into disjoint blocks of consecutive draws. The statistic varies over these as it varies over sets
    of that size; with a variance that falls as 1/n, its error on all draws is that standard deviation over the root of
    the number of blocks (Politis, Romano, Wolf 1999, https://doi.org/10.1007/978-1-4612-1554-7). A bias is no part of
    it, but what it does to the statistic shows in the mean over blocks, which have fewer draws.

    Args:
        first, second: Draws in random order, shape (n, D) and (m, D).
        blocks: At least 2.
    """
    pairs = zip(first.tensor_split(blocks), second.tensor_split(blocks), strict=True)
    values = [statistic(a, b) for a, b in pairs]
    return float(np.std(values, ddof=1)) / math.sqrt(blocks), float(np.mean(values))


def of_a_block(k: int) -> int:
    """Draws that a block has at least, where the distances to k-th neighbours are looked at."""
    return 2 * (k + 1)


def fewest(k: int) -> int:
    """Draws that make two such blocks."""
    return 2 * of_a_block(k)


def blocks_of(n: int, least: int) -> int:
    """How many blocks of at least ``least`` draws n draws are cut into for `over_blocks`: `BLOCKS`, if they suffice."""
    return min(BLOCKS, n // least)

r"""The classifier two-sample test: how often a network tells draws of q(z|x) from exact ones.

.. math:: E[\mathrm{accuracy}] \le \tfrac12 \bigl(1 + \mathrm{TV}(q, p)\bigr)

whatever the classifier: one half where they cannot be told apart, 1 where they never overlap. Lopez-Paz and Oquab 2017,
https://arxiv.org/abs/1610.06545; in the form of sbibm: draws in units of the exact posterior's standard deviations, two
hidden layers of 10 D units, five folds (Lueckmann, Boelts, Greenberg, Goncalves, Macke 2021,
https://arxiv.org/abs/2101.04653).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import torch
from pydantic import Field, PositiveInt
from torch import Tensor

from harness import hookimpl
from harness.distances import Distance, DrawsEvaluator, Target
from harness.options import UserError
from harness.seeding import isolated

BOUNDS = "stochastic lower bound on (1 + total variation of q and p) / 2"


@dataclass(frozen=True, kw_only=True)
class C2ST(DrawsEvaluator):
    """`c2st_accuracy` on held-out draws: a mean over 2 n of them, each by a network that has not seen it.

    Its error is that of 2 n independent answers, given the networks. What these owe to chance is no part of it: that is
    little where they are trained to the end, but after 20 epochs with 100 draws the whole error is twice as large.

    Args:
        width: Units of either hidden layer, per latent dimension.
        folds: Parts of the draws that are held out in turn.
        epochs: The most that a network is trained for.
    """

    name: str = "c2st"
    samples: Annotated[int, Field(ge=20)] = 2000
    width: PositiveInt = 10
    folds: Annotated[int, Field(ge=2)] = 5
    epochs: PositiveInt = 1000

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.samples < self.folds:
            raise UserError(f"{self.name}: option folds={self.folds} needs as many samples, got {self.samples}")

    def compare(self, z: Tensor, target: Target, stream: torch.Generator) -> Sequence[Distance]:
        draws = torch.cat([target.standardised(z), target.reference]).numpy()
        labels = np.repeat([1, 0], len(z))
        seed = int(torch.randint(2**31 - 1, (), generator=stream, device=stream.device))
        right = held_out(draws, labels, self.width * draws.shape[1], self.folds, self.epochs, seed)
        value, likely = float(right.mean()), (right.sum() + 1) / (len(right) + 2)  # no certainty from any number
        stderr = math.sqrt(likely * (1 - likely) / len(right))
        return [
            Distance(metric="c2st_accuracy", value=value, stderr=stderr, kind="unbiased", unit="", bounds=BOUNDS),
        ]


def held_out(draws: np.ndarray, labels: np.ndarray, width: int, folds: int, epochs: int, seed: int) -> np.ndarray:
    """Whether each draw is classified rightly by a network that was trained without its fold, shape (2 n,)."""
    right = np.zeros(len(labels))
    with isolated(seed), warnings.catch_warnings():  # what the library imports draws from a process-wide generator
        from sklearn.exceptions import ConvergenceWarning  # slow to import
        from sklearn.model_selection import StratifiedKFold
        from sklearn.neural_network import MLPClassifier

        warnings.simplefilter("ignore", ConvergenceWarning)  # a network that was stopped is a classifier too
        for train, test in StratifiedKFold(folds, shuffle=True, random_state=seed).split(draws, labels):
            classifier = MLPClassifier((width, width), max_iter=epochs, random_state=seed)
            classifier.fit(draws[train], labels[train])
            right[test] = classifier.predict(draws[test]) == labels[test]
    return right


@hookimpl
def harness_evaluators() -> list[C2ST]:
    return [C2ST()]

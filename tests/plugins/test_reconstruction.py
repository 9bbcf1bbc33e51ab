"""The reconstruction cost against its closed form on the oracle."""

from __future__ import annotations

import math

import numpy as np
import pytest

from harness_plugins.linear_gaussian import true_parameters
from harness_plugins.reconstruction import Reconstruction


@pytest.mark.parametrize("kind", ["mean_field", "implicit"])
def test_reconstruction_is_its_closed_form(oracle, kind: str) -> None:
    posterior = getattr(oracle, kind)()
    measured = Reconstruction().measure(oracle.fit(posterior), oracle.problem, oracle.run)
    weight, bias = true_parameters(2, 10, correlation=0.6, scale=1.0)
    factor = np.diag(posterior.sd.numpy()) if kind == "mean_field" else posterior.factor.numpy()
    spread = np.trace(weight @ factor @ factor.T @ weight.T)
    residual = oracle.x.numpy() - posterior.mean(oracle.x).numpy() @ weight.T - bias
    expected = (np.square(residual).sum(1) + spread) / (2 * 0.5**2) + 5 * math.log(2 * math.pi * 0.5**2)

    (cost,) = measured
    assert abs(cost.value - expected.mean()) < 4 * cost.stderr
    assert cost.stderr < 0.01  # dropping the constant or the spread changes the cost by more than a nat
    # 600 z-scores have mean square 1 +- 0.06; four of that, and a little for 100 draws being few and skewed.
    assert np.square((cost.values - expected) / cost.stderrs).mean() == pytest.approx(1, abs=0.27)
    assert (cost.metric, cost.kind, cost.bounds, cost.unit) == ("reconstruction", "unbiased", "", "nats")
    assert cost.settings == {"samples": 100}

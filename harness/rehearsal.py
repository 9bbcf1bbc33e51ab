"""An experiment without its fits: which suites it would run, given results that are made up."""

from __future__ import annotations

from collections.abc import Iterator

import pandas as pd

from harness.experiment import Experiment, Scale, Suite
from harness.options import UserError
from harness.record import COLUMNS

SEEDS = (0, 1)
SECONDS, STEPS = 1.5, 10
MOST_SUITES = 100
METRICS = ("log_likelihood", "elbo", "kl_to_posterior")


def rehearse(experiment: Experiment, scale: Scale, status: str = "ok", beside: bool = False) -> Iterator[list[Suite]]:
    """The suites that can be named at first and after each suite, until all have been "run".

    Args:
        beside: Whether fits run beside each other, so that only those with a budget of seconds have a valid time.
        status: How every fit ends. The budget of a suite that depends on such results means nothing.

    Raises:
        UserError: If there is no end to them.
    """
    done: dict[str, pd.DataFrame] = {}
    while len(done) <= MOST_SUITES:
        suites = experiment.suites(scale, dict(done))
        yield suites
        following = next((suite for suite in suites if suite.name not in done), None)
        if following is None:
            return
        done[following.name] = _records(following, status, not beside or following.budget.startswith("seconds="))
    raise UserError(f"experiment {experiment.name!r} has more than {MOST_SUITES} suites; does it end?")


def _records(suite: Suite, status: str, valid: bool) -> pd.DataFrame:
    """Records as of two seeds, one measurement of each metric; without numbers where fits have not ended well."""
    ok = status == "ok"
    rows = [
        {
            "suite": suite.name, "run": run, "job_id": f"{run}, seed {seed}", "seed": seed, "status": status,
            "evaluator": "exact" if ok else None, "metric": metric if ok else None,
            "value": -1.0 - i if ok else None, "fit_seconds": SECONDS if ok else None,
            "fit_steps": STEPS if ok else None, "timing_valid": valid,
        }
        for i, run in enumerate(suite.methods)
        for seed in SEEDS
        for metric in METRICS
    ]  # fmt: skip
    return pd.DataFrame(rows, columns=[*COLUMNS, "suite", "run"])

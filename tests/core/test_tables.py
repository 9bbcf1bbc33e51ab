"""What is derived from the files of jobs is read where it can stand for them, and only there."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

import harness
from harness import readings
from harness import store as store_module
from harness.store import Store

PLANNED = """
import sys
from harness.cli import main
assert main(["plan", "--methods", "vae", "--problems", "four-points", "--seeds", "1", "--out", sys.argv[1]]) == 0
print(sorted({"pandas", "pyarrow", "scipy", "sklearn", "matplotlib", "pyro"} & sys.modules.keys()))
"""


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """The adversary of a VAE is skipped, its numbers are missing."""
    out = tmp_path_factory.mktemp("tables") / "store"
    harness.compare("vae,avb", "four-points", seeds=2, budget="steps=5", evaluators="exact,adversary", out=out)
    return Store(out)


def typed(records: pd.DataFrame) -> list[list[tuple[str, object, type]]]:
    return [[(name, value, type(value)) for name, value in row.items()] for row in readings.rows(records)]


def test_derived_tables_stand_for_the_files_of_jobs(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    made = typed(store.records())
    monkeypatch.setattr(Store, "records", lambda self: pytest.fail("made anew"))
    records, examples = store.tables()
    assert typed(records) == made
    assert not examples.empty


def test_tables_of_another_version_are_made_anew(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "row", lambda job, facts=None: {"job_id": job["job_id"], "reason": "other"})
    assert "other" not in set(store.tables()[0]["reason"])
    monkeypatch.setattr(store_module, "_sources", lambda: "another")
    assert set(store.tables()[0]["reason"]) == {"other"}


def test_tables_follow_the_files_of_jobs(store: Store) -> None:
    job_id = store.job_ids()[0]
    path = store.path / "jobs" / f"{job_id}.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "plugin": "changed"}))
    records, _ = store.tables()
    assert set(records.loc[records["job_id"] == job_id, "plugin"]) == {"changed"}


def test_observations_that_are_there_twice_are_left_out() -> None:
    examples = pd.DataFrame(
        {
            "job_id": ["a", "b", "b", "a", "b"],
            "evaluator": "exact",
            "metric": ["log_likelihood", "elbo", "elbo", "log_likelihood", "log_likelihood"],
            "index": [3, 1, 1, 2, 1],
            "value": [0.0, 1.0, 2.0, 3.0, 4.0],
            "stderr": 0.0,
        }
    )
    found = readings.values_per_observation(examples)
    assert list(found) == [("a", "exact", "log_likelihood"), ("b", "exact", "log_likelihood")]
    assert found["a", "exact", "log_likelihood"].index.tolist() == [2, 3]
    assert found["a", "exact", "log_likelihood"].value.tolist() == [3.0, 0.0]


def test_a_plan_imports_nothing_that_it_has_no_use_for(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PLANNED, str(tmp_path)], capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"

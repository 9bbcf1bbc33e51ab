"""How long a user waits for `plan`, for `report` and for the start of `compare` in a folder of ten thousand jobs."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

import harness
from harness.job import evaluator_file
from harness.planning import resolve
from harness.store import Store

JOBS = 10_000
ASKED: dict[str, Any] = {"methods": "vae", "problems": "four-points", "budget": "steps=5", "evaluators": "exact"}
COMPARE = """
import sys, time
from harness import executing
from harness.cli import main

def begun(*arguments, **options):
    sys.exit(0)

executing.bundles = begun  # the plan is made, and the first job would be fitted next
main(sys.argv[1:])
sys.exit("compare had nothing to do")
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All jobs but the last are done and measured: copies of one, under the ids that they would have."""
    store = Store(tmp_path_factory.mktemp("many") / "store")
    harness.compare(**ASKED, seeds=1, out=store.path)
    asked = resolve(**ASKED, seeds=JOBS, device="cpu", precision="float32", step="auto", plugins=(), retry=())
    first, (by,) = asked.jobs[0].job_id, asked.evaluators
    name, facts = evaluator_file(by), store.job(first)
    measured = store.measured(first, name)
    assert facts is not None
    assert measured is not None
    for job in asked.jobs[1:-1]:
        for kind in ("fits", "measurements"):
            shutil.copytree(store.path / kind / first, store.path / kind / job.job_id)
        of_job = {**facts, "job_id": job.job_id, "seed": job.seed}
        (store.path / "jobs" / f"{job.job_id}.json").write_text(json.dumps(of_job, indent=1))
        of_measurement = {**measured, "key": job.measurement_key(by)}
        (store.path / "measurements" / job.job_id / f"{name}.json").write_text(json.dumps(of_measurement, indent=1))
    store.derive()
    return store.path


@pytest.mark.parametrize("command", ["one job", "plan", "report", "compare"])
def test_many_jobs(benchmark: BenchmarkFixture, folder: Path, command: str) -> None:
    """Fresh processes, as a user starts them."""
    module = [sys.executable, "-c", "import sys; from harness.cli import main; sys.exit(main(sys.argv[1:]))"]
    options = [f"--{name}={value}" for name, value in ASKED.items()] + ["--out", str(folder)]
    words = {
        "one job": [*module, "plan", *options, "--seeds=1"],
        "plan": [*module, "plan", *options, f"--seeds={JOBS}"],
        "report": [*module, "report", str(folder)],
        "compare": [sys.executable, "-c", COMPARE, "compare", *options, f"--seeds={JOBS}"],
    }[command]

    def run() -> None:
        subprocess.run(words, check=True, capture_output=True)

    benchmark.pedantic(run, rounds=2, warmup_rounds=1)

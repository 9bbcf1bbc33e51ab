"""A plan as orders, which are carried out one by one, gives the records of the comparison; none is trusted blindly."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

import harness
from harness.comparison import planned
from harness.options import UserError
from harness.orders import carry_out, orders_of, parsed
from harness.record import TIMING_COLUMNS
from harness.store import Store

SMALL: dict[str, Any] = {
    "problems": "four-points",
    "budget": "steps=30",
    "evaluators": "exact[samples=50],reconstruction",
}
WORDS = ["--problems", "four-points", "--budget", "steps=30", "--evaluators", SMALL["evaluators"]]
METHODS = "vae[lr=1e-3|2e-3],avb"
Run = Callable[..., tuple[int, str, str]]


def results(records: pd.DataFrame) -> pd.DataFrame:
    same = records.drop(columns=[*TIMING_COLUMNS, "run_id", "timing_valid"])
    return same.sort_values(["job_id", "evaluator", "metric"]).reset_index(drop=True)


def ordered(folder: Path, run: Run, *words: str) -> list[str]:
    code, out, _ = run("plan", "--methods", METHODS, *WORDS, "--out", str(folder), "--format", "jsonl", *words)
    assert code == 0
    return out.splitlines()


def test_orders_give_the_records_of_the_comparison(tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    texts = ordered(Path("there"), run, "--seeds", "2")
    assert len(texts) == 6
    (tmp_path / "job.json").write_text(texts[0])
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")  # paths are those of where it was planned
    assert run("exec", "../job.json", "--apart")[0] == 0
    assert Store(tmp_path / "there").records()["timing_valid"].all()
    for text in texts[1:]:
        records = carry_out(parsed(text))
        assert set(records["status"]) == {"ok"}
        assert not records["timing_valid"].any()  # another order may be carried out at the same time
    here = harness.compare(METHODS, seeds=2, out=tmp_path / "here", **SMALL)
    pd.testing.assert_frame_equal(results(Store(tmp_path / "there").records()), results(here))
    assert not (tmp_path / "there" / "records.csv").exists()  # which `report` derives
    assert run("report", str(tmp_path / "there"))[0] == 0
    monkeypatch.chdir(tmp_path)
    assert ordered(Path("there"), run, "--seeds", "2") == []


def test_what_is_fitted_together_is_one_order(tmp_path: Path, run: Run) -> None:
    texts = ordered(tmp_path / "there", run, "--seeds", "2", "--vectorize-seeds")
    assert sorted(len(parsed(text)["jobs"]) for text in texts) == [2, 4]
    for text in texts:
        carry_out(parsed(text), time_limit=100)  # in a worker process
    here = harness.compare(METHODS, seeds=2, out=tmp_path / "here", vectorize_seeds=True, **SMALL)
    pd.testing.assert_frame_equal(results(Store(tmp_path / "there").records()), results(here))


def test_commands_are_for_any_shell(tmp_path: Path, run: Run) -> None:
    out = tmp_path / "it's there"
    code, lines, _ = run("plan", "--methods", "vae", *WORDS, "--seeds", "1", "--out", str(out), "--format", "sh")
    assert code == 0
    path = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    subprocess.run(["sh", "-c", lines], env={**os.environ, **path}, check=True, capture_output=True, cwd="/")
    assert set(Store(out).records()["status"]) == {"ok"}


def test_limits_go_into_commands_and_are_not_lost_without_a_word(tmp_path: Path, run: Run) -> None:
    words = ["plan", "--methods", "vae", *WORDS, "--seeds", "1", "--out", str(tmp_path)]
    words += ["--time-limit", "10 min", "--stop-after", "60"]
    code, lines, err = run(*words, "--format", "sh")
    assert (code, err) == (0, "")
    assert lines.endswith(" | harness exec --stop-after 60 --time-limit '10 min' -\n")
    code, lines, err = run(*words, "--format", "jsonl")
    assert (code, len(lines.splitlines())) == (0, 1)
    assert err == "harness: orders do not hold --stop-after, --time-limit; give it to `harness exec`\n"


def test_a_device_that_is_not_here_can_be_planned_for(tmp_path: Path, run: Run) -> None:
    texts = ordered(tmp_path, run, "--seeds", "1", "--device", "cuda")
    assert {parsed(text)["device"] for text in texts} == {"cuda"}


def test_objects_that_no_plugin_provides_cannot_be_ordered(tmp_path: Path) -> None:
    from harness_plugins.vae import VAE

    comparison = planned(VAE(name="mine"), seeds=1, out=tmp_path, **SMALL)
    [order] = orders_of(comparison, Store(tmp_path), ())
    with pytest.raises(UserError, match="cannot be carried out here: unknown method 'mine'"):
        carry_out(order)


@pytest.mark.parametrize("text", ["", "[]", "3", '{"schema": 1}', "{", '{"schema": "1"}', b"\xff\xfe"])
def test_other_texts_are_no_orders(text: str | bytes) -> None:
    with pytest.raises(UserError, match="not an order"):
        parsed(text)


def test_an_order_that_would_be_another_job_here_is_refused(tmp_path: Path, run: Run) -> None:
    [text, *_] = ordered(tmp_path, run, "--seeds", "1")
    good = json.loads(text)
    job = good["jobs"][0]
    changes: list[tuple[dict[str, Any], str]] = [
        ({"jobs": [{**job, "seed": 7}]}, "would be another job here"),
        ({"jobs": [{**job, "method": "vea"}]}, "did you mean 'vae'"),
        ({"jobs": [{**job, "config": '{"lr": "fast"}'}]}, "cannot be carried out here"),
        ({"jobs": [{"seed": 7}]}, "is missing in it"),
        ({"evaluators": [{"name": "exact", "config": {"no": 1}}]}, "cannot be carried out here"),
        ({"schema": 99}, "has schema 99"),
        ({"folder": str(tmp_path / "gone")}, "is not there on this machine"),
    ]
    for change, words in changes:
        with pytest.raises(UserError, match=words):
            carry_out(parsed(json.dumps({**good, **change})))
    assert not (tmp_path / "jobs").exists()

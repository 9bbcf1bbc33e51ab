"""Why a job is not another one: what differs is told by name."""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import harness
from harness import job as job_module
from harness import problem as problem_module
from harness import sources as sources_module
from harness.comparison import plan
from harness.differences import Difference, differences, why
from harness.job import Job
from harness.method import Budget
from harness.options import UserError
from harness.planning import find_device
from harness.problem import MLPSpec, loaded
from harness.registry import Registry
from harness.store import Facts, Store

ONE: dict[str, Any] = {"problems": "four-points", "budget": "steps=5", "evaluators": "exact"}
MINE = """
from dataclasses import dataclass
import harness
from harness_plugins.vae import VAE


@dataclass(frozen=True, kw_only=True)
class Mine(VAE):
    name: str = "mine"


@harness.hookimpl
def harness_methods():
    return [Mine()]
"""
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Jobs of three methods, one of them from a file."""
    folder = tmp_path_factory.mktemp("made")
    (folder / "mine.py").write_text(MINE)
    for methods, seeds in (("mine,vae[lr=2e-3],avb[noise_dim=4]", [0]), ("vae[lr=1e-3]", [0, 1])):
        harness.compare(methods, seeds=seeds, out=folder / "store", plugins=[folder / "mine.py"], **ONE)
    return folder


@pytest.fixture
def store(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """A copy of them in the working folder."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return Store("store")


def facts_of(store: Store, method: str, seed: int = 0, lr: float = 1e-3) -> Facts:
    for job_id in store.job_ids():
        facts = store.job(job_id) or {}
        found = facts["method"], facts["seed"], json.loads(facts["config"])["lr"]
        if found == (method, seed, lr) or (method != "vae" and facts["method"] == method):
            return facts
    raise LookupError(method)


def test_the_nearest_job_is_of_the_same_method_and_differs_least(store: Store) -> None:
    job = facts_of(store, "vae", seed=1)
    found = why("store", job["job_id"])
    assert found.now == job["job_id"]
    assert found.since == []
    assert (found.nearest or {})["job_id"] == facts_of(store, "vae")["job_id"]
    assert found.apart == [Difference("configuration", "seed", "1", "0")]
    found = why("store", facts_of(store, "vae", lr=2e-3)["job_id"])
    assert found.apart == [Difference("configuration", "lr", "0.002", "0.001")]


def test_of_jobs_that_differ_as_much_the_newest_is_the_nearest(store: Store) -> None:
    job, old = facts_of(store, "vae", seed=1), facts_of(store, "vae")
    for day, seed in ((2, 7), (3, 8), (1, 9)):
        job_id = f"{seed}" * 16
        store.write_job(job_id, {**old, "job_id": job_id, "seed": seed, "started_at": f"2999-01-0{day}"})
    assert (why("store", job["job_id"]).nearest or {})["seed"] == 8


@pytest.mark.parametrize("key", ["method", "problem_name"])
def test_one_of_another_method_or_problem_is_not_the_nearest(key: str, store: Store) -> None:
    """However much else it has in common."""
    job = facts_of(store, "vae", seed=1)
    store.write_job("0" * 16, {**job, "job_id": "0" * 16, key: "another"})
    for found in map(store.job, store.job_ids()):
        if found and found["job_id"] not in ("0" * 16, job["job_id"]):
            store.write_job(found["job_id"], {**found, "budget": "steps=77", "precision": "bf16"})
    assert (why("store", job["job_id"]).nearest or {})["job_id"] == facts_of(store, "vae")["job_id"]


def test_an_edit_of_a_plugin_is_told_by_its_name(store: Store, run: Run) -> None:
    job_id = facts_of(store, "mine")["job_id"]
    assert why("store", job_id, ["mine.py"]).now == job_id
    with Path("mine.py").open("a") as file:
        file.write("# an edit\n")
    found = why("store", job_id, ["mine.py"])
    [now] = plan("mine", seeds=1, out="store", plugins=["mine.py"], **ONE)
    assert found.now == now.job_id != job_id
    assert [(each.aspect, each.what) for each in found.since] == [("sources", "mine.py")]
    code, out, err = run("why", "store", now.job_id[:8], "--plugin", "mine.py")
    assert (code, err) == (0, "")
    assert out.splitlines()[0].startswith(f"job {job_id} (mine on four-points, seed 0): ok, begun 20")
    assert f"stale: in its place job {now.job_id} would be computed now" in out
    assert re.search(r"^sources +mine\.py +[0-9a-f]{16} +[0-9a-f]{16}$", out, re.MULTILINE)
    assert "nearest other job: " in out


def test_what_cannot_be_computed_any_more_says_why(store: Store, run: Run) -> None:
    code, out, _ = run("why", "store", facts_of(store, "mine")["job_id"])
    assert code == 0
    assert "it cannot be computed now: unknown method 'mine'" in out


GIVE = "it comes from file mine.py: give --plugin, or plugins= in Python"


def test_a_fit_whose_plugin_file_is_not_loaded_says_so(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    job_id = facts_of(store, "mine")["job_id"]
    assert harness.load("store", job_id, plugins=["mine.py"]).state
    with pytest.raises(UserError, match=f"^job '{job_id}': {GIVE}$"):
        harness.load("store", job_id)
    with caplog.at_level(logging.WARNING):
        records = harness.evaluate("store", "elbo[samples=2]")
    assert f"job {job_id} (mine on four-points) is left out: {GIVE}" in caplog.text
    assert "mine" not in set(records["method"])
    assert "mine" in set(harness.evaluate("store", "elbo[samples=2]", plugins=["mine.py"])["method"])


def test_a_fit_whose_problem_is_from_a_file_that_is_not_loaded_says_so(store: Store) -> None:
    """Also where an installed method was fitted."""
    source = MINE.replace("vae import VAE", "four_points import FourPoints").replace("VAE", "FourPoints")
    Path("own.py").write_text(source.replace("methods", "problems"))
    harness.compare("vae", "mine", 1, budget="steps=5", evaluators="exact", out="own", plugins=["own.py"])
    [job_id] = Store("own").job_ids()
    assert harness.load("own", job_id, plugins=["own.py"]).state
    with pytest.raises(UserError, match=r"it comes from file own\.py: give --plugin"):
        harness.load("own", job_id)
    assert len(harness.data("mine", plugins=["own.py"]).test) == 4
    with pytest.raises(UserError, match="unknown problem 'mine'"):
        harness.data("mine")


def test_a_fit_whose_problem_has_a_mistake_today_says_so_and_others_are_measured(
    store: Store, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, run: Run
) -> None:
    vae = facts_of(store, "vae")
    store.write_job(vae["job_id"], {**vae, "problem_name": "digits", "problem_config": {}})

    def unreachable(self: object) -> None:
        raise RuntimeError("no server")

    loaded.cache_clear()
    [digits] = Registry.discover().select("problems", "digits")
    monkeypatch.setattr(type(digits), "dataset", unreachable)
    with caplog.at_level(logging.WARNING):
        records = harness.evaluate("store", "elbo[samples=2]", plugins=["mine.py"])
    assert f"job {vae['job_id']} (vae on four-points) is left out: problem 'digits': RuntimeError: no s" in caplog.text
    assert "elbo[samples=2]" in set(records["evaluator"])
    assert (
        "it cannot be computed now: problem 'digits': RuntimeError: no server" in run("why", "store", vae["job_id"])[1]
    )


def test_a_fit_that_would_be_another_one_today_says_so(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    """And one that cannot be made any more says why, in the words of what hinders it."""
    job_id = facts_of(store, "mine")["job_id"]
    with Path("mine.py").open("a") as file:
        file.write("# an edit\n")
    changed = "its method, problem or data have changed since it was fitted; fit it anew"
    with pytest.raises(UserError, match=f"^job '{job_id}': {changed}$"):
        harness.load("store", job_id, plugins=["mine.py"])
    with caplog.at_level(logging.WARNING):
        harness.evaluate("store", "elbo[samples=2]", plugins=["mine.py"])
    assert f"job {job_id} (mine on four-points) is left out: {changed}" in caplog.text
    other = facts_of(store, "vae")
    store.write_job(other["job_id"], {**other, "problem_config": {"latent_dim": -1}})
    with pytest.raises(UserError, match=f"job '{other['job_id']}': four-points: option latent_dim=-1: input should be"):
        harness.load("store", other["job_id"])


def test_a_job_of_an_earlier_version_kept_no_note_of_sources(store: Store, run: Run) -> None:
    facts = {key: value for key, value in facts_of(store, "vae").items() if key not in ("sources", "versions")}
    shutil.rmtree("store/jobs")
    store.write_job("0123456789abcdef", {**facts, "job_id": "0123456789abcdef", "torch_version": "1.0"})
    code, out, _ = run("why", "store", "0")
    assert code == 0
    assert "which sources have changed cannot be told" in out
    assert re.search(rf"^library versions +torch +1\.0 +{re.escape(torch.__version__)}$", out, re.MULTILINE)
    assert len(why("store", "0").since) == 1
    assert "nearest" not in out


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"seed": 3}, ("configuration", "seed", "0", "3")),
        ({"problem_config": {"width": 3}}, ("configuration", "width of the problem", None, "3")),
        ({"budget": "steps=6"}, ("configuration", "budget", "steps=5", "steps=6")),
        ({"step_mode": "eager"}, ("configuration", "step_mode", "auto", "eager")),
        ({"plugin_version": "9"}, ("plugin version", "plugin_version", "0.1.0", "9")),
        ({"data_sha256": "other"}, ("data", "data_sha256", None, "other")),
        ({"versions": {"numpy": "0.1"}}, ("library versions", "numpy", None, "0.1")),
        ({"hardware": "an abacus"}, ("machine", "hardware", None, "an abacus")),
        ({"started_at": "never", "status": "failed", "run_id": "another", "fit_seconds": 1e9}, None),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_every_aspect_is_told_apart(changed: Facts, expected: tuple[str, ...] | None, store: Store) -> None:
    facts = facts_of(store, "vae")
    other = {**facts, **changed, "problem_config": {**facts["problem_config"], **changed.get("problem_config", {})}}
    found = [(each.aspect, each.what, each.first, each.second) for each in differences(facts, other)]
    if expected is None:
        assert found == []
        return
    assert len(found) == 1
    first = found[0][2] if expected[2] is None else expected[2]  # whatever it is here
    assert found[0] == (*expected[:2], first, expected[3])


def test_an_option_that_only_one_method_has_is_told(store: Store) -> None:
    found = differences(facts_of(store, "avb"), facts_of(store, "vae"))
    assert Difference("configuration", "noise_dim", "4", "-") in found
    sources = {each.what for each in found if each.aspect == "sources"}
    assert {"harness_plugins.avb", "harness_plugins.vae"} <= sources
    assert "harness.training" not in sources


class SpecOfThisFile(MLPSpec):
    """Its source is needed too."""


def test_the_sources_that_are_noted_are_all_that_the_fit_key_depends_on(monkeypatch: pytest.MonkeyPatch) -> None:
    registry = Registry.discover()
    [four_points] = registry.select("problems", "four-points")
    monkeypatch.setattr(type(four_points), "model_spec", lambda self: SpecOfThisFile(latent_dim=2))
    monkeypatch.setattr(job_module, "_spec_hash", lambda problem, content_hash: problem.spec_hash)  # not kept
    for method, problem in (("avb-ac", "four-points"), ("nuts", "eight-schools"), ("vae", "digits[model=conv1]")):
        [chosen] = registry.select("methods", method)
        [on] = registry.select("problems", problem)
        plugin = registry.plugin_of("methods", chosen)
        job = Job(on, chosen, 0, Budget("steps", 5), find_device("cpu"), "float32", plugin)
        used, hashed = set[str](), sources_module.source_hash

        def noted(thing: object, used: set[str] = used, hashed: Callable[[object], str] = hashed) -> str:
            used.add(hashed(thing)[:16])
            return hashed(thing)

        with monkeypatch.context() as patched:
            for module in (problem_module, job_module, sources_module):
                patched.setattr(module, "source_hash", noted)
            assert job.job_id
        assert used == set(job.sources().values())
        assert used


def test_a_job_is_named_by_as_much_of_its_id_as_is_needed(store: Store) -> None:
    job_id = facts_of(store, "avb")["job_id"]
    assert why("store", job_id[:6]).job["job_id"] == job_id
    store.write_job(f"{job_id[:6]}0000000000", {**(store.job(job_id) or {}), "job_id": f"{job_id[:6]}0000000000"})
    with pytest.raises(UserError, match=rf"2 jobs begin with '{job_id[:6]}': {job_id[:6]}"):
        why("store", job_id[:6])
    assert why("store", job_id).job["job_id"] == job_id
    with pytest.raises(UserError, match="unknown job 'xyz'"):
        why("store", "xyz")

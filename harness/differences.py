"""Why a job is not another one: in which of the facts that results depend on two of them differ."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from harness import environment
from harness.planning import UNUSABLE, only, rebuilt
from harness.registry import Registry
from harness.store import Facts, Store

ABSENT = "-"


@dataclass(frozen=True)
class Difference:
    """One fact that two jobs do not share.

    Args:
        aspect: ``configuration``, ``plugin version``, ``sources``, ``data``, ``library versions`` or ``machine``.
        what: An option, a module, a library ...
        first, second: Its values, as text; "-" where a job has none.
    """

    aspect: str
    what: str
    first: str
    second: str


@dataclass(frozen=True, kw_only=True)
class Why:
    """What a job of a store depends on, told by what differs from it.

    Args:
        job: The facts of the job.
        now: Id of the job that would be computed in its place now: the same, unless it is stale; empty if none can be.
        reason: Why none can be computed now.
        since: What has changed since it was computed.
        nearest: The facts of the most similar other job of the store, if there is one.
        apart: In what that one differs.
    """

    job: Facts
    now: str
    reason: str
    since: list[Difference]
    nearest: Facts | None
    apart: list[Difference]


def why(out: str | Path, job_id: str, plugins: Iterable[str | Path] = ()) -> Why:
    """What differs between a job of a store and what would be computed now, and its nearest other job.

    Args:
        job_id: Of a stored job, or of what would be computed in its place now; so much of it as no other begins with.

    Raises:
        UserError: If the folder holds no results, or no job or several jobs with that id.
    """
    store, registry = Store.open(out), Registry.discover(plugins)
    jobs = {name: facts for name in store.job_ids() if (facts := store.job(name))}
    found = [name for name in jobs if name.startswith(job_id)]
    found = found or [name for name, facts in jobs.items() if _now(registry, facts)[0].startswith(job_id)]
    job = jobs.pop(only(found, job_id, jobs))
    now, reason, facts = _now(registry, job)
    nearest = max(jobs.values(), key=lambda other: _likeness(job, other), default=None)
    return Why(
        job=job,
        now=now,
        reason=reason,
        since=differences(job, facts) if facts else [],
        nearest=nearest,
        apart=differences(job, nearest) if nearest else [],
    )


def differences(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[Difference]:
    """In what two jobs differ, by their facts as they are stored; of what one of them kept no note, nothing is told."""
    found: list[Difference] = []
    for aspect, facts in _aspects(first).items():
        others = _aspects(second)[aspect]
        whole = aspect in ("configuration", "sources") and facts and others
        for what in dict.fromkeys([*facts, *others]) if whole else [name for name in facts if name in others]:
            ours, theirs = (_text(each[what]) if what in each else ABSENT for each in (facts, others))
            if ours != theirs:
                found.append(Difference(aspect, what, ours, theirs))
    return found


def _now(registry: Registry, facts: Facts) -> tuple[str, str, Facts]:
    """Id and facts of the job that would be computed now, and if there is none, why."""
    try:
        job = rebuilt(registry, facts, torch.device("cpu"))
        return job.job_id, "", {**job.facts(), "versions": environment.versions()}
    except UNUSABLE as error:
        return "", str(error), {}


def _likeness(job: Facts, other: Facts) -> tuple[bool, bool, int, str]:
    """Same method and problem first, then the fewest differences, then the newest."""
    method, problem = (job.get(key) == other.get(key) for key in ("method", "problem_name"))
    return method, problem, -len(differences(job, other)), str(other.get("started_at"))


def _aspects(facts: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The facts that results depend on; jobs of earlier versions have fewer."""
    options = json.loads(facts.get("config") or "{}")
    of_problem = {f"{key} of the problem": value for key, value in (facts.get("problem_config") or {}).items()}
    asked = ("problem_name", "method", "seed", "budget", "precision", "step_mode", "model")
    return {
        "configuration": {**_some(facts, asked), **of_problem, **options},
        "plugin version": _some(facts, ("plugin", "plugin_version")),
        "sources": facts.get("sources") or {},
        "data": _some(facts, ("dataset", "binarisation", "data_sha256")),
        "library versions": _versions(facts),
        "machine": _some(facts, ("device", "hardware", "threads")),
    }


def _versions(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Of all libraries; of torch only, where no more was noted."""
    return facts.get("versions") or ({"torch": facts["torch_version"]} if "torch_version" in facts else {})


def _some(facts: Mapping[str, Any], keys: Iterable[str]) -> dict[str, Any]:
    return {key: facts[key] for key in keys if key in facts}


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)

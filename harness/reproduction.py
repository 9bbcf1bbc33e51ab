"""An experiment of a paper, run: suite after suite, each in a folder of its own, then one report of all of them."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import pandas as pd

from harness import environment
from harness.audience import Progress
from harness.comparison import compare, executor_of, plan, stored
from harness.executing import stopping
from harness.executor import Executor
from harness.experiment import Experiment, Scale, Suite
from harness.options import UserError, parse_jobs, parse_seeds, seeds_text, several, unknown
from harness.planning import select
from harness.registry import Registry
from harness.rehearsal import rehearse
from harness.report.experiment import write
from harness.report.reproduced import Ran, Results
from harness.stopping import Stopped
from harness.store import Store

DEFAULT_SCALE: Scale = "laptop"


@dataclass(frozen=True, kw_only=True, eq=False)
class Reproduction:
    """An experiment that has been run and reported.

    Args:
        records: Of all suites, with the columns ``suite`` and ``run``: the label of the method in its suite.
    """

    results: Results
    records: pd.DataFrame
    folder: Path
    report: Path


def reproduce(
    experiment: str | Experiment,
    *,
    seeds: int | str | Sequence[int] | None = None,
    scale: str = DEFAULT_SCALE,
    device: str = "auto",
    step: str = "auto",
    out: str | Path | None = None,
    plugins: Iterable[str | Path] = (),
    retry: Iterable[str] = (),
    stop_after: float | str | None = None,
    jobs: int | str = 1,
    executor: str | Executor | None = None,
    time_limit: float | str | None = None,
    memory_limit: float | str | None = None,
    progress: Progress | None = None,
) -> pd.DataFrame:
    """Run an experiment of a paper and write its report under ``out``; what is done already is not done again.

    Args:
        experiment: As on the command line (``"avb-decoders[model=conv1]"``), or an object.
        seeds: How many (0, 1, ...), or which; the experiment's own number unless given.
        scale: ``smoke``, ``laptop`` or ``paper``.
        step: How steps of training are taken, as in `harness.compare`; another way is other fits.
        out: ``results/NAME`` unless given, with the scale in the name if it is not laptop.
        retry: Statuses (``failed`` ...) of finished jobs that are to be tried again.
        stop_after: As in `harness.compare`, for all suites together.
        jobs, executor, time_limit, memory_limit: As in `harness.compare`.

    Returns:
        The records of all suites, one row per measurement, with the columns ``suite`` and ``run``.

    Raises:
        UserError: For any mistake in the arguments, before anything is run.
        Stopped: If the run has ended before its work was done; a KeyboardInterrupt. What is done is reported.
    """
    made = run(
        experiment,
        seeds=seeds,
        scale=scale,
        device=device,
        step=step,
        out=out,
        plugins=plugins,
        retry=retry,
        stop_after=stop_after,
        jobs=jobs,
        executor=executor,
        time_limit=time_limit,
        memory_limit=memory_limit,
        progress=progress,
    )
    return made.records


def run(
    experiment: str | Experiment,
    *,
    seeds: int | str | Sequence[int] | None,
    scale: str,
    device: str,
    step: str,
    out: str | Path | None,
    plugins: Iterable[str | Path],
    retry: Iterable[str],
    stop_after: float | str | None,
    jobs: int | str,
    executor: str | Executor | None,
    time_limit: float | str | None,
    memory_limit: float | str | None,
    progress: Progress | None,
) -> Reproduction:
    """As `reproduce`, with everything that the report was made of."""
    plugins, retry, stop = several(plugins), several(retry), stopping(stop_after)
    registry = Registry.discover(plugins)
    chosen, at = _one(registry, experiment), _scale(scale)
    numbers = parse_seeds(chosen.seeds(at) if seeds is None else seeds)
    folder = Path(out) if out is not None else Path("results") / _folder(chosen.label, at)
    common = {"device": device, "step": step, "plugins": plugins, "retry": retry, "executor": executor}
    common |= {"jobs": parse_jobs(jobs), "time_limit": time_limit, "memory_limit": memory_limit}
    *_, suites = rehearse(chosen, at)
    somewhere = executor_of(executor, plugins, common["jobs"])
    *_, beside = rehearse(chosen, at, beside=common["jobs"] > 1 or (somewhere is not None and not somewhere.apart))
    if untimed := [suite.name for suite in suites if suite not in beside]:
        raise UserError(
            f"{', '.join(untimed)}: the seconds of fits are needed that run one at a time: use jobs=1, here"
        )
    for suite in suites:  # mistakes are told of before anything is run, in later suites too
        _check_apart(suite, numbers)
        plan(**_arguments(suite, numbers, folder), **common)
    ran: dict[str, Ran] = {}

    def results(so_far: str = "") -> Results:
        return Results(
            title=f"{chosen.label}, scale {at}{so_far}",
            repeat=_command(chosen, at, numbers, common),
            contents=chosen.contents(at),
            ran=ran,
            versions=_versions(folder, ran),
        )

    def keep(suite: Suite, records: pd.DataFrame) -> None:
        named, store = _named(records, suite, registry), Store(folder / suite.name)
        ran[suite.name] = Ran(suite=suite, records=named, store=store)

    suite = None
    try:
        while suite := _next(chosen, at, ran):
            keep(suite, compare(**_arguments(suite, numbers, folder), **common, stop_after=stop, progress=progress))
    except Stopped:  # its time is up
        if suite and not (begun := stored(**_arguments(suite, numbers, folder), **common)).empty:
            keep(suite, begun)
        if ran:
            write(results(", stopped before its end"), folder)
        raise
    found = results()
    return Reproduction(results=found, records=_all(ran), folder=folder, report=write(found, folder))


def _one(registry: Registry, experiment: str | Experiment) -> Experiment:
    chosen: list[Experiment] = (
        registry.select("experiments", experiment) if isinstance(experiment, str) else [experiment]
    )
    if len(chosen) != 1:
        raise UserError(f"expected one experiment, got {len(chosen)}: {experiment!r}")
    return chosen[0]


def _scale(text: str) -> Scale:
    if text not in get_args(Scale):
        raise UserError(unknown("scale", text, get_args(Scale)))
    return text  # type: ignore[return-value]


def _folder(label: str, scale: Scale) -> str:
    """A folder's name from the experiment with its options and its scale: each choice has its own."""
    text = label if scale == DEFAULT_SCALE else f"{label} {scale}"
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def _check_apart(suite: Suite, seeds: Sequence[int]) -> None:
    """Settings must not be chosen with seeds that they are then compared on.

    Raises:
        UserError: If a suite has seeds of its own, and some of these are the run's.
    """
    shared = sorted(set(suite.seeds) & set(seeds))
    if shared:
        raise UserError(f"seeds {', '.join(map(str, shared))} belong to suite {suite.name!r} alone; choose others")


def _arguments(suite: Suite, seeds: Sequence[int], folder: Path) -> dict[str, Any]:
    """Of `harness.compare`."""
    return {
        "methods": list(suite.methods.values()),
        "problems": suite.problem,
        "seeds": suite.seeds or seeds,
        "budget": suite.budget or None,
        "evaluators": suite.evaluators,
        "precision": suite.precision,
        "out": folder / suite.name,
    }


def _next(experiment: Experiment, scale: Scale, ran: Mapping[str, Ran]) -> Suite | None:
    """The first suite that has not been run, given the records of those that have."""
    suites = experiment.suites(scale, {name: found.records for name, found in ran.items()})
    return next((suite for suite in suites if suite.name not in ran), None)


def _named(records: pd.DataFrame, suite: Suite, registry: Registry) -> pd.DataFrame:
    """The records of a suite with the label of each run."""
    labels: dict[tuple[str, str], str] = {}
    for label, text in suite.methods.items():
        for method in select(registry, "methods", text):
            labels[method.name, json.dumps(method.config, sort_keys=True)] = label
    runs = [labels[key] for key in zip(records["method"], records["config"], strict=True)]
    return records.assign(suite=suite.name, run=runs)


def _command(experiment: Experiment, scale: Scale, seeds: Sequence[int], common: Mapping[str, Any]) -> str:
    """The command line that repeats the run."""
    words = ["harness", "reproduce", experiment.label, "--scale", scale, "--seeds", seeds_text(seeds)]
    words += ["--device", common["device"]] if common["device"] != "auto" else []
    words += ["--step", common["step"]] if common["step"] != "auto" else []
    words += ["--jobs", str(common["jobs"])] if common["jobs"] != 1 else []
    words += ["--executor", str(common["executor"])] if isinstance(common["executor"], str) else []
    return shlex.join([*words, *(word for path in common["plugins"] for word in ("--plugin", str(path)))])


def _versions(folder: Path, suites: Iterable[str]) -> dict[str, list[str]]:
    """Of Python and the libraries, as each suite's last run had them."""
    facts = [Store(folder / suite).environment() for suite in suites]
    names = [name for name in environment.versions() if name != "system"]
    return {name: list(dict.fromkeys(str(found[name]) for found in facts if name in found)) for name in names}


def _all(ran: Mapping[str, Ran]) -> pd.DataFrame:
    tables = [found.records for found in ran.values()]
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()

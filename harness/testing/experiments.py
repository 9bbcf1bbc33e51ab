"""Laws of experiments: suites that can be run one after another, and contents that speak of nothing else."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import get_args

from harness.experiment import (
    Contents,
    Differences,
    Experiment,
    Line,
    Progression,
    Reported,
    Scale,
    Suite,
    Tabulated,
)
from harness.method import Budget
from harness.precision import parse_precision
from harness.registry import Registry
from harness.rehearsal import rehearse
from harness.testing.laws import check_options, require

NAME = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")


def check_experiment(experiment: Experiment, registry: Registry | None = None) -> None:
    """Everything that the harness asks of an experiment, at every scale; nothing is run.

    Args:
        registry: Where methods, problems and evaluators are looked up; all that is installed unless given.

    Raises:
        ConformanceError: If a law does not hold.
        UserError: If there is no end to its suites, or one names what is not registered or has no such option.
    """
    check_options(experiment, Experiment)
    registry = registry or Registry.discover()
    for scale in get_args(Scale):
        what = f"{experiment.name} at scale {scale}"
        seeds = experiment.seeds(scale)
        require(seeds >= 1, f"{what}: {seeds} seeds")
        suites = _rehearsed(experiment, scale, what)
        require(experiment.suites(scale, {}) == experiment.suites(scale, {}), f"{what}: suites differ when asked twice")
        for failed in rehearse(experiment, scale, status="failed"):  # can be asked for, whatever the results
            require(all(suite in suites for suite in failed), f"{what}: where fits have failed there are other suites")
        for suite in suites:
            _check_suite(f"{what}, suite {suite.name}", suite, registry)
        contents = experiment.contents(scale)
        require(experiment.contents(scale) == contents, f"{what}: contents differ when asked for twice")
        _check_contents(what, contents, {suite.name: suite for suite in suites})


def _rehearsed(experiment: Experiment, scale: Scale, what: str) -> list[Suite]:
    """All suites where every fit ends well; each time that it is asked, those named before stay as they are."""
    asked: list[list[Suite]] = []
    for suites in rehearse(experiment, scale):
        names = [suite.name for suite in suites]
        require(bool(suites), f"{what}: no suite")
        require(len(set(names)) == len(names), f"{what}: two suites of one name: {names}")
        require(all(suite in suites for suite in (asked or [[]])[-1]), f"{what}: a suite changes when others have run")
        asked.append(suites)
    return asked[-1]


def _check_suite(what: str, suite: Suite, registry: Registry) -> None:
    require(bool(NAME.fullmatch(suite.name)), f"{what}: a name must be lower-case words joined by hyphens")
    require(bool(suite.methods), f"{what}: no methods")
    chosen = [method for text in suite.methods.values() for method in registry.select("methods", text)]
    require(len(chosen) == len(suite.methods), f"{what}: each label must stand for one run, got {len(chosen)}")
    labels = [method.label for method in chosen]
    require(len(set(labels)) == len(labels), f"{what}: the same run under two labels: {labels}")
    problems = registry.select("problems", suite.problem)
    require(len(problems) == 1, f"{what}: expected one problem, got {suite.problem!r}")
    registry.select("evaluators", suite.evaluators)
    if suite.budget:
        Budget.parse(suite.budget)
    parse_precision(suite.precision)


def _check_contents(what: str, contents: Contents, suites: Mapping[str, Suite]) -> None:
    for line in _lines(contents):
        known = line.suite in suites and line.run in suites[line.suite].methods
        require(known, f"{what}: line {line.label!r} speaks of {line.run!r} in {line.suite!r}, which is never run")
    for spec in contents.tables:
        _check_table(f"{what}, table {spec.title!r}", spec)
    names = [picture.name for picture in contents.pictures]
    require(len(set(names)) == len(names), f"{what}: two pictures of one name: {names}")
    require(all(map(NAME.fullmatch, names)), f"{what}: names of pictures must be lower-case words joined by hyphens")
    groups = {contrast.group for contrast in contents.contrasts}
    for picture in contents.pictures:
        if isinstance(picture, Differences):
            empty = sorted(set(picture.groups) - groups)
            require(not empty, f"{what}: picture {picture.name!r} has groups without contrasts: {empty}")


def _check_table(what: str, spec: Tabulated) -> None:
    labels = [line.label for line in spec.lines if isinstance(line, Line)]
    require(len(set(labels)) == len(labels), f"{what}: a label twice: {labels}")
    headings = {column.heading for column in spec.columns}
    for line in spec.lines:
        if isinstance(line, Reported):
            unknown = sorted(set(line.figures) - headings)
            require(not unknown, f"{what}: {line.label!r} reports {unknown}, for which there is no column")
            require(bool(line.source.strip()), f"{what}: {line.label!r} is reported without a source")


def _lines(contents: Contents) -> Iterator[Line]:
    """Every line that tables, contrasts and pictures speak of."""
    for spec in contents.tables:
        yield from (line for line in spec.lines if isinstance(line, Line))
    for contrast in contents.contrasts:
        yield from (contrast.first, contrast.second)
    for picture in contents.pictures:
        if isinstance(picture, Progression):
            yield from (line for lines in picture.curves.values() for line in lines)
            yield from picture.levels
        elif not isinstance(picture, Differences):
            yield from picture.lines

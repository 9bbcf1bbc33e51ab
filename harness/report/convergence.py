"""Figures of how estimates of log p(x) come about: along the temperatures of annealing, and with importance draws."""

# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false
from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from zipfile import BadZipFile

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from harness.report.doubts import short
from harness.report.figures import Source, plain, tidy
from harness.report.tables import MethodRow, Table
from harness.report.trust import LOG_LIKELIHOOD
from harness.statistics import STANDARD_ERRORS, Estimate

Array = NDArray[np.float64]

PANELS = 3  # in a row
BOXES = 14  # whiskers that a panel has room for
TICKS = 4
SETTLED = 10  # draws from which the bound decides the vertical range: the first few are far below


def _traces(store: Source, job_id: str, evaluator: str, names: Sequence[str]) -> dict[str, Array] | None:
    """Arrays of a log-likelihood by name; None unless all of them are there."""
    try:
        found = store.traces(job_id, evaluator, LOG_LIKELIHOOD)
    except (OSError, ValueError, EOFError, BadZipFile):  # damaged: the figure goes without it
        return None
    if not set(names) <= found.keys():
        return None
    return {name: np.asarray(found[name], dtype=float) for name in names}


Found = dict[str, dict[int, dict[str, Array]]]
"""Traces of each seed of each method, by label."""


def _of_rows(table: Table, store: Source, names: Sequence[str]) -> tuple[str, Found]:
    """Traces by one evaluator, and which: the one that the table shows if it has any, else the first that has."""
    evaluators = dict.fromkeys([table.evaluator, *(name for row in table.rows for name in row.evidence)])
    for evaluator in evaluators:
        found = {
            row.label: {
                seed: traces
                for seed, job_id in row.jobs.items()
                if evaluator in row.evidence and (traces := _traces(store, job_id, evaluator, names))
            }
            for row in table.rows
        }
        found = {label: seeds for label, seeds in found.items() if seeds}
        if found:
            return evaluator, found
    return "", {}


# Annealing


def annealing(table: Table, store: Source, colour: Mapping[str, str]) -> Figure | None:
    """Running estimate of log p(x) along the temperatures, as boxes over observations, and acceptance by temperature.

    A panel per method, of its first seed; the last one has the acceptance of all of them.
    """
    _, found = _of_rows(table, store, ("temperature", "running", "acceptance"))
    if not found:
        return None
    lines = math.ceil((len(found) + 1) / PANELS)
    columns = min(PANELS, len(found) + 1)
    figure = Figure(figsize=(4.1 * columns, 3.5 * lines), layout="constrained")
    panels = list(figure.subplots(lines, columns, squeeze=False).flat)
    for axes in panels[len(found) + 1 :]:
        axes.set_axis_off()
    first = {label: next(iter(seeds.items())) for label, seeds in found.items()}
    low, high = _range([traces["running"] for _, traces in first.values()])
    for axes, (label, (seed, traces)) in zip(panels, first.items(), strict=False):
        _draw_running(axes, traces, colour[label])
        axes.set_ylim(low, high)
        axes.set_title(f"{plain(label)}, seed {seed}", fontsize=10)
    for axes in panels[: len(found) : columns]:
        axes.set_ylabel("running estimate of log p(x)\n[nats per observation]")
    _draw_acceptance(panels[len(found)], {label: traces for label, (_, traces) in first.items()}, colour)
    return figure


def _range(running: Sequence[Array]) -> tuple[float, float]:
    low = min(float(values[np.isfinite(values)].min()) for values in running)
    high = max(float(values[np.isfinite(values)].max()) for values in running)
    margin = 0.05 * (high - low) or 1.0
    return low - margin, high + margin


def _draw_running(axes: Axes, traces: Mapping[str, Array], colour: str) -> None:
    """Boxes: quartiles and median; whiskers: 5 % and 95 % of the observations; the line joins the means."""
    running, beta, position = traces["running"], traces["temperature"], _positions(traces)
    shown = np.unique(np.linspace(0, len(beta) - 1, min(BOXES, len(beta))).round().astype(int))
    axes.boxplot(
        [running[i] for i in shown],
        positions=position[shown].tolist(),
        widths=0.55 / BOXES,
        whis=(5, 95),
        showfliers=False,
        patch_artist=True,
        manage_ticks=False,
        boxprops={"facecolor": colour, "alpha": 0.35, "edgecolor": colour},
        medianprops={"color": colour, "linewidth": 1.6},
        whiskerprops={"color": colour},
        capprops={"color": colour},
    )
    axes.plot(position, running.mean(axis=1), color="0.25", linewidth=1, zorder=3)
    axes.axhline(float(running[-1].mean()), color="0.25", linewidth=0.8, linestyle=":")
    _inverse_temperatures(axes, position, beta)


def _positions(traces: Mapping[str, Array]) -> Array:
    """Part of the temperatures that are done at each checkpoint; these are as even as whole temperatures allow."""
    checkpoints, temperatures = len(traces["temperature"]), len(traces["acceptance"]) + 1
    return np.ceil((np.arange(checkpoints) + 1) * temperatures / checkpoints) / temperatures


def _inverse_temperatures(axes: Axes, position: Array, beta: Array) -> None:
    """The horizontal axis runs with the transitions, evenly, and is labelled with beta."""
    ticks = np.linspace(0, 1, TICKS + 1)
    names = [f"{b:.2g}" for b in np.interp(ticks, [0.0, *position.tolist()], [0.0, *beta.tolist()])]
    axes.set_xticks(ticks, names)
    axes.set_xlim(-0.02, 1.04)
    axes.set_xlabel("inverse temperature β, spaced by transitions")
    tidy(axes)


def _draw_acceptance(axes: Axes, found: Mapping[str, Mapping[str, Array]], colour: Mapping[str, str]) -> None:
    """Mean over chains and observations of the probability of acceptance at each temperature."""
    for label, traces in found.items():
        acceptance = traces["acceptance"]
        position = (np.arange(len(acceptance)) + 1) / (len(acceptance) + 1)
        axes.plot(position, acceptance, color=colour[label], linewidth=1.2, label=plain(label))
    traces = next(iter(found.values()))
    _inverse_temperatures(axes, _positions(traces), traces["temperature"])
    axes.set_ylim(0, 1)
    axes.set_ylabel("probability of acceptance")
    axes.set_title("acceptance by temperature", fontsize=10)
    axes.legend(loc="lower left", frameon=False, fontsize=9)


# Importance draws


@dataclass(frozen=True, eq=False)
class _Curve:
    """The bound of one method over the observations that all estimators have scored.

    Args:
        k: Numbers of draws, shape (J,).
        bound: Mean over observations, for each seed, shape (S, J).
        stderr: The estimator's error of the mean over seeds, shape (J,).
        others: Estimates of log p(x) by other evaluators, and their means over the same observations.
    """

    k: Array
    bound: Array
    stderr: Array
    others: Sequence[tuple[Estimate, float]]
    n_observations: int


def importance(table: Table, store: Source, colour: Mapping[str, str]) -> Figure | None:
    """The bound against the number of draws K, and as level lines what else is known of log p(x) of the same x."""
    evaluator, found = _of_rows(table, store, ("k", "bound", "bound_stderr"))
    if not found:
        return None
    examples = store.examples()
    rows = [row for row in table.rows if row.label in found]
    drawn = {row.label: _curve(row, evaluator, found[row.label], examples) for row in rows}
    curves = {label: curve for label, curve in drawn.items() if curve}
    if not curves:
        return None
    figure = Figure(figsize=(7.5, 4.4), layout="constrained")
    axes = figure.add_subplot()
    for label, curve in curves.items():
        _draw_bound(axes, table, label, curve, colour[label])
    axes.set_xscale("log")
    axes.set_ylim(_settled_range(list(curves.values())))
    counts = sorted({curve.n_observations for curve in curves.values()})
    axes.set_xlabel("draws K per observation")
    over = "" if counts == [1] else f", mean over\n{' or '.join(f'{n:,}' for n in counts)} observations"
    axes.set_ylabel(f"log p(x) [nats]{over}")
    tidy(axes)
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=2, frameon=False, fontsize=9)
    return figure


def _curve(
    row: MethodRow, evaluator: str, found: Mapping[int, Mapping[str, Array]], examples: pd.DataFrame
) -> _Curve | None:
    """None where it is not known which observations the traces are of."""
    k = next(iter(found.values()))["k"]
    scores = {seed: _scores(row, seed, examples) for seed in found}
    seeds = [
        seed
        for seed, traces in found.items()
        if len(scores[seed].get(evaluator, ())) == traces["bound"].shape[1] and np.array_equal(traces["k"], k)
    ]
    if not seeds:
        return None
    own = {seed: scores[seed][evaluator].index for seed in seeds}
    others = [name for name in row.evidence if name != evaluator and all(name in scores[seed] for seed in seeds)]
    common = functools.reduce(
        _intersection, [scores[seed][name].index for seed in seeds for name in (evaluator, *others)]
    )
    if not len(common):
        others, common = [], functools.reduce(_intersection, own.values())
    where = [own[seed].get_indexer(common) for seed in seeds]
    bounds, errors = (
        np.stack([found[seed][name][:, at] for seed, at in zip(seeds, where, strict=True)])
        for name in ("bound", "bound_stderr")
    )
    return _Curve(
        k=k,
        bound=bounds.mean(axis=2),
        stderr=np.sqrt(np.square(errors).sum(axis=(0, 2))) / (bounds.shape[0] * bounds.shape[2]),
        others=[
            (row.evidence[name], float(np.mean([scores[seed][name].loc[common].mean() for seed in seeds])))
            for name in others
        ],
        n_observations=len(common),
    )


def _intersection(first: pd.Index, second: pd.Index) -> pd.Index:
    return first.intersection(second)


def _scores(row: MethodRow, seed: int, examples: pd.DataFrame) -> dict[str, pd.Series]:
    """log p(x) of one fit by evaluator and observation, in the order in which it was measured."""
    mine = examples[(examples["job_id"] == row.jobs[seed]) & (examples["metric"] == LOG_LIKELIHOOD)]
    found = {name: mine[mine["evaluator"] == name].set_index("index")["value"] for name in row.evidence}
    return {name: values for name, values in found.items() if len(values) and values.index.is_unique}


def _draw_bound(axes: Axes, table: Table, label: str, curve: _Curve, colour: str) -> None:
    mean, reach = curve.bound.mean(axis=0), STANDARD_ERRORS * curve.stderr
    axes.fill_between(curve.k, mean - reach, mean + reach, color=colour, alpha=0.2, linewidth=0)
    axes.plot(curve.k, mean, "-o", color=colour, markersize=4, label=plain(label))
    styles = itertools.cycle(("--", ":", "-."))
    for estimate, value in curve.others:
        style = "-" if estimate.kind == "exact" else next(styles)
        name = f"{plain(label)}: {plain(short(table, estimate.evaluator))}"
        axes.axhline(value, color=colour, linewidth=1.2, linestyle=style, label=name)


def _settled_range(curves: Sequence[_Curve]) -> tuple[float, float]:
    """All that is known, and of the bounds what follows the first few draws."""
    settled = [curve.bound.mean(axis=0)[curve.k >= min(SETTLED, curve.k[-1])] for curve in curves]
    values = [float(value) for bound in settled for value in bound]
    values += [value for curve in curves for _, value in curve.others]
    low, high = min(values), max(values)
    margin = 0.08 * (high - low) or 0.05 * abs(high) or 1.0
    return low - margin, high + margin

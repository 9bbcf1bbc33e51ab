"""Figures of an experiment: made of tables and stored arrays, in the order and the colours of its lines."""

# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false
from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast
from zipfile import BadZipFile

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from harness.experiment import Differences, LatentPlanes, Line, Marginals, ModelSamples, Picture, Progression
from harness.report import images
from harness.report.figures import MUTED, PALETTE, draw_difference, plain, tidy
from harness.report.reproduced import Outcome, Results, measure, outcome
from harness.statistics import Difference

Array = NDArray[np.float64]
MASSES = (0.9, 0.5)
"""Of the exact density inside its contour lines."""
CELLS = 80  # a side of the grid on which a density is drawn
LEVEL_STYLES = ("--", ":", "-.")


def draw(picture: Picture, results: Results) -> Figure | None:
    """The figure that an experiment asks for; None if there is nothing to draw."""
    if isinstance(picture, LatentPlanes):
        return images.latent(galleries(picture.lines, results))
    if isinstance(picture, ModelSamples):
        return images.samples(galleries(picture.lines, results))
    if isinstance(picture, Marginals):
        return marginals(picture, galleries(picture.lines, results))
    if isinstance(picture, Progression):
        return progression(picture, points(picture, results))
    outcomes = [outcome(contrast, results) for contrast in results.contents.contrasts]
    return differences(picture, outcomes)


def colours(labels: Sequence[str]) -> dict[str, str]:
    """One colour for each label."""
    return dict(zip(dict.fromkeys(labels), itertools.cycle(PALETTE + MUTED), strict=False))


def galleries(lines: Sequence[Line], results: Results) -> dict[str, Mapping[str, np.ndarray]]:
    """The arrays of the first seed of each line that ended well, by its label."""
    found: dict[str, Mapping[str, np.ndarray]] = {}
    for label, row in measure(lines, results).rows.items():
        suite = next(line.suite for line in lines if line.label == label)
        for job_id in list(row.jobs.values())[:1]:
            try:
                found[plain(label)] = results.ran[suite].store.gallery(job_id)
            except (OSError, ValueError, EOFError, BadZipFile):  # never written, or damaged: the figure goes without it
                continue
    return found


# A quantity against the budget


def points(picture: Progression, results: Results) -> pd.DataFrame:
    """Columns curve, place (in its curve), level (whether it is one), seed, steps, seconds, value, floor."""
    curves = {**picture.curves, **{line.label: [line] for line in picture.levels}}
    found: list[dict[str, Any]] = []
    for label, lines in curves.items():
        for place, line in enumerate(lines):
            for seed, rows in _by_seed(results.records_of(line)).items():
                values = {row["metric"]: row for row in rows if row["status"] == "ok" and row["metric"]}
                if picture.metric in values:
                    row, floor = values[picture.metric], values.get(picture.floor)
                    found.append({
                        "curve": label, "place": place, "level": label not in picture.curves, "seed": seed,
                        "steps": row["fit_steps"], "seconds": row["fit_seconds"], "value": row["value"],
                        "floor": floor["value"] if floor else math.nan,
                    })  # fmt: skip
    return pd.DataFrame(
        found, columns=["curve", "place", "level", "seed", "steps", "seconds", "value", "floor"]
    ).astype({"steps": float, "seconds": float, "value": float, "floor": float})


def _by_seed(rows: Sequence[Mapping[str, Any]]) -> dict[int, list[Mapping[str, Any]]]:
    found: dict[int, list[Mapping[str, Any]]] = {}
    for row in rows:
        found.setdefault(int(row["seed"]), []).append(row)
    return found


def progression(picture: Progression, found: pd.DataFrame) -> Figure | None:
    """Mean over seeds with a bar from the smallest to the largest, and a dot for each seed."""
    if found.empty:
        return None
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True, squeeze=False)[0]
    colour = colours(list(found["curve"]))
    for axes, column in zip(panels, ("steps", "seconds"), strict=True):
        _draw_progression(axes, found, column, colour)
        axes.set_xlabel({"steps": "training steps", "seconds": "seconds of training (validation apart)"}[column])
    panels[0].set_ylabel(picture.axis)
    _scale(panels[0], np.asarray(found["value"], dtype=float), np.asarray(found["floor"], dtype=float))
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=min(4, len(labels)), frameon=False, fontsize=9)
    return figure


def _draw_progression(axes: Axes, found: pd.DataFrame, column: str, colour: Mapping[str, str]) -> None:
    curves, levels = found[~found["level"]], found[found["level"]]
    for label, mine in curves.groupby("curve", sort=False):
        mean = mine.groupby("place")[[column, "value"]].mean()
        axes.plot(mean[column], mean["value"], "-o", color=colour[str(label)], markersize=5, label=plain(str(label)))
        axes.plot(mine[column], mine["value"], "o", color=colour[str(label)], markersize=3, alpha=0.4)
    styles = itertools.cycle(LEVEL_STYLES)
    for label, mine in levels.groupby("curve", sort=False):
        value = float(mine["value"].mean())
        axes.axhline(value, color=colour[str(label)], linestyle=next(styles), linewidth=1.4, label=plain(str(label)))
    floor = np.asarray(found["floor"].dropna(), dtype=float)
    if len(floor):
        label = "exact draws by the same estimator"
        axes.axhspan(float(floor.min()), float(floor.max()), color="0.8", linewidth=0, zorder=0, label=label)
    axes.set_xscale("log")
    tidy(axes)


def _scale(axes: Axes, values: Array, floor: Array) -> None:
    """Logarithmic; around zero linear where an estimate is not positive."""
    known = np.concatenate([values, floor[np.isfinite(floor)]])
    if (known > 0).all():
        axes.set_yscale("log")
    else:
        axes.set_yscale("symlog", linthresh=max(float(np.abs(known[known <= 0]).max()), 1e-3))


# Draws over an exact density


@dataclass(frozen=True, eq=False)
class _Plane:
    """Draws of two quantities, and of their exact joint density, each of shape (M, 2)."""

    names: tuple[str, str]
    drawn: Mapping[str, Array]
    exact: Array


def marginals(picture: Marginals, shown: images.Galleries) -> Figure | None:
    """A row of panels for each plane, one for each line; contour lines hold 50 % and 90 % of the exact density."""
    planes = [plane for names in picture.planes if (plane := _plane(names, shown))]
    if not planes:
        return None
    labels = list(planes[0].drawn)
    size = 2.5
    figure = Figure(figsize=(size * len(labels) + 0.5, (size + 0.2) * len(planes) + 0.3), layout="constrained")
    grid = figure.subplots(len(planes), len(labels), squeeze=False, sharex="row", sharey="row")
    colour = colours(labels)
    for i, plane in enumerate(planes):
        density = _density(plane.exact)
        for axes, label in zip(grid[i], labels, strict=True):
            axes.plot(*plane.drawn[label].T, ".", color=colour[label], markersize=2, alpha=0.4, markeredgewidth=0)
            if density:
                axes.contour(*density, colors="black", linewidths=1)
            axes.set_xlabel(plain(plane.names[0]))
            tidy(axes)
            if i == 0:
                axes.set_title(label, fontsize=10)
        _frame(grid[i][0], plane)
        grid[i][0].set_ylabel(plain(plane.names[1]))
    return figure


def _plane(names: tuple[str, str], shown: images.Galleries) -> _Plane | None:
    drawn: dict[str, Array] = {}
    exact: list[Array] = []
    for label, arrays in shown.items():
        known = [str(name) for name in arrays.get("quantity_names", ())]
        if set(names) <= set(known):
            columns = [known.index(name) for name in names]
            drawn[label] = np.asarray(arrays["quantities"], dtype=float)[:, columns]
            if "exact_quantities" in arrays:
                exact.append(np.asarray(arrays["exact_quantities"], dtype=float)[:, columns])
    return _Plane(names, drawn, exact[0] if exact else np.empty((0, 2))) if drawn else None


def _density(draws: Array) -> tuple[Array, Array, Array, list[float]] | None:
    """Grid, density and levels of its contours, from a kernel estimate; None without draws."""
    if not len(draws):
        return None
    from scipy.stats import gaussian_kde

    estimate = gaussian_kde(draws.T)
    low, high = draws.min(axis=0), draws.max(axis=0)
    x, y = (np.linspace(low[i] - 0.1 * (high[i] - low[i]), high[i] + 0.1 * (high[i] - low[i]), CELLS) for i in (0, 1))
    density = estimate(np.stack(np.meshgrid(x, y)).reshape(2, -1)).reshape(CELLS, CELLS)
    at_draws = estimate(draws.T)
    return x, y, density, [float(np.quantile(at_draws, 1 - mass)) for mass in MASSES]


def _frame(axes: Axes, plane: _Plane) -> None:
    """All but one in a thousand of the draws of a line in each direction; what is far off must not hide the rest."""
    sets = [*plane.drawn.values(), *([plane.exact] if len(plane.exact) else [])]
    for i, limit in enumerate((axes.set_xlim, axes.set_ylim)):
        low = min(float(np.quantile(draws[:, i], 0.001)) for draws in sets)
        high = max(float(np.quantile(draws[:, i], 0.999)) for draws in sets)
        limit(low - 0.08 * (high - low), high + 0.08 * (high - low))


# Contrasts


def differences(picture: Differences, outcomes: Sequence[Outcome]) -> Figure | None:
    """Mean, standard error (thick), margin of noise and gap (thin) and seeds (crosses) of each contrast."""
    groups = {
        group: [found for found in outcomes if found.contrast.group == group and found.difference]
        for group in picture.groups
    }
    groups = {group: found for group, found in groups.items() if found}
    if not groups:
        return None
    counts = [len(found) for found in groups.values()]
    figure = Figure(figsize=(8, 0.9 + 0.45 * sum(counts) + 0.35 * len(counts)), layout="constrained")
    panels = figure.subplots(len(groups), 1, squeeze=False, sharex=True, height_ratios=[n + 0.6 for n in counts])[:, 0]
    for axes, (group, found) in zip(panels, groups.items(), strict=True):
        axes.axvline(0, color="0.3", linewidth=1)
        for position, (each, colour) in enumerate(zip(found, itertools.cycle(PALETTE), strict=False)):
            difference = cast(Difference, each.difference)
            draw_difference(axes, position, difference, difference.margin + each.reach, colour)
        axes.set_yticks(range(len(found)), [plain(each.contrast.statement) for each in found])
        axes.set_ylim(len(found) - 0.5, -0.5)
        axes.set_title(plain(group), fontsize=10, loc="left")
        tidy(axes)
    panels[-1].set_xlabel(
        "difference: the statement holds right of zero\n"
        "thick: standard error; thin: margin of noise and gap; crosses: seeds"
    )
    return figure

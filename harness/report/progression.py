"""Figure of a quantity against training steps and seconds, from fits of different length."""

# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false
from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from harness import readings
from harness.experiment import Progression
from harness.report.figures import colours_of, plain, tidy
from harness.report.reproduced import Results
from harness.statistics import Row

COLUMNS = ["curve", "place", "level", "seed", "steps", "seconds", "value", "floor"]
AXES = {"steps": "training steps", "seconds": "seconds of training (validation apart)"}
LEVEL_STYLES = ("--", ":", "-.")
MOST_TICKS = 8  # numbers of steps that are labelled each
SMALLEST = 1e-3  # nats; what is nearer to zero is drawn as zero


def points(picture: Progression, results: Results) -> pd.DataFrame:
    """Columns curve, place (in its curve), level (whether it is one), seed, steps, seconds, value, floor."""
    curves = {**picture.curves, **{line.label: [line] for line in picture.levels}}
    found: list[dict[str, Any]] = []
    for label, lines in curves.items():
        for place, line in enumerate(lines):
            for seed, rows in _by_seed(results.records_of(line)).items():
                values = {row["metric"]: row for row in rows if _asked(picture, row)}
                if picture.metric in values:
                    row, floor = values[picture.metric], values.get(picture.floor)
                    found.append({
                        "curve": label, "place": place, "level": label not in picture.curves, "seed": seed,
                        "steps": row["fit_steps"], "seconds": row["fit_seconds"] if row["timing_valid"] else None,
                        "value": row["value"],
                        "floor": floor["value"] if floor else math.nan,
                    })  # fmt: skip
    return pd.DataFrame(found, columns=COLUMNS).astype(
        {"steps": float, "seconds": float, "value": float, "floor": float}
    )


def _asked(picture: Progression, row: Row) -> bool:
    by = picture.evaluator in ("", readings.stem(row["evaluator"] or ""))
    return row["status"] == "ok" and by and row["metric"] in (picture.metric, picture.floor)


def _by_seed(rows: Sequence[Row]) -> dict[int, list[Row]]:
    found: dict[int, list[Row]] = {}
    for row in rows:
        found.setdefault(int(row["seed"]), []).append(row)
    return found


def progression(picture: Progression, found: pd.DataFrame) -> Figure | None:
    """Mean over seeds, and a small dot for each seed; no seconds where those of no fit are valid."""
    known = [column for column in AXES if found.loc[~found["level"].astype(bool), column].gt(0).any()]
    if not known:
        return None
    figure = Figure(figsize=(1.5 + 3.75 * len(known), 4.2), layout="constrained")
    panels = figure.subplots(1, len(known), sharey=True, squeeze=False)[0]
    colour = colours_of(list(found["curve"]))
    for axes, column in zip(panels, known, strict=True):
        _draw_progression(axes, found, column, colour)
        axes.set_xlabel(AXES[column])
    panels[0].set_ylabel(picture.axis)
    _scale(panels, found)
    handles, labels = panels[0].get_legend_handles_labels()
    columns = min(2 * len(known), len(labels))
    figure.legend(handles, labels, loc="outside upper left", ncols=columns, frameon=False, fontsize=9)
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
    axes.set_xscale("log")
    steps = sorted(set(curves["steps"])) if column == "steps" else []
    if 0 < len(steps) <= MOST_TICKS:
        axes.set_xticks(steps, [f"{n:,.0f}" for n in steps])
        axes.minorticks_off()
    tidy(axes)


def _scale(panels: Sequence[Axes], found: pd.DataFrame) -> None:
    """Logarithmic; linear around zero, where the floor is shaded: as good as exact draws."""
    known = np.asarray(found["floor"].dropna(), dtype=float)
    values = np.asarray(found["value"], dtype=float)
    floor = float(known.max()) if len(known) else math.nan
    lowest = min(0.0, float(values.min()), *([-floor] if floor > 0 else []))
    if floor > 0:
        for axes in panels:
            axes.axhspan(lowest, floor, color="0.88", linewidth=0, zorder=0, label="as exact draws by this estimator")
    if floor > 0 or lowest < 0:
        threshold = max(floor if floor > 0 else SMALLEST, -lowest)
        panels[0].set_yscale("symlog", linthresh=threshold, linscale=0.5)
        highest = 2 * max(float(values.max()), threshold)
        panels[0].set_ylim(lowest, highest)
        powers = [10.0**k for k in range(math.ceil(math.log10(threshold)), math.floor(math.log10(highest)) + 1)]
        panels[0].set_yticks([0.0, *powers], [f"{tick:g}" for tick in [0.0, *powers]])
    else:
        panels[0].set_yscale("log")

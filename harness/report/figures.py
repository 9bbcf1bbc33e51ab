"""Figures of a report: training curves and paired differences. Matplotlib's objects, never its global state."""

# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false
from __future__ import annotations

import io
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray

from harness.files import Folder
from harness.report.cells import one_line
from harness.report.tables import MethodRow, Table
from harness.statistics import Difference

Array = NDArray[np.float64]

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
"""Distinct for the colour-blind too: Okabe and Ito 2008, without the yellow that is lost on white."""

MUTED = (
    "#CC6677", "#332288", "#DDCC77", "#117733", "#88CCEE", "#882255", "#44AA99", "#999933", "#AA4499", "#777777",
)  # fmt: skip
"""Ten more, for classes and for the eighth method and on: Paul Tol's "muted", https://personal.sron.nl/~pault"""

SETTLED = 0.1
"""The part of a training curve that does not decide the vertical range: first values are huge."""
MOST_CURVES = 100
"""Of a method in a figure: nobody sees more of them."""

RESOLUTION = 150  # dots per inch


class Source(Protocol):
    """What a report needs of a store."""

    def records(self) -> pd.DataFrame: ...
    def examples(self) -> pd.DataFrame: ...
    def curve(self, job_id: str) -> pd.DataFrame: ...
    def gallery(self, job_id: str) -> Mapping[str, np.ndarray]: ...
    def traces(self, job_id: str, evaluator: str, metric: str) -> Mapping[str, np.ndarray]: ...


def colours(tables: Sequence[Table]) -> dict[str, str]:
    """One colour per method, the same in every figure of a report."""
    return colours_of([row.label for table in tables for row in table.rows])


def colours_of(labels: Sequence[str]) -> dict[str, str]:
    """One colour for each label, in the order of their first use."""
    return dict(zip(dict.fromkeys(labels), itertools.cycle(PALETTE + MUTED), strict=False))


def save(figure: Figure, path: Path) -> None:
    FigureCanvasAgg(figure)
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=RESOLUTION, bbox_inches="tight", metadata={"Software": None})
    Folder(path.parent).write(path.name, drawn.getvalue())


def plain(text: str) -> str:
    """Text that matplotlib prints as it is: no mathematics between dollars, no label hidden by an underscore."""
    shown = one_line(text, 60).replace("$", r"\$")
    return f" {shown}" if shown.startswith("_") else shown


def distinct(labels: Iterable[str]) -> dict[str, str]:
    """What each label is called in a figure: those that are cut to the same text are numbered."""
    names: dict[str, str] = {}
    for label in dict.fromkeys(labels):
        same = sum(name.partition(" #")[0] == plain(label) for name in names.values())
        names[label] = f"{plain(label)} #{same + 1}" if same else plain(label)
    return names


def tidy(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)


# Training curves


def curves(table: Table, store: Source, colour: Mapping[str, str]) -> Figure | None:
    """Validation objective against steps and against seconds; thin lines are seeds, the thick one is their mean."""
    found = {row.label: _validation_curves(row, store) for row in table.rows}
    shown = [row for row in table.rows if found[row.label]]
    if not shown:
        return None
    figure = Figure(figsize=(9, 3.9), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True, squeeze=False)[0]
    names = distinct(row.label for row in table.rows)
    for row in shown:
        for axes, column in zip(panels, (0, 1), strict=True):
            _draw_curves(axes, row, names[row.label], found[row.label], column, colour[row.label])
    for axes, label in zip(panels, ("training steps", "seconds of training (validation apart)"), strict=True):
        axes.set_xlabel(label)
        axes.set_xlim(left=0)
        tidy(axes)
    panels[0].set_ylabel("validation objective\n[nats per observation, lower is better]")
    panels[0].set_ylim(_vertical_range([curve for row in shown for curve in found[row.label]]))
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=min(3, len(labels)), frameon=False)
    return figure


def _validation_curves(row: MethodRow, store: Source) -> list[Array]:
    """Step, seconds and validation objective of the first seeds, shape (3, T); those without any are left out."""
    found: list[Array] = []
    for job_id in [*row.jobs.values()][:MOST_CURVES]:
        try:
            table = store.curve(job_id)
        except (OSError, ValueError):  # never written, or damaged: the figure goes without it
            continue
        curve = np.stack(
            [np.asarray(cast(Any, table[name]), dtype=float) for name in ("step", "seconds", "validation")]
        )
        curve = curve[:, np.isfinite(curve).all(axis=0)]
        if curve.shape[1]:
            found.append(curve)
    return found


def _draw_curves(axes: Axes, row: MethodRow, name: str, found: Sequence[Array], column: int, colour: str) -> None:
    style = "--" if row.density_ratio else "-"
    if len(found) > 1:
        for curve in found:
            axes.plot(curve[column], curve[2], style, color=colour, linewidth=0.8, alpha=0.4)
    mean = _mean_curve(found)
    label = name + (" (density ratio: no bound)" if row.density_ratio else "")
    label += f" ({MOST_CURVES} of {len(row.jobs):,} seeds)" if len(row.jobs) > MOST_CURVES else ""
    axes.plot(mean[column], mean[2], style, color=colour, linewidth=2, label=label)
    axes.plot(mean[column][-1:], mean[2][-1:], "o", color=colour, markersize=5)


def _mean_curve(found: Sequence[Array]) -> Array:
    """Over the steps at which all seeds were checked; the first seed's curve if there are none."""
    steps = found[0][0]
    for curve in found[1:]:
        steps = np.intersect1d(steps, curve[0])
    if len(steps) == 0:
        return found[0]
    return np.stack([curve[:, np.isin(curve[0], steps)] for curve in found]).mean(axis=0)


def _vertical_range(found: Sequence[Array]) -> tuple[float, float]:
    """Shows nearly everything after the first tenth of each curve; a rare spike leaves the figure at the top."""
    settled = [curve[2][curve[0] > SETTLED * curve[0][-1]] for curve in found]
    low = min(float(values.min()) for values in settled)
    high = max(float(np.quantile(values, 0.9)) for values in settled)
    margin = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
    return low - margin, high + margin


# Paired differences


def differences(table: Table, colour: Mapping[str, str]) -> Figure | None:
    """Log-likelihood less that of the first row: mean, standard error, margin of noise, and a mark for each seed.

    A difference is ranked if the line of its margin keeps clear of the certificate's gap around zero.
    """
    rows = [row for row in table.rows if row.difference]
    if not any(_is_open(row.difference) for row in rows):
        return None
    figure = Figure(figsize=(7.5, 1.3 + 0.45 * len(rows)), layout="constrained")
    axes = figure.add_subplot()
    axes.axvline(0, color="0.3", linewidth=1)
    first = table.rows[0]
    reach = [table.reach(row, first) for row in rows]
    for position, row in enumerate(rows):
        difference = cast(Difference, row.difference)
        draw_difference(axes, position, difference, difference.margin, colour[row.label])
        if math.isfinite(reach[position]):
            height = [position - 0.4, position + 0.4]
            axes.fill_betweenx(height, -reach[position], reach[position], color="0.85", linewidth=0, zorder=0)
    doubted = [" (untrusted)" if row.untrusted or first.untrusted else "" for row in rows]
    names = distinct(row.label for row in table.rows)
    axes.set_yticks(range(len(rows)), [names[row.label] + doubt for row, doubt in zip(rows, doubted, strict=True)])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    bias = "; grey: the BDMC gap with its error" if any(0 < each < math.inf for each in reach) else ""
    bias += "; without a grey bar: gap unknown, not ranked" if math.inf in reach else ""
    axes.set_xlabel(
        f"log p(x) less that of {plain(first.label)} [nats per observation, right is better]\n"
        f"thick: standard error; thin: within the noise if it reaches zero; crosses: seeds{bias}"
    )
    tidy(axes)
    return figure


def _is_open(difference: Difference | None) -> bool:
    """Not where it is zero beyond doubt: all methods agree on the exact log p(x) of a model that learns nothing."""
    return difference is not None and bool(difference.stderr or any(difference.per_seed.values()))


def draw_difference(axes: Axes, position: int, difference: Difference, margin: float, colour: str) -> None:
    """Mean; standard error (thick); margin (thin); a cross below them for each seed."""
    seeds = list(difference.per_seed.values())
    axes.plot(seeds, [position + 0.22] * len(seeds), "x", color=colour, markersize=4, alpha=0.8)
    for reach, width in ((margin, 1.5), (difference.stderr, 4)):
        if math.isfinite(reach):
            ends = [difference.value - reach, difference.value + reach]
            axes.plot(ends, [position, position], color=colour, linewidth=width, solid_capstyle="butt")
    axes.plot([difference.value], [position], "o", color=colour, markersize=7)

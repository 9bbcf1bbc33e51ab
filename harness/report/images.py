"""Figures of fits: the aggregate posterior in a latent plane, samples and reconstructions."""

# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false
from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from zipfile import BadZipFile

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from numpy.typing import NDArray

from harness.report.figures import MUTED, PALETTE, Source, distinct
from harness.report.tables import Table

Array = NDArray[np.float64]
Galleries = Mapping[str, Mapping[str, np.ndarray]]
"""Title of a panel -> arrays of one fit."""

COLUMNS = 4
PIXELS = 28  # least height of an image in a montage
GAP = "#A9BCD6"  # between images: neither black, white nor grey


def galleries(table: Table, store: Source) -> dict[str, Mapping[str, np.ndarray]]:
    """The arrays of the first seed of each row that has any."""
    found: dict[str, Mapping[str, np.ndarray]] = {}
    names = distinct(row.label for row in table.rows)
    for row in table.rows:
        for seed, job_id in list(row.jobs.items())[:1]:
            try:
                found[f"{names[row.label]}, seed {seed}"] = store.gallery(job_id)
            except (OSError, ValueError, EOFError, BadZipFile):  # never written, or damaged: the figure goes without it
                continue
    return found


def latent(shown: Galleries) -> Figure | None:
    """Draws of the aggregate posterior, coloured by data point or class: a panel per method, the same axes."""
    shown = {title: arrays for title, arrays in shown.items() if {"latent", "latent_label"} <= arrays.keys()}
    if not shown:
        return None
    figure, panels = _panels(len(shown), 3.0, shared_axes=True)
    reach = _reach([np.asarray(arrays["latent"], dtype=float) for arrays in shown.values()])
    for axes, (title, arrays) in zip(panels, shown.items(), strict=True):
        _draw_latent(axes, np.asarray(arrays["latent"], dtype=float), np.asarray(arrays["latent_label"]))
        axes.set_title(title, fontsize=10)
        axes.set_aspect("equal")
        axes.set_xlim(-reach, reach)
        axes.set_ylim(-reach, reach)
    figure.supxlabel("$z_1$")
    figure.supylabel("$z_2$")
    return figure


def _reach(draws: Sequence[Array]) -> float:
    """Half the width of a square that shows all but one draw in a thousand."""
    return 1.05 * max(float(np.quantile(np.abs(z[np.isfinite(z)]), 0.999)) for z in draws)


def _draw_latent(axes: Axes, z: Array, label: np.ndarray) -> None:
    classes = np.unique(label)
    scheme = PALETTE if len(classes) <= len(PALETTE) else MUTED
    if len(classes) > len(scheme):
        axes.scatter(z[:, 0], z[:, 1], c=label, cmap=colormaps["viridis"], s=4, alpha=0.6, linewidths=0)
        return
    for i, name in enumerate(classes):
        mine = z[label == name]
        axes.scatter(mine[:, 0], mine[:, 1], color=scheme[i], s=4, alpha=0.6, linewidths=0)
    if len(classes) > 1:
        for name in classes:
            x, y = np.median(z[label == name], axis=0)
            text = axes.text(x, y, str(name), fontsize=10, fontweight="bold", ha="center", va="center")
            text.set_path_effects([withStroke(linewidth=3, foreground="white")])


def samples(shown: Galleries) -> Figure | None:
    """E[x|z] for draws z from the prior: a panel per method."""
    shown = {title: arrays for title, arrays in shown.items() if "samples" in arrays}
    if not shown:
        return None
    figure, panels = _panels(len(shown), 2.4)
    for axes, (title, arrays) in zip(panels, shown.items(), strict=True):
        images = np.asarray(arrays["samples"], dtype=float)
        _show(axes, _montage(images, math.ceil(math.sqrt(len(images)))))
        axes.set_title(title, fontsize=10)
    return figure


def reconstructions(shown: Galleries) -> Figure | None:
    """Test observations, and below them E[x|z] for one draw z from each method's posterior."""
    shown = {title: arrays for title, arrays in shown.items() if {"observed", "reconstructed"} <= arrays.keys()}
    if not shown:
        return None
    first = next(iter(shown.values()))
    strips = {"observed": first["observed"], **{title: arrays["reconstructed"] for title, arrays in shown.items()}}
    n = len(first["observed"])
    figure = Figure(figsize=(1.8 + 0.55 * n, 0.62 * len(strips) + 0.1), layout="constrained")
    panels = figure.subplots(len(strips), 1, squeeze=False)[:, 0]
    for axes, (title, images) in zip(panels, strips.items(), strict=True):
        _show(axes, _montage(np.asarray(images, dtype=float), n))
        axes.set_ylabel(title, rotation=0, ha="right", va="center", fontsize=10)
    return figure


def _panels(n: int, size: float, *, shared_axes: bool = False) -> tuple[Figure, list[Axes]]:
    """A figure with ``n`` panels, a few in a row."""
    columns = min(n, COLUMNS)
    lines = math.ceil(n / columns)
    figure = Figure(figsize=(size * columns, (size + 0.25) * lines), layout="compressed")
    grid = figure.subplots(lines, columns, squeeze=False, sharex=shared_axes, sharey=shared_axes)
    panels = list(grid.flat)
    for axes in panels[n:]:
        axes.set_axis_off()
    return figure, panels[:n]


def _montage(images: Array, columns: int) -> Array:
    """Images (n, H, W) in rows of ``columns``, parted by nan; small ones are enlarged, so that gaps stay thin."""
    scale = math.ceil(PIXELS / images.shape[1])
    images = images.repeat(scale, axis=1).repeat(scale, axis=2)
    n, height, width = images.shape
    gap = max(1, height // 14)
    lines = math.ceil(n / columns)
    canvas = np.full((lines * (height + gap) - gap, columns * (width + gap) - gap), np.nan)
    for i, image in enumerate(images):
        top, left = (i // columns) * (height + gap), (i % columns) * (width + gap)
        canvas[top : top + height, left : left + width] = image
    return canvas


def _show(axes: Axes, canvas: Array) -> None:
    greys = colormaps["gray"].with_extremes(bad=GAP)
    axes.imshow(canvas, cmap=greys, vmin=0, vmax=1, interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)

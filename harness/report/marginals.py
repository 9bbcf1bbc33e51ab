"""Figure of draws from posteriors in planes of two quantities, over the exact density.

Where a model knows that density (`harness.model.HasPlanes`), it is shown; else a kernel estimate from exact draws,
which is wider than what they were drawn from.
"""

# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from numpy.typing import NDArray

from harness.experiment import Marginals
from harness.report.figures import colours_of, plain, tidy
from harness.report.images import Galleries

Array = NDArray[np.float64]
MASSES = (0.9, 0.5)
"""Of the exact density inside its contour lines."""
CELLS = 80  # a side of the grid on which a density is estimated
AROUND = 0.4  # part of the exact density's range that is shown on either side of it
SIZE = 2.2  # of a panel, inches


Density = tuple[Array, Array, Array]
"""Values of both quantities, (G,) and (H,), and a density there, (H, G)."""


@dataclass(frozen=True, eq=False)
class _Plane:
    """Draws of two quantities, and of their exact joint density, each of shape (M, 2); that density, if it is known."""

    names: tuple[str, str]
    drawn: Mapping[str, Array]
    exact: Array
    density: Density | None


def marginals(picture: Marginals, shown: Galleries) -> Figure | None:
    """A row of panels for each plane, one for each line; contour lines hold 50 % and 90 % of the exact density."""
    planes = [plane for names in picture.planes if (plane := _plane(names, shown))]
    if not planes:
        return None
    labels = list(planes[0].drawn)
    figure = Figure(figsize=(SIZE * len(labels) + 0.5, (SIZE + 0.2) * len(planes) + 0.3), layout="constrained")
    grid = figure.subplots(len(planes), len(labels), squeeze=False, sharex="row", sharey="row")
    colour = colours_of(labels)
    for i, plane in enumerate(planes):
        density, corners = plane.density or _estimated(plane.exact), _frame(grid[i][0], plane)
        for axes, label in zip(grid[i], labels, strict=True):
            axes.plot(*plane.drawn[label].T, ".", color=colour[label], markersize=2, alpha=0.4, markeredgewidth=0)
            if density:
                axes.contour(*density, _levels(density[2]), colors="black", linewidths=1)
            _tell_outside(axes, plane.drawn[label], *corners)
            axes.set_xlabel(plain(plane.names[0]))
            tidy(axes)
            if i == 0:
                axes.set_title(label, fontsize=10)
        grid[i][0].set_ylabel(plain(plane.names[1]))
    return figure


def _plane(names: tuple[str, str], shown: Galleries) -> _Plane | None:
    drawn: dict[str, Array] = {}
    exact: list[Array] = []
    densities: list[Density] = []
    for label, arrays in shown.items():
        known = [str(name) for name in arrays.get("quantity_names", ())]
        if set(names) <= set(known):
            columns = [known.index(name) for name in names]
            drawn[label] = np.asarray(arrays["quantities"], dtype=float)[:, columns]
            if "exact_quantities" in arrays:
                exact.append(np.asarray(arrays["exact_quantities"], dtype=float)[:, columns])
            planes = [tuple(map(str, plane)) for plane in arrays.get("planes", ())]
            if names in planes:
                at = planes.index(names)
                densities.append((*arrays["plane_axes"][at], arrays["plane_density"][at]))
    if not drawn:
        return None
    return _Plane(names, drawn, exact[0] if exact else np.empty((0, 2)), densities[0] if densities else None)


def _estimated(draws: Array) -> Density | None:
    """By kernels around the draws, (M, 2); None without any."""
    if not len(draws):
        return None
    from scipy.stats import gaussian_kde

    estimate = gaussian_kde(draws.T)
    low, high = draws.min(axis=0), draws.max(axis=0)
    x, y = (np.linspace(low[i] - 0.1 * (high[i] - low[i]), high[i] + 0.1 * (high[i] - low[i]), CELLS) for i in (0, 1))
    return x, y, estimate(np.stack(np.meshgrid(x, y)).reshape(2, -1)).reshape(CELLS, CELLS)


def _levels(density: Array) -> list[float]:
    """Those above which the cells of equal size have `MASSES` of the whole."""
    highest = np.sort(density, axis=None)[::-1]
    mass = highest.cumsum()
    return [float(highest[np.searchsorted(mass, part * mass[-1])]) for part in MASSES]


def _frame(axes: Axes, plane: _Plane) -> tuple[Array, Array]:
    """Lower and upper corner: around the exact density if it is known, so that draws far off do not hide it."""
    draws = plane.exact if len(plane.exact) else np.concatenate(list(plane.drawn.values()))
    low, high = np.quantile(draws, 0.001, axis=0), np.quantile(draws, 0.999, axis=0)
    reach = AROUND * (high - low)
    axes.set_xlim(low[0] - reach[0], high[0] + reach[0])
    axes.set_ylim(low[1] - reach[1], high[1] + reach[1])
    return low - reach, high + reach


def _tell_outside(axes: Axes, draws: Array, low: Array, high: Array) -> None:
    """How many of the draws the panel does not show, unless they are few."""
    outside = float(((draws < low) | (draws > high)).any(axis=1).mean())
    if outside >= 0.01:
        text = axes.text(0.97, 0.03, f"{outside:.0%} outside", transform=axes.transAxes, ha="right", fontsize=8)
        text.set_path_effects([withStroke(linewidth=3, foreground="white")])

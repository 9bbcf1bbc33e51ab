"""Figures of an experiment: made of tables and stored arrays, in the order and the colours of its lines."""

# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false
from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import cast
from zipfile import BadZipFile

import numpy as np
from matplotlib.figure import Figure

from harness.experiment import Differences, LatentPlanes, Line, Marginals, ModelSamples, Picture, Progression
from harness.report import images
from harness.report.figures import PALETTE, distinct, draw_difference, plain, tidy
from harness.report.marginals import marginals
from harness.report.progression import points, progression
from harness.report.reproduced import Outcome, Results, measure, outcome
from harness.statistics import Difference


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


def galleries(lines: Sequence[Line], results: Results) -> dict[str, Mapping[str, np.ndarray]]:
    """The arrays of the first seed of each line that ended well, by its label."""
    found: dict[str, Mapping[str, np.ndarray]] = {}
    rows = measure(lines, results).rows
    names = distinct(rows)
    for label, row in rows.items():
        suite = next(line.suite for line in lines if line.label == label)
        for job_id in list(row.jobs.values())[:1]:
            try:
                found[names[label]] = results.ran[suite].store.gallery(job_id)
            except (OSError, ValueError, EOFError, BadZipFile):  # never written, or damaged: the figure goes without it
                continue
    return found


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
        doubts = [" (undecided)" if each.obstacle else "" for each in found]
        labels = [plain(each.contrast.statement) + doubt for each, doubt in zip(found, doubts, strict=True)]
        axes.set_yticks(range(len(found)), labels)
        axes.set_ylim(len(found) - 0.5, -0.5)
        axes.set_title(plain(group), fontsize=10, loc="left")
        tidy(axes)
    panels[-1].set_xlabel(
        "difference: the statement holds right of zero\n"
        "thick: standard error; thin: margin of noise and gap; crosses: seeds"
    )
    return figure

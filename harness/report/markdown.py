"""The report of a store: Markdown and figures. A pure function of the store: it holds no date of its own."""

# pyright: reportMissingTypeStubs=false
from __future__ import annotations

import html
import json
import math
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from harness import readings
from harness.files import Folder
from harness.options import seeds_text
from harness.record import FROM_FILE
from harness.report import cells, doubts, notes, tables
from harness.report.build import tables_of
from harness.report.entries import FLAGS, UNTRUSTED, WARNING, Entry, Panel
from harness.report.panels import panels
from harness.report.tables import MethodRow, Table
from harness.statistics import Estimate, Row

if TYPE_CHECKING:
    import pandas as pd

    from harness.report.figures import Source

_SPECIAL = re.compile(r"([\\`*_\[\]|~$])")
_BLOCK = re.compile(r"^([-+#]|\d+(?=[.)]))")
_NO_BLOCK = "\u200b\\1"  # a zero-width space: text that starts like a list or a heading is none
_CAPTIONS = {
    "differences": "Paired log-likelihood differences to the first row; noise where the thin line reaches zero, and "
    "not ranked where it reaches the certified gap (grey, if there is one).",
    "curves": "Objective on the validation split. Objectives of different methods are not the same quantity: "
    "an adversarial one is a density ratio and no bound (dashed).",
    "annealing": "Annealing: running estimate of log p(x) over the test observations (box: quartiles and median, "
    "whiskers: 5 % and 95 %, line: mean) as the inverse temperature rises, and how many proposals were accepted.",
    "importance": "Lower bound on log p(x) from K importance draws, the mean over the observations that all estimators "
    "have scored, and two standard errors of it. Level lines: the other estimators on the same observations.",
    "latent": "Draws of the aggregate posterior over test observations, coloured by class or data point.",
    "samples": "E[x|z] for draws of z from the prior.",
    "reconstructions": "Test observations, and E[x|z] for one draw of z from each posterior.",
}
_ENVIRONMENT = ("hardware", "threads", "device", "torch_version", "git_commit", "git_dirty", "plugin", "plugin_version")


def write_report(store: Source, folder: Path) -> Path:
    """Write ``folder/report.md`` and its figures under ``folder/figures``.

    Args:
        store: Records, values per observation, training curves and galleries.
        folder: Made if need be; files of an earlier report are overwritten.

    Returns:
        The path of the Markdown file.
    """
    records = store.records()
    return write_built(store, records, tables_of(records, store.examples()), folder)


def write_built(store: Source, records: pd.DataFrame, built: Sequence[Table], folder: Path) -> Path:
    """As `write_report`, of records and tables that are there already."""
    folder.mkdir(parents=True, exist_ok=True)
    names = unique_slugs([table.key.problem for table in built])
    pictures = [_figures(table, store, built, folder, name) for table, name in zip(built, names, strict=True)]
    sections = [
        "# Comparison of inference methods",
        *bullets(notes.legend(built)),
        *(line for table, shown in zip(built, pictures, strict=True) for line in _section(table, shown)),
        *_methods(built),
        *environment(readings.rows(records[[*_ENVIRONMENT]])),
    ]
    Folder(folder).write_text("report.md", "\n".join(sections) + "\n")
    return folder / "report.md"


def slug(text: str) -> str:
    """A file name from any text: lower-case letters, digits and dashes, not empty."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:60].strip("-") or "problem"


def unique_slugs(texts: Sequence[str]) -> list[str]:
    """A file name for each text, all different."""
    found: list[str] = []
    for text in texts:
        name, n = slug(text), 2
        while name in found:
            name, n = f"{slug(text)}-{n}", n + 1
        found.append(name)
    return found


def escape(text: str, longest: int = cells.LONGEST_REASON) -> str:
    """Text from elsewhere as Markdown that shows it as it is: on one line, within a table or a paragraph.

    But for the user's home folder: reports are passed on.
    """
    line = cells.one_line(text.replace(_home(), "~/"), longest)
    return _SPECIAL.sub(r"\\\1", html.escape(line, quote=False))


def _home() -> str:
    """With a slash behind it; what stands for it if there is none, or if it is the root of all folders."""
    try:
        home = Path.home()
    except RuntimeError:
        return "~/"
    return f"{home}/" if home != home.parent else "~/"


def bullets(lines: Iterable[str], longest: int = cells.LONGEST_REASON) -> list[str]:
    shown = [f"- {_BLOCK.sub(_NO_BLOCK, escape(line, longest))}" for line in lines]
    return ["", *shown] if shown else []


def grid(header: Sequence[str], lines: Iterable[Sequence[str]], numeric_from: int = 1) -> list[str]:
    """A Markdown table from cells that are Markdown already."""
    rule = ["---" if i < numeric_from else "---:" for i in range(len(header))]
    return ["", *(f"| {' | '.join(line)} |" for line in (header, rule, *lines))]


# One problem


def _section(table: Table, pictures: Mapping[str, str]) -> list[str]:
    return [
        "",
        f"## {escape(table.key.problem)}",
        "",
        escape(cells.title(table)),
        *_table(table),
        *bullets(notes.notes(table)),
        *(line for panel in panels(table) for line in _panel(panel)),
        *(line for name, path in pictures.items() for line in ("", f"![{name}]({path})", "", escape(_CAPTIONS[name]))),
        *_numbers(table),
        *_failures(table),
        *_repeat(table),
    ]


def _table(table: Table) -> list[str]:
    header = ["method", "seeds", "log p(x)", "Δ to first", "ELBO", "KL to prior", "reconstruction", "fit, s", "steps/s"]
    places = {column: cells.column_decimals(table, column) for column in tables.COLUMNS}
    return grid(header, [_line(table, row, places) for row in table.rows])


def _line(table: Table, row: MethodRow, places: Mapping[str, int]) -> list[str]:
    scores = {column: _inline(cells.estimate_cell(row, column, places[column])) for column in tables.COLUMNS}
    if row.exceeds:
        scores["elbo"] += " (exceeds log p(x))"
    if row.untrusted:
        scores["log_likelihood"] += f" ({UNTRUSTED})"
    name, score = escape(row.label), scores.pop("log_likelihood")
    if row.warnings:
        name += f" {escape(cells.WARNED)} (warning)"
    if row.best:
        name, score = f"**{name}** {escape(cells.BEST)}", f"**{score}**"
    difference = _inline(cells.difference_cell(table, row, places["log_likelihood"]))
    timings = [_inline(cells.timing_cell(spread)) for spread in (row.fit_seconds, row.steps_per_second)]
    return [name, cells.seeds(row), score, difference, *scores.values(), *timings]


def _inline(cell: cells.Cell) -> str:
    error = f"± {cell.error}{cell.flag}" if cell.error else cell.flag
    return " ".join(escape(text) for text in (cell.mark, cell.number, error) if text)


def _panel(panel: Panel) -> list[str]:
    """A table below the main one: each number with its errors in turn."""
    lines = [[escape(label), *(_entry(entry) for entry in entries)] for label, entries in panel.lines]
    header = ["method", *(escape(column.replace("-\n", "").replace("\n", " ")) for column in panel.columns)]
    return ["", f"### {escape(panel.title)}", *grid(header, lines), *bullets(panel.notes)]


def _entry(entry: Entry) -> str:
    known = list(filter(None, entry.errors))
    if len(known) > 1:
        known = [error or "?" for error in entry.errors]
    flags = [f"({FLAGS[flag]})" for flag in entry.flags]
    texts = (entry.mark, entry.number, f"± {' / '.join(known)}" if known else "", *flags)
    return " ".join(escape(text) for text in texts if text)


def _numbers(table: Table) -> list[str]:
    """Every measurement with its kind, its three errors and its settings."""
    header = ["method", "metric", "evaluator", "kind", "split", "mean", "sd over seeds", "estimator's error",
              "test set's error", "seeds", "observations", "bits/dim", "settings (first seed)"]  # fmt: skip
    lines = [_number_line(row, estimate) for row in table.rows for estimate in row.estimates]
    return (
        ["", "<details><summary>All numbers</summary>", *grid(header, lines, len(header)), "", "</details>"]
        if lines
        else []
    )


def _number_line(row: MethodRow, estimate: Estimate) -> list[str]:
    errors = (estimate.spread, estimate.stderr, estimate.stderr_test)
    told = estimate.bounds.startswith(estimate.kind)
    kind = estimate.bounds if told else "; ".join(filter(None, [estimate.kind, estimate.bounds]))
    bits = f"{estimate.bits_per_dim:.4f}" if math.isfinite(estimate.bits_per_dim) else "-"
    observations = ", ".join(f"{n:,}" for n in estimate.n_observations)
    flags = [UNTRUSTED] if doubts.doubted(row, estimate) else []
    flags += [WARNING] if (estimate.evaluator, estimate.metric) in row.warnings else []
    value = " ".join([f"{estimate.value:.6g}", *filter(None, [estimate.unit]), *(f"({FLAGS[flag]})" for flag in flags)])
    texts = (row.label, estimate.metric, estimate.evaluator, kind, estimate.split, value)
    numbers = (*(f"{error:.2g}" if math.isfinite(error) else "unknown" for error in errors), str(estimate.seeds))
    shown = [escape(text) for text in (*texts, *numbers, observations, bits)]
    return [*shown, escape(_settings(estimate.settings[0]), LONGEST_SETTINGS)]


LONGEST_SETTING, LONGEST_SETTINGS = 80, 1000


def _settings(text: str) -> str:
    """An estimator's settings and diagnostics, rounded and shortened: they are there to be read."""
    shown = {key: cells.one_line(_rounded(value), LONGEST_SETTING) for key, value in json.loads(text).items()}
    return ", ".join(f"{key}={value}" for key, value in shown.items())


def _rounded(value: Any) -> str:
    """Any JSON value in short: mappings as ``{key: value}``."""
    if isinstance(value, dict):
        inside = cast(Mapping[str, Any], value)
        return "{" + ", ".join(f"{key}: {_rounded(inside[key])}" for key in sorted(inside, key=_natural)) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(_rounded(each) for each in cast(Sequence[Any], value)) + "]"
    return f"{value:.4g}" if isinstance(value, float) else _text(value)


def _natural(key: str) -> tuple[float, str]:
    """Numbers before words, in their own order: settings are stored with their keys sorted as texts."""
    return (float(key) if key.isdecimal() else math.inf), key


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _failures(table: Table) -> list[str]:
    """Everything that gave no number, with its reason."""
    fields = [(i.label, seeds, i.evaluator or "the fit", i.status, i.reason) for i, seeds in notes.issues(table.rows)]
    lines = [[escape(text) for text in line] for line in fields]
    header = ["method", "seeds", "of", "status", "reason"]
    return ["", "Fits and evaluators without a number:", *grid(header, lines, len(header))] if lines else []


def _repeat(table: Table) -> list[str]:
    """The command that asks for these rows."""
    methods = ",".join(f"{row.method}[{assignments(row.config)}]".replace("[]", "") for row in table.rows)
    seeds = seeds_text(sorted({seed for row in table.rows for seed in row.statuses}))
    evaluators = sorted({found.evaluator for row in table.rows for found in (*row.estimates, *row.issues)} - {""})
    command = ["harness", "compare", "--methods", methods, "--problems", table.key.problem, "--seeds", seeds]
    command += ["--budget", table.key.budget, "--precision", table.key.precision, "--device", table.key.device]
    command += ["--evaluators", ",".join(evaluators)] if evaluators else []
    shared, _, step = table.key.step_mode.rpartition(" ")
    command += ["--vectorize-seeds"] if shared else []
    command += ["--step", step] if step != "auto" else []
    for plugin in sorted({row.plugin for row in table.rows if row.plugin.startswith(FROM_FILE)}):
        command += ["--plugin", plugin.removeprefix(FROM_FILE)]
    return ["", "To repeat:", "", f"    {cells.one_line(shlex.join(command), 10_000)}"]


def assignments(config: str) -> str:
    """Options as on the command line, exactly."""
    return ",".join(f"{key}={_text(value)}" for key, value in json.loads(config).items())


def _figures(table: Table, store: Source, built: Sequence[Table], folder: Path, name: str) -> dict[str, str]:
    """Draw what there is to draw; returns the path of each figure, relative to the report."""
    from harness.report import convergence, figures, images  # matplotlib, slow to import

    colour = figures.colours(built)
    shown = images.galleries(table, store)
    drawn = {
        "differences": figures.differences(table, colour),
        "curves": figures.curves(table, store, colour),
        "annealing": convergence.annealing(table, store, colour),
        "importance": convergence.importance(table, store, colour),
        "latent": images.latent(shown),
        "samples": images.samples(shown),
        "reconstructions": images.reconstructions(shown),
    }
    paths: dict[str, str] = {}
    for kind, figure in drawn.items():
        if figure:
            paths[kind] = f"figures/{name}-{kind}.png"
            figures.save(figure, folder / paths[kind])
    return paths


# What all problems share


def _methods(built: Sequence[Table]) -> list[str]:
    rows = {row.label: row for table in built for row in table.rows}
    lines = [[escape(text) for text in (row.label, assignments(row.config), row.plugin)] for row in rows.values()]
    return ["", "## Methods", *grid(["method", "all options", "plugin"], lines, 3), *_sizes(built)]


def _sizes(built: Sequence[Table]) -> list[str]:
    """Trainable parameters that methods bring besides the decoder, which is the same for all."""
    lines = [
        [escape(text or "-") for text in (table.key.problem, row.label, row.parameters, table.decoder_parameters)]
        for table in built
        for row in table.rows
    ]
    return grid(["problem", "method", "parameters of its own", "of the shared decoder"], lines, 2)


def environment(rows: Sequence[Row]) -> list[str]:
    lines: list[list[str]] = []
    for column in _ENVIRONMENT:
        values = sorted({str(row[column]) for row in rows if row[column] not in (None, "")})
        lines.append([escape(column.replace("_", " ")), escape("; ".join(values) or "unknown")])
    return ["", "## Environment", *grid(["what", "value"], lines, 2)]

"""Tables below the main one: which log p(x) to trust, what others say of a posterior, and where its ELBO falls short.

How far posteriors are from exact ones: `harness.report.distances`, `harness.report.named`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from harness.readings import stem
from harness.report import distances, doubts, named, tables
from harness.report.cells import decimals, one_line
from harness.report.entries import EXCEEDS, UNTRUSTED, VACUOUS, WARNING, Entry, Panel, entry, error_text, places_of
from harness.report.tables import Checks, MethodRow, Table
from harness.report.trust import GAP, LOG_LIKELIHOOD
from harness.statistics import FLOOR, SECOND_OPINIONS, SIMULATED, Agreement, Estimate

GAPS = ("approximation_gap", "amortisation_gap", "kl_to_posterior")
CHAINS = {
    "r_hat_max": ("largest\nR-hat", 3),
    "ess_bulk_min": ("bulk, worth\ndraws", 0),
    "ess_tail_min": ("tails, worth\ndraws", 0),
    "divergences": ("diver-\ngences", 1),
}
"""Metric -> heading and decimals."""
COLUMNS = set[str]().union(*tables.COLUMNS.values()) - {LOG_LIKELIHOOD}
"""Metrics of which the main table shows one estimate."""
ELSEWHERE = {LOG_LIKELIHOOD, GAP, "adversarial_kl", "smoothed_elbo", *CHAINS}
"""Metrics that other tables show, or tell of."""


def panels(table: Table) -> list[Panel]:
    """Those that have anything to show."""
    made = (trust, checks, gaps, chains, distances.distances, named.modes, named.moments, others)
    return [panel for make in made if (panel := make(table))]


# log p(x)


def trust(table: Table) -> Panel | None:
    """log p(x) by every estimator, how they agree, how far off they may be, and where their errors are not to be had.

    None where there is one estimator, and nothing to be said of it.
    """
    columns = [*_evidence(table), *_agreements(table), *_certified(table), *_k_hat(table)]
    notes = doubts.of_trust(table, pairs(table))
    if len(columns) == len(estimators(table)) < 2 and not notes:
        return None
    return Panel(
        title="Can log p(x) be trusted?",
        columns=[heading for heading, _ in columns],
        lines=[(row.label, [cell(row) for _, cell in columns]) for row in table.rows],
        about=doubts.about_trust(table, pairs(table)),
        notes=notes,
        kinds=frozenset(estimate.kind for row in table.rows for estimate in [*row.evidence.values(), *_gaps_of(row)]),
    )


Column = tuple[str, Callable[[MethodRow], Entry]]


def estimators(table: Table) -> list[str]:
    """Evaluators of log p(x), in the order in which rows have them."""
    found = [list(row.evidence) for row in table.rows]
    return list(dict.fromkeys(name for names in sorted(found, key=len, reverse=True) for name in names))


def pairs(table: Table) -> list[tuple[str, str]]:
    return list(dict.fromkeys(pair for row in table.rows for pair in row.agreements))


def _evidence(table: Table) -> list[Column]:
    def column(name: str) -> Column:
        places = places_of(row.evidence.get(name) for row in table.rows)

        def cell(row: MethodRow) -> Entry:
            return entry(row, row.evidence.get(name), places)

        return f"log p(x)\n{doubts.short(table, name)}", cell

    return [column(name) for name in estimators(table)]


def _agreements(table: Table) -> list[Column]:
    def column(first: str, second: str) -> Column:
        mine = {row.label: row.agreements.get((first, second)) for row in table.rows}
        places = decimals([found.stderr for found in mine.values() if found])

        def cell(row: MethodRow) -> Entry:
            doubted = [UNTRUSTED] if row.distrusts(first) or row.distrusts(second) else []
            return _difference(mine[row.label], places, doubted)

        a, b = doubts.short(table, first), doubts.short(table, second)
        return min((f"{a} less\n{b}", f"{a}\nless {b}"), key=lambda text: max(map(len, text.split("\n")))), cell

    return [column(first, second) for first, second in pairs(table)]


def _difference(found: Agreement | None, places: int, flags: Sequence[str]) -> Entry:
    if found is None:
        return Entry()
    return Entry(f"{found.value:+.{places}f}", "", ("", error_text(found.stderr), ""), tuple(flags))


def _gaps_of(row: MethodRow) -> list[Estimate]:
    return [estimate for estimate in row.estimates if estimate.metric == GAP]


def _certified(table: Table) -> list[Column]:
    names = dict.fromkeys(gap.evaluator for row in table.rows for gap in _gaps_of(row))

    def column(name: str) -> Column:
        mine = {row.label: gap for row in table.rows for gap in _gaps_of(row) if gap.evaluator == name}
        places = decimals([max(gap.stderr, gap.stderr_test) for gap in mine.values()])

        def cell(row: MethodRow) -> Entry:
            return entry(row, mine.get(row.label), places)

        return f"BDMC gap,\n{'simulated' if len(names) == 1 else one_line(name)}", cell

    return [column(name) for name in names]


def _k_hat(table: Table) -> list[Column]:
    found = doubts.shares(table)
    names = list(dict.fromkeys(name for _, name in found))

    def column(name: str) -> Column:
        def cell(row: MethodRow) -> Entry:
            share = found.get((row.label, name))
            return Entry() if share is None else Entry(f"{100 * share:.3g} %")

        return "k-hat\n> 0.7" if len(names) == 1 else f"k-hat > 0.7\n{doubts.short(table, name)}", cell

    return [column(name) for name in names]


# Posteriors


def checks(table: Table) -> Panel | None:
    """What others say of the posteriors; None if nobody looked."""
    rows = [row for row in table.rows if row.checks]
    if not rows:
        return None
    estimates = {row.label: _checked(row) for row in rows}
    places = [places_of(column) for column in zip(*estimates.values(), strict=True)]
    return Panel(
        title="Checks of the posteriors by others than their methods",
        columns=[
            "own\nELBO",
            "fresh dis-\ncriminator",
            "ELBO at\nmost",
            "smoothed\nat least",
            f"log p(x)\n{one_line(stem(table.evaluator), 11)}",
        ],
        lines=[
            (row.label, [entry(row, *cell) for cell in zip(estimates[row.label], places, _flags(row), strict=True)])
            for row in rows
        ],
        about=doubts.about_checks(),
        notes=doubts.of_checks(table),
        kinds=frozenset(estimate.kind for line in estimates.values() for estimate in line if estimate),
    )


def _checked(row: MethodRow) -> list[Estimate | None]:
    found = row.checks or Checks()
    return [found.own, found.fresh, found.upper, found.smoothed, found.truth]


def _flags(row: MethodRow) -> list[list[str]]:
    found = row.checks or Checks()
    own, fresh, smoothed = ([EXCEEDS] if name in found.exceeds else [] for name in ("own", "fresh", "smoothed"))
    return [own, fresh, [], [*smoothed, *([VACUOUS] if found.vacuous else [])], []]


def gaps(table: Table) -> Panel | None:
    """Where ELBOs fall short of log p(x); None if nobody measured it."""
    found = {
        row.label: {e.metric: e for e in row.estimates if stem(e.evaluator) == "gaps" and e.metric in GAPS}
        for row in table.rows
    }
    rows = [row for row in table.rows if found[row.label]]
    if not rows:
        return None
    places = {metric: places_of(found[row.label].get(metric) for row in rows) for metric in GAPS}
    return Panel(
        title="Where the ELBO falls short of log p(x)",
        columns=["approxi-\nmation gap", "amorti-\nsation gap", "their sum:\nKL to p(z|x)"],
        lines=[(row.label, [entry(row, found[row.label].get(m), places[m]) for m in GAPS]) for row in rows],
        about=doubts.about_gaps(),
        notes=doubts.of_gaps(table),
        kinds=frozenset(estimate.kind for estimates in found.values() for estimate in estimates.values()),
    )


# Markov chains


def chains(table: Table) -> Panel | None:
    """Whether Markov chains agree, and what their draws are worth; None if nobody measured it."""
    found = {row.label: {e.metric: e for e in row.estimates if e.metric in CHAINS} for row in table.rows}
    rows = [row for row in table.rows if found[row.label]]
    if not rows:
        return None
    return Panel(
        title="Do the Markov chains agree?",
        columns=[heading for heading, _ in CHAINS.values()],
        lines=[
            (row.label, [_of_chains(row, found[row.label].get(metric), metric) for metric in CHAINS]) for row in rows
        ],
        about=[
            "chains: the worst of the model's quantities; R-hat is 1 where they agree, sample sizes are effective ones"
        ],
        notes=[],
        kinds=frozenset(estimate.kind for estimates in found.values() for estimate in estimates.values()),
    )


def _of_chains(row: MethodRow, estimate: Estimate | None, metric: str) -> Entry:
    warned = estimate is not None and (estimate.evaluator, metric) in row.warnings
    return entry(row, estimate, CHAINS[metric][1], [WARNING] if warned else [])


# Whatever else


def others(table: Table) -> Panel | None:
    """What no other table shows, such as the metrics of a plugin's evaluator; None if there is nothing."""
    found = [(row, found) for row in table.rows for found in row.estimates if not _is_elsewhere(found, row, table)]
    if not found:
        return None
    keys = list(dict.fromkeys((estimate.evaluator, estimate.metric) for _, estimate in found))
    rows = [row for row in table.rows if any(distances.estimate_of(row, key) for key in keys)]
    places = [places_of(distances.estimate_of(row, key) for row in rows) for key in keys]
    return Panel(
        title="Other measurements",
        columns=[distances.heading(rows, key) for key in keys],
        lines=[
            (row.label, [_other(row, key, digits) for key, digits in zip(keys, places, strict=True)]) for row in rows
        ],
        about=(),
        notes=(),
        kinds=frozenset(estimate.kind for _, estimate in found),
    )


def _is_elsewhere(estimate: Estimate, row: MethodRow, table: Table) -> bool:
    metric, key = estimate.metric, (estimate.evaluator, estimate.metric)
    second = stem(estimate.evaluator) in SECOND_OPINIONS
    shown = metric in COLUMNS and (second or estimate in row.shown.values())
    of_gaps = stem(estimate.evaluator) == "gaps" and metric in GAPS
    told = metric in ELSEWHERE or metric.endswith(FLOOR) or estimate.split == SIMULATED
    return shown or told or of_gaps or key in table.closeness


def _other(row: MethodRow, key: tuple[str, str], places: int) -> Entry:
    found = distances.estimate_of(row, key)
    told = entry(row, found, places, [WARNING] if key in row.warnings else [])
    small_or_large = found is not None and found.value and not 1e-3 <= abs(found.value) < 1e7  # of whatever unit
    return told._replace(number=f"{found.value:.4g}") if found and small_or_large else told

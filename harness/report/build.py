"""Tables from records and values per observation: which rows are compared, by which estimator, and who is ahead."""

# pyright: reportMissingTypeStubs=false
from __future__ import annotations

import dataclasses
import functools
import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import pandas as pd

from harness import readings, statistics
from harness.options import UserError, unknown
from harness.report import checks, distances, trust
from harness.report.cells import seed_list
from harness.report.tables import COLUMNS, SOURCES, Issue, MethodRow, Table, TableKey
from harness.report.trust import ValuesOf, of_seeds
from harness.statistics import SIMULATED, Difference, Row, Spread

UNIFORM = ("hardware", "threads", "torch_version", "git_commit", "plugin_version")
"""Columns whose values should be the same throughout a table; a note says so where they are not."""
LATE = 1.1
"""Seconds of a fit that count as kept to its budget, relative to that: a step is not broken off."""
BUSY = 0.1
"""Part of the cores' time above which a note says that other programs had it during a fit."""

RunKey = tuple[str, str]
"""Method's name and configuration (JSON)."""

K = TypeVar("K", TableKey, RunKey, str)


def tables_of(records: pd.DataFrame, examples: pd.DataFrame, job_order: Sequence[str] = ()) -> list[Table]:
    """All tables of a comparison or of a store. The order of the rows of ``records`` does not matter.

    Args:
        records: Columns as in `harness.record.COLUMNS`.
        examples: Values per observation: job_id, evaluator, metric, index, value, stderr.
        job_order: Job ids in the order of a plan. Methods and problems are shown in the order of their first jobs
            there; those that are not there follow in the order in which they were started.
    """
    rows = readings.rows(records)
    plan = {job_id: position for position, job_id in reversed(list(enumerate(job_order)))}
    runs = _in_order([(row, _run_key(row)) for row in rows], plan)
    kept, older = readings.latest(rows)
    placed = _placed(kept)
    groups: dict[TableKey, dict[RunKey, list[Row]]] = {}
    for row, key in placed:
        groups.setdefault(key, {}).setdefault(_run_key(row), []).append(row)
    values, labels = readings.values_per_observation(examples), labelled(runs)
    problems = _in_order([(row, row["problem"]) for row in rows], plan)
    keys = _in_order(placed, plan)
    keys.sort(key=lambda key: problems.index(key.problem))
    found = {key: {labels[run]: groups[key][run] for run in runs if run in groups[key]} for key in keys}
    definitions = Counter(problem for problem, _ in {(key.problem, key.spec_hash) for key in keys})
    return [
        dataclasses.replace(_table(key, found[key], values, older), definitions=definitions[key.problem])
        for key in keys
    ]


def jobs_of(records: pd.DataFrame, name: str) -> list[str]:
    """Ids of the jobs of a method, or of the run that tables call so: a job order in which these are first.

    Raises:
        UserError: If there are none.
    """
    runs = [(row["job_id"], _run_key(row)) for row in readings.rows(records)]
    names = {run: {run[0], label} for run, label in labelled(list(dict.fromkeys(run for _, run in runs))).items()}
    found = [job_id for job_id, run in runs if name in names[run]]
    if not found:
        raise UserError(unknown("row", name, itertools.chain(*names.values())))
    return list(dict.fromkeys(found))


def labelled(runs: Sequence[RunKey]) -> dict[RunKey, str]:
    """The method's name and, in brackets, the options in which the runs of that method differ."""
    options = {run: json.loads(run[1] or "{}") for run in runs}
    labels: dict[RunKey, str] = {}
    for run in runs:
        same = [options[other] for other in runs if other[0] == run[0]]
        keys = dict.fromkeys(key for config in same for key in config)
        differing = [key for key in keys if len({_text(config.get(key, "unset")) for config in same}) > 1]
        inside = ",".join(f"{key}={_text(options[run].get(key, 'unset'))}" for key in differing)
        labels[run] = f"{run[0]}[{inside}]" if inside else run[0]
    return labels


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _in_order(rows: Iterable[tuple[Row, K]], plan: Mapping[str, int]) -> list[K]:
    """The distinct keys of the rows, by their first job: as planned, else as started."""
    first: dict[K, tuple[int, str]] = {}
    for row, found in rows:
        place = plan.get(row["job_id"], len(plan)), row["started_at"] or ""
        first[found] = min(place, first.get(found, place))
    return sorted(first, key=lambda found: (first[found], found))


def _run_key(row: Row) -> RunKey:
    return row["method"], row["config"] or ""


def _placed(rows: Sequence[Row]) -> list[tuple[Row, TableKey]]:
    """Each row with the table that it belongs to.

    Simulated observations belong to the splits that their job is measured on: they certify estimates on each. What gave
    no number, such as a fit that diverged, is told in the tables of all splits: it is missing from each.
    """
    splits: dict[str, set[str]] = {}
    for row in rows:
        if row["metric"]:
            splits.setdefault(row["job_id"], set()).add(row["split"] or "")
    own = {job_id: sorted(found - {SIMULATED}) or ["test"] for job_id, found in splits.items()}
    measured = [
        (row, _table_key(row, split))
        for row in rows
        if row["metric"]
        for split in (own[row["job_id"]] if row["split"] == SIMULATED else [row["split"] or ""])
    ]
    tables: dict[TableKey, dict[TableKey, None]] = {}
    for row, key in measured:
        tables.setdefault(_table_key(row, ""), {})[key] = None
    lost = [row for row in rows if not row["metric"]]
    return measured + [
        (row, key) for row in lost for key in tables.get(_table_key(row, ""), (_table_key(row, row["split"] or ""),))
    ]


def _table_key(row: Row, split: str) -> TableKey:
    return _key_of(*(split if column == "split" else row[column] or "" for column in _KEY))


_KEY = [column.name for column in dataclasses.fields(TableKey)]


@functools.lru_cache(maxsize=1024)
def _key_of(*columns: str) -> TableKey:
    """Thousands of records share it."""
    return TableKey(**dict(zip(_KEY, columns, strict=True)))


def _table(
    key: TableKey, runs: Mapping[str, Sequence[Row]], values: ValuesOf, older: Mapping[tuple[Any, ...], int]
) -> Table:
    evaluator, measured = method_rows(runs, values)
    identities = {readings.identity(row) for rows in runs.values() for row in rows}
    table = Table(
        key=key,
        rows=measured,
        evaluator=evaluator,
        decoder_parameters=_joined(
            [row for rows in runs.values() for row in rows], lambda row: _whole(row["decoder_parameters"])
        ),
        left_out=sum(older.get(found, 0) for found in identities),
        mixed=mixed(runs),
    )
    return _compared(table, values)


def method_rows(runs: Mapping[str, Sequence[Row]], values: ValuesOf) -> tuple[str, list[MethodRow]]:
    """The evaluator whose log p(x) is shown for all, and a row for the records under each label, not yet compared."""
    measured = [_row(label, rows, values) for label, rows in runs.items()]
    evaluator = trust.chosen(measured)
    columns = {
        column: readings.preference([row.estimates for row in measured], metrics) for column, metrics in COLUMNS.items()
    }
    return evaluator, [_with_shown(row, evaluator, columns, values) for row in measured]


def _row(label: str, rows: Sequence[Row], values: ValuesOf) -> MethodRow:
    """A row without what depends on the other rows."""
    statuses, jobs = _jobs(rows)
    by_seed = {int(row["seed"]): row for row in rows}
    timed = [by_seed[seed] for seed in jobs if by_seed[seed]["timing_valid"]]
    estimates = readings.estimates(rows)
    evidence = trust.evidence(estimates)
    return MethodRow(
        label=label,
        method=rows[0]["method"],
        config=rows[0]["config"] or "{}",
        plugin=_joined(rows, lambda row: f"{row['plugin'] or ''} {row['plugin_version'] or ''}".strip()),
        parameters=_joined(rows, lambda row: _whole(row["method_parameters"])),
        statuses=statuses,
        jobs=jobs,
        estimates=estimates,
        shown={},
        fit_seconds=_timing(timed, "fit_seconds"),
        steps_per_second=_timing(timed, "steps_per_second"),
        issues=_issues(label, rows),
        together=sorted({row["fit_seconds"] for row in by_seed.values() if row["shared_clock"] and row["fit_seconds"]}),
        untimed=[seed for seed in jobs if not by_seed[seed]["timing_valid"] and not by_seed[seed]["shared_clock"]],
        busy={int(row["seed"]): row["busy_elsewhere"] for row in timed if (row["busy_elsewhere"] or 0.0) > BUSY},
        beyond=_beyond(by_seed[seed] for seed in jobs),
        evidence=evidence,
        certificates=trust.certificates(rows),
        agreements=trust.agreements(evidence, jobs, values),
        warnings=trust.warnings(rows),
    )


def _beyond(rows: Iterable[Row]) -> str:
    """What the longest fit took that was longer than its budget in steps or, by more than a tenth, in seconds."""
    found: dict[str, float] = {}
    for row in rows:
        unit, _, amount = (row["budget"] or "").partition("=")
        spent = {"steps": row["fit_steps"], "seconds": row["fit_seconds"]}.get(unit)
        if spent and spent > float(amount) * (LATE if unit == "seconds" else 1.0):
            found[unit] = max(spent, found.get(unit, 0.0))
    return ", ".join(
        f"{most:,.4g} {unit}" if unit == "seconds" else f"{most:,.0f} {unit}" for unit, most in found.items()
    )


def _with_shown(row: MethodRow, evaluator: str, preference: Mapping[str, Sequence[str]], values: ValuesOf) -> MethodRow:
    """The row with what the table's columns show, log p(x) by ``evaluator``, the others by whom is preferred."""
    comparable = [found for found in row.estimates if found.metric != "log_likelihood" or found.evaluator == evaluator]
    shown = {column: readings.choose(comparable, metrics, preference[column]) for column, metrics in COLUMNS.items()}
    row = dataclasses.replace(row, shown={column: estimate for column, estimate in shown.items() if estimate})
    return dataclasses.replace(row, checks=checks.checked(row, values))


def _jobs(rows: Sequence[Row]) -> tuple[dict[int, str], dict[int, str]]:
    """Status of each seed's job, and ids of those that are ok. A job that has measurements is ok."""
    statuses, jobs = dict[int, str](), dict[int, str]()
    for row in sorted(rows, key=lambda row: int(row["seed"])):
        status = "ok" if row["evaluator"] else row["status"]
        statuses[int(row["seed"])] = status
        if status == "ok":
            jobs[int(row["seed"])] = row["job_id"]
    return statuses, jobs


def _timing(rows: Sequence[Row], column: str) -> Spread | None:
    found = [float(row[column]) for row in rows if row[column] is not None]
    return statistics.spread(found) if found else None


def _joined(rows: Sequence[Row], text: Callable[[Row], str]) -> str:
    return ", ".join(sorted({text(row) for row in rows} - {""}))


def _whole(number: Any) -> str:
    return "" if number is None else f"{int(number):,}"


def _issues(label: str, rows: Sequence[Row]) -> list[Issue]:
    finite = {id(row) for row in readings.measured(rows)}
    issues: set[Issue] = set()
    for row in rows:
        status, reason = row["status"], row["reason"] or ""
        if status == "ok" and row["metric"] and id(row) not in finite:
            status, reason = "failed", f"{row['metric']} is not finite"
        if status != "ok":
            by = row["evaluator"] or ""
            issues.add(Issue(label=label, seed=int(row["seed"]), evaluator=by, status=status, reason=reason))
    return sorted(issues, key=lambda issue: (issue.evaluator, issue.status, issue.reason, issue.seed))


def mixed(runs: Mapping[str, Sequence[Row]]) -> dict[str, dict[str, list[str]]]:
    """Columns that should be uniform and are not: their values, each with the labels of the rows that have it."""
    found_in: dict[str, dict[str, list[str]]] = {}
    plugins = {row["plugin"] for rows in runs.values() for row in rows}
    for column in UNIFORM:
        found: dict[str, dict[str, None]] = {}
        for label, rows in runs.items():
            for row in rows:
                value = f"{row['plugin']} {row[column]}" if column == "plugin_version" else f"{row[column] or ''}"
                found.setdefault(value, {})[label] = None
        if len(found) > (len(plugins) if column == "plugin_version" else 1):
            found_in[column] = {value: list(labels) for value, labels in sorted(found.items())}
    by_version = _seeds_by_version(runs)
    return {**found_in, SOURCES: by_version} if by_version else found_in


def _seeds_by_version(runs: Mapping[str, Sequence[Row]]) -> dict[str, list[str]]:
    """Seeds of a row that were fitted by the same sources, with its label, where not all were."""
    told: dict[str, list[str]] = {}
    for label, rows in runs.items():
        seeds: dict[str, set[int]] = {}
        for row in rows:
            if row["metric"]:
                seeds.setdefault(row["source_hash"] or "", set()).add(int(row["seed"]))
        if len(seeds) > 1:
            for some in sorted(seeds.values(), key=min):
                told.setdefault(seed_list(sorted(some)), []).append(label)
    return told


# Comparison of rows


def _compared(table: Table, values: ValuesOf) -> Table:
    """The table with paired differences, the best row and the bounds that cannot be."""
    scores = {row.label: of_seeds(row.jobs, row.shown.get("log_likelihood"), values) for row in table.rows}

    def difference(first: MethodRow, second: MethodRow) -> Difference | None:
        return statistics.paired_difference(scores[first.label], scores[second.label], exhaustive=table.exhaustive)

    best = trust.best(table, difference)
    reference = table.rows[0]
    rows = [
        dataclasses.replace(
            row,
            difference=None if row is reference else difference(row, reference),
            exceeds=exceeding(row, values),
            best=row is best,
        )
        for row in table.rows
    ]
    return dataclasses.replace(table, rows=rows, closeness=distances.judged(rows, values))


def exceeding(row: MethodRow, values: ValuesOf) -> list[int]:
    """Seeds whose ELBO is above log p(x) by more than the combined error."""
    scores, bounds = (of_seeds(row.jobs, row.shown.get(column), values) for column in ("log_likelihood", "elbo"))
    return [seed for seed, score in scores.items() if seed in bounds and statistics.excess(bounds[seed], score)]

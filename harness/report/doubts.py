"""Sentences about what is not to be believed: certificates, estimators that disagree, bounds that cannot be."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

from harness.readings import stem
from harness.report.cells import DOUBTED, EXCEEDS, WARNED, one_line, seed_list
from harness.report.tables import Certificate, Checks, MethodRow, Table
from harness.report.trust import GAP, K_HAT, LOG_LIKELIHOOD, anneals, differing, few_weights, gap_error, settings
from harness.statistics import DENSITY_RATIO, DISAGREEMENT, LOWER_BOUNDS, Agreement, Estimate

RESTS_ON_EVIDENCE = ("log_likelihood", "approximation_gap", "kl_to_posterior")
"""Metrics that are as good as their log p(x); the amortisation gap is a difference of two ELBOs."""

Pair = tuple[str, str]


def short(table: Table, evaluator: str) -> str:
    """The evaluator's name, without its options where no other of that name measured log p(x)."""
    names = {name for row in table.rows for name in row.evidence}
    bare = stem(evaluator)
    alone = [stem(name) for name in names].count(bare) == 1
    return one_line(bare, 11) if alone else one_line(evaluator, 24)


def number(value: float, error: float) -> str:
    """A value with its error, to two digits of the error."""
    if not math.isfinite(error) or error <= 0:
        return f"{value:.3g}"
    places = max(0, 1 - math.floor(math.log10(error)))
    return f"{value:.{places}f} ± {error:.{places}f}"


# Certificates


def over_threshold(gap: Estimate, row: MethodRow) -> bool:
    """Whether the gap of any seed is over its threshold, whatever it certifies."""
    certified = [found for found in row.certificates.values() if found.gap.evaluator == gap.evaluator]
    threshold = settings(gap.settings[0]).get("threshold", math.inf)
    return any(found.untrusted for found in certified) or gap.value > threshold


def doubted(row: MethodRow, estimate: Estimate) -> bool:
    """Whether a number is marked as untrusted: a log p(x), what is made of one, or the gap itself."""
    if estimate.metric == GAP:
        return over_threshold(estimate, row)
    return estimate.metric in RESTS_ON_EVIDENCE and row.distrusts(estimate.evaluator)


def of_certificate(row: MethodRow, evaluator: str) -> list[str]:
    """That an evaluator's log-likelihood is untrusted, and why."""
    if not row.distrusts(evaluator):
        return []
    found = row.certificates[evaluator]
    gap = number(found.gap.value, gap_error(found.gap))
    threshold = min(found.thresholds[seed] for seed in found.untrusted)
    what = f"{DOUBTED} {one_line(row.label)}: log p(x) by {one_line(evaluator)} is untrusted and not ranked"
    over = f"over the threshold of {threshold:g} ({seed_list(found.untrusted)})"
    return [f"{what}: BDMC gap {gap} nats on simulated observations, {over}"]


def of_warnings(row: MethodRow) -> list[str]:
    """The warnings of a method's measurements: in the words of the first seed, with all that have one."""
    told: list[str] = []
    for (evaluator, metric), texts in row.warnings.items():
        text = next(iter(texts.values()))
        same = [seed for seed, other in texts.items() if other == text]
        others = [seed for seed in texts if seed not in same]
        too = f"; with other numbers {seed_list(others)}" if others else ""
        what = f"{WARNED} {one_line(row.label)}: {one_line(metric)} by {one_line(evaluator)}"
        told.append(f"{what}: {one_line(text)} ({seed_list(same)}{too})")
    return told


def of_ranking(table: Table) -> list[str]:
    """Differences to the first row that are beyond the noise and not beyond the gap; weights that are no evidence."""
    first, *others = table.rows
    found = [
        f"{one_line(row.label)}: k-hat of {one_line(table.evaluator)} is above 0.7 for most observations: not ranked; "
        "`ais` needs no such weights"
        for row in table.rows
        if LOG_LIKELIHOOD in row.shown and few_weights(row)
    ]
    for row in others:
        reach = table.reach(row, first)
        if row.difference and row.difference.beyond_noise and not row.untrusted and not first.untrusted:
            lead = abs(row.difference.value) - row.difference.margin
            if lead <= reach:
                gap = f"the BDMC gap with its error, {reach:.2g} nats" if math.isfinite(reach) else "an unknown gap"
                found.append(
                    f"{one_line(row.label)}: the difference to {one_line(first.label)} is beyond the noise, but not "
                    f"beyond it and {gap}: not ranked"
                )
    return found


def _certification(table: Table) -> Iterator[str]:
    """Which estimators that anneal have no certificate, and why; gaps below zero."""
    for row in table.rows:
        label = one_line(row.label)
        gaps = [estimate for estimate in row.estimates if estimate.metric == GAP]
        for evaluator, estimate in row.evidence.items():
            if evaluator in row.certificates:
                yield from _missing(label, evaluator, row.certificates[evaluator])
            elif anneals(estimate) and gaps:
                names = {gap.evaluator: differing(estimate.settings[0], gap.settings[0]) for gap in gaps}
                told = "; ".join(f"{one_line(name)} has {_differences(found)}" for name, found in names.items())
                yield f"{label}: {one_line(evaluator)} is not certified, the settings differ: {told}"
            elif anneals(estimate):
                why = [f" ({i.status}: {one_line(i.reason)})" for i in row.issues if i.evaluator.startswith("bdmc")]
                yield f"{label}: {one_line(evaluator)} is not certified, no BDMC gap was measured{''.join(why[:1])}"
        for gap in gaps:
            if gap.value < -DISAGREEMENT * gap_error(gap):
                yield f"{label}: the upper bound of {one_line(gap.evaluator)} is below its lower bound: a fault"


def _missing(label: str, evaluator: str, certificate: Certificate) -> Iterator[str]:
    if certificate.missing:
        missing = seed_list(certificate.missing)
        yield f"{label}: {one_line(evaluator)} is not certified for {missing}, and therefore not ranked"


def _differences(found: Mapping[str, tuple[object, object]]) -> str:
    return ", ".join(f"{name} {theirs}, not {mine}" for name, (mine, theirs) in found.items()) or "other seeds"


# Agreement


def of_trust(table: Table, pairs: Sequence[Pair]) -> list[str]:
    """What is to be known before one of the estimates of log p(x) is believed, the worst first."""
    shown = table.evaluator  # its certificate is told under the main table
    return [
        *_pairing(table, pairs),
        *(note for pair in pairs for row in table.rows for note in _disagreement(row, pair)),
        *(note for row in table.rows for name in row.evidence if name != shown for note in of_certificate(row, name)),
        *_certification(table),
        *_tails(table),
    ]


def _disagreement(row: MethodRow, pair: Pair) -> list[str]:
    found = row.agreements.get(pair)
    if found is None or not found.disagree:
        return []
    first, second = (row.evidence[name] for name in pair)
    names = [one_line(name) for name in pair]
    high, low = names if found.value > 0 else names[::-1]
    by = f"{one_line(row.label)}: {low} is {number(abs(found.value), found.stderr)} nats below {high}"
    if second.kind == "exact":
        if first.kind not in LOWER_BOUNDS:
            return [f"{by}, beyond {DISAGREEMENT:g} errors: they disagree"]
        if found.above:
            return [f"{EXCEEDS} {by}: a lower bound cannot exceed log p(x), so one of them is faulty"]
        return [f"{by}, which is exact: the bound is loose by that much"]
    if first.kind in LOWER_BOUNDS and second.kind in LOWER_BOUNDS:
        return [f"{by}, beyond {DISAGREEMENT:g} errors: of two lower bounds the higher is the closer"]
    return [f"{by}, beyond {DISAGREEMENT:g} errors: they disagree"]


def shares(table: Table) -> dict[tuple[str, str], float]:
    """Part of the observations whose weights have a tail too heavy for their errors, by method and evaluator."""
    found: dict[tuple[str, str], float] = {}
    for row in table.rows:
        for name, estimate in row.evidence.items():
            known = [settings(text)[K_HAT] for text in estimate.settings if K_HAT in settings(text)]
            if known:
                found[row.label, name] = sum(known) / len(known)
    return found


def _tails(table: Table) -> list[str]:
    heavy = {(one_line(label), one_line(name)): share for (label, name), share in shares(table).items() if share > 0}
    if not heavy:
        return []
    names = ", ".join(sorted({name for _, name in heavy}))
    above = "Pareto k-hat of the weights is above 0.7"
    if {n for row in table.rows for estimate in row.evidence.values() for n in estimate.n_observations} == {1}:
        labels = ", ".join(dict.fromkeys(label for label, _ in heavy))
        return [
            f"{above} ({labels}): the standard errors of {names} are not to be believed, and the bound may be loose"
        ]
    part = ", ".join(f"{label} {100 * share:.3g} %" for (label, _), share in heavy.items())
    what = f"{above} for a part of the observations ({part})"
    return [f"{what}: the standard errors of {names} are not to be believed there, and the bound may be loose"]


def about_trust(table: Table, pairs: Sequence[Pair]) -> list[str]:
    told = ["one estimator less another: paired over the fits and observations that both scored, ± both their errors"]
    if any(estimate.metric == GAP for row in table.rows for estimate in row.estimates):
        told.append(
            "BDMC gap: upper less lower bound on log p(x). It certifies the settings on observations simulated from "
            "the fitted model, not on the real ones"
        )
    return told if pairs else told[1:]


def _pairing(table: Table, pairs: Sequence[Pair]) -> list[str]:
    """Over how many observations estimators are compared, where they have scored different ones."""
    scored = {name: row.evidence[name].n_observations for row in table.rows for name in row.evidence}
    if len(set(scored.values())) == 1 or not pairs:
        return []
    counts = ", ".join(f"{short(table, name)} {' or '.join(f'{n:,}' for n in found)}" for name, found in scored.items())
    return [f"observations scored: {counts}; differences are over those in common: {_common(table, pairs)}"]


def _common(table: Table, pairs: Sequence[Pair]) -> str:
    counts = {
        pair: sorted({row.agreements[pair].n_observations for row in table.rows if pair in row.agreements})
        for pair in pairs
    }
    texts = {pair: " or ".join(f"{n:,}" for n in found) for pair, found in counts.items()}
    if len(set(texts.values())) == 1:
        return next(iter(texts.values()))
    return "; ".join(f"{short(table, a)} - {short(table, b)}: {text}" for (a, b), text in texts.items())


# Posteriors


NAMES = {
    "own": "own ELBO",
    "fresh": "ELBO of the fresh discriminator",
    "smoothed": "lower bound of the smoothed posterior",
}


def of_checks(table: Table) -> list[str]:
    rows = [row for row in table.rows if row.checks]
    return [*_checked(rows), *(note for row in rows for note in (*_exceeding(table, row), *_outside(row)))]


def _checked(rows: Sequence[MethodRow]) -> list[str]:
    """Over how many observations the numbers are, where the main table has others."""
    counts = {n for row in rows if row.checks and row.checks.fresh for n in row.checks.fresh.n_observations}
    main = {n for row in rows for estimate in row.shown.values() for n in estimate.n_observations}
    if main <= counts:
        return []
    return [f"over {' or '.join(f'{n:,}' for n in sorted(counts))} observations, which all of these have scored"]


def _exceeding(table: Table, row: MethodRow) -> Iterator[str]:
    if row.checks is None or "log_likelihood" not in row.shown:
        return
    truth = row.shown["log_likelihood"]
    by = "" if truth.kind == "exact" else f" as estimated by {one_line(table.evaluator)} (itself a {truth.kind})"
    for name, seeds in row.checks.exceeds.items():
        estimate: Estimate = getattr(row.checks, name)
        why = "a density ratio is no bound" if estimate.kind == DENSITY_RATIO else "check both estimators"
        yield f"{EXCEEDS} {one_line(row.label)}: {NAMES[name]} exceeds log p(x){by} ({seed_list(seeds)}): {why}"


def _outside(row: MethodRow) -> Iterator[str]:
    """Where the own ELBO is not between the bounds, and where the bounds do not leave room for any."""
    found, label = row.checks or Checks(), one_line(row.label)
    ratio = found.own is not None and found.own.kind == DENSITY_RATIO
    above, below, none = found.own_less_upper, found.smoothed_less_own, found.smoothed_less_upper
    if above and above.above:
        why = "its adversary was too weak, its KL is too small" if ratio else "a fault in one of them"
        yield f"{EXCEEDS} {label}: own ELBO is {_by(above)} above the upper bound on the ELBO: {why}"
    if below and below.above:
        other = "its KL is too large" if ratio else "there is a fault in one of them"
        what = "below the lower bound of the smoothed posterior"
        yield f"{label}: own ELBO is {_by(below)} {what}: the smoothed one is the better posterior, or {other}"
    elif none and none.above:
        yield f"{label}: smoothed, the posterior is better than as fitted, by at least {_by(none)}"


def _by(found: Agreement) -> str:
    return f"{number(abs(found.value), found.stderr)} nats"


def about_checks() -> list[str]:
    return [
        "fresh discriminator: trained on new draws, after the fit and larger than the method's own",
        "ELBO at most: from the same discriminator, on draws that it has never seen; above log p(x) it is merely loose",
        SMOOTHED,
    ]


SMOOTHED = (
    "smoothed at least: lower bound on the ELBO of the posterior with Gaussian noise added, so on log p(x) too; "
    "vacuous: more than 5 nats below the upper bound"
)


def about_gaps() -> list[str]:
    return [
        "approximation gap: log p(x) less the ELBO of the best member of the same family for each observation",
        "amortisation gap: that ELBO less the one of the posterior as fitted",
    ]


def of_gaps(table: Table) -> list[str]:
    """Posteriors without gaps, and why."""
    told = {
        (one_line(row.label), issue.status, one_line(issue.reason))
        for row in table.rows
        for issue in row.issues
        if stem(issue.evaluator) == "gaps"
    }
    return [f"{label}: {status}: {reason}" for label, status, reason in sorted(told)]

"""What benchmarks have told as one Markdown table, and whether it is worse than what they told before.

::

    pytest benchmarks --benchmark-only --benchmark-json=NEW.json
    python -m benchmarks.table NEW.json --into results/speed
    python -m benchmarks.table NEW.json --against results/speed/speed.json

The second writes `speed.md`, and `speed.json` with as much of the measurements as the third needs. The third compares
ratios and slopes, and seconds only of the same machine: one is worse if the whole of its 90 % interval is on the wrong
side of that of before. Exit code 1 says that one is; 2 that a file cannot be read.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Key = tuple[str, str, str]
SLOPE = "log-log slope"


@dataclass(frozen=True, kw_only=True)
class Line:
    """A ratio: how much better ours is than a peer, more than 1 being better.

    Args:
        what: What the benchmark is called.
        our_value, peer_value: In ``unit``.
        low, high: The 90 % interval of ``median``, that of the rounds.
    """

    what: str
    ours: str
    peer: str
    unit: str
    our_value: float
    peer_value: float
    median: float
    low: float
    high: float
    rounds: int

    @property
    def key(self) -> Key:
        return self.what, self.ours, self.peer


@dataclass(frozen=True, kw_only=True)
class Measure:
    """Another median with its interval: a slope, or seconds; the less, the better."""

    what: str
    name: str
    median: float
    low: float
    high: float
    rounds: int

    @property
    def key(self) -> Key:
        return self.what, self.name, ""


@dataclass(frozen=True)
class Speeds:
    """What was told in one run.

    Args:
        machine: Processor, its cores, and the threads that were used.
        made: By which commit, and when; empty if that was not kept.
    """

    machine: str
    made: str
    lines: Sequence[Line]
    measures: Sequence[Measure]


def read(measured: Mapping[str, Any]) -> Speeds:
    """From the content of a file of ``--benchmark-json``, or of a `speed.json`.

    Raises:
        ValueError: If it is something else, or if two ratios have the same name.
    """
    try:
        benchmarks = sorted(measured["benchmarks"], key=lambda each: each["fullname"])
        told = [each["extra_info"] for each in benchmarks if "what" in each["extra_info"]]
        lines = [_line(each["what"], ratio) for each in told for ratio in each.get("ratios", [])]
        measures = [
            Measure(what=each["what"], name=name, **median)
            for each in told
            for name, median in each.get("measures", {}).items()
        ]
        machine, made = _machine(measured["machine_info"], told), _made(measured)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"expected a file of --benchmark-json: {type(error).__name__}: {error}") from error
    twice = sorted({line.key for line in lines if sum(line.key == other.key for other in lines) > 1})
    if twice:
        raise ValueError(f"two ratios have the name {', '.join(twice[0])}")
    return Speeds(machine, made, lines, measures)


def _line(what: str, ratio: Mapping[str, Any]) -> Line:
    flat = {name: value for name, value in ratio.items() if name != "ratio"}
    return Line(what=what, **flat, **ratio["ratio"])


def _machine(info: Mapping[str, Any], told: Sequence[Mapping[str, Any]]) -> str:
    cpu, threads = info["cpu"], sorted({each["threads"] for each in told})
    return f"{cpu.get('brand_raw', 'unknown processor')}, {cpu.get('count', '?')} cores, threads {threads}"


def _made(measured: Mapping[str, Any]) -> str:
    commit = measured.get("commit_info") or {}
    if not commit.get("id"):
        return ""
    changed = " and changes that are in none" if commit.get("dirty") else ""
    return f"Measured at commit {commit['id'][:7]}{changed}, {measured['datetime'][:10]}."


def slim(measured: Mapping[str, Any]) -> dict[str, Any]:
    """The part that `read` reads: without the single rounds, and without the name of the machine."""
    cpu, commit = measured["machine_info"]["cpu"], measured.get("commit_info") or {}
    return {
        "machine_info": {"cpu": {name: cpu[name] for name in ("brand_raw", "count") if name in cpu}},
        "commit_info": {name: commit[name] for name in ("id", "dirty") if name in commit},
        "datetime": measured.get("datetime", ""),
        "benchmarks": [{name: each[name] for name in ("fullname", "extra_info")} for each in measured["benchmarks"]],
    }


def markdown(speeds: Speeds) -> str:
    ratios = [
        f"| {line.what} | {line.ours}, {value(line.our_value, line.unit)} | "
        f"{line.peer}, {value(line.peer_value, line.unit)} | {with_interval(line)} | {line.rounds} |"
        for line in speeds.lines
    ]
    measures = [f"| {each.what} | {each.name} | {with_interval(each)} | {each.rounds} |" for each in speeds.measures]
    return "\n".join(
        [
            "# Speed",
            "",
            f"Machine: {speeds.machine}. All sides took turns in the same run. A ratio is the median of those of the",
            "rounds, in brackets with a 90 % interval of that median; above 1 ours is the faster one.",
            *([speeds.made] if speeds.made else []),
            "",
            "| what | ours | peer | ratio | rounds |",
            "| --- | ---: | ---: | ---: | ---: |",
            *ratios,
            "",
            "| what | measure | median | rounds |",
            "| --- | --- | ---: | ---: |",
            *measures,
            "",
        ]
    )


def value(number: float, unit: str) -> str:
    return f"{1000 * number:.3g} ms" if unit == "s" and number < 1 else f"{number:.3g} {unit}"


def with_interval(each: Line | Measure) -> str:
    return f"{each.median:.3g} ({each.low:.3g}, {each.high:.3g})"


def worse(new: Speeds, before: Speeds) -> list[str]:
    """Ratios that have fallen and measures that have risen: a line for each. Seconds are those of one machine."""
    known = {line.key: line for line in before.lines}
    measures = {each.key: each for each in before.measures if each.name == SLOPE or new.machine == before.machine}
    fallen = [
        f"{line.what}: {line.ours} against {line.peer} was {with_interval(known[line.key])}, is {with_interval(line)}"
        for line in new.lines
        if line.key in known and line.high < known[line.key].low
    ]
    risen = [
        f"{each.what}: {each.name} was {with_interval(measures[each.key])}, is {with_interval(each)}"
        for each in new.measures
        if each.key in measures and each.low > measures[each.key].high
    ]
    return fallen + risen


def not_compared(new: Speeds, before: Speeds) -> list[str]:
    """What says nothing of whether it is worse: a line for each."""
    found, known = ({each.key for each in (*speeds.lines, *speeds.measures)} for speeds in (new, before))
    notes = [f"not measured this time: {', '.join(filter(None, key))}" for key in sorted(known - found)]
    notes += [f"not measured before: {', '.join(filter(None, key))}" for key in sorted(found - known)]
    if new.machine != before.machine:
        notes.append(f"another machine: {before.machine} before, {new.machine} now")
    return notes


def loaded(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.table", description="Speeds as a table, or compared.")
    parser.add_argument("new", type=Path, help="file of --benchmark-json")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--into", type=Path, default=Path("results/speed"), help="folder of the table")
    what.add_argument("--against", type=Path, help="file of --benchmark-json, or speed.json, of an earlier run")
    asked = parser.parse_args(arguments)
    try:
        measured = loaded(asked.new)
        new = read(measured)
        before = None if asked.against is None else read(loaded(asked.against))
    except (OSError, ValueError) as error:
        parser.error(str(error))
    if before is None:
        asked.into.mkdir(parents=True, exist_ok=True)
        (asked.into / "speed.md").write_text(markdown(new), encoding="utf-8")
        (asked.into / "speed.json").write_text(json.dumps(slim(measured), indent=1) + "\n", encoding="utf-8")
        return 0
    fallen = worse(new, before)
    _say([*not_compared(new, before), *(f"worse: {line}" for line in fallen)])
    _say([f"{len(fallen)} of {len(new.lines) + len(new.measures)} are worse"])
    return 1 if fallen else 0


def _say(lines: Sequence[str]) -> None:
    sys.stdout.write("".join(f"{line}\n" for line in lines))


if __name__ == "__main__":
    sys.exit(main())

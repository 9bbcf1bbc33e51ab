"""Options of methods, problems and evaluators: typed dataclass fields, validated, and their textual form.

The textual form is that of the command line: ``avb[noise_dim=32,lr=1e-4|2e-4],vae``; seeds are ``3`` or ``0,1,2``.
"""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import json
import math
import operator
import string
import typing
from collections.abc import Iterable, Mapping, Sequence
from functools import cache, cached_property
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError


class UserError(Exception):
    """A mistake of the user's: one clear line with what was expected, what came, and the remedy."""


MAX_SEEDS = 10_000
"""More repetitions than this are a typing error."""


@cache
def _adapters(cls: type) -> dict[str, TypeAdapter[Any]]:
    hints = typing.get_type_hints(cls, include_extras=True)
    return {field.name: TypeAdapter(hints[field.name]) for field in dataclasses.fields(cls) if field.init}


def schema(cls: type[Configurable]) -> dict[str, dict[str, Any]]:
    """JSON schema (type, bounds, choices) of every option of a class, by name."""
    return {key: adapter.json_schema() for key, adapter in _adapters(cls).items() if key != "name"}


def _reason(error: ValidationError) -> str:
    return "; ".join(item["msg"][:1].lower() + item["msg"][1:] for item in error.errors())


def _finite(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return all(_finite(item) for item in typing.cast("Sequence[Any]", value))
    return not isinstance(value, float) or math.isfinite(value)


class Configurable:
    """Base of frozen dataclasses whose fields are options: every value is validated on construction.

    Fields that are no arguments of the constructor are none.

    Raises:
        UserError: If a value has the wrong type, is out of range or is not finite.
    """

    name: str

    def __post_init__(self) -> None:
        for key, adapter in _adapters(type(self)).items():
            value = getattr(self, key)
            try:
                valid = adapter.validate_python(value)
            except ValidationError as error:
                raise UserError(f"{self.name}: option {key}={value!r}: {_reason(error)}") from None
            if not _finite(valid):
                raise UserError(f"{self.name}: option {key}={value!r}: must be finite")
            object.__setattr__(self, key, valid)

    @cached_property
    def config(self) -> dict[str, Any]:
        """All options with their values, JSON-compatible."""
        return {
            key: adapter.dump_python(getattr(self, key), mode="json")
            for key, adapter in _adapters(type(self)).items()
            if key != "name"
        }

    @cached_property
    def label(self) -> str:
        """The name and, in brackets, the options that differ from the defaults of the class."""
        usual = defaults(type(self))
        changed = [f"{key}={_text(value)}" for key, value in self.config.items() if getattr(self, key) != usual[key]]
        return f"{self.name}[{','.join(changed)}]" if changed else self.name


def defaults(cls: type[Configurable]) -> dict[str, Any]:
    """Default of every field of a class, `dataclasses.MISSING` where there is none."""
    return {
        field.name: field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        for field in dataclasses.fields(cls)  # type: ignore[arg-type]
    }


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


C = TypeVar("C", bound=Configurable)


def configure(prototype: C, options: Mapping[str, str]) -> C:
    """A copy of ``prototype`` with options given as text.

    Raises:
        UserError: If an option is unknown or its text is not a valid value.
    """
    adapters = {key: adapter for key, adapter in _adapters(type(prototype)).items() if key != "name"}
    values: dict[str, Any] = {}
    for key, text in options.items():
        if key not in adapters:
            raise UserError(
                unknown(f"option of {prototype.name}", key, adapters)
                if adapters
                else f"{prototype.name} has no options; got {key!r}"
            )
        try:
            values[key] = adapters[key].validate_strings(text)
        except ValidationError as error:
            raise UserError(f"{prototype.name}: option {key}={text!r}: {_reason(error)}") from None
    return dataclasses.replace(prototype, **values)  # type: ignore[type-var]


def several(given: str | Path | Iterable[Any]) -> tuple[Any, ...]:
    """All that is given, a single text or path too."""
    return (given,) if isinstance(given, str | Path) else tuple(given)


def one_of(what: str, text: str, known: Iterable[str]) -> str:
    """The text, which must be one of the names.

    Raises:
        UserError: If it is none of them.
    """
    names = list(known)
    if text not in names:
        raise UserError(unknown(what, str(text), names))
    return text


def unknown(what: str, name: str, known: Iterable[str]) -> str:
    """The message for a name that is not known, with the nearest one that is."""
    names = {name.casefold(): name for name in sorted(known)}
    close = difflib.get_close_matches(name.casefold(), names, n=1, cutoff=0.5)
    hint = f"did you mean {names[close[0]]!r}?" if close else f"known: {', '.join(names.values()) or 'none'}"
    return f"unknown {what} {name!r}; {hint}"


def parse_seeds(seeds: int | str | Iterable[int]) -> list[int]:
    """Seeds from how many (``3`` or ``"3"``: 0, 1, 2) or which (``"0,1,2"`` or ``[0, 1, 2]``; ``"7,"`` is one, 7).

    Raises:
        UserError: If there is none, too many, the same one twice, or something that is no whole number from 0.
    """
    form = "expected how many (3) or which (0,1,2), whole numbers"
    if isinstance(seeds, str):
        texts = [text.strip() for text in seeds.split(",")]
        alone = len(texts) == 2 and not texts[1]
        texts = texts[:1] if alone else texts
        wrong = [text for text in texts if not text.isdecimal() or len(text) > 19]
        if wrong:
            raise UserError(f"seeds {seeds!r}: {wrong[0]!r} is not a whole number from 0 to 2^63 - 1; {form}")
        seeds = [int(text) for text in texts] if alone or len(texts) > 1 else int(texts[0])
    if not isinstance(seeds, Iterable):
        number = _whole(seeds)
        if number is None or not 1 <= number <= MAX_SEEDS:
            raise UserError(f"seeds {seeds!r}: how many must be between 1 and {MAX_SEEDS}; {form}")
        return list(range(number))
    return _chosen_seeds(seeds, form)


def seeds_text(seeds: Sequence[int]) -> str:
    """Seeds as on the command line: which."""
    return ",".join(map(str, seeds)) + ("," if len(seeds) == 1 else "")


def _chosen_seeds(seeds: Iterable[int], form: str) -> list[int]:
    chosen: list[int] = []
    for seed in seeds:
        number = _whole(seed)
        if number is None:
            raise UserError(f"seeds: {seed!r} is not a whole number; {form}")
        if not 0 <= number < 2**63:
            raise UserError(f"seeds: {seed!r} must be a whole number from 0 to 2^63 - 1; {form}")
        if number in chosen:
            raise UserError(f"seeds: {number} is given twice; {form}")
        chosen.append(number)
    if not 1 <= len(chosen) <= MAX_SEEDS:
        raise UserError(f"seeds: between 1 and {MAX_SEEDS} of them, got {len(chosen)}; {form}")
    return chosen


def _whole(number: Any) -> int | None:
    """Of Python, numpy or torch; None for anything else, truth values too."""
    try:
        return None if isinstance(number, bool) else operator.index(number)
    except TypeError:
        return None


def parse_jobs(jobs: int | str) -> int:
    """How many jobs at once, as on the command line.

    Raises:
        UserError: If it is no positive whole number.
    """
    try:
        number = int(str(jobs))
    except ValueError:
        number = 0
    if number < 1:
        raise UserError(f"jobs: expected a positive whole number, got {jobs!r}")
    return number


_SECONDS = {"": 1.0, "s": 1.0, "min": 60.0, "h": 3600.0}
_BYTES = {"": 1.0, "mb": 1e6, "gb": 1e9, "mib": 2.0**20, "gib": 2.0**30}


def parse_seconds(what: str, seconds: float | str) -> float:
    """A positive number of seconds, given as one or as text: ``90``, ``"90s"``, ``"1.5min"``, ``"2h"``.

    Raises:
        UserError: If it is something else.
    """
    return _quantity(what, seconds, _SECONDS, "a positive number of seconds, or as 90s, 10min or 2h")


def parse_bytes(what: str, size: float | str) -> float:
    """A positive number of bytes, given as one or as text: ``"500MB"``, ``"8GiB"``.

    Raises:
        UserError: If it is something else.
    """
    return _quantity(what, size, _BYTES, "a positive number of bytes, or as 500MB, 500MiB, 8GB or 8GiB")


def _quantity(what: str, given: float | str, units: Mapping[str, float], expected: str) -> float:
    """A finite positive number, with one of the units behind it in any case of letters if it is text."""
    number, unit = (given, "") if not isinstance(given, str) else _split_unit(given)
    try:
        value = float(number) * units[unit]
    except (TypeError, ValueError, KeyError):
        value = math.nan
    if isinstance(given, bool) or not (math.isfinite(value) and value > 0):
        raise UserError(f"{what} {given!r}: expected {expected}")
    return value


def _split_unit(text: str) -> tuple[str, str]:
    number = text.strip().rstrip(string.ascii_letters)
    return number, text.strip()[len(number) :].lower()


def parse_selection(text: str) -> list[tuple[str, dict[str, str]]]:
    """Parse ``name[key=value|other,...],name`` into (name, options) pairs; alternatives ``|`` are multiplied out.

    Raises:
        UserError: If a bracket is unbalanced, an entry is empty, or an option is repeated or has no value.
    """
    selected: list[tuple[str, dict[str, str]]] = []
    for entry in _split_outside_brackets(text):
        name, bracket, rest = entry.partition("[")
        if bracket and rest.find("]") != len(rest) - 1:
            raise UserError(f"unexpected text after ']' in {entry!r}; expected name[option=value,...]")
        if not name:
            raise UserError(f"empty entry in {text!r}; expected name or name[option=value,...], separated by commas")
        selected += [(name, options) for options in _alternatives(rest[:-1], entry)] if bracket else [(name, {})]
    return selected


def _split_outside_brackets(text: str) -> list[str]:
    entries, depth = [""], 0
    for character in text:
        depth += {"[": 1, "]": -1}.get(character, 0)
        if depth not in (0, 1):
            raise UserError(f"unbalanced bracket in {text!r}")
        if character == "," and depth == 0:
            entries.append("")
        else:
            entries[-1] += character
    if depth:
        raise UserError(f"unbalanced bracket in {text!r}")
    return [entry.strip() for entry in entries]


def _alternatives(text: str, entry: str) -> list[dict[str, str]]:
    choices: dict[str, list[str]] = {}
    for item in text.split(","):
        key, equals, value = (part.strip() for part in item.partition("="))
        if not key or not equals or not all(part.strip() for part in value.split("|")):
            raise UserError(f"expected option=value in {entry!r}, got {item.strip()!r}")
        if key in choices:
            raise UserError(f"option {key!r} is given twice in {entry!r}")
        choices[key] = [part.strip() for part in value.split("|")]
    return [dict(zip(choices, values, strict=True)) for values in itertools.product(*choices.values())]

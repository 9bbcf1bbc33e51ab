"""What can be told of a method, problem, evaluator or dataset from its class: documents, options, capabilities."""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
import sys
from dataclasses import dataclass
from typing import Any

from harness.cli.parsing import one_line
from harness.options import Configurable, defaults, schema

_ENTRY = re.compile(r"    (\w[\w, ]*):\s+(.*)")
_BOUNDS = {"exclusiveMinimum": ">", "minimum": ">=", "exclusiveMaximum": "<", "maximum": "<="}


@dataclass(frozen=True, kw_only=True)
class Option:
    """One option, as text."""

    name: str
    value: str
    default: str
    type: str
    doc: str


def summary(cls: type) -> str:
    """The first paragraph of a class's own docstring, in one line without markup; empty if there is none."""
    return one_line(_own_docstring(cls).partition("\n\n")[0].replace("`", ""))


def module_docstring(cls: type) -> str:
    """The docstring of the module that defines a class: equation and source."""
    return inspect.cleandoc(sys.modules[cls.__module__].__doc__ or "")


def _own_docstring(cls: type) -> str:
    text = inspect.cleandoc(cls.__dict__.get("__doc__") or "")
    generated = dataclasses.is_dataclass(cls) and text.startswith(f"{cls.__name__}(")
    return "" if generated else text


def argument_docs(cls: type) -> dict[str, str]:
    """What the ``Args:`` sections of a class and its bases say of each argument."""
    docs: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        names: list[str] = []
        for line in _section(_own_docstring(base), "Args:"):
            entry = _ENTRY.fullmatch(line)
            if entry:
                names = [name.strip() for name in entry[1].split(",")]
                docs |= dict.fromkeys(names, entry[2])
            else:
                docs |= {name: f"{docs[name]} {line.strip()}" for name in names}
    return docs


def _section(docstring: str, title: str) -> list[str]:
    """The indented lines below a title."""
    lines = docstring.splitlines()
    if title not in lines:
        return []
    body = lines[lines.index(title) + 1 :]
    end = next((i for i, line in enumerate(body) if line and not line.startswith(" ")), len(body))
    return [line for line in body[:end] if line.strip()]


def options(thing: Configurable) -> list[Option]:
    """The options of a thing with their values, types, bounds and documents."""
    cls = type(thing)
    docs, usual = argument_docs(cls), defaults(cls)
    return [
        Option(
            name=name,
            value=_text(thing.config[name]),
            default="" if usual[name] is dataclasses.MISSING else _text(usual[name]),
            type=_type(facts),
            doc=docs.get(name, ""),
        )
        for name, facts in schema(cls).items()
    ]


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _type(facts: dict[str, Any]) -> str:
    """A JSON schema in words: ``integer > 0``, ``residual | inner-product``."""
    if "anyOf" in facts:
        return " or ".join(_type(choice) for choice in facts["anyOf"])
    if "enum" in facts:
        return " | ".join(map(_text, facts["enum"]))
    bounds = [f"{sign} {facts[key]:g}" for key, sign in _BOUNDS.items() if key in facts]
    return " ".join([str(facts.get("type", facts.get("const", "any"))), ", ".join(bounds)]).strip()

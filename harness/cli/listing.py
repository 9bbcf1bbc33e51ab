"""`harness list`: what there is."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from harness.cli.parsing import StrictCommand
from harness.cli.suite import plugin_option

if TYPE_CHECKING:
    from harness.registry import Provided, Registry

THINGS = ("methods", "datasets", "problems", "evaluators", "experiments", "executors")
KINDS = (*THINGS, "plugins")


@click.command("list", cls=StrictCommand)
@click.argument("kind", metavar="|".join(KINDS))
@click.option("--json", "as_json", is_flag=True, help="For machines.")
@plugin_option
def list_things(kind: str, as_json: bool, plugin: tuple[str, ...]) -> int:
    """List methods, problems and so on, with where each comes from."""
    from harness.options import UserError, unknown

    if kind not in KINDS:
        raise UserError(unknown("kind", kind, KINDS))
    from harness.registry import Registry

    rows = _rows(Registry.discover(plugin), kind)
    if as_json:
        click.echo(json.dumps(rows, indent=1))
    else:
        _print(rows)
    return 0


def _rows(registry: Registry, kind: str) -> list[dict[str, Any]]:
    if kind == "plugins":
        return _plugins(registry)
    provided: dict[str, Provided[Any]] = getattr(registry, kind)
    return [
        {
            "name": name,
            "what": _what(entry.thing),
            "options": entry.thing.config,
            "plugin": entry.plugin.name,
            "distribution": entry.plugin.distribution,
            "version": entry.plugin.version,
        }
        for name, entry in provided.items()
    ]


def _plugins(registry: Registry) -> list[dict[str, Any]]:
    return [
        {
            "name": plugin.name,
            "distribution": plugin.distribution,
            "version": plugin.version,
            "provides": [
                f"{kind[:-1]} {name}"
                for kind in THINGS
                for name, entry in getattr(registry, kind).items()
                if entry.plugin == plugin
            ],
            "broken": plugin.broken,
        }
        for plugin in registry.plugins
    ]


def _what(thing: object) -> str:
    from harness.cli.describe import summary

    return summary(type(thing))


def _print(rows: list[dict[str, Any]]) -> None:
    """The same facts in fewer words: `harness show` tells the rest."""
    from harness.cli.console import print_table

    shown = [_without_options(row) for row in rows]
    columns = list(shown[0]) if shown else ["name"]
    print_table(columns, [[_text(row[column]) for column in columns] for row in shown])


def _without_options(row: dict[str, Any]) -> dict[str, Any]:
    if "plugin" not in row:
        return row
    origin = f"{row['plugin']} of {row['distribution']} {row['version']}"
    return {"name": row["name"], "what": row["what"], "plugin": origin}


def _text(value: str | list[str]) -> str:
    return value if isinstance(value, str) else ", ".join(value)

"""`harness data`: where data sets are, fetching and verifying them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from harness.cli.parsing import StrictCommand, StrictGroup
from harness.cli.suite import plugin_option

if TYPE_CHECKING:
    from harness.problem import Dataset


@click.group(cls=StrictGroup)
def data() -> None:
    """List, fetch and verify data sets."""


@data.command("list", cls=StrictCommand)
@plugin_option
def list_data(plugin: tuple[str, ...]) -> int:
    """List the data sets and where each is read from."""
    from harness.cli.console import print_table
    from harness.cli.describe import summary
    from harness.registry import Registry

    entries = Registry.discover(plugin).datasets.values()
    rows = [(entry.thing.name, entry.thing.location, summary(type(entry.thing))) for entry in entries]
    print_table(("name", "location", "what"), rows)
    return 0


@data.command(cls=StrictCommand)
@click.argument("name")
@plugin_option
def fetch(name: str, plugin: tuple[str, ...]) -> int:
    """Download or prepare NAME, and verify it.

    Embedded data sets need nothing.
    """
    dataset = _dataset(name, plugin)
    click.echo(f"fetching {dataset.label}", err=True)
    click.echo(f"{dataset.label}: {dataset.fetch()}")
    return 0


@data.command(cls=StrictCommand)
@click.argument("name")
@plugin_option
def verify(name: str, plugin: tuple[str, ...]) -> int:
    """Check NAME; print its sizes and hash."""
    dataset = _dataset(name, plugin)
    spec = dataset.load()
    sizes = ", ".join(f"{len(getattr(spec, split))} {split}" for split in ("train", "validation", "test"))
    click.echo(f"{dataset.label}: verified; {sizes}; sha256 of the content {spec.content_hash}")
    return 0


def _dataset(name: str, plugin: tuple[str, ...]) -> Dataset:
    from harness.options import UserError
    from harness.registry import Registry

    chosen: list[Dataset] = Registry.discover(plugin).select("datasets", name)
    if len(chosen) > 1:
        raise UserError(f"expected one data set, got {name!r}")
    return chosen[0]

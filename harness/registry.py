"""Discovery of plugins, and what they provide under which name."""

from __future__ import annotations

import importlib.util
import sys
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any, Generic, TypeVar

import pluggy

from harness import hookspecs
from harness.evaluator import Evaluator
from harness.method import Method
from harness.options import Configurable, UserError, configure, parse_selection, unknown
from harness.problem import Dataset, Problem

T = TypeVar("T", bound=Configurable)


class PluginWarning(UserWarning):
    """A plugin could not be used; the others are."""


@dataclass(frozen=True)
class Plugin:
    """A plugin as found: its name, where it comes from, and why it is broken, if it is."""

    name: str
    distribution: str
    version: str
    broken: str = ""

    @property
    def origin(self) -> str:
        return f"{self.distribution} {self.version}".strip()


@dataclass(frozen=True)
class Provided(Generic[T]):
    """An object that a plugin provides."""

    thing: T
    plugin: Plugin


@dataclass
class Registry:
    """All methods, datasets, problems and evaluators by name, with the plugin that each comes from."""

    plugins: list[Plugin] = field(default_factory=list)
    methods: dict[str, Provided[Method]] = field(default_factory=dict)
    datasets: dict[str, Provided[Dataset]] = field(default_factory=dict)
    problems: dict[str, Provided[Problem]] = field(default_factory=dict)
    evaluators: dict[str, Provided[Evaluator]] = field(default_factory=dict)
    manager: pluggy.PluginManager = field(default_factory=lambda: pluggy.PluginManager(hookspecs.PROJECT))

    def __post_init__(self) -> None:
        self.manager.add_hookspecs(hookspecs)

    @staticmethod
    def discover(files: Iterable[str | Path] = ()) -> Registry:
        """Load every entry point of the group `harness.plugins` by itself, then one-off plugin files.

        A broken entry point is warned about and listed as broken; the others are used.

        Raises:
            UserError: If a file is missing or broken, or if two plugins claim one name.
        """
        registry = Registry()
        for entry_point in metadata.entry_points(group=hookspecs.ENTRY_POINT_GROUP):
            registry._load_entry_point(entry_point)
        for path in files:
            registry._load_file(Path(path))
        return registry

    def select(self, kind: str, text: str) -> list[Any]:
        """Configured objects from their textual form, e.g. ``select("methods", "avb[lr=1e-4],vae")``.

        Raises:
            UserError: If the text is malformed, a name or option is unknown, a value invalid, or a run given twice.
        """
        chosen = [configure(self.prototype(kind, name), options) for name, options in parse_selection(text)]
        repeated = [item.label for i, item in enumerate(chosen) if item in chosen[:i]]
        if repeated:
            raise UserError(f"{kind}: the same run is asked for twice: {repeated[0]}")
        return chosen

    def prototype(self, kind: str, name: str) -> Any:
        """What is registered as ``name``, or as the part before the colon in ``name:argument``, with its defaults.

        Raises:
            UserError: If there is none.
        """
        provided: dict[str, Provided[Any]] = getattr(self, kind)
        stem, colon, argument = name.partition(":")
        if stem not in provided or (colon and not hasattr(provided[stem].thing, "with_argument")):
            raise UserError(unknown(kind[:-1], name, provided))
        thing = provided[stem].thing
        return thing.with_argument(argument) if colon else thing

    def plugin_of(self, kind: str, thing: Configurable) -> Plugin:
        """Where a method, problem ... comes from; one made in Python need not come from a plugin."""
        provided = getattr(self, kind).get(thing.name)
        if provided is None or type(provided.thing) is not type(thing):
            return Plugin(thing.name, "not a plugin", "")
        return provided.plugin

    def _load_entry_point(self, entry_point: metadata.EntryPoint) -> None:
        distribution = entry_point.dist
        origin = (distribution.name, distribution.version) if distribution else ("unknown", "")
        try:
            self._register(entry_point.load(), Plugin(entry_point.name, *origin))
        except UserError:
            raise
        except (Exception, SystemExit) as error:  # a plugin may fail in any way; the others go on
            plugin = Plugin(entry_point.name, *origin, broken=f"{type(error).__name__}: {error}")
            self.plugins.append(plugin)
            warnings.warn(f"plugin {plugin.name!r} of {plugin.origin} is broken: {plugin.broken}", PluginWarning, 2)

    def _load_file(self, path: Path) -> None:
        if not path.is_file():
            raise UserError(f"plugin file {str(path)!r} does not exist")
        try:
            self._register(_import_file(path), Plugin(path.stem, f"file {path.name}", ""))
        except UserError:
            raise
        except (Exception, SystemExit) as error:
            raise UserError(f"plugin file {str(path)!r} is broken: {type(error).__name__}: {error}") from error

    def _register(self, module: ModuleType, plugin: Plugin) -> None:
        self.manager.register(module, name=f"{plugin.distribution}:{plugin.name}")
        try:
            self.manager.check_pending()
            found = {
                kind: _provided(module, hook, base)
                for kind, hook, base in (
                    ("methods", "harness_methods", Method),
                    ("datasets", "harness_datasets", Dataset),
                    ("problems", "harness_problems", Problem),
                    ("evaluators", "harness_evaluators", Evaluator),
                )
            }
        except BaseException:
            self.manager.unregister(module)
            raise
        for kind, things in found.items():
            self._claim(kind, things, plugin)
        self.plugins.append(plugin)

    def _claim(self, kind: str, things: Sequence[Configurable], plugin: Plugin) -> None:
        known: dict[str, Provided[Any]] = getattr(self, kind)
        for thing in things:
            if thing.name in known:
                other = known[thing.name].plugin
                raise UserError(
                    f"two plugins claim the {kind[:-1]} {thing.name!r}: {other.name!r} of {other.origin} and "
                    f"{plugin.name!r} of {plugin.origin}; uninstall or rename one"
                )
            known[thing.name] = Provided(thing, plugin)


def _provided(module: ModuleType, hook: str, base: type) -> Sequence[Any]:
    implementation = getattr(module, hook, None)
    if implementation is None:
        return []
    things = implementation()
    if not isinstance(things, Sequence):
        raise TypeError(f"{hook} must return a list of {base.__name__}, got {type(things).__name__}")
    for thing in things:
        if not isinstance(thing, base):
            raise TypeError(f"{hook} must return {base.__name__} instances, got {thing!r}")
    return things


def _import_file(path: Path) -> ModuleType:
    name = f"harness_plugin_file_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise UserError(f"plugin file {str(path)!r} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module

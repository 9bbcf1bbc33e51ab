"""Discovery of plugins, and what they provide under which name."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any, Generic, TypeVar

import pluggy

from harness import hookspecs
from harness.evaluator import Evaluator
from harness.executor import Executor
from harness.experiment import Experiment
from harness.loading import PluginError, check_marked, check_prototype, import_file, reason_of
from harness.method import Method
from harness.options import Configurable, UserError, configure, parse_selection, several, unknown
from harness.problem import Dataset, Problem
from harness.record import FROM_FILE
from harness.sources import remember_sources

T = TypeVar("T", bound=Configurable)

KINDS: dict[str, type[Configurable]] = {
    "methods": Method,
    "datasets": Dataset,
    "problems": Problem,
    "evaluators": Evaluator,
    "experiments": Experiment,
    "executors": Executor,
}


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

    def __str__(self) -> str:
        return f"{self.name!r} of {self.origin}"


@dataclass(frozen=True)
class Provided(Generic[T]):
    """An object that a plugin provides."""

    thing: T
    plugin: Plugin


@dataclass
class Registry:
    """All that plugins provide, by name, with the plugin that each thing comes from."""

    plugins: list[Plugin] = field(default_factory=list)
    methods: dict[str, Provided[Method]] = field(default_factory=dict)
    datasets: dict[str, Provided[Dataset]] = field(default_factory=dict)
    problems: dict[str, Provided[Problem]] = field(default_factory=dict)
    evaluators: dict[str, Provided[Evaluator]] = field(default_factory=dict)
    experiments: dict[str, Provided[Experiment]] = field(default_factory=dict)
    executors: dict[str, Provided[Executor]] = field(default_factory=dict)
    manager: pluggy.PluginManager = field(default_factory=lambda: pluggy.PluginManager(hookspecs.PROJECT))

    def __post_init__(self) -> None:
        self.manager.add_hookspecs(hookspecs)

    @staticmethod
    def discover(files: Iterable[str | Path] = ()) -> Registry:
        """Load every entry point of the group `harness.plugins` by itself, then one-off plugin files.

        A broken entry point is warned about and listed as broken; the others are used.

        Raises:
            UserError: If a file is missing, broken or given twice, or if two plugins claim one name.
        """
        registry = Registry()
        for entry_point in metadata.entry_points(group=hookspecs.ENTRY_POINT_GROUP):
            registry._load_entry_point(entry_point)
        seen: set[Path] = set()
        for path in map(Path, several(files)):
            if path.resolve() in seen:
                raise UserError(f"plugin file {str(path)!r} is given twice")
            seen.add(path.resolve())
            registry._load_file(path)
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
        provided = getattr(self, kind).get(thing.name.partition(":")[0])
        if provided is None or type(provided.thing) is not type(thing):
            return Plugin(thing.name, "not a plugin", "")
        return provided.plugin

    def notify(self, hook: str, **facts: Any) -> None:
        """Call a notification hook of every plugin; one that raises is warned about and stops nothing."""
        for implementation in reversed(getattr(self.manager.hook, hook).get_hookimpls()):
            try:
                implementation.function(*[facts[name] for name in implementation.argnames])
            except Exception as error:
                warnings.warn(
                    f"plugin {implementation.plugin_name!r}: {hook} failed: {reason_of(error)}", PluginWarning, 2
                )

    def _load_entry_point(self, entry_point: metadata.EntryPoint) -> None:
        origin = _origin(entry_point.dist) if entry_point.dist else ("unknown", "")
        try:
            self._register(entry_point.load(), Plugin(entry_point.name, *origin))
        except _NameTaken:
            raise
        except (Exception, SystemExit) as error:  # a plugin may fail in any way; the others go on
            plugin = Plugin(entry_point.name, *origin, broken=reason_of(error))
            self.plugins.append(plugin)
            warnings.warn(f"plugin {plugin} is broken: {plugin.broken}", PluginWarning, 2)

    def _load_file(self, path: Path) -> None:
        if not path.is_file():
            raise UserError(f"plugin file {str(path)!r} does not exist")
        try:
            self._register(import_file(path), Plugin(path.stem, f"{FROM_FILE}{path.name}", ""))
        except _NameTaken:
            raise
        except (Exception, SystemExit) as error:
            raise UserError(f"plugin file {str(path)!r} is broken: {reason_of(error)}") from error

    def _register(self, module: object, plugin: Plugin) -> None:
        if self.manager.is_registered(module):
            raise PluginError("this module is registered already, under another entry point")
        check_marked(module)
        try:
            self.manager.register(module)
            self._check_hooks(module)
            found = {kind: self._provided(module, kind, base) for kind, base in KINDS.items()}
        except BaseException:
            if self.manager.is_registered(module):  # pluggy may have refused it halfway
                self.manager.unregister(module)
            raise
        for kind, things in found.items():
            self._claim(kind, things, plugin)
            for thing in things:
                remember_sources(thing)
        self.plugins.append(plugin)

    def _check_hooks(self, module: object) -> None:
        known = {name for name in vars(hookspecs) if name.startswith("harness_")}
        for caller in self.manager.get_hookcallers(module) or []:
            if caller.name not in known and not all(impl.optionalhook for impl in caller.get_hookimpls()):
                ours = metadata.version("inference-harness")
                raise PluginError(
                    f"it implements {caller.name}, which inference-harness {ours} does not know: "
                    f"update inference-harness, or mark it @hookimpl(optionalhook=True)"
                )

    def _provided(self, module: object, kind: str, base: type[Configurable]) -> list[Any]:
        hook = f"harness_{kind}"
        things: list[Any] = []
        for implementation in getattr(self.manager.hook, hook).get_hookimpls():
            if implementation.plugin is module:
                returned = implementation.function()
                if not isinstance(returned, Sequence):
                    raise PluginError(f"{hook} must return a list of {base.__name__}, got {type(returned).__name__}")
                things += returned
        for thing in things:
            check_prototype(thing, base, hook)
        names = [thing.name for thing in things]
        if len(set(names)) < len(names):
            raise PluginError(f"{hook} gives one name to two things: {', '.join(names)}")
        return things

    def _claim(self, kind: str, things: Sequence[Configurable], plugin: Plugin) -> None:
        known: dict[str, Provided[Any]] = getattr(self, kind)
        for thing in things:
            if thing.name in known:
                raise _NameTaken(
                    f"two plugins claim the {kind[:-1]} {thing.name!r}: {known[thing.name].plugin} and {plugin}; "
                    "uninstall or rename one"
                )
            known[thing.name] = Provided(thing, plugin)


@cache
def _origin(distribution: metadata.Distribution) -> tuple[str, str]:
    """Name and version; reading them takes a millisecond, and most entry points have one distribution in common."""
    return distribution.name, distribution.version


class _NameTaken(UserError):
    """Two plugins claim one name: neither can be trusted to be the one that is meant, so nothing runs."""

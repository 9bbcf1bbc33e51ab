"""Loading of plugin files, and what is asked of a plugin and of the things that it provides."""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import json
import re
import sys
import textwrap
from importlib.machinery import ModuleSpec, SourceFileLoader
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

from harness import hookspecs
from harness.options import Configurable, UserError

_NAME = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")


class PluginError(Exception):
    """What a plugin provides is not what the hooks ask for; the message names the remedy."""


def reason_of(error: BaseException) -> str:
    """Why a plugin is broken, in one line."""
    text = textwrap.shorten("; ".join(str(error).splitlines()), 400)
    return text if isinstance(error, PluginError | UserError) else f"{type(error).__name__}: {text}"


def check_marked(plugin: object) -> None:
    """An unmarked hook would be ignored without a word.

    Raises:
        PluginError: If a function with the name of a hook lacks `hookimpl`.
    """
    for name, function in inspect.getmembers(plugin, inspect.isfunction):
        own = function.__module__ == getattr(plugin, "__name__", None)
        if own and hasattr(hookspecs, name) and not hasattr(function, f"{hookspecs.PROJECT}_impl"):
            raise PluginError(f"{name} is not marked: write @hookimpl (from harness import hookimpl) above it")


def check_prototype(thing: Any, base: type[Configurable], hook: str) -> None:
    """Each thing is an instance of a frozen dataclass with a name, whose options are plain data.

    Raises:
        PluginError: If it is not.
    """
    if isinstance(thing, type) and issubclass(thing, base):
        raise PluginError(f"{hook} must return instances: {thing.__name__}(), not the class {thing.__name__}")
    if not isinstance(thing, base):
        raise PluginError(f"{hook} must return instances of {base.__name__}, got {thing!r}")
    cls = type(thing)
    parameters = vars(cls).get("__dataclass_params__")  # of the class itself, not inherited
    if parameters is None or not parameters.frozen:
        raise PluginError(f"{cls.__name__} must be a frozen dataclass: write @dataclass(frozen=True, kw_only=True)")
    name = getattr(thing, "name", None)
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise PluginError(f"{cls.__name__} has the name {name!r}: expected lower-case words joined by hyphens")
    try:
        hash(thing)
        json.dumps(thing.config, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise PluginError(f"the options of {name!r} must be hashable and JSON-compatible: {error}") from None


class _FreshLoader(SourceFileLoader):
    """Always compiles the source: cached byte code of a file edited within a second would run under the new key."""

    def get_code(self, fullname: str) -> CodeType:
        return self.source_to_code(self.get_data(self.path), self.path)


_FILE = "harness_plugin_file_"


def source_name(module: str) -> str:
    """What to call a module: its name, and for a plugin file that without what tells its folder."""
    return f"{module.removeprefix(_FILE).rpartition('_')[0]}.py" if module.startswith(_FILE) else module


def import_file(path: Path) -> ModuleType:
    """Import a Python file as a module of its own, whatever its folder; nothing is written beside it."""
    digest = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:8]
    name = f"{_FILE}{path.stem}_{digest}"
    loader = _FreshLoader(name, str(path))
    module = importlib.util.module_from_spec(ModuleSpec(name, loader, origin=str(path)))
    module.__file__ = str(path)
    sys.modules[name] = module
    try:
        loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module

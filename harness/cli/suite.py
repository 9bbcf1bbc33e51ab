"""What a comparison is asked for: options of the command line over the keys of a suite file."""

from __future__ import annotations

import functools
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Required, TypedDict, cast

import click

Texts = str | list[str]


class Arguments(TypedDict, total=False):
    """Arguments of `harness.compare`, as far as they were given."""

    methods: Required[Texts]
    problems: Texts
    seeds: int | str | list[int]
    budget: str
    evaluators: Texts
    device: str
    precision: str
    step: str
    vectorize_seeds: bool
    out: str
    plugins: list[str]
    retry: str | list[str]
    only_failed: bool
    stop_after: float | str
    jobs: int | str
    executor: str
    time_limit: float | str
    memory_limit: float | str


_WHOLE = "a whole number"
_TEXT, _TEXTS, _SEEDS = "text", "text or a list of texts", "a number, text or a list of numbers"
_NUMBER, _FLAG = "a number or text", "true or false"


@dataclass(frozen=True)
class _Key:
    """An option of the command line, and key of a suite file: ``expected`` is what a suite may give."""

    metavar: str
    help: str
    expected: str = _TEXT


_KEYS = {
    "methods": _Key("NAMES", "Methods: avb,vae or 'avb[lr=1e-4|2e-4],vae'.  [needed]", _TEXTS),
    "problems": _Key(
        "NAMES",
        "Problems: mnist or 'mnist[latent_dim=8]' or file:DATA.npz.  [default: four-points,digits]",
        _TEXTS,
    ),
    "seeds": _Key("N|LIST", "How many (3) or which (0,1,2).  [default: 3]", _SEEDS),
    "budget": _Key(
        "UNIT=N",
        "steps=5000, seconds=60, examples=1e6 or converged=10 (checks without improvement).  "
        "[default: each problem's own]",
    ),
    "evaluators": _Key("NAMES", "Evaluators: importance,elbo.  [default: the usual ones]", _TEXTS),
    "device": _Key("NAME", "auto, cpu or cuda.  [default: auto]"),
    "precision": _Key(
        "NAME", "float32, bf16 (networks multiply in it while they train) or float64.  [default: float32]"
    ),
    "step": _Key(
        "NAME", "How steps are taken: eager, graph (recorded once), compile, or auto: graph.  [default: auto]"
    ),
    "vectorize-seeds": _Key(
        "",
        "Fit all seeds of a method on a problem, and its learning rates, as one batched program, on one clock.",
        _FLAG,
    ),
    "out": _Key("DIR", "Folder of results; what it has is not done again.  [default: results/local]"),
    "plugin": _Key("FILE.py", "A plugin from a file; may be repeated.", _TEXTS),
    "retry": _Key("STATUSES", "Try again what ended so: failed,diverged.", _TEXTS),
    "only-failed": _Key("", "Leave out what has not been tried yet; --retry is failed then unless given.", _FLAG),
    "stop-after": _Key(
        "SECONDS",
        "Stop at the next checkpoint after that time; the same command goes on from there.  [default: never]",
        _NUMBER,
    ),
    "jobs": _Key(
        "N",
        "How many jobs at once, each in a process with its part of the cores; budgets of seconds run one at a time.  "
        "[default: 1]",
        _WHOLE,
    ),
    "executor": _Key(
        "NAME",
        "Where jobs run: 'slurm[minutes=120]', 'dask[address=tcp://10.0.0.1:8786]' ...  [default: local, this machine]",
    ),
    "time-limit": _Key(
        "TIME",
        "Kill a fit or a measurement that takes longer (600s, 10min); the others go on.  [default: never]",
        _NUMBER,
    ),
    "memory-limit": _Key(
        "SIZE", "Kill a fit or a measurement whose process takes more memory (8GiB).  [default: never]", _NUMBER
    ),
}

_SUITE_HELP = "The same options from a file, as keys; those given here override."


def plugin_option(command: Callable[..., int]) -> Callable[..., int]:
    key = _KEYS["plugin"]
    return click.option("--plugin", metavar=key.metavar, multiple=True, help=key.help)(command)


def stop_option(command: Callable[..., int]) -> Callable[..., int]:
    key = _KEYS["stop-after"]
    return click.option("--stop-after", metavar=key.metavar, help=key.help)(command)


def retry_option(command: Callable[..., int]) -> Callable[..., int]:
    return _options(command, "retry")


def limit_options(command: Callable[..., int]) -> Callable[..., int]:
    return _options(command, "time-limit", "memory-limit")


def step_option(command: Callable[..., int]) -> Callable[..., int]:
    return _options(command, "step")


def worker_options(command: Callable[..., int]) -> Callable[..., int]:
    return _options(command, "jobs", "executor", "time-limit", "memory-limit")


def _options(command: Callable[..., int], *names: str) -> Callable[..., int]:
    for name in reversed(names):
        command = click.option(f"--{name}", metavar=_KEYS[name].metavar, help=_KEYS[name].help)(command)
    return command


def comparison_options(command: Callable[..., int]) -> Callable[..., int]:
    """The options that `compare` and `plan` share; the command gets them, with the suite's, as ``asked``."""

    @functools.wraps(command)
    def parsed(suite: str | None, **values: Any) -> int:
        given = {key: values.pop(key.replace("-", "_")) for key in _KEYS}
        given["plugin"] = list(given["plugin"]) or None
        return command(asked=_arguments(given, suite), **values)

    callback = click.option("--suite", metavar="FILE.toml", help=_SUITE_HELP)(parsed)
    for name, key in reversed(_KEYS.items()):
        option = (
            click.option(f"--{name}", is_flag=True, default=None, help=key.help)
            if key.expected == _FLAG
            else click.option(f"--{name}", metavar=key.metavar, help=key.help)
        )
        callback = plugin_option(callback) if name == "plugin" else option(callback)
    return callback


def _arguments(given: dict[str, Any], suite: str | None) -> Arguments:
    from harness.options import UserError

    merged = _read(Path(suite)) if suite is not None else {}
    merged |= {key: value for key, value in given.items() if value is not None}
    if "methods" not in merged:
        raise UserError("no methods: give --methods NAME,NAME (`harness list methods` shows them) or --suite FILE.toml")
    if "plugin" in merged:
        plugin = merged.pop("plugin")
        merged["plugins"] = [plugin] if isinstance(plugin, str) else plugin
    merged = {key.replace("-", "_"): value for key, value in merged.items()}
    return cast("Arguments", merged)


def _read(path: Path) -> dict[str, Any]:
    """The keys of a suite file.

    Raises:
        UserError: If it is missing or no TOML, or has a key that is unknown, of the wrong type or empty.
    """
    from harness.options import UserError, unknown

    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"suite {str(path)!r}: {error.strerror or error}") from None
    except ValueError as error:  # not TOML, or not text at all
        raise UserError(f"suite {str(path)!r} is not valid TOML: {error}") from None
    for key, value in content.items():
        if key not in _KEYS:
            raise UserError(f"suite {str(path)!r}: {unknown('key', key, _KEYS)}")
        if not _fits(value, _KEYS[key].expected):
            raise UserError(f"suite {str(path)!r}: {key} = {value!r}: expected {_KEYS[key].expected}")
    return content


def _fits(value: object, expected: str) -> bool:
    """Whether a value is what is expected, and not empty."""
    if isinstance(value, bool) or expected == _FLAG:
        return isinstance(value, bool) and expected == _FLAG
    if isinstance(value, str):
        return bool(value.strip()) and expected != _WHOLE
    if isinstance(value, list) and expected in (_TEXTS, _SEEDS):
        number = int if expected == _SEEDS else str
        items = cast("list[object]", value)
        return bool(items) and all(type(item) is number and item != "" for item in items)
    numbers = {_SEEDS: int, _WHOLE: int, _NUMBER: (int, float)}
    return isinstance(value, numbers.get(expected, ()))

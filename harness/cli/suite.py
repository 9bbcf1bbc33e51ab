"""What a comparison is asked for: options of the command line over the keys of a suite file."""

from __future__ import annotations

import functools
import tomllib
from collections.abc import Callable
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
    out: str
    plugins: list[str]
    retry: list[str]


_TEXT, _TEXTS, _SEEDS = "text", "text or a list of texts", "a number, text or a list of numbers"
_KEYS = {
    "methods": _TEXTS,
    "problems": _TEXTS,
    "seeds": _SEEDS,
    "budget": _TEXT,
    "evaluators": _TEXTS,
    "device": _TEXT,
    "precision": _TEXT,
    "out": _TEXT,
    "plugin": _TEXTS,
    "retry": _TEXTS,
}
"""Keys of a suite file, and what is expected of each."""


def plugin_option(command: Callable[..., int]) -> Callable[..., int]:
    return click.option(
        "--plugin", metavar="FILE.py", multiple=True, help="A plugin from a file; may be repeated."
    )(command)  # fmt: skip


def comparison_options(command: Callable[..., int]) -> Callable[..., int]:
    """The options that `compare` and `plan` share; the command gets them, with the suite's, as ``asked``."""

    @functools.wraps(command)
    def parsed(
        methods: str | None,
        problems: str | None,
        seeds: str | None,
        budget: str | None,
        evaluators: str | None,
        device: str | None,
        precision: str | None,
        out: str | None,
        suite: str | None,
        plugin: tuple[str, ...],
        retry: str | None,
        **others: Any,
    ) -> int:
        given = {
            "methods": methods,
            "problems": problems,
            "seeds": seeds,
            "budget": budget,
            "evaluators": evaluators,
            "device": device,
            "precision": precision,
            "out": out,
            "plugin": list(plugin) or None,
            "retry": retry,
        }
        return command(asked=_arguments(given, suite), **others)

    options = (
        click.option("--methods", metavar="NAMES", help="Methods: avb,vae or 'avb[lr=1e-4|2e-4],vae'. Needed."),
        click.option("--problems", metavar="NAMES", help="Problems: mnist or 'mnist[latent_dim=8]' or file:DATA.npz.  "
                     "[default: four-points,digits]"),
        click.option("--seeds", metavar="N|LIST", help="How many (3) or which (0,1,2).  [default: 3]"),
        click.option("--budget", metavar="UNIT=N", help="steps=5000, seconds=60, examples=1e6 or converged=10.  "
                     "[default: each problem's own]"),
        click.option("--evaluators", metavar="NAMES", help="Evaluators: importance,elbo.  [default: the usual ones]"),
        click.option("--device", metavar="NAME", help="auto, cpu or cuda.  [default: auto]"),
        click.option("--precision", metavar="NAME", help="float32 or float64.  [default: float32]"),
        click.option("--out", metavar="DIR", help="Folder of results; what it has is not done again.  "
                     "[default: results/local]"),
        click.option("--suite", metavar="FILE.toml", help="The same options from a file; those given here override."),
        plugin_option,
        click.option("--retry", metavar="STATUSES", help="Try jobs that ended so again: failed,diverged."),
    )  # fmt: skip
    callback: Callable[..., int] = parsed
    for option in reversed(options):
        callback = option(callback)
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
    if "retry" in merged:
        texts = [merged["retry"]] if isinstance(merged["retry"], str) else merged["retry"]
        merged["retry"] = [status.strip() for text in texts for status in text.split(",")]
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
        if not _fits(value, _KEYS[key]):
            raise UserError(f"suite {str(path)!r}: {key} = {value!r}: expected {_KEYS[key]}")
    return content


def _fits(value: object, expected: str) -> bool:
    """Whether a value is what is expected, and not empty."""
    if isinstance(value, str):
        return bool(value.strip())
    number = int if expected == _SEEDS else str
    if isinstance(value, list) and expected != _TEXT:
        items = cast("list[object]", value)
        return bool(items) and all(type(item) is number and item != "" for item in items)
    return expected == _SEEDS and isinstance(value, int) and not isinstance(value, bool)

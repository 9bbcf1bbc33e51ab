"""Strict parsing: click, but no option twice, no empty value, and the nearest name in the error."""

from __future__ import annotations

from typing import Any, cast

import click

CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 110}


class StrictCommand(click.Command):
    """A command that takes every option at most once (but for those that say otherwise), and never an empty value."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, context_settings=CONTEXT, **kwargs)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        values, _, order = self.make_parser(ctx).parse_args(args=list(args))
        given = [parameter for parameter in order if not parameter.is_eager]
        for parameter in given:
            many = isinstance(parameter, click.Option) and parameter.multiple
            name = (
                max(parameter.opts, key=len) if isinstance(parameter, click.Option) else parameter.human_readable_name
            )
            if given.count(parameter) > 1 and not many:
                raise click.UsageError(f"{name} is given twice")
            value = cast("object", values.get(parameter.name or ""))
            for text in cast("list[object]", value) if isinstance(value, list | tuple) else [value]:
                _check_value(name, text)
        return super().parse_args(ctx, args)


def _check_value(name: str, value: object) -> None:
    """Refuse what was surely meant otherwise: nothing, or the next option."""
    if isinstance(value, str) and not value.strip():
        raise click.UsageError(f"{name} has an empty value {value!r}")
    if isinstance(value, str) and value.startswith("--"):
        raise click.UsageError(f"{name} needs a value, got the option {value!r}")


class StrictGroup(click.Group):
    """A group of commands that suggests the nearest one."""

    command_class = StrictCommand
    group_class = type

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, context_settings=CONTEXT, no_args_is_help=False, **kwargs)

    def list_commands(self, ctx: click.Context) -> list[str]:
        """In the order in which they are used, not by the alphabet."""
        return list(self.commands)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if not args[0].startswith("-") and args[0] not in self.commands:
            from harness.options import unknown

            raise click.UsageError(unknown("command", args[0], self.commands))
        return super().resolve_command(ctx, args)


def one_line(text: str) -> str:
    return " ".join(text.split())


def explained(error: click.ClickException) -> str:
    """One line that says what is wrong and, if it can, what was meant."""
    context = getattr(error, "ctx", None)
    if isinstance(error, click.NoSuchOption) and context is not None:
        from harness.options import unknown

        known = [name for parameter in context.command.get_params(context) for name in parameter.opts]
        return unknown("option", error.option_name, [name for name in known if name.startswith("--")])
    message = error.format_message()
    message = message[:1].lower() + message[1:].rstrip(".")
    if message == "missing command" and isinstance(context, click.Context) and isinstance(context.command, click.Group):
        return f"{message}; known: {', '.join(context.command.commands)}"
    return message

"""The command `harness`: its commands, and what becomes of mistakes, interrupts and warnings."""

from __future__ import annotations

import errno
import logging
import os
import signal
import sys
import threading
import warnings
from collections.abc import Generator, Sequence
from contextlib import contextmanager, suppress
from types import FrameType
from typing import TextIO

import click

from harness.cli.comparing import compare, evaluate, execute, plan, report
from harness.cli.data import data
from harness.cli.listing import list_things
from harness.cli.parsing import StrictGroup, explained, one_line
from harness.cli.reproducing import reproduce
from harness.cli.showing import show
from harness.cli.storing import gc, merge, why

INTERRUPTED = 130
PIPE_CLOSED = 141
USER_MISTAKE = 2
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)


def _print_version(context: click.Context, _: click.Parameter, wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        click.echo(f"harness {version('inference-harness')}")
        context.exit()


@click.group(cls=StrictGroup, invoke_without_command=True)
@click.option(
    "--version", is_flag=True, is_eager=True, expose_value=False, callback=_print_version, help="Show the version."
)
@click.pass_context
def app(context: click.Context) -> None:
    """Compare inference methods for latent-variable models: same data, same decoder, same budget, same estimators.

    \b
    harness compare --methods avb,vae      fit, measure, print a table
    harness list methods                   what there is
    harness show avb                       what it is, and its options
    harness reproduce avb-toy              an experiment of a paper, the reported figures beside ours

    Exit codes: 0 all jobs ok or skipped, 1 some job failed, 2 a mistake in what was asked for (nothing is run),
    130 stopped before the end (the same command goes on from there).
    """
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


for command in (compare, plan, execute, evaluate, report, reproduce, why, merge, gc, list_things, show, data):
    app.add_command(command)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line; returns the exit code.

    0: all is well (jobs ok or skipped); 1: some job failed; 2: a mistake of the user's, or a folder that cannot be
    written to or is full, told in one line on stderr; 130: interrupted, terminated, or stopped when its time was up.
    """
    words = sys.argv[1:] if arguments is None else arguments
    try:
        with _plain_warnings(), _terminated_is_interrupted():
            code = _run(words)
        sys.stdout.flush()
    except KeyboardInterrupt as interrupt:
        kept = "; finished jobs are kept, and the same command goes on from there"
        what = str(interrupt) or "interrupted"
        click.echo(
            f"harness: {what}{kept if words[0] in ('compare', 'exec', 'evaluate', 'reproduce') else ''}", err=True
        )
        return INTERRUPTED
    except BrokenPipeError:  # the reader has gone (`harness list methods | head`)
        _print_no_more()
        return PIPE_CLOSED
    except Exception as error:
        message = _mistake(error)
        if message is None:
            raise
        if isinstance(error, OSError) and error.filename is None:
            _print_no_more()
        _say(f"harness: error: {one_line(message)}")
        return USER_MISTAKE
    return code


def _run(arguments: Sequence[str]) -> int:
    try:
        with app.make_context("harness", list(arguments)) as context:
            return app.invoke(context) or 0
    except click.exceptions.Exit as leave:
        return leave.exit_code


def _mistake(error: Exception) -> str | None:
    """What to tell the user whose mistake it is; None if it is ours."""
    from harness.options import UserError

    problem = sys.modules.get("harness.problem")  # without it there are no data that could be wrong
    if isinstance(error, click.ClickException):
        return explained(error)
    if isinstance(error, UserError) or (problem and isinstance(error, problem.DataError)):
        return str(error)
    if isinstance(error, OSError) and (error.filename is not None or error.errno in _NO_ROOM):
        kept = "; what is done is kept, and the same command goes on when there is room"
        place = "what is printed" if error.filename is None else error.filename
        return f"{place}: {error.strerror or error}{kept if error.errno in _NO_ROOM else ''}"
    return None


def _print_no_more() -> None:
    """What has been printed and has found no place is not tried again when Python ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _say(line: str) -> None:
    """On stderr, if that has room."""
    with suppress(OSError):
        click.echo(line, err=True)


@contextmanager
def _plain_warnings() -> Generator[None]:
    """Warnings and log messages are one line each on stderr."""

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        ours = category.__module__.partition(".")[0] == "harness"
        _warn(str(message) if ours else f"{message} ({category.__name__}, {filename}:{lineno})")

    log, handler = logging.getLogger("harness"), _LogToStderr(logging.WARNING)
    log.addHandler(handler)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = show
            yield
    finally:
        log.removeHandler(handler)


@contextmanager
def _terminated_is_interrupted() -> Generator[None]:
    """SIGTERM ends a command as Ctrl-C does, unless somebody has seen to it otherwise."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    usual = signal.getsignal(signal.SIGTERM)
    ours = usual is signal.SIG_DFL and threading.current_thread() is threading.main_thread()
    if ours:
        signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        if ours:
            signal.signal(signal.SIGTERM, usual)


class _LogToStderr(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        _warn(record.getMessage())


def _warn(message: str) -> None:
    _say(f"harness: warning: {one_line(message)}")

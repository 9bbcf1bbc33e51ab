"""The command line: parse, call, print. Torch, pandas and rich are imported by the functions that run a command."""

from harness.cli.app import main

__all__ = ["main"]

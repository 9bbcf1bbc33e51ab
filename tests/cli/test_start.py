"""The installed command in fresh processes: what it imports, its help, its exit codes, pipes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

HARNESS = str(Path(sysconfig.get_path("scripts")) / "harness")

COMMANDS = [
    [],
    ["compare"],
    ["plan"],
    ["evaluate"],
    ["report"],
    ["reproduce"],
    ["why"],
    ["merge"],
    ["gc"],
    ["list"],
    ["show"],
    ["data"],
    ["data", "list"],
    ["data", "fetch"],
    ["data", "verify"],
]
HEAVY = {"torch", "pyro", "pandas", "numpy", "matplotlib", "rich", "pydantic", "pyarrow", "sklearn", "scipy"}

HELP_OF_ALL = """
import json, sys
from harness.cli import main
for words in json.loads(sys.argv[1]):
    assert main(words) == 0, words
print(json.dumps(sorted(sys.modules)))
"""


def test_help_and_version_import_nothing_heavy() -> None:
    asked = [[*words, flag] for words in COMMANDS for flag in ("--help", "-h")] + [["--version"], []]
    done = subprocess.run(
        [sys.executable, "-c", HELP_OF_ALL, json.dumps(asked)], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stderr == ""
    assert done.returncode == 0
    assert not HEAVY & set(json.loads(done.stdout.splitlines()[-1]))
    assert done.stdout.count("Usage: harness") == len(asked) - 1


def test_the_installed_command_answers() -> None:
    done = subprocess.run([HARNESS, "--version"], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("harness 0.")


def test_the_installed_command_refuses_with_code_2(tmp_path: Path) -> None:
    done = subprocess.run(
        [HARNESS, "compare", "--methods", "abv"], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "harness: error: unknown method 'abv'; did you mean 'avb'?\n"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("words", [["--help"], ["list", "methods"]])
def test_a_closed_pipe_is_met_in_silence(words: list[str]) -> None:
    """As in `harness list methods | head -0`: the reader is gone before a word is written."""
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([HARNESS, *words], stdout=write, stderr=subprocess.PIPE, text=True, timeout=60, check=False)
    os.close(write)
    assert done.stderr == ""
    assert done.returncode == 141  # as a shell sees a program that SIGPIPE ended

"""Every comparison that the README asks for can be planned as it is written there."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
Run = Callable[..., tuple[int, str, str]]


def commands(text: str) -> list[str]:
    """Those in the blocks of commands, without their comments, and those within a paragraph."""
    blocks = re.findall(r"^```sh\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    lines = [line.partition("  #")[0].strip() for block in blocks for line in block.splitlines()]
    inline = re.findall(r"`(harness [^`]*)`", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL))
    found = [" ".join(command.split()) for command in (*lines, *inline)]
    return list(dict.fromkeys(command for command in found if command.startswith("harness compare --")))


COMMANDS = commands((ROOT / "README.md").read_text(encoding="utf-8"))


def test_they_are_found() -> None:
    assert len(COMMANDS) > 15
    assert any("file:images.npz" in command for command in COMMANDS)
    assert any(command.endswith("--step compile --jobs 2") for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_can_be_planned(command: str, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "benchmarks").symlink_to(ROOT / "benchmarks")
    monkeypatch.chdir(tmp_path)
    images = np.random.default_rng(0).integers(0, 256, (30, 8, 8), dtype=np.uint8)
    np.savez("images.npz", train=images[:20], test=images[20:])
    words = shlex.split(command)[2:]
    if "--out" in words:
        place = words.index("--out")
        del words[place : place + 2]
    code, out, err = run("plan", *words, "--out", "nowhere")
    needs_mnist = "mnist" in command and "harness data fetch mnist" in err
    assert needs_mnist or (code, err) == (0, ""), err
    assert needs_mnist or re.search(r"^\d+ jobs?: 0 done", out, re.MULTILINE)
    assert not Path("nowhere").exists()

"""Where a run takes place: hardware, versions, the state of the source tree."""

from __future__ import annotations

import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
import torch

_PACKAGES = "inference-harness torch pyro-ppl numpy pandas scikit-learn scipy safetensors pydantic pluggy".split()


def describe(device: torch.device) -> dict[str, Any]:
    """The columns of a record that speak of the machine and of the source tree."""
    commit, dirty = _git_state()
    return {
        "device": device.type,
        "hardware": _hardware(device),
        "threads": torch.get_num_threads(),
        "torch_version": torch.__version__,
        "git_commit": commit,
        "git_dirty": dirty,
    }


def versions() -> dict[str, str]:
    """Versions of Python, the system and the libraries that numbers depend on."""
    packages = {name: metadata.version(name) for name in _PACKAGES}
    return {
        "python": platform.python_version(),
        "system": " ".join((platform.system(), platform.machine(), *platform.libc_ver())),
        **packages,
    }


def _hardware(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device) if torch.cuda.is_available() else ""  # it is another machine's
    return f"{_processor()}, {psutil.cpu_count(logical=True)} logical cores"


def _processor() -> str:
    information = Path("/proc/cpuinfo")
    if information.is_file():
        for line in information.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _git_state() -> tuple[str, bool]:
    """Commit and dirtiness of the checkout that this package runs from; empty for an installed copy."""
    here = Path(__file__).parent

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", "-C", str(here), *arguments], capture_output=True, text=True, timeout=10)
        if done.returncode:
            raise LookupError(done.stderr)
        return done.stdout.strip()

    try:
        git("ls-files", "--error-unmatch", Path(__file__).name)
        return git("rev-parse", "HEAD"), bool(git("status", "--porcelain", "--untracked-files=no"))
    except (OSError, LookupError, subprocess.TimeoutExpired):
        return "", False

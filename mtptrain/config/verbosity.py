"""Verbosity of standard error: `-q` for errors alone, `-v` for details."""

from __future__ import annotations

import logging
import sys
from enum import Enum


class Verbosity(Enum):
    """`quiet`: results and errors. `normal`: also what a run does. `verbose`: also its steps and their time."""

    quiet = "quiet"
    normal = "normal"
    verbose = "verbose"


LEVELS = {Verbosity.quiet: logging.ERROR, Verbosity.normal: logging.WARNING, Verbosity.verbose: logging.DEBUG}
_chosen = [Verbosity.normal]


def set_verbosity(chosen: Verbosity) -> None:
    """Set the verbosity of this process, and the level of our loggers."""
    _chosen[:] = [chosen]
    logger = logging.getLogger("mtptrain")
    logger.setLevel(LEVELS[chosen])
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
    if chosen is Verbosity.verbose:  # Python prints warnings without a handler
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(relativeCreated)8.0f ms %(name)s: %(message)s"))
        logger.addHandler(handler)


def is_quiet() -> bool:
    """Return whether only results and errors are printed."""
    return _chosen[0] is Verbosity.quiet


def print_status(line: str) -> None:
    """Print what a run does, on standard error, unless it is quiet."""
    if not is_quiet():
        print(line, file=sys.stderr, flush=True)

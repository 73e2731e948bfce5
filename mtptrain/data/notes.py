"""Lines about the data for the user: form, rows left out, parts that a template drops."""

from __future__ import annotations

from mtptrain.config.verbosity import print_status
from mtptrain.run.distributed import rank

_shown: set[str] = set()  # training and held-out documents are read one after the other from the same files
_is_silent: list[bool] = []


def note(line: str) -> None:
    """Print a line on stderr, once a run and on rank 0 only."""
    if rank() == 0 and not _is_silent and line not in _shown:
        _shown.add(line)
        print_status(line)


def silence() -> None:
    """Print no more notes in this process: a worker beside another one that reads the same rows."""
    _is_silent.append(True)

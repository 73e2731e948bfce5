"""Errors of torch which mean that another process, its host or the network to it is gone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from mtptrain.errors import UserError

# In the messages of gloo, NCCL and the store, which raise plain RuntimeErrors.
SILENT = ("Timed out waiting", "Connection timed out", "No route to host", "Network is unreachable")
ENDED = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "remote process exited")


class LostProcessError(UserError):
    """Another process of the run has ended or does not answer."""


class UnreachableError(LostProcessError):
    """Another host does not answer, so it cannot be asked which process says so: each one does."""


def lost_process_error(error: BaseException, minutes: int, rest: str) -> LostProcessError | None:
    """Return the line for an error by which another process was lost; None for any other error.

    Args:
        error: of a collective.
        minutes: value of `distributed_timeout`.
        rest: what is saved, and how to go on.
    """
    sign = lost_process_reason(error)
    if sign is None:
        return None
    kind = UnreachableError if sign in SILENT else LostProcessError
    return kind(
        f"distributed_timeout={minutes}: another process is gone or does not answer ({sign}); look at its host and the "
        f"network between them; {rest}"
    )


def lost_process_reason(error: BaseException) -> str | None:
    """Return the part of a message that says how another process was lost; None for any other error."""
    if not isinstance(error, RuntimeError):
        return None
    return next((sign for sign in SILENT + ENDED if sign in str(error)), None)


@contextmanager
def naming_lost_processes(minutes: int) -> Iterator[None]:
    """Turn an error by which another process was lost into a line, if the recipe has not done so."""
    try:
        yield
    except RuntimeError as error:
        lost = lost_process_error(error, minutes, "start it again")
        if lost is None:
            raise
        raise lost from error

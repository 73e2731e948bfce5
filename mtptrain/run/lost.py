"""Errors of torch which mean that another process, its host or the network to it is gone."""

from __future__ import annotations

SIGNS = (  # in the messages of gloo, NCCL and the store, which raise plain RuntimeErrors
    "Connection closed by peer",
    "Connection reset by peer",
    "Connection timed out",
    "Broken pipe",
    "No route to host",
    "Network is unreachable",
    "Timed out waiting",
    "remote process exited or there was a network error",
)


def lost_process_reason(error: BaseException) -> str | None:
    """Return the part of a message that says how another process was lost; None for any other error."""
    if not isinstance(error, RuntimeError):
        return None
    return next((sign for sign in SIGNS if sign in str(error)), None)

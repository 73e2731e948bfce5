"""Reading and tokenising in processes of their own, so that training does not wait for them."""

from __future__ import annotations

import ctypes
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from mtptrain.data.streaming.dataset import Position, StreamingDataset, StreamingPlan
from mtptrain.data.streaming.row_stream import Row
from mtptrain.errors import UserError
from mtptrain.run.preemption import SIGNALS

PREFETCHED = 4  # micro-batches that a process prepares ahead
PR_SET_PDEATHSIG = 1  # of Linux' prctl: the signal that a process gets when the one that started it ends

Items = Iterator[tuple[list[Row], Position]]


def start_feeds(plan: StreamingPlan, lanes: list[int], workers: int, first: int, position: Position) -> list[Items]:
    """Feeds that share lanes in their order, each in a process of its own; with `workers=0` one feed in this process.

    Each is a `DataLoader` with one worker: with several, `datasets` would share its files out over them by itself.
    """
    if workers == 0:
        return [_sound(iter(StreamingDataset(plan, lanes, first, position)), workers)]
    parts = [part.tolist() for part in np.array_split(lanes, min(workers, len(lanes)))]
    with _quiet_fork():
        return [_sound(_start(StreamingDataset(plan, part, first, position)), workers) for part in parts]


def _start(feed: StreamingDataset) -> Iterator[Any]:
    return iter(
        DataLoader(
            feed,
            batch_size=None,
            num_workers=1,
            prefetch_factor=PREFETCHED,
            collate_fn=_as_it_is,
            worker_init_fn=_belong_to_the_run,
            multiprocessing_context="fork",  # the tokenizer and its settings need not be pickled
            generator=torch.Generator(),  # else it draws from the one that training draws from
        )
    )


def _as_it_is(item: Any) -> Any:
    return item


def _belong_to_the_run(_worker: int) -> None:
    """Live as long as the run: one that is asked to leave finishes its step, and needs rows for it."""
    for number in (*SIGNALS, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    # Prepared rows that nobody fetches any more would otherwise keep this process from ending by itself.
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


@contextmanager
def _quiet_fork() -> Iterator[None]:
    """Processes that are started inside neither talk about threads nor interrupt this one when they end."""
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the threads of this process do not exist in a fork of it
    is_main = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGCHLD)
    try:
        yield
    finally:
        if is_main:  # torch raises from there, wherever the run is; a process that ended is met when it is asked
            signal.signal(signal.SIGCHLD, handler or signal.SIG_DFL)
        if before is None:
            del os.environ["TOKENIZERS_PARALLELISM"]
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = before


def _sound(items: Iterator[Any], workers: int) -> Items:
    """The items, or the `UserError` that took the place of one, or that of a process which is gone."""
    while True:
        try:
            item = next(items)
        except RuntimeError as error:
            if "DataLoader worker" not in str(error) or "exited unexpectedly" not in str(error):
                raise
            raise UserError(
                f"data.workers={workers}: a process that reads and tokenises was killed, as happens when memory runs "
                "out; free some or lower data.workers, and continue with the same output_dir and resume=auto"
            ) from None
        if isinstance(item, UserError):
            raise item
        yield item

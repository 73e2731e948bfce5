"""Read and tokenise in worker processes, so that training does not wait for either."""

from __future__ import annotations

import ctypes
import os
import signal
import threading
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, get_worker_info

from mtptrain.data.files import Position
from mtptrain.data.notes import silence
from mtptrain.data.streaming.dataset import StreamingDataset, StreamingPlan
from mtptrain.data.streaming.row_stream import Row
from mtptrain.errors import UserError
from mtptrain.run.preemption import SIGNALS

PREFETCHED = 4  # micro-batches that a worker prepares ahead
PR_SET_PDEATHSIG = 1  # option of Linux's prctl: the signal sent to a process when its parent ends

Items = Generator[tuple[list[Row], Position], None, None]


def start_loaders(
    plan: StreamingPlan, row_numbers: list[int], workers: int, first: int, position: Position
) -> list[Items]:
    """Return iterators that share the rows in order, each in its own worker; with `workers=0`, one in this process.

    Each worker has a `DataLoader` of its own: with several workers in one, `datasets` would split its files over them.
    """
    if workers == 0:
        return [_checked(iter(StreamingDataset(plan, row_numbers, first, position)), workers)]
    parts = [part.tolist() for part in np.array_split(row_numbers, min(workers, len(row_numbers)))]
    with _quiet_fork():
        return [_checked(_start_worker(StreamingDataset(plan, part, first, position)), workers) for part in parts]


def _start_worker(dataset: StreamingDataset) -> Iterator[Any]:
    return iter(
        DataLoader(
            dataset,
            batch_size=None,
            num_workers=1,
            prefetch_factor=PREFETCHED,
            collate_fn=_unchanged,
            worker_init_fn=_bind_to_run,
            # Pickling a tokenizer would lose `encode_special_tokens`.
            multiprocessing_context="fork",
            generator=torch.Generator(),  # the default would draw from the generator that training uses
        )
    )


def _unchanged(item: Any) -> Any:
    return item


def _bind_to_run(_worker: int) -> None:
    """Make this worker live as long as the run: after a signal the run finishes its step and needs rows for it."""
    for number in (*SIGNALS, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    # A worker whose prepared rows are never fetched would otherwise not end by itself.
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    worker = get_worker_info()
    dataset = worker.dataset if worker is not None else None
    if isinstance(dataset, StreamingDataset) and 0 not in dataset.row_numbers:
        silence()  # every worker reads the whole text


@contextmanager
def _quiet_fork() -> Iterator[None]:
    """Suppress the tokenizers fork warning, and torch's SIGCHLD handler, for processes started inside the block."""
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the threads of this process do not exist in a fork of it
    is_main = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGCHLD)
    try:
        yield
    finally:
        if is_main:  # torch's handler would raise at any line of the run; a dead worker is reported by `next` anyway
            signal.signal(signal.SIGCHLD, handler or signal.SIG_DFL)
        if before is None:
            del os.environ["TOKENIZERS_PARALLELISM"]
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = before


def _checked(items: Iterator[Any], workers: int) -> Items:
    """Yield the items; raise the `UserError` that arrives as an item, or one that reports a killed worker.

    The worker ends with this generator, also while a traceback holds its frame: it ignores the signals by which Python
    ends its child processes at exit, and waits for it.
    """
    try:
        while True:
            item = _next_of(items, workers)
            if isinstance(item, UserError):
                raise item
            yield item
    finally:
        del items


def _next_of(items: Iterator[Any], workers: int) -> Any:
    try:
        return next(items)
    except RuntimeError as error:
        if "DataLoader worker" not in str(error) or "exited unexpectedly" not in str(error):
            raise
        raise UserError(
            f"data.workers={workers}: a process that reads and tokenises was killed, as happens when memory runs "
            "out; free some or lower data.workers, and continue with the same output_dir and resume=auto"
        ) from None

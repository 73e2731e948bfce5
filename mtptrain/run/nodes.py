"""Work of one process of every node, and folders that all nodes see."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from mtptrain.errors import UserError
from mtptrain.run.distributed import on_each_rank, on_rank0, rank, world_size
from mtptrain.run.storage import temporary_path

T = TypeVar("T")


def on_each_node(work: Callable[[], T]) -> T:
    """Call `work` on one process of every node, and return its result on all processes of the node.

    The others wait without computing. A process whose node has no such process gets the result of the first node.

    Args:
        work: returns a picklable value, such as the path of a file that the node's other processes read.

    Raises:
        UserError: that of the first node where `work` raised one, on every process.
    """
    if world_size() == 1:
        return work()
    is_chosen = os.environ["LOCAL_RANK"] == "0"
    results = on_each_rank(lambda: (platform.node(), [work()] if is_chosen else []))
    of_node = [result for node, result in results if result and node == platform.node()]
    return (of_node or [result for _, result in results if result])[0][0]


def require_shared(folder: Path) -> None:
    """Check that all processes see a folder, to which each will write its part.

    Args:
        folder: the run's folder; created if it is missing.

    Raises:
        UserError: on every process: one does not see the folder.
    """

    def create() -> Path:
        mark = temporary_path(folder / "mark")
        mark.mkdir(parents=True)
        return mark

    def look() -> None:
        if not mark.is_dir():
            raise UserError(
                f"output_dir={folder}: process {rank()} does not see what process 0 writes there, and every process "
                "writes its part of a checkpoint; choose a folder on a file system that all hosts share"
            )

    mark = on_rank0(create)
    try:
        on_each_rank(look)
    finally:
        if rank() == 0:
            mark.rmdir()

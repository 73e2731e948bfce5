"""Work that one process of every node does for all processes of the node."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from typing import TypeVar

from mtptrain.errors import UserError
from mtptrain.run.distributed import gather_objects, world_size

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
    results: list[T] = []
    error: UserError | None = None
    if os.environ["LOCAL_RANK"] == "0":
        try:
            results.append(work())
        except UserError as mistake:
            error = mistake
    told = gather_objects((platform.node(), results, error))
    errors = [one for _, _, one in told if one is not None]
    if errors:
        raise errors[0]
    of_node = [found for node, found, _ in told if found and node == platform.node()]
    return (of_node or [found for _, found, _ in told if found])[0][0]

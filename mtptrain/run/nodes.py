"""Work that one process of every node does for all processes of the node."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from typing import TypeVar

from mtptrain.run.distributed import on_each_rank, world_size

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

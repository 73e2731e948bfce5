"""Work that rank 0 leads while the other processes run their share of the backbone's experts for it.

A text is decoded by one process, and what comes next depends on the tokens. So no control flow is repeated on every
rank: rank 0 announces each forward, and the others run the experts of all layers on the tokens that it sends them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from mtptrain.errors import INTERRUPTED, PREEMPTED, USER_MISTAKE, Preempted, SharedMistake, UserError
from mtptrain.recipes.session import Session
from mtptrain.run.distributed import END, LOAD, acting_alone, announce, await_order, rank, world_size
from mtptrain.run.lost import LostProcessError

T = TypeVar("T")


def lead(session: Session, work: Callable[[], T]) -> T | None:
    """Call `work` on rank 0 as if it were a run of one process; return its result there and None on other ranks.

    Args:
        session: of the run, with `backbone.placement=expert_parallel` if it has several processes.
        work: may load `session.backbone` and decode with it.

    Raises:
        SystemExit: on other ranks: rank 0 ended with this exit code, or on a user's mistake or a signal.
    """
    if world_size() == 1:
        return work()
    if rank() > 0:
        follow(session)
        return None
    with acting_alone():
        try:
            result = work()
        except (SharedMistake, LostProcessError):
            raise
        except UserError:
            announce(END + USER_MISTAKE)
            raise
        except Preempted as ending:
            announce(END + (INTERRUPTED if ending.is_by_user else PREEMPTED))
            raise
        except SystemExit as ending:
            announce(END + int(ending.code or 0))
            raise
        announce(END)
    return result


def follow(session: Session) -> None:
    """Carry out rank 0's orders until it ends."""
    from mtptrain.backbone.placement import run_experts

    while (order := await_order()) < END:
        if order == LOAD:
            _ = session.backbone
        else:
            run_experts(session.backbone.model)
    if order > END:
        raise SystemExit(order - END)

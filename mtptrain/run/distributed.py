"""Device, dtype, threads and memory of a process, and the processes that share a run."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from itertools import count
from typing import TYPE_CHECKING, Any, TypeVar, cast

from mtptrain.config import Device, Precision, RunConfig
from mtptrain.errors import SharedMistake, UserError
from mtptrain.run.sharing import check_processes, refuse_sharing

if TYPE_CHECKING:  # a plan computes nothing and starts without torch
    import torch
    from torch import Tensor
    from torch import distributed as dist

T = TypeVar("T")

LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
JOIN_TIMEOUT = timedelta(minutes=5)  # torch would wait half an hour for a node that never starts
# Keys in the shared store: ranks that end on a mistake of their own, or because another has ended; rank 0 among them.
MISTAKE, LOST, RANK0_ENDS = "mtptrain/mistake", "mtptrain/lost", "mtptrain/rank0_ends"


@dataclass(frozen=True, slots=True)
class _Group:
    """The processes of a run, after they have joined.

    Attributes:
        store: shared by all, on rank 0's machine.
        rank: of this process.
        size: number of processes.
        side: a gloo group of all, for orders and small objects: waiting in it costs no GPU.
    """

    store: dist.Store
    rank: int
    size: int
    side: dist.ProcessGroup


_joined: list[_Group] = []  # holds one group between `join` and `leave`, otherwise none
_meetings = count()  # jobs of a sweep that were joined in this process
_led: list[_Group] = []  # holds that group while rank 0 acts alone
LOAD, PASS, END = 0, 1, 2  # rank 0's orders to the processes that follow it; an exit code is added to END


def choose_device(wanted: Device) -> torch.device:
    """Return the device that this process computes on: with several processes, the GPU of its local rank.

    Raises:
        UserError: `wanted` is a GPU and torch sees none.
    """
    import torch

    if wanted is Device.cuda and not torch.cuda.is_available():
        raise UserError("device=cuda: torch sees no GPU here; use device=cpu or device=auto")
    if wanted is Device.cpu or not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # transformers imports DeepSpeed, which would warn of no GPU
        return torch.device("cpu")
    if "LOCAL_RANK" not in os.environ:
        return torch.device("cuda")
    local_rank = int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count()
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def choose_dtype(wanted: Precision, device: torch.device) -> torch.dtype:
    """Return the dtype of matrices: the wanted one, or with `auto` bf16 on a GPU and fp32 on a CPU."""
    import torch

    if wanted is Precision.auto:
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return {Precision.fp32: torch.float32, Precision.bf16: torch.bfloat16}[wanted]


def bound_threads(wanted: int | None, hidden_size: int) -> int:
    """Limit torch's CPU threads and return their number.

    A second thread gains nothing on tensors of the tiny preset's size, and costs a factor of 30 when another job
    holds the core (OpenMP threads spin). By default small models therefore run on one thread.

    Args:
        wanted: number of threads; None for one thread below a `hidden_size` of 256, otherwise half the cores.
        hidden_size: model width.
    """
    import torch

    cores = len(os.sched_getaffinity(0))
    threads = wanted or (1 if hidden_size < 256 else max(1, cores // 2))
    torch.set_num_threads(threads)
    return threads


def rank() -> int:
    """Return the number of this process in the run; rank 0 prints, writes and decides."""
    return _joined[0].rank if _joined else 0


def world_size() -> int:
    """Return the number of processes of the run."""
    return _joined[0].size if _joined else 1


def join(config: RunConfig, processes: str) -> None:
    """Join the processes that a launcher started with this one; without a launcher the run has one process.

    Args:
        config: of the run.
        processes: how many the recipe can run in: "one", "any", or "led": several if they share the backbone's experts.

    Raises:
        UserError: the launcher's variables are incomplete, the task or the batch cannot be shared, or the processes
            do not reach each other.
    """
    present = [name for name in LAUNCHER_VARIABLES if name in os.environ]
    if "RANK" not in present and "WORLD_SIZE" not in present:
        refuse_sharing(config)
        return
    missing = sorted(set(LAUNCHER_VARIABLES) - set(present))
    if missing:
        raise UserError(
            f"{missing[0]}: is not set although {present[0]} is; start every process through one of "
            "scripts/launch_*.sh, or unset the launcher's variables for a run of one process"
        )
    if not os.environ["WORLD_SIZE"].isdecimal():
        raise UserError(
            f"WORLD_SIZE={os.environ['WORLD_SIZE']}: must be a number; start every process through one of "
            "scripts/launch_*.sh"
        )
    size = int(os.environ["WORLD_SIZE"])
    if size > 1:
        check_processes(config, processes, size)
    from torch import distributed as dist

    device = choose_device(config.device)
    try:
        store, number, _ = next(dist.rendezvous("env://", timeout=JOIN_TIMEOUT))
        store = dist.PrefixStore(f"mtptrain/{next(_meetings)}", store)  # no addresses of an earlier job's group
        backend = "nccl" if device.type == "cuda" else "gloo"
        patience = timedelta(minutes=config.distributed_timeout)
        dist.init_process_group(backend, store=store, rank=number, world_size=size, timeout=patience)
        side: Any = dist.new_group(backend="gloo", timeout=patience)
        _joined[:] = [_Group(store, number, size, side)]
    except (ValueError, RuntimeError) as error:  # a variable that is no number, a port in use, a missing peer
        summary = str(error).splitlines()[0]
        raise UserError(
            f"MASTER_ADDR={os.environ['MASTER_ADDR']}: the {size} processes did not meet ({summary}); check the "
            "address, the port and that every node was started"
        ) from None


@contextmanager
def acting_alone() -> Iterator[None]:
    """Let rank 0 act as a run of one process while the other processes wait for its orders."""
    _led[:], _joined[:] = list(_joined), []
    try:
        yield
    finally:
        _joined[:], _led[:] = list(_led), []


@contextmanager
def joining_others(order: int) -> Iterator[None]:
    """Give the processes that follow an order that all carry out together; without any, do nothing.

    Raises:
        SharedMistake: the order could not be carried out.
    """
    if not _led:
        yield
        return
    announce(order)
    _joined[:] = _led
    try:
        yield
    except UserError as error:
        raise SharedMistake(str(error)) from error
    finally:
        _joined[:] = []


def announce(order: int) -> None:
    """Send an order to the processes that follow; without any, do nothing."""
    if _led:
        _broadcast_order(order)


def await_order() -> int:
    """Return rank 0's next order."""
    return _broadcast_order(END)


def _broadcast_order(order: int) -> int:
    import torch
    from torch import distributed as dist

    box = torch.tensor([order])
    dist.broadcast(box, src=0, group=(_led or _joined)[0].side)
    return int(box)


def leave() -> None:
    """Leave the group; afterwards each process is a run of one."""
    if _joined:
        from torch import distributed as dist

        dist.destroy_process_group()
        _joined.clear()
        if groups := cast("Any", sys.modules.get("deepspeed.utils.groups")):
            groups._WORLD_GROUP = None  # DeepSpeed would use it in the next job of a sweep


def rank_rows(batch_size: int) -> range:
    """Return this rank's rows of a micro-batch of `batch_size` sequences."""
    share = batch_size // world_size()
    return range(rank() * share, (rank() + 1) * share)


def sum_over_processes(values: Tensor) -> Tensor:
    """Return the sum of a tensor over all processes; with one process, the tensor itself."""
    if world_size() > 1:
        from torch import distributed as dist

        values = values.clone()
        dist.all_reduce(values)
    return values


def max_over_processes(number: int) -> int:
    """Return the largest of the processes' numbers."""
    if world_size() == 1:
        return number
    import torch
    from torch import distributed as dist

    box = torch.tensor([number])
    dist.all_reduce(box, dist.ReduceOp.MAX, group=_joined[0].side)
    return int(box)


def broadcast_object(value: T) -> T:
    """Return rank 0's value on every process; it must be picklable."""
    if world_size() == 1:
        return value
    from torch import distributed as dist

    box = [value]
    dist.broadcast_object_list(box, src=0, group=_joined[0].side)
    return box[0]


def gather_objects(value: T) -> list[T]:
    """Return the values of all processes in the order of their ranks, on every process; they must be picklable."""
    if world_size() == 1:
        return [value]
    from torch import distributed as dist

    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value, group=_joined[0].side)
    return values


def send_to_rank0(value: Tensor) -> None:
    """Send a tensor to rank 0, which must receive it."""
    from torch import distributed as dist

    dist.send(value.cpu().contiguous(), 0, group=_joined[0].side)


def receive_from(source: int, like: Tensor) -> Tensor:
    """Return the next tensor that rank `source` sends to this one, on the CPU, of the shape and dtype of `like`."""
    import torch
    from torch import distributed as dist

    value = torch.empty_like(like, device="cpu", memory_format=torch.contiguous_format)
    dist.recv(value, source, group=_joined[0].side)
    return value


def on_rank0(work: Callable[[], T]) -> T:
    """Call `work` on rank 0 only and return its result on every process, or raise its `UserError` on every process."""
    result, error = broadcast_object(_attempt(work) if rank() == 0 else (None, None))
    if error is not None:
        raise error
    return cast("T", result)


def on_each_rank(work: Callable[[], T]) -> list[T]:
    """Call `work` on every rank and return all results on every one, or raise the first `UserError` on every one."""
    attempts = gather_objects(_attempt(work))
    for _, error in attempts:
        if error is not None:
            raise error
    return [cast("T", result) for result, _ in attempts]


def _attempt(work: Callable[[], T]) -> tuple[T | None, UserError | None]:
    try:
        return work(), None
    except UserError as mistake:
        return None, mistake


def has_met() -> bool:
    """Return whether this process has joined others."""
    return bool(_joined)


def prints_mistake(is_lost: bool) -> bool:
    """Return whether this rank prints the mistake on which it ends, of all ranks that end on it: rank 0, or the first.

    Args:
        is_lost: the mistake is that another rank has ended. It is not printed if that rank prints a mistake of its own.
    """
    for group in _joined:
        with suppress(RuntimeError):  # the process that hosts the store has ended
            place = group.store.add(LOST if is_lost else MISTAKE, 1)
            if group.rank == 0:
                is_first = not (is_lost and group.store.check([MISTAKE]))
                group.store.set(RANK0_ENDS, "yes")
                return is_first
            if not _appears(group.store, RANK0_ENDS):
                return place == 1 and not (is_lost and group.store.check([MISTAKE]))
    return os.environ.get("RANK", "0") == "0"


def another_rank_failed() -> bool:
    """Return whether another rank ends on a mistake of its own, after which a launcher ends this one."""
    with suppress(RuntimeError):
        return any(group.store.check([MISTAKE]) for group in _joined)
    return False


def _appears(store: dist.Store, key: str, patience: timedelta = timedelta(seconds=5)) -> bool:
    """Return whether a key is in the store; wait at most `patience` for it."""
    from torch import distributed as dist

    try:
        store.wait([key], patience)
    except dist.DistStoreError:
        return False
    return True

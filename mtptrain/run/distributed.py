"""Device, dtype, threads and memory of a process, and the processes that share a run."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from itertools import count
from typing import TYPE_CHECKING, Any, TypeVar, cast

from mtptrain.config import PARTITIONED_PLACEMENTS, Device, EngineName, HeadExperts, Placement, Precision, RunConfig
from mtptrain.errors import SharedMistake, UserError

if TYPE_CHECKING:  # a plan computes nothing and starts without torch
    import torch
    from torch import Tensor
    from torch import distributed as dist

T = TypeVar("T")

LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
JOIN_TIMEOUT = timedelta(minutes=5)  # torch would wait half an hour for a node that never starts
FAILED = "mtptrain/first_failed"  # key that rank 0 sets in the shared store before it ends on a user's mistake


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
        _refuse_sharing(config)
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
        _check_processes(config, processes, size)
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


def _check_processes(config: RunConfig, processes: str, size: int) -> None:
    """Refuse several processes if the recipe, the placement or the batch cannot be shared by them."""
    placement = config.backbone.placement
    if processes == "one":
        raise UserError(f"task={config.task}: runs in one process and {size} were started; use one")
    if processes == "led" and placement is not Placement.expert_parallel:
        raise UserError(
            f"backbone.placement={placement.value}: +recipe={config.task} decodes texts, in one process or, to hold a "
            f"backbone that is too large for one, in several that share its experts; {size} were started: set "
            "backbone.placement=expert_parallel, or use one"
        )
    if placement is Placement.auto:
        raise UserError(
            f"backbone.placement={placement.value}: spreads layers within one process and {size} were started; "
            "set backbone.placement=replicate, zero3 or expert_parallel"
        )
    trains = processes == "any" and config.task != "collect"
    if trains and config.train.batch_size % size:
        raise UserError(
            f"train.batch_size={config.train.batch_size}: is the number of sequences of all processes together, and "
            f"{size} processes cannot share it evenly; use a multiple of {size}"
        )


def _refuse_sharing(config: RunConfig) -> None:
    """Refuse settings that partition tensors over processes, in a run of one process without a launcher."""
    shares = {"engine": config.engine.value} if config.engine is not EngineName.single else {}
    if config.backbone.placement in PARTITIONED_PLACEMENTS:
        shares["backbone.placement"] = config.backbone.placement.value
    if config.mtp.experts is HeadExperts.expert_parallel:
        shares["mtp.experts"] = config.mtp.experts.value
    for setting, value in shares.items():
        raise UserError(
            f"{setting}={value}: shares tensors out over processes and this one was started alone; start it with "
            f"scripts/launch_torchrun.sh, or leave {setting} at its default"
        )


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


def announce_failure() -> None:
    """Let the other ranks know that rank 0 is about to end on a user's mistake."""
    for group in _joined:
        group.store.set(FAILED, "yes")


def rank0_failed_too(patience: timedelta = timedelta(seconds=5)) -> bool:
    """Return whether rank 0 ends on a user's mistake as well and prints it for all; wait at most `patience`."""
    from torch import distributed as dist

    try:
        for group in _joined:
            group.store.wait([FAILED], patience)
    except dist.DistStoreError:
        return False
    except RuntimeError:  # rank 0 hosts the store and has ended
        return True
    return True

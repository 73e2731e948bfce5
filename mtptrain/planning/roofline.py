"""How long a pass takes on some hardware if every part runs at the hardware's ceiling."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mtptrain.config import HardwareConfig, PlanConfig, ShapeConfig
from mtptrain.errors import UserError
from mtptrain.planning.work import Arithmetic, Pass, Work

ACTIVATION_BYTES = 2  # a channel that GPUs send each other, bf16
REDUCTIONS = 2  # sums over the GPUs that a layer needs, after attention and after its experts


@dataclass(frozen=True, slots=True)
class Ceilings:
    """Rates that a GPU is assumed to reach: bytes/s and FLOP/s by arithmetic."""

    bandwidth: float
    flops: dict[Arithmetic, float]


def find_ceilings(hardware: HardwareConfig, measured: bool) -> Ceilings:
    """The data sheet's rates, or those that were measured, times the assumed efficiency.

    Raises:
        UserError: measured ceilings are asked for and the row has none.
    """
    if measured and hardware.measured_bandwidth is None:
        raise UserError(
            f"plan.measured=true: hardware={hardware.name} has no measured ceilings; set plan.measured=false"
        )
    bandwidth, bf16 = hardware.bandwidth, hardware.bf16_flops
    if measured:
        bandwidth, bf16 = hardware.measured_bandwidth or bandwidth, hardware.measured_bf16_flops or bf16
    rates = {Arithmetic.fp8: hardware.fp8_flops, Arithmetic.bf16: bf16, Arithmetic.fp32: hardware.fp32_flops}
    share = hardware.efficiency
    return Ceilings(bandwidth * share, {name: rate * share for name, rate in rates.items()})


def part_seconds(work: Work, num_gpus: int, ceilings: Ceilings) -> float:
    """The longer of moving its bytes and computing its FLOPs, on each of the GPUs."""
    moving = (work.split_bytes / num_gpus + work.whole_bytes) / ceilings.bandwidth
    computing = (work.split_flops / num_gpus + work.whole_flops) / ceilings.flops[work.arithmetic]
    return max(moving, computing)


def reduction_bytes(shape: ShapeConfig, tokens: int, num_layers: int, num_gpus: int) -> float:
    """Bytes that each GPU sends to sum the outputs of attention and experts, ring all-reduce."""
    share = 2 * (num_gpus - 1) / num_gpus
    return REDUCTIONS * num_layers * share * tokens * shape.hidden_size * ACTIVATION_BYTES


def time_pass(
    work: Pass, shape: ShapeConfig, tokens: int, num_layers: int, hardware: HardwareConfig, plan: PlanConfig
) -> dict[str, dict[str, float]]:
    """Bytes of memory, FLOPs and seconds of every part of a pass, `communication` and `latency` among them.

    Parts run one after the other, as kernels do; nothing overlaps. Bytes and FLOPs are those of one GPU alone.
    """
    ceilings = find_ceilings(hardware, plan.measured)
    parts = {
        name: {"bytes": part.bytes, "flops": part.flops, "seconds": part_seconds(part, hardware.num_gpus, ceilings)}
        for name, part in work.items()
    }
    if hardware.num_gpus > 1:
        sent = reduction_bytes(shape, tokens, num_layers, hardware.num_gpus)
        parts["communication"] = {"bytes": 0.0, "flops": 0.0, "seconds": sent / hardware.interconnect, "sent": sent}
    if hardware.layer_seconds:
        parts["latency"] = {"bytes": 0.0, "flops": 0.0, "seconds": num_layers * hardware.layer_seconds}
    return parts


def sum_parts(parts: dict[str, dict[str, float]]) -> dict[str, Any]:
    """Totals of a pass beside its parts."""
    totals = {key: sum(part[key] for part in parts.values()) for key in ("seconds", "bytes", "flops")}
    return {**totals, "parts": parts}

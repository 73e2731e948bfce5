"""Time of a pass when every part runs at the hardware's ceiling."""

from __future__ import annotations

from dataclasses import dataclass

from mtptrain.config import HardwareConfig, PlanConfig, ShapeConfig
from mtptrain.errors import UserError
from mtptrain.planning.result import PartCost, PassCost
from mtptrain.planning.work import Arithmetic, Pass, Work, expected_experts

ACTIVATION_BYTES = 2  # GPUs send activations in bf16
REDUCTIONS = 2  # all-reduces per layer: after attention and after the experts


@dataclass(frozen=True, slots=True)
class PeakRates:
    """Peak rates of one GPU.

    Attributes:
        bandwidth: of memory, in bytes/s.
        flops: of matrix products, in FLOP/s by arithmetic.
    """

    bandwidth: float
    flops: dict[Arithmetic, float]


def peak_rates(hardware: HardwareConfig, measured: bool) -> PeakRates:
    """Return the rates of the data sheet, or the measured ones, times the assumed efficiency.

    Raises:
        UserError: `measured` is set and the hardware has no measured rates.
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
    return PeakRates(bandwidth * share, {name: rate * share for name, rate in rates.items()})


def part_seconds(work: Work, num_gpus: int, rates: PeakRates) -> float:
    """Return the time to move the bytes or to compute the FLOPs, whichever is longer, split over the GPUs."""
    moving = (work.split_bytes / num_gpus + work.whole_bytes) / rates.bandwidth
    computing = (work.split_flops / num_gpus + work.whole_flops) / rates.flops[work.arithmetic]
    return max(moving, computing)


def reduction_bytes(shape: ShapeConfig, tokens: int, num_layers: int, num_gpus: int) -> float:
    """Return the bytes that each GPU sends to sum the outputs of attention and experts by ring all-reduce."""
    share = 2 * (num_gpus - 1) / num_gpus
    return REDUCTIONS * num_layers * share * tokens * shape.hidden_size * ACTIVATION_BYTES


def pass_cost(
    work: Pass, shape: ShapeConfig, tokens: int, num_layers: int, hardware: HardwareConfig, plan: PlanConfig
) -> PassCost:
    """Return bytes, FLOPs and seconds of a pass over `tokens` new tokens.

    Parts run one after the other and do not overlap. `communication` and `latency` are parts of their own.

    Raises:
        UserError: see `peak_rates`.
    """
    rates = peak_rates(hardware, plan.measured)
    parts = {
        name: PartCost(part.bytes, part.flops, part_seconds(part, hardware.num_gpus, rates))
        for name, part in work.items()
    }
    if hardware.num_gpus > 1:
        sent = reduction_bytes(shape, tokens, num_layers, hardware.num_gpus)
        parts["communication"] = PartCost(0.0, 0.0, sent / hardware.interconnect, sent)
    if hardware.layer_seconds:
        parts["latency"] = PartCost(0.0, 0.0, num_layers * hardware.layer_seconds)
    return PassCost(
        tokens=tokens,
        experts=expected_experts(shape, tokens),
        seconds=sum(part.seconds for part in parts.values()),
        bytes=sum(part.bytes for part in parts.values()),
        flops=sum(part.flops for part in parts.values()),
        parts=parts,
    )

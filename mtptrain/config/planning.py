"""What a plan is made for: the question, the load and the hardware."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from mtptrain.config.choices import CacheFormat, PlanKind, WeightFormat
from mtptrain.config.rules import require


@dataclass(kw_only=True, slots=True)
class HardwareConfig:
    """One kind of GPU and how many of them hold the model together."""

    name: str = "own"
    num_gpus: int = 1  # weights are split evenly over them
    memory: float = 0.0  # bytes a GPU
    bandwidth: float = 0.0  # bytes/s of a GPU's memory
    fp8_flops: float = 0.0  # FLOP/s of a GPU in matrix products, without sparsity
    bf16_flops: float = 0.0
    fp32_flops: float = 0.0
    interconnect: float = 0.0  # bytes/s that a GPU sends to the others
    measured_bandwidth: float | None = None  # what a large copy reached; used with plan.measured=true
    measured_bf16_flops: float | None = None  # what a large matrix product reached
    efficiency: float = 1.0  # assumed share of bandwidth and FLOP/s that kernels reach; 1 = the roofline
    layer_seconds: float = 0.0  # assumed time that a layer costs beside its bytes and FLOPs: launches, waiting

    def __post_init__(self) -> None:
        require(self.num_gpus >= 1, "hardware.num_gpus", self.num_gpus, "must be at least 1")
        for name in ("memory", "bandwidth", "fp8_flops", "bf16_flops", "fp32_flops"):
            value = getattr(self, name)
            require(
                math.isfinite(value) and value > 0, f"hardware.{name}", value, "must be above 0; see the data sheet"
            )
        require(
            self.num_gpus == 1 or (math.isfinite(self.interconnect) and self.interconnect > 0),
            "hardware.interconnect",
            self.interconnect,
            "must be above 0 with more than one GPU",
        )
        for name in ("measured_bandwidth", "measured_bf16_flops"):
            value = getattr(self, name)
            require(value is None or value > 0, f"hardware.{name}", value, "must be above 0, or null: not measured")
        require(0 < self.efficiency <= 1, "hardware.efficiency", self.efficiency, "must lie in (0, 1]")
        require(self.layer_seconds >= 0, "hardware.layer_seconds", self.layer_seconds, "must not be negative")


@dataclass(kw_only=True, slots=True)
class PlanConfig:
    """What `plan` computes, and for which load; a plan of training reads the settings of the training itself."""

    what: PlanKind = PlanKind.decoding
    batch: int = 1  # rows decoded together
    context: int = 8192  # tokens that each row holds already
    weights: WeightFormat = WeightFormat.release
    cache: CacheFormat = CacheFormat.fp8
    measured: bool = False  # take the row's measured ceilings, where it has them, instead of the data sheet's
    # Share of drafts kept at position k of those that were kept up to k - 1; later positions repeat the last.
    acceptance: list[float] = field(default_factory=list)
    evaluation: str | None = None  # an evaluation.json, or the folder of its run, to read the acceptance from
    head: str | None = None  # its name there; null = the last one

    def __post_init__(self) -> None:
        require(self.batch >= 1, "plan.batch", self.batch, "must be at least 1 row")
        require(self.context >= 1, "plan.context", self.context, "must be at least 1 token")
        require(
            all(0 <= share <= 1 for share in self.acceptance),
            "plan.acceptance",
            self.acceptance,
            "every share must lie in [0, 1]",
        )

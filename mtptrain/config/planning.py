"""What a plan is made for: the question, the load and the hardware."""

from __future__ import annotations

import math
from dataclasses import dataclass

from mtptrain.config.choices import CacheFormat, PlanKind, WeightFormat
from mtptrain.config.rules import check_fields, ranged, require

FROM_DATA_SHEET = "must be above 0; see the data sheet"
MEASURED = "must be above 0, or null: not measured"


@dataclass(kw_only=True, slots=True)
class HardwareConfig:
    """One kind of GPU and how many of them hold the model together."""

    name: str = "own"
    num_gpus: int = ranged(1, at_least=1)  # weights are split evenly over them
    memory: float = ranged(0.0, above=0, rule=FROM_DATA_SHEET)  # bytes a GPU
    bandwidth: float = ranged(0.0, above=0, rule=FROM_DATA_SHEET)  # bytes/s of a GPU's memory
    fp8_flops: float = ranged(0.0, above=0, rule=FROM_DATA_SHEET)  # FLOP/s in matrix products, without sparsity
    bf16_flops: float = ranged(0.0, above=0, rule=FROM_DATA_SHEET)
    fp32_flops: float = ranged(0.0, above=0, rule=FROM_DATA_SHEET)
    interconnect: float = 0.0  # bytes/s that a GPU sends to the others; above 0 where there are others
    # Ceilings that a large copy and a large matrix product reached; used with plan.measured=true.
    measured_bandwidth: float | None = ranged(None, above=0, rule=MEASURED)
    measured_bf16_flops: float | None = ranged(None, above=0, rule=MEASURED)
    # Assumed share of bandwidth and FLOP/s that kernels reach; 1 = the roofline.
    efficiency: float = ranged(1.0, above=0, at_most=1)
    # Assumed time that a layer costs beside its bytes and FLOPs: launches, waiting.
    layer_seconds: float = ranged(0.0, at_least=0)

    def __post_init__(self) -> None:
        check_fields(self, "hardware")
        require(
            self.num_gpus == 1 or 0 < self.interconnect < math.inf,
            "hardware.interconnect",
            self.interconnect,
            "must be above 0 with more than one GPU",
        )


@dataclass(kw_only=True, slots=True)
class PlanConfig:
    """What `plan` computes, and for which load; a plan of training reads the settings of the training itself."""

    what: PlanKind = PlanKind.decoding
    batch: int = ranged(1, at_least=1)  # rows decoded together
    context: int = ranged(8192, at_least=1)  # tokens that each row holds already
    weights: WeightFormat = WeightFormat.release
    cache: CacheFormat = CacheFormat.fp8
    measured: bool = False  # take the row's measured ceilings, where it has them, instead of the data sheet's
    # Share of drafts kept at position k of those that were kept up to k - 1; later positions repeat the last.
    acceptance: list[float] = ranged([], at_least=0, at_most=1, rule="every share must lie in [0, 1]")
    evaluation: str | None = None  # an evaluation.json, or the folder of its run, to read the acceptance from
    head: str | None = None  # its name there; null = the last one

    def __post_init__(self) -> None:
        check_fields(self, "plan")

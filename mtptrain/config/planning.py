"""Settings of a plan: its subject, the load and the hardware."""

from __future__ import annotations

import math
from dataclasses import dataclass

from mtptrain.config.choices import CacheFormat, PlanKind, WeightFormat
from mtptrain.config.rules import check_fields, ranged, require

FROM_DATA_SHEET = "must be above 0; see the data sheet"
MEASURED = "must be above 0, or null: not measured"


@dataclass(kw_only=True, slots=True)
class HardwareConfig:
    """One kind of GPU, and the number of GPUs that hold the model together."""

    name: str = "own"
    num_gpus: int = ranged(1, at_least=1)  # weights are split evenly over them
    memory: float = ranged(0.0, above=0, rule=FROM_DATA_SHEET)  # bytes a GPU
    bandwidth: float = ranged(0.0, above=0, rule=FROM_DATA_SHEET)  # bytes/s of a GPU's memory
    fp8_flops: float = ranged(0.0, above=0, rule=FROM_DATA_SHEET)  # FLOP/s in matrix products, without sparsity
    bf16_flops: float = ranged(0.0, above=0, rule=FROM_DATA_SHEET)
    fp32_flops: float = ranged(0.0, above=0, rule=FROM_DATA_SHEET)
    interconnect: float = 0.0  # bytes/s that a GPU sends to the others; above 0 with more than one GPU
    # Rates of a large copy and of a large matrix product; used with plan.measured=true.
    measured_bandwidth: float | None = ranged(None, above=0, rule=MEASURED)
    measured_bf16_flops: float | None = ranged(None, above=0, rule=MEASURED)
    # Assumed share of bandwidth and FLOP/s that kernels reach; 1 = the roofline.
    efficiency: float = ranged(1.0, above=0, at_most=1)
    # Assumed seconds per layer in addition to its bytes and FLOPs: launches, waiting.
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
    """Subject and load of a plan. A plan of training also reads the settings of the training."""

    what: PlanKind = PlanKind.decoding
    batch: int = ranged(1, at_least=1)  # rows decoded together
    context: int = ranged(8192, at_least=1)  # tokens already in each row
    weights: WeightFormat = WeightFormat.release
    cache: CacheFormat = CacheFormat.fp8
    measured: bool = False  # use the hardware's measured rates instead of the data sheet's
    # Share of drafts kept at position k, given that all earlier ones were kept; later positions repeat the last. The
    # default of +recipe=plan is reported for V4-Pro's head.
    acceptance: list[float] = ranged([], at_least=0, at_most=1, rule="every share must lie in [0, 1]")
    evaluation: str | None = None  # an evaluation.json, or the folder of its run, to read the acceptance from
    head: str | None = None  # name of the head in the evaluation; null = the last head

    def __post_init__(self) -> None:
        check_fields(self, "plan")

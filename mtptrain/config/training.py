"""Settings of the MTP modules, their loss and their training loop."""

from __future__ import annotations

import math
from dataclasses import dataclass

from mtptrain.config.choices import HeadExperts, LossName, MtpMode, OptimizerName
from mtptrain.config.rules import MAX_DRAFT_LENGTH, check_fields, ranged, require


@dataclass(kw_only=True, slots=True)
class MtpConfig:
    """The multi-token-prediction modules and their training rollout."""

    mode: MtpMode = MtpMode.shared
    depth: int = ranged(1, at_least=1)  # modules
    steps: int | None = None  # draft steps of the training rollout; null = depth
    trainable: str = "all"  # all, no_experts, or patterns of tensor names such as "*.e_proj.*,*.h_proj.*"
    experts: HeadExperts = HeadExperts.replicate  # expert_parallel: each process trains its share of the experts
    init: str = "stock"  # stock, fresh, backbone (from its last sliding-window layer), or the path of a checkpoint
    quant_aware: bool = False  # train with weights rounded to the backbone's storage format
    zero_first_embedding: bool = False  # zero the embedding at position 0, as vLLM does

    def __post_init__(self) -> None:
        check_fields(self, "mtp")
        require(
            self.mode is MtpMode.stacked or self.depth == 1,
            "mtp.depth",
            self.depth,
            "mtp.mode=shared has one module (depth 1); set mtp.mode=stacked, or mtp.steps for a longer rollout",
        )
        require(self.num_steps >= self.depth, "mtp.steps", self.steps, f"must be at least mtp.depth={self.depth}")
        require(self.num_steps <= MAX_DRAFT_LENGTH, "mtp.steps", self.num_steps, f"must be at most {MAX_DRAFT_LENGTH}")

    @property
    def num_steps(self) -> int:
        """Draft steps of the training rollout."""
        return self.depth if self.steps is None else self.steps


DEFAULT_LOSS = LossName("kl")


@dataclass(kw_only=True, slots=True)
class LossConfig:
    """The training loss of one draft step."""

    divergence: LossName = DEFAULT_LOSS
    temperature: float = ranged(1.0, above=0)  # divides teacher and student logits alike
    step_decay: float = ranged(1.0, above=0, at_most=1)  # step k weighs decay^(k-1), weights sum to 1
    scale: float = ranged(1.0, above=0)  # the lambda of DeepSeek-V3 section 2.2

    def __post_init__(self) -> None:
        check_fields(self, "loss")


@dataclass(kw_only=True, slots=True)
class TrainConfig:
    """The training loop."""

    steps: int = ranged(100, at_least=1)  # optimiser steps
    batch_size: int = ranged(8, at_least=1)  # sequences a micro-batch, of all processes together
    accumulation: int = ranged(1, at_least=1)  # micro-batches an optimiser step
    optimizer: OptimizerName = OptimizerName.adamw
    learning_rate: float = ranged(1e-3, above=0)  # the peak, after the warm-up
    final_learning_rate_ratio: float = ranged(0.0, at_least=0, at_most=1)  # of the peak, at the last step
    warmup_steps: int = ranged(10, at_least=0)  # in which the learning rate rises linearly
    weight_decay: float = ranged(0.1, at_least=0)
    beta1: float = ranged(0.9, at_least=0, below=1)
    beta2: float = ranged(0.95, at_least=0, below=1)
    clip_norm: float = ranged(1.0, above=0, at_most=math.inf)  # global gradient norm; inf = no clipping
    recompute: bool = False  # run each draft step again in the backward instead of keeping its activations
    # Auxiliary-free balancing of experts, arXiv 2412.19437 section 2.1.2; 0 = off.
    router_bias_rate: float = ranged(0.0, at_least=0)
    log_every: int = ranged(10, at_least=1)  # steps
    checkpoint_every: int = ranged(100, at_least=1)  # steps; the last step always writes one
    keep_checkpoints: int = ranged(2, at_least=1)  # the newest ones
    max_bad_steps: int = ranged(5, at_least=1)  # non-finite steps in a row before the run stops

    def __post_init__(self) -> None:
        check_fields(self, "train")


@dataclass(kw_only=True, slots=True)
class StockHeadConfig(TrainConfig):
    """The training loop of the stock head in `recipe=backbone`."""

    def __post_init__(self) -> None:
        check_fields(self, "stock_head")

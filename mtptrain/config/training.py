"""The modules, what they are charged, and the loop that trains them."""

from __future__ import annotations

from dataclasses import dataclass

from mtptrain.config.choices import LossName, MtpMode, OptimizerName
from mtptrain.config.rules import MAX_DRAFT_LENGTH, require


@dataclass(kw_only=True, slots=True)
class MtpConfig:
    """The multi-token-prediction modules and the rollout they are trained on."""

    mode: MtpMode = MtpMode.shared
    depth: int = 1  # modules
    steps: int | None = None  # draft steps of the training rollout; null = depth
    trainable: str = "all"  # all, no_experts, or patterns of tensor names such as "*.e_proj.*,*.h_proj.*"
    init: str = "stock"  # stock, fresh, backbone (from its last sliding-window layer), or the path of a checkpoint
    quant_aware: bool = False  # train with the values that weights have once they are stored as the backbone's own are

    def __post_init__(self) -> None:
        require(self.depth >= 1, "mtp.depth", self.depth, "must be at least 1 module")
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


@dataclass(kw_only=True, slots=True)
class LossConfig:
    """What one draft step is charged for missing the next token."""

    divergence: LossName = LossName.kl
    temperature: float = 1.0  # > 0, divides teacher and student logits alike
    step_decay: float = 1.0  # in (0, 1]: step k weighs decay^(k-1), weights sum to 1
    scale: float = 1.0  # > 0, the lambda of DeepSeek-V3 section 2.2

    def __post_init__(self) -> None:
        require(self.temperature > 0, "loss.temperature", self.temperature, "must be above 0")
        require(0 < self.step_decay <= 1, "loss.step_decay", self.step_decay, "must lie in (0, 1]")
        require(self.scale > 0, "loss.scale", self.scale, "must be above 0")


@dataclass(kw_only=True, slots=True)
class TrainConfig:
    """The training loop."""

    steps: int = 100  # optimiser steps
    batch_size: int = 8  # sequences a micro-batch, of all processes together
    accumulation: int = 1  # micro-batches an optimiser step
    optimizer: OptimizerName = OptimizerName.adamw
    learning_rate: float = 1e-3
    final_learning_rate_ratio: float = 0.0  # of the peak, at the last step
    warmup_steps: int = 10
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    clip_norm: float = 1.0  # global gradient norm
    recompute: bool = False  # run each draft step again in the backward instead of keeping its activations
    router_bias_rate: float = 0.0  # auxiliary-free balancing, arXiv 2412.19437 section 2.1.2; 0 = off
    log_every: int = 10  # steps
    checkpoint_every: int = 100  # steps; the last step always writes one
    keep_checkpoints: int = 2
    max_bad_steps: int = 5  # non-finite steps in a row before the run stops

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulation", "log_every", "checkpoint_every", "keep_checkpoints"):
            require(getattr(self, name) >= 1, f"train.{name}", getattr(self, name), "must be at least 1")
        require(self.max_bad_steps >= 1, "train.max_bad_steps", self.max_bad_steps, "must be at least 1")
        require(self.warmup_steps >= 0, "train.warmup_steps", self.warmup_steps, "must not be negative")
        require(self.learning_rate > 0, "train.learning_rate", self.learning_rate, "must be above 0")
        require(self.clip_norm > 0, "train.clip_norm", self.clip_norm, "must be above 0")
        require(self.weight_decay >= 0, "train.weight_decay", self.weight_decay, "must not be negative")
        require(self.router_bias_rate >= 0, "train.router_bias_rate", self.router_bias_rate, "must not be negative")
        for name in ("beta1", "beta2"):
            require(0 <= getattr(self, name) < 1, f"train.{name}", getattr(self, name), "must lie in [0, 1)")
        ratio = self.final_learning_rate_ratio
        require(0 <= ratio <= 1, "train.final_learning_rate_ratio", ratio, "must lie in [0, 1]")

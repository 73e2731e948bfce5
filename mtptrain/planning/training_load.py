"""How MTP heads are trained, as far as a plan counts it."""

from __future__ import annotations

from dataclasses import dataclass

from mtptrain.config import OptimizerName, Placement, WeightFormat


@dataclass(frozen=True, slots=True)
class TrainingLoad:
    """How heads are trained.

    Attributes:
        num_gpus: processes, one per GPU.
        zero_stage: DeepSpeed stage for the heads; 0 keeps everything in every process.
        offload: masters and optimiser state are held in CPU memory.
        optimizer: AdamW, or Muon for the matrices and experts.
        placement: of the frozen backbone: `replicate`, `zero3` or `expert_parallel`.
        backbone: format of its weights.
        heads: bf16 with fp32 masters, or fp32.
        train_experts: whether the routed experts of the heads are trained.
        share_experts: each process holds and trains its share of them (`mtp.experts=expert_parallel`).
        modules: MTP modules.
        steps: draft steps of the rollout.
        rows: sequences per GPU and micro-batch.
        row_length: tokens of a sequence.
        micro_batches: per optimiser step.
        recompute: the rollout keeps only the streams between its steps and recomputes the rest in the backward pass.
        from_streams: streams come from a cache; of the backbone only embedding, hc_head, norm and lm_head are held.
    """

    num_gpus: int = 8
    zero_stage: int = 0
    offload: bool = False
    optimizer: OptimizerName = OptimizerName.adamw
    placement: Placement = Placement.replicate
    backbone: WeightFormat = WeightFormat.bf16
    heads: WeightFormat = WeightFormat.bf16
    train_experts: bool = True
    share_experts: bool = False
    modules: int = 1
    steps: int = 3
    rows: int = 1
    row_length: int = 4096
    micro_batches: int = 1
    recompute: bool = False
    from_streams: bool = False

    @property
    def tokens(self) -> int:
        """Tokens per GPU and micro-batch."""
        return self.rows * self.row_length

    @property
    def step_tokens(self) -> int:
        """Tokens of one optimiser step on all GPUs."""
        return self.num_gpus * self.micro_batches * self.tokens

    def share(self, stage: int) -> float:
        """Return the fraction that a GPU holds of tensors that ZeRO partitions from `stage` on."""
        return 1 / self.num_gpus if self.zero_stage >= stage else 1.0

"""What a run can be told: typed sections, each with its units, ranges and checks.

This module imports neither torch nor transformers, so that `--help` and `--cfg job` answer at once.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, OmegaConf

from mtptrain.errors import UserError

MAX_DRAFT_LENGTH = 8


class Task(Enum):
    """The program that a recipe runs."""

    backbone = "backbone"
    pretrain = "pretrain"
    distill = "distill"
    evaluate = "evaluate"
    compare = "compare"


class Device(Enum):
    """Where a run computes; `auto` takes the GPU when there is one."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class Precision(Enum):
    """Arithmetic of a run; `auto` is bf16 on a GPU and fp32 on a CPU."""

    auto = "auto"
    fp32 = "fp32"
    bf16 = "bf16"


class DataSource(Enum):
    """Where documents come from."""

    stdlib = "stdlib"
    text = "text"


class MtpMode(Enum):
    """`shared`: one module drafts every step. `stacked`: module d drafts step d."""

    shared = "shared"
    stacked = "stacked"


class LossName(Enum):
    """What the heads are trained on: data tokens (`ce`) or the backbone's distribution (the others)."""

    ce = "ce"
    kl = "kl"
    reverse_kl = "reverse_kl"
    jsd = "jsd"
    tv = "tv"
    neg_log_alpha = "neg_log_alpha"
    hybrid = "hybrid"
    chain = "chain"


class Tracker(Enum):
    """Where metrics are mirrored; `jsonl` is always the record unless `none` is chosen."""

    none = "none"
    jsonl = "jsonl"
    wandb = "wandb"


def require(condition: bool, setting: str, value: Any, rule: str) -> None:
    """Raise a `UserError` that names setting, value and rule unless the condition holds."""
    if not condition:
        raise UserError(f"{setting}={value}: {rule}")


@dataclass(kw_only=True, slots=True)
class ShapeConfig:
    """Sizes of a DeepSeek-V4 backbone that the `backbone` recipe builds from scratch."""

    vocab_size: int = 2048  # tokens, at least 258: 256 bytes and two marks
    hidden_size: int = 128
    layer_types: list[str] = field(default_factory=lambda: ["sliding", "csa", "hca", "sliding"])
    num_hash_layers: int = 1  # leading layers whose experts are chosen by token id
    num_attention_heads: int = 4
    head_dim: int = 32
    rope_head_dim: int = 16  # trailing dimensions of a head that are rotated
    q_lora_rank: int = 64
    o_groups: int = 2
    o_lora_rank: int = 32
    sliding_window: int = 64  # tokens
    csa_rate: int = 4  # tokens a compressed entry
    hca_rate: int = 16  # tokens a compressed entry
    index_heads: int = 4
    index_head_dim: int = 32
    index_topk: int = 16  # compressed entries a query keeps
    num_experts: int = 8
    experts_per_token: int = 2
    expert_size: int = 64
    hc_mult: int = 2  # residual streams
    sinkhorn_iterations: int = 4
    max_positions: int = 4096  # tokens

    def __post_init__(self) -> None:
        require(self.vocab_size >= 258, "backbone.shape.vocab_size", self.vocab_size, "must be at least 258")
        known = {"sliding", "csa", "hca"}
        require(
            bool(self.layer_types) and set(self.layer_types) <= known,
            "backbone.shape.layer_types",
            self.layer_types,
            f"must be a list of {sorted(known)}",
        )
        require(self.rope_head_dim % 2 == 0, "backbone.shape.rope_head_dim", self.rope_head_dim, "must be even")
        require(
            1 <= self.experts_per_token <= self.num_experts,
            "backbone.shape.experts_per_token",
            self.experts_per_token,
            f"must lie between 1 and num_experts={self.num_experts}",
        )


@dataclass(kw_only=True, slots=True)
class BackboneConfig:
    """Which frozen backbone, and how it is held in memory."""

    name: str = "tiny"
    path: str | None = None  # folder with config.json, weights and tokenizer; null = the shipped one
    shape: ShapeConfig = field(default_factory=ShapeConfig)


@dataclass(kw_only=True, slots=True)
class DataConfig:
    """Documents and how they become sequences."""

    source: DataSource = DataSource.stdlib
    path: str | None = None  # data=text: a .txt/.jsonl/.parquet file, a folder of them, or a `datasets` name
    field_name: str = "text"  # the column of .jsonl, .parquet and `datasets` rows that holds the text
    streaming: bool = False  # read documents as training needs them instead of tokenising all first
    packages: list[str] = field(default_factory=list)  # data=stdlib: installed packages that join the training split
    sequence_length: int = 256  # tokens
    heldout_every: int = 16  # one document in this many is held out, by hash of its name
    cache_dir: str | None = None  # null = $XDG_CACHE_HOME/mtptrain or ~/.cache/mtptrain

    def __post_init__(self) -> None:
        length = self.sequence_length
        require(length >= 3, "data.sequence_length", length, "must be at least 3 tokens (depth + 2)")
        require(self.heldout_every >= 2, "data.heldout_every", self.heldout_every, "must be at least 2")
        require(
            self.source is not DataSource.text or bool(self.path),
            "data.path",
            self.path,
            "data=text needs a .txt, .jsonl or .parquet file, a folder of them, or a name for datasets.load_dataset",
        )
        require(
            self.source is DataSource.text or not self.streaming,
            "data.streaming",
            self.streaming,
            "streams data=text; the standard library is small, leave it false",
        )


@dataclass(kw_only=True, slots=True)
class MtpConfig:
    """The multi-token-prediction modules and the rollout they are trained on."""

    mode: MtpMode = MtpMode.shared
    depth: int = 1  # modules
    steps: int | None = None  # draft steps of the training rollout; null = depth
    init: str = "stock"  # stock, fresh, or the path of a checkpoint

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
    batch_size: int = 8  # sequences a micro-batch
    accumulation: int = 1  # micro-batches an optimiser step
    learning_rate: float = 1e-3
    final_learning_rate_ratio: float = 0.0  # of the peak, at the last step
    warmup_steps: int = 10
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    clip_norm: float = 1.0  # global gradient norm
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


@dataclass(kw_only=True, slots=True)
class DecodingConfig:
    """How speculative decoding is run when it is measured."""

    draft_length: int = 4  # the longest K that is measured; every K from 1 up to it is reported
    max_new_tokens: int = 64  # tokens a prompt

    def __post_init__(self) -> None:
        length = self.draft_length
        require(1 <= length <= MAX_DRAFT_LENGTH, "decoding.draft_length", length, "must lie between 1 and 8")
        require(self.max_new_tokens >= 1, "decoding.max_new_tokens", self.max_new_tokens, "must be at least 1")


@dataclass(kw_only=True, slots=True)
class EvaluationConfig:
    """How much is measured."""

    num_prompts: int = 64  # held-out documents that are continued
    prompt_tokens: int = 96
    timed_prompts: int = 6  # of them, for the paired timing of plain and speculative decoding
    heldout_sequences: int = 96  # held-out sequences for the teacher-forced figures
    every: int = 0  # training steps between replays of some of the prompts; 0 = only at the end
    include_stock: bool = True  # measure the stock head beside the checkpoint

    def __post_init__(self) -> None:
        for name in ("num_prompts", "prompt_tokens", "timed_prompts", "heldout_sequences"):
            require(getattr(self, name) >= 1, f"evaluation.{name}", getattr(self, name), "must be at least 1")
        require(self.every >= 0, "evaluation.every", self.every, "must not be negative")


@dataclass(kw_only=True, slots=True)
class TrackingConfig:
    """Metrics and where they go."""

    tracker: Tracker = Tracker.jsonl
    project: str = "mtptrain"
    name: str | None = None  # of the W&B run; null = chosen by W&B


@dataclass(kw_only=True, slots=True)
class RunConfig:
    """One run: a task, its parts and its folder."""

    task: Task = MISSING
    output_dir: str | None = None  # null = outputs/<task>/<date-time>
    resume: str = "never"  # never, or auto: continue from the newest whole checkpoint in output_dir
    seed: int = 0
    device: Device = Device.auto
    precision: Precision = Precision.auto
    threads: int | None = None  # CPU threads of torch; null = 1 for the tiny preset, else half the cores
    checkpoint: str | None = None  # evaluate: a checkpoint folder, a run folder, or `stock`
    checkpoints: list[str] = field(default_factory=list)  # compare: two or more of the same, the first is the base
    evaluate_at_end: bool = True  # pretrain and distill: measure the trained head
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    data: DataConfig = field(default_factory=DataConfig)
    mtp: MtpConfig = field(default_factory=MtpConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    stock_head: TrainConfig = field(default_factory=TrainConfig)  # recipe=backbone: the training of its stock head
    decoding: DecodingConfig = field(default_factory=DecodingConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    def __post_init__(self) -> None:
        require(self.resume in ("never", "auto"), "resume", self.resume, "must be never or auto")
        require(self.seed >= 0, "seed", self.seed, "must not be negative")
        require(self.threads is None or self.threads >= 1, "threads", self.threads, "must be at least 1")
        require(
            self.task is not Task.compare or len(self.checkpoints) >= 2,
            "checkpoints",
            self.checkpoints,
            "compare needs two or more, e.g. checkpoints=[stock,outputs/distill/RUN]",
        )
        depth, length = self.mtp.num_steps, self.data.sequence_length
        require(
            length >= depth + 2,
            "data.sequence_length",
            length,
            f"leaves no target at depth {depth}: step k needs token i+k+1; use at least {depth + 2}",
        )
        require(
            self.task is not Task.distill or self.loss.divergence is not LossName.ce,
            "loss.divergence",
            "ce",
            "is training on data tokens, not distillation; use +recipe=pretrain",
        )
        require(
            self.resume == "never" or self.output_dir is not None,
            "resume",
            self.resume,
            "needs the folder of the run to continue; set output_dir",
        )


def register() -> None:
    """Make `RunConfig` the schema that Hydra composes against, and name the folder of a sweep."""
    ConfigStore.instance().store(name="run_schema", node=RunConfig)
    # Hydra writes multirun.yaml there, whatever it is told.
    OmegaConf.register_new_resolver("sweep_folder", lambda output_dir: output_dir or "outputs/sweep", replace=True)

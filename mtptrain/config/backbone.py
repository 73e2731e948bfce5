"""Which frozen backbone a run stands on."""

from __future__ import annotations

from dataclasses import dataclass, field, fields

from mtptrain.config.choices import Placement, StoredWeights
from mtptrain.config.rules import require


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
        for part in fields(self):
            value, least = getattr(self, part.name), 0 if part.name == "num_hash_layers" else 1
            if isinstance(value, int):
                require(value >= least, f"backbone.shape.{part.name}", value, f"must be at least {least}")
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
    path: str | None = None  # a folder, or a hub id as ORGANISATION/NAME; null = the shipped one
    revision: str = "main"  # branch, tag or commit of a hub id
    placement: Placement = Placement.replicate  # where the layers go
    weights: StoredWeights = StoredWeights.auto  # how a quantised release is held
    shape: ShapeConfig = field(default_factory=ShapeConfig)  # what `recipe=backbone` builds; of a release: its sizes

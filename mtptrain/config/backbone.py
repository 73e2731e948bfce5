"""Settings of the frozen backbone and of the model folders that are written from it."""

from __future__ import annotations

from dataclasses import dataclass, field

from mtptrain.config.choices import (
    ExportCheck,
    ExportForm,
    ExportScheme,
    Placement,
    ReleaseSize,
    ReleaseVariant,
    ShardCopies,
    StoredWeights,
)
from mtptrain.config.rules import check_fields, one_of, ranged, require


@dataclass(kw_only=True, slots=True)
class ShapeConfig:
    """Sizes of a DeepSeek-V4 backbone that the `backbone` recipe builds from scratch."""

    vocab_size: int = ranged(2048, at_least=258)  # tokens: 256 bytes and two special ones, or more
    hidden_size: int = ranged(128, at_least=1)
    layer_types: list[str] = one_of(["sliding", "csa", "hca", "sliding"], "sliding", "csa", "hca")
    num_hash_layers: int = ranged(1, at_least=0)  # leading layers that choose experts by token id
    num_attention_heads: int = ranged(4, at_least=1)
    head_dim: int = ranged(32, at_least=1)
    rope_head_dim: int = ranged(16, at_least=2)  # trailing dimensions of a head that are rotated
    q_lora_rank: int = ranged(64, at_least=1)
    o_groups: int = ranged(2, at_least=1)
    o_lora_rank: int = ranged(32, at_least=1)
    sliding_window: int = ranged(64, at_least=1)  # tokens
    csa_rate: int = ranged(4, at_least=1)  # tokens a compressed entry
    hca_rate: int = ranged(16, at_least=1)  # tokens a compressed entry
    index_heads: int = ranged(4, at_least=1)
    index_head_dim: int = ranged(32, at_least=1)
    index_topk: int = ranged(16, at_least=1)  # compressed entries a query keeps
    num_experts: int = ranged(8, at_least=1)
    experts_per_token: int = ranged(2, at_least=1)
    expert_size: int = ranged(64, at_least=1)
    hc_mult: int = ranged(2, at_least=1)  # residual streams
    sinkhorn_iterations: int = ranged(4, at_least=1)
    max_positions: int = ranged(4096, at_least=1)  # tokens

    def __post_init__(self) -> None:
        check_fields(self, "backbone.shape")
        require(bool(self.layer_types), "backbone.shape.layer_types", [], "must name at least one layer")
        require(self.rope_head_dim % 2 == 0, "backbone.shape.rope_head_dim", self.rope_head_dim, "must be even")
        require(
            self.experts_per_token <= self.num_experts,
            "backbone.shape.experts_per_token",
            self.experts_per_token,
            f"must lie between 1 and num_experts={self.num_experts}",
        )

    def require_computable(self) -> None:
        """Raise a `UserError` if no layer can be built from these sizes."""
        bound = min(self.head_dim, self.index_head_dim if "csa" in self.layer_types else self.head_dim)
        rule = f"are dimensions of a head and of an index head; use at most {bound}"
        require(self.rope_head_dim <= bound, "backbone.shape.rope_head_dim", self.rope_head_dim, rule)
        width = self.num_attention_heads * self.head_dim
        rule = f"must divide num_attention_heads x head_dim = {width}"
        require(width % self.o_groups == 0, "backbone.shape.o_groups", self.o_groups, rule)
        for name in ("hidden_size", "expert_size"):  # 16 bytes in bf16
            value, rule = getattr(self, name), "must be a multiple of 8, as matrix products of experts need"
            require(value % 8 == 0, f"backbone.shape.{name}", value, rule)


@dataclass(kw_only=True, slots=True)
class BackboneConfig:
    """The frozen backbone and its placement in memory."""

    name: str = "tiny"
    path: str | None = None  # a folder, or a hub id as ORGANISATION/NAME; null = the shipped one of this name
    revision: str = "main"  # branch, tag or commit of a hub id
    placement: Placement = Placement.replicate  # of the layers
    weights: StoredWeights = StoredWeights.auto  # storage of a quantised release in memory
    grow_from: str | None = None  # recipe=backbone: shipped name or folder of one with fewer layers, to begin with
    shape: ShapeConfig = field(default_factory=ShapeConfig)  # built by `recipe=backbone`; for a release: its sizes


BACKBONE_CHOICE = "backbone or backbone.path"  # in an error: the settings that choose another backbone


def backbone_words(name: object, path: object) -> list[str]:
    """Return the settings that choose a backbone on a command line, given those of a run; none for the default."""
    default = BackboneConfig()
    named = [] if name in (None, default.name) else [f"backbone={name}"]
    return named + ([] if path is None else [f"backbone.path={path}"])


@dataclass(kw_only=True, slots=True)
class ExportConfig:
    """The folder that `recipe=export` writes."""

    form: ExportForm = ExportForm.full
    scheme: ExportScheme = ExportScheme.target
    shards: ShardCopies = ShardCopies.hardlink  # of unchanged files
    check: ExportCheck = ExportCheck.replay  # tensors: measures no acceptance, decodes nothing, loads no backbone
    # Largest loss of acceptance length, in tokens a pass, by storing the head; a larger loss is an error.
    max_drop: float = ranged(0.05, at_least=0, rule="must be 0 or more tokens a pass")
    # form=draft: with the model's embedding and lm_head, which no checked server reads from there.
    embeddings: bool = False
    force: bool = False  # write to a path that vLLM takes for another kind of draft
    push_to_hub: str | None = None  # ORGANISATION/NAME of a model on the hub that receives the folder

    def __post_init__(self) -> None:
        check_fields(self, "export")


@dataclass(kw_only=True, slots=True)
class ReleaseConfig:
    """The folder that `recipe=mini_release` writes."""

    variant: ReleaseVariant = ReleaseVariant.release
    random: bool = False  # a random backbone of backbone.shape and a random head, instead of the configured backbone
    size: ReleaseSize = ReleaseSize.tiny  # servable: sizes for the kernels of servers, instead of backbone.shape

    def __post_init__(self) -> None:
        is_possible = self.random or self.size is ReleaseSize.tiny
        rule = "builds a random backbone of these sizes; set release.random=true as well"
        require(is_possible, "release.size", self.size.value, rule)

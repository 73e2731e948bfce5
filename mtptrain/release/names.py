"""The tensors of one released MTP module and their names in this package, as data.

The rows are written out because no renaming rule fits: transformers' `.norm.` rule, for one, would turn the module's
`norm.weight` into a norm of the attention's keys.

Source: the index of deepseek-ai/DeepSeek-V4-Flash and of DeepSeek-V4-Pro; for the scales of the -Base releases, the
header quoted in NVIDIA-NeMo/Automodel#2034.
"""

# E routed experts

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch
from transformers import DeepseekV4Config

from mtptrain.release.codec import FP4_BLOCK, FP8_BLOCK, scale_shape
from mtptrain.release.config import Scheme

ScaleKind = Literal["none", "fp8", "fp4"]
Stored = Literal["f32", "i64", "bf16", "fp8", "expert"]  # storage in a release; `expert` follows the scheme


@dataclass(frozen=True)
class TableEntry:
    """One tensor of a module: both names, its shape by the names of `sizes`, and its storage."""

    released: str
    ours: str
    shape: tuple[str, ...]
    stored: Stored


ENTRIES = (
    TableEntry("enorm.weight", "enorm.weight", ("width",), "bf16"),
    TableEntry("hnorm.weight", "hnorm.weight", ("width",), "bf16"),
    TableEntry("e_proj.weight", "e_proj.weight", ("width", "width"), "fp8"),
    TableEntry("h_proj.weight", "h_proj.weight", ("width", "width"), "fp8"),
    TableEntry("attn_norm.weight", "layer.input_layernorm.weight", ("width",), "bf16"),
    TableEntry("attn.attn_sink", "layer.self_attn.sinks", ("heads",), "f32"),
    TableEntry("attn.wq_a.weight", "layer.self_attn.q_a_proj.weight", ("q_rank", "width"), "fp8"),
    TableEntry("attn.q_norm.weight", "layer.self_attn.q_a_norm.weight", ("q_rank",), "bf16"),
    TableEntry("attn.wq_b.weight", "layer.self_attn.q_b_proj.weight", ("head_width", "q_rank"), "fp8"),
    TableEntry("attn.wkv.weight", "layer.self_attn.kv_proj.weight", ("head_dim", "width"), "fp8"),
    TableEntry("attn.kv_norm.weight", "layer.self_attn.kv_norm.weight", ("head_dim",), "bf16"),
    TableEntry("attn.wo_a.weight", "layer.self_attn.o_a_proj.weight", ("o_width", "group_width"), "fp8"),
    TableEntry("attn.wo_b.weight", "layer.self_attn.o_b_proj.weight", ("width", "o_width"), "fp8"),
    TableEntry("ffn_norm.weight", "layer.post_attention_layernorm.weight", ("width",), "bf16"),
    TableEntry("ffn.gate.weight", "layer.mlp.gate.weight", ("experts", "width"), "bf16"),
    TableEntry("ffn.gate.bias", "layer.mlp.gate.e_score_correction_bias", ("experts",), "f32"),
    TableEntry("ffn.shared_experts.w1.weight", "layer.mlp.shared_experts.gate_proj.weight", ("shared", "width"), "fp8"),
    TableEntry("ffn.shared_experts.w2.weight", "layer.mlp.shared_experts.down_proj.weight", ("width", "shared"), "fp8"),
    TableEntry("ffn.shared_experts.w3.weight", "layer.mlp.shared_experts.up_proj.weight", ("shared", "width"), "fp8"),
    TableEntry("hc_attn_fn", "layer.attn_hc.fn", ("mixes", "stream_width"), "f32"),
    TableEntry("hc_attn_base", "layer.attn_hc.base", ("mixes",), "f32"),
    TableEntry("hc_attn_scale", "layer.attn_hc.scale", ("3",), "f32"),
    TableEntry("hc_ffn_fn", "layer.ffn_hc.fn", ("mixes", "stream_width"), "f32"),
    TableEntry("hc_ffn_base", "layer.ffn_hc.base", ("mixes",), "f32"),
    TableEntry("hc_ffn_scale", "layer.ffn_hc.scale", ("3",), "f32"),
    TableEntry("hc_head_fn", "hc_head.hc_fn", ("streams", "stream_width"), "f32"),
    TableEntry("hc_head_base", "hc_head.hc_base", ("streams",), "f32"),
    TableEntry("hc_head_scale", "hc_head.hc_scale", ("1",), "f32"),
    TableEntry("norm.weight", "norm.weight", ("width",), "bf16"),
)
# One expert: w1 above w3 make gate_up_proj[E], w2 is down_proj[E].
EXPERT_ENTRIES = (
    TableEntry("ffn.experts.E.w1.weight", "layer.mlp.experts.gate_up_proj", ("expert", "width"), "expert"),
    TableEntry("ffn.experts.E.w2.weight", "layer.mlp.experts.down_proj", ("width", "expert"), "expert"),
    TableEntry("ffn.experts.E.w3.weight", "layer.mlp.experts.gate_up_proj", ("expert", "width"), "expert"),
)


def sizes(config: DeepseekV4Config) -> dict[str, int]:
    """Return the sizes that the entries name."""
    heads, streams, width = config.num_attention_heads, config.hc_mult, config.hidden_size
    return {
        "1": 1,
        "3": 3,
        "width": width,
        "heads": heads,
        "head_dim": config.head_dim,
        "head_width": heads * config.head_dim,
        "group_width": heads * config.head_dim // config.o_groups,
        "q_rank": config.q_lora_rank,
        "o_width": config.o_groups * config.o_lora_rank,
        "experts": config.n_routed_experts,
        "expert": config.moe_intermediate_size,
        "shared": config.moe_intermediate_size * config.n_shared_experts,
        "streams": streams,
        "stream_width": streams * width,
        "mixes": (2 + streams) * streams,
    }


@dataclass(frozen=True)
class Row:
    """One tensor of a released module.

    Attributes:
        released: its name below `mtp.{d}.`.
        ours: our tensor that holds its values, below `mtp.{d}.`.
        shape: shape as stored.
        dtype: dtype as stored.
        scale: encoding of the weight; for a row of scales, of the weight that they scale.
        is_scale: whether this row holds the scales of the weight of the same name.
        scale_dtype: dtype of the scales as stored; without a meaning if there are none.
        value_shape: shape of the decoded weight; equals `shape` if the weight is not encoded.
        expert: number of its expert; None outside the routed experts.
    """

    released: str
    ours: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    scale: ScaleKind
    is_scale: bool
    scale_dtype: torch.dtype
    value_shape: tuple[int, ...]
    expert: int | None = None

    @property
    def scale_shape(self) -> tuple[int, ...]:
        """Shape of the scales of this weight."""
        return scale_shape((self.value_shape[0], self.value_shape[1]), FP4_BLOCK if self.scale == "fp4" else FP8_BLOCK)

    @property
    def scale_name(self) -> str:
        """The released name of this weight's scales."""
        return self.released.removesuffix("weight") + "scale"


def scheme_scales(scheme: Scheme) -> torch.dtype:
    """Return the dtype in which releases of a scheme hold every scale: float32 beside FP8 experts, else E8M0."""
    return torch.float32 if scheme == "fp8" else torch.float8_e8m0fnu


def release_table(
    config: DeepseekV4Config, scheme: Scheme = "fp8_fp4", scale_dtype: torch.dtype | None = None
) -> list[Row]:
    """Return every tensor of one released module: 1575 for Flash and 2343 for Pro, including scales.

    Args:
        config: config of the backbone.
        scheme: `fp8_fp4` as released, `fp8` with FP8 experts (the -Base releases), `bf16` without scales.
        scale_dtype: dtype of the scales; None takes that of the scheme's releases.
    """
    known = sizes(config)
    rows = [row for entry in ENTRIES for row in _rows(entry, known, scheme, None)]
    for expert in range(config.n_routed_experts):
        rows += [row for entry in EXPERT_ENTRIES for row in _rows(entry, known, scheme, expert)]
    return rows if scale_dtype is None else [_with_scales(row, scale_dtype) for row in rows]


def _with_scales(row: Row, dtype: torch.dtype) -> Row:
    return replace(row, scale_dtype=dtype, dtype=dtype if row.is_scale else row.dtype)


def our_shapes(config: DeepseekV4Config) -> dict[str, tuple[int, ...]]:
    """Return names and shapes of one module's state dict, below `mtp.{d}.`."""
    known = sizes(config)
    shapes = {entry.ours: tuple(known[size] for size in entry.shape) for entry in ENTRIES}
    experts, expert, width = known["experts"], known["expert"], known["width"]
    shapes["layer.mlp.experts.gate_up_proj"] = (experts, 2 * expert, width)
    shapes["layer.mlp.experts.down_proj"] = (experts, width, expert)
    return shapes


def _rows(entry: TableEntry, known: dict[str, int], scheme: Scheme, expert: int | None) -> Iterator[Row]:
    shape = tuple(known[size] for size in entry.shape)
    released = entry.released if expert is None else entry.released.replace(".E.", f".{expert}.")
    return stored_rows(released, entry.ours, shape, entry.stored, scheme, expert)


def stored_rows(
    released: str, ours: str, shape: tuple[int, ...], stored: Stored, scheme: Scheme, expert: int | None = None
) -> Iterator[Row]:
    """Yield the row of one weight of `shape`, then the row of its scales if the scheme has any."""
    kind: ScaleKind = "none"
    scales = scheme_scales(scheme)
    if scheme != "bf16" and stored in ("fp8", "expert"):
        kind = "fp4" if stored == "expert" and scheme == "fp8_fp4" else "fp8"
    if kind == "none":
        dtype = {"f32": torch.float32, "i64": torch.int64}.get(stored, torch.bfloat16)
        yield Row(released, ours, shape, dtype, kind, False, scales, shape, expert)
        return
    packed = (shape[0], shape[1] // 2) if kind == "fp4" else shape
    dtype = torch.int8 if kind == "fp4" else torch.float8_e4m3fn
    weight = Row(released, ours, packed, dtype, kind, False, scales, shape, expert)
    yield weight
    yield Row(weight.scale_name, ours, weight.scale_shape, scales, kind, True, scales, shape, expert)

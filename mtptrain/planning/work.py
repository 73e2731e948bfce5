"""Bytes and FLOPs of one pass over a backbone or an MTP module while decoding.

Counted: reads of weights and of cached keys, residual streams, matrix products. Left out: norms, softmax, Sinkhorn, the
pooling of windows, writes of new keys, rows of the embedding.
"""

# R rows decoded together, S new tokens per row, T = R * S new tokens

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from enum import Enum

from mtptrain.config import CacheFormat, PlanConfig, ShapeConfig, WeightFormat
from mtptrain.planning.parameters import (
    Weights,
    attention_weights,
    collapse_weights,
    compression_weights,
    connection_weights,
    expert_weights,
    head_weights,
    layer_parts,
)

STREAM_BYTES = 2  # per channel of a residual stream, bf16
STREAM_VISITS = 4  # each of a layer's two hyper-connections reads and writes every stream


class Arithmetic(Enum):
    """Number format that sets the rate of a matrix product."""

    fp8 = "fp8"
    bf16 = "bf16"
    fp32 = "fp32"


@dataclass(frozen=True, slots=True)
class Work:
    """Memory traffic and FLOPs of one part of a pass.

    Attributes:
        split_bytes, split_flops: divided by the number of GPUs, as tensor parallelism divides matrices and heads.
        whole_bytes, whole_flops: repeated on every GPU: cached keys (one key head serves all query heads), compressors,
            routers and hyper-connections.
        arithmetic: of the matrix products.
    """

    split_bytes: float = 0.0
    split_flops: float = 0.0
    whole_bytes: float = 0.0
    whole_flops: float = 0.0
    arithmetic: Arithmetic = Arithmetic.bf16

    @property
    def bytes(self) -> float:
        """Bytes that one GPU alone would move."""
        return self.split_bytes + self.whole_bytes

    @property
    def flops(self) -> float:
        """FLOPs that one GPU alone would compute."""
        return self.split_flops + self.whole_flops

    def __add__(self, other: Work) -> Work:
        return Work(
            self.split_bytes + other.split_bytes,
            self.split_flops + other.split_flops,
            self.whole_bytes + other.whole_bytes,
            self.whole_flops + other.whole_flops,
            self.arithmetic,
        )

    def times(self, count: int) -> Work:
        """Return this work repeated `count` times."""
        return Work(
            self.split_bytes * count,
            self.split_flops * count,
            self.whole_bytes * count,
            self.whole_flops * count,
            self.arithmetic,
        )


Pass = dict[str, Work]  # by name of the part


def add_passes(*many: Pass) -> Pass:
    """Return the sum of each part."""
    total: Pass = {}
    for one in many:
        for name, work in one.items():
            total[name] = total[name] + work if name in total else work
    return total


def expected_experts(shape: ShapeConfig, tokens: int) -> float:
    """Return the expected number of experts that T tokens use in a layer, E (1 - (1 - k/E)^T).

    Each token chooses k of E experts uniformly. The same holds for hash layers as long as the tokens differ. Real
    routing is uneven and neighbouring tokens choose similar experts, so the estimate is on the high side.
    """
    idle = 1 - shape.experts_per_token / shape.num_experts
    return shape.num_experts * (1 - idle**tokens)


def key_bytes(shape: ShapeConfig, cache: CacheFormat, channels: int) -> float:
    """Return the bytes of one cached key. Scales of fp8 are left out."""
    if cache is CacheFormat.fp8:
        rotated = shape.rope_head_dim if channels == shape.head_dim else 0  # the indexer's keys are fp8 throughout
        return channels + rotated
    return channels * (2 if cache is CacheFormat.bf16 else 4)


def matrix_arithmetic(weights: WeightFormat) -> Arithmetic:
    """Return the arithmetic of products with matrices and experts. FP4 experts run at the rate of FP8."""
    if weights in (WeightFormat.release, WeightFormat.fp8):
        return Arithmetic.fp8
    return Arithmetic.bf16 if weights is WeightFormat.bf16 else Arithmetic.fp32


def plain_arithmetic(weights: WeightFormat) -> Arithmetic:
    """Return the arithmetic of products with weights that a release stores in bf16."""
    return Arithmetic.fp32 if weights is WeightFormat.fp32 else Arithmetic.bf16


def product(weights: Weights, tokens: float, plan: PlanConfig, arithmetic: Arithmetic, split: bool = True) -> Work:
    """Return the work of reading weights once and multiplying them with every token."""
    size, flops = weights.bytes(plan.weights), 2 * tokens * weights.total
    return Work(size, flops, arithmetic=arithmetic) if split else Work(0, 0, size, flops, arithmetic)


def attended_keys(shape: ShapeConfig, kind: str, context: int) -> int:
    """Return the number of keys that one query of a layer attends to after `context` tokens, including its own."""
    local = min(context + 1, shape.sliding_window)
    if kind == "csa":
        return local + min(context // shape.csa_rate, shape.index_topk)
    return local + (context // shape.hca_rate if kind == "hca" else 0)


def cache_work(shape: ShapeConfig, kind: str, per_row: int, plan: PlanConfig) -> Work:
    """Return the work of attention over cached keys in one layer, for R rows of S queries.

    The queries of a row share the window and the HCA entries. With CSA each query chooses its own entries, at most all.
    """
    local = min(plan.context, shape.sliding_window + per_row - 1)
    chosen = attended_keys(shape, kind, plan.context) - attended_keys(shape, "sliding", plan.context)
    if kind == "csa":
        chosen = min(per_row * chosen, plan.context // shape.csa_rate)
    read = (local + chosen) * key_bytes(shape, plan.cache, shape.head_dim)
    per_key = 4 * shape.num_attention_heads * shape.head_dim  # scores, and the sum over the same keys as values
    flops = plan.batch * per_row * attended_keys(shape, kind, plan.context) * per_key
    return Work(split_flops=flops, whole_bytes=plan.batch * read, arithmetic=plain_arithmetic(plan.weights))


def indexer_work(shape: ShapeConfig, per_row: int, plan: PlanConfig) -> Work:
    """Return the work of scoring every compressed entry with the CSA indexer; each row reads them once."""
    entries = plan.context // shape.csa_rate
    read = entries * key_bytes(shape, plan.cache, shape.index_head_dim)
    flops = plan.batch * per_row * entries * 2 * shape.index_heads * shape.index_head_dim
    return Work(whole_bytes=plan.batch * read, whole_flops=flops, arithmetic=matrix_arithmetic(plan.weights))


def layer_pass(shape: ShapeConfig, kind: str, per_row: int, plan: PlanConfig) -> Pass:
    """Return the work of one decoder layer over S new tokens of every row."""
    tokens = plan.batch * per_row
    matrix, plain = matrix_arithmetic(plan.weights), plain_arithmetic(plan.weights)
    one, touched = expert_weights(shape), expected_experts(shape, tokens)
    experts = Work(
        split_bytes=touched * Weights(expert=one).bytes(plan.weights),
        split_flops=2 * tokens * shape.experts_per_token * one,
        arithmetic=matrix,
    )
    streams = STREAM_VISITS * tokens * shape.hc_mult * shape.hidden_size * STREAM_BYTES
    connections = product(connection_weights(shape), tokens, plan, Arithmetic.fp32, split=False).times(2)
    parts = {
        "attention": product(attention_weights(shape), tokens, plan, matrix),
        "cache": cache_work(shape, kind, per_row, plan),
        "router": product(layer_parts(shape, kind)["router"], tokens, plan, plain, split=False),
        "routed experts": experts,
        "shared expert": product(Weights(matrix=one), tokens, plan, matrix),
        "hyper-connections": connections + Work(whole_bytes=streams, arithmetic=Arithmetic.fp32),
    }
    if kind != "sliding":
        parts["compression"] = product(compression_weights(shape, kind), tokens, plan, plain, split=False)
    if kind == "csa":
        parts["indexer"] = indexer_work(shape, per_row, plan)
    return parts


def head_pass(shape: ShapeConfig, tokens: int, plan: PlanConfig) -> Pass:
    """Return the work from streams to logits for `tokens` tokens."""
    return {
        "hyper-connections": product(collapse_weights(shape), tokens, plan, Arithmetic.fp32, split=False),
        "lm_head": product(head_weights(shape), tokens, plan, plain_arithmetic(plan.weights)),
    }


def backbone_pass(shape: ShapeConfig, per_row: int, plan: PlanConfig) -> Pass:
    """Return the work of one backbone pass over S new tokens of every row, with logits for each token."""
    layers = [
        {name: work.times(count) for name, work in layer_pass(shape, kind, per_row, plan).items()}
        for kind, count in Counter(shape.layer_types).items()
    ]
    return add_passes(*layers, head_pass(shape, plan.batch * per_row, plan))


def module_pass(shape: ShapeConfig, per_row: int, plan: PlanConfig) -> Pass:
    """Return the work of one pass of an MTP module over S slots of every row, with logits for the last slot only."""
    width, tokens = shape.hidden_size, plan.batch * per_row
    matrix = matrix_arithmetic(plan.weights)
    half = Weights(matrix=width * width, strict=width)
    combine = product(half, tokens, plan, matrix) + product(half, tokens * shape.hc_mult, plan, matrix)
    return add_passes(
        {"combine": combine}, layer_pass(shape, "sliding", per_row, plan), head_pass(shape, plan.batch, plan)
    )

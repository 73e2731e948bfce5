"""Triton for the softmax of a sampling policy, a program a row.

Top-k and top-p need no sort. For probabilities p >= 0 the bits of an fp32 are an integer that grows with it, so the
smallest kept probability is found bit by bit: it is the largest t for which the tokens with p >= t are k, or weigh
top_p. Each bit reads the row once more, out of the cache; a plain softmax reads it twice in all. Masses are summed in
whole units of 2^-52, as the reference does; the softmax itself differs from torch's in the last bits of fp32.

V vocabulary.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import MODELS, Launch
from .reference import GRID

BLOCK = 2048  # tokens of a row at once; not measured on a GPU
OPTIONS = {"num_warps": 8, "enable_fp_fusion": False}
UNIT, UNITS_OF_ONE = tl.constexpr(GRID), tl.constexpr(1 / GRID)


@triton.jit
def whole_units(x):
    """Whole units of 2^-52 in probabilities, int64."""
    return (x.to(tl.float64) * UNITS_OF_ONE).to(tl.int64)


@triton.jit
def _policy_kernel(
    logits_ptr,
    out_ptr,
    vocabulary,
    temperature,
    top_k,
    top_p_units,
    GREEDY: tl.constexpr,
    TOP_K: tl.constexpr,
    TOP_P: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """`policy_probabilities_reference` of one row."""
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * vocabulary
    out_ptr += row * vocabulary
    peak, top, total = float("-inf"), 0, 0.0
    for start in range(0, vocabulary, BLOCK):
        place = start + tl.arange(0, BLOCK)
        z = tl.load(logits_ptr + place, mask=place < vocabulary, other=float("-inf")).to(tl.float32)
        block_peak, block_top = tl.max(z, 0, return_indices=True)
        higher = block_peak > peak
        top = tl.where(higher, start + block_top, top)
        new_peak = tl.where(higher, block_peak, peak)
        if not GREEDY:
            x = tl.where(z > float("-inf"), z - new_peak, float("-inf"))
            lift = tl.where(peak > float("-inf"), peak - new_peak, 0.0)
            total = total * tl.exp(tl.div_rn(lift, temperature)) + tl.sum(tl.exp(_divided(x, temperature, BLOCK)))
        peak = new_peak
    for start in range(0, vocabulary, BLOCK):
        place = start + tl.arange(0, BLOCK)
        inside = place < vocabulary
        if GREEDY:
            p = tl.where(place == top, 1.0, 0.0)
        else:
            z = tl.load(logits_ptr + place, mask=inside, other=float("-inf")).to(tl.float32)
            p = tl.exp(_divided(z - peak, temperature, BLOCK))
            p = tl.div_rn(p, tl.zeros([BLOCK], tl.float32) + total)
        tl.store(out_ptr + place, p, mask=inside)
    if TOP_K:
        _keep_likeliest(out_ptr, vocabulary, top_k, False, BLOCK)
    if TOP_P:
        _keep_likeliest(out_ptr, vocabulary, top_p_units, True, BLOCK)


@triton.jit
def _divided(x, temperature, BLOCK: tl.constexpr):
    return tl.div_rn(x, tl.zeros([BLOCK], tl.float32) + temperature)


@triton.jit
def _size(p, MASS: tl.constexpr):
    """What a token counts towards the limit: 1 for top-k, its units for top-p."""
    return whole_units(p) if MASS else tl.where(p >= 0, 1, 0).to(tl.int64)


@triton.jit
def _keep_likeliest(p_ptr, vocabulary, limit, MASS: tl.constexpr, BLOCK: tl.constexpr):
    """Cut one row, in place, to the fewest likeliest tokens that reach the limit, lower ids first; rows sum to 1."""
    tl.debug_barrier()  # the row was written by other threads
    smallest = 0  # kept probability, as bits
    for step in range(31):
        candidate = smallest | (1 << (30 - step))
        reached = tl.zeros([], tl.int64)
        for start in range(0, vocabulary, BLOCK):
            place = start + tl.arange(0, BLOCK)
            p = tl.load(p_ptr + place, mask=place < vocabulary, other=-1.0)
            reached += tl.sum(tl.where(p.to(tl.int32, bitcast=True) >= candidate, _size(p, MASS), 0))
        smallest = tl.where(reached >= limit, candidate, smallest)
    before = tl.zeros([], tl.int64)  # what the tokens above the smallest count
    for start in range(0, vocabulary, BLOCK):
        place = start + tl.arange(0, BLOCK)
        p = tl.load(p_ptr + place, mask=place < vocabulary, other=-1.0)
        before += tl.sum(tl.where(p.to(tl.int32, bitcast=True) > smallest, _size(p, MASS), 0))
    total = 0.0
    for start in range(0, vocabulary, BLOCK):
        place = start + tl.arange(0, BLOCK)
        inside = place < vocabulary
        p = tl.load(p_ptr + place, mask=inside, other=-1.0)
        bits = p.to(tl.int32, bitcast=True)
        tie = tl.where(bits == smallest, _size(p, MASS), 0)
        through = before + tl.cumsum(tie, 0)  # up to and with this one
        kept = (bits > smallest) | ((bits == smallest) & (through - tie < limit))
        before += tl.sum(tie)
        p = tl.where(kept, p, 0.0)
        total += tl.sum(p)
        tl.store(p_ptr + place, p, mask=inside)
    tl.debug_barrier()
    for start in range(0, vocabulary, BLOCK):
        place = start + tl.arange(0, BLOCK)
        inside = place < vocabulary
        p = tl.load(p_ptr + place, mask=inside, other=0.0)
        tl.store(p_ptr + place, tl.div_rn(p, tl.zeros([BLOCK], tl.float32) + total), mask=inside)


def policy_probabilities_triton(
    logits_BKV: Tensor, temperature: float, top_k: int | None = None, top_p: float = 1.0
) -> Tensor:
    """`policy_probabilities_reference` of fp32, bf16 or fp16 logits, in one launch."""
    logits_BKV = logits_BKV.contiguous()
    vocabulary = logits_BKV.shape[-1]
    out_BKV = torch.empty_like(logits_BKV, dtype=torch.float32)
    if out_BKV.numel():
        sampled = temperature != 0
        _policy_kernel[(out_BKV.numel() // vocabulary,)](
            logits_BKV,
            out_BKV,
            vocabulary,
            float(temperature),
            top_k or 0,
            math.ceil(top_p / GRID),
            GREEDY=not sampled,
            TOP_K=sampled and top_k is not None and top_k < vocabulary,
            TOP_P=sampled and top_p < 1,
            BLOCK=BLOCK,
            **OPTIONS,
        )
    return out_BKV


def launches() -> list[Launch]:
    """What is compiled ahead of time: at the vocabulary that V4-Flash and V4-Pro share."""
    (vocabulary,) = {shapes.vocabulary for shapes in MODELS.values()}
    arguments = {"logits_ptr": "*fp32:16", "out_ptr": "*fp32:16", "temperature": "fp32", "top_k": "i32"}
    arguments |= {"top_p_units": "i64", "vocabulary": "i32:16" if vocabulary % 16 == 0 else "i32"}
    return [
        Launch(
            kernel=_policy_kernel,
            label=label,
            arguments=arguments,
            constants={"GREEDY": False, "TOP_K": is_cut, "TOP_P": is_cut, "BLOCK": BLOCK},
            options=OPTIONS,
        )
        for label, is_cut in (("softmax", False), ("top-k and top-p", True))
    ]

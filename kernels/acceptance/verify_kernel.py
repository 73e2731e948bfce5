"""The Triton function of a verification; a program takes one text.

It decides how much of a draft is kept, adds up the residual after it one block of the vocabulary at a time, and
searches for the next token in a single block. Given the probabilities, which differ from torch's in the last bits of
fp32, it equals the definition bit by bit: it computes in float64 without fused multiply-add, and sums whole units of
2^-52, so the order of additions does not matter.

B rows, K drafted tokens, L = K + 1 verified positions, V vocabulary, R row distributions of a text.
"""

import triton
import triton.language as tl

from .distribution_kernel import NUMBERS, UNIT, probability, whole_units


@triton.jit
def _pair(
    draft_ptr,
    draft_logits_ptr,
    logits_ptr,
    distribution_ptr,
    row,
    k,
    ids,
    drafted,
    length,
    vocabulary,
    temperature,
    TOP_K: tl.constexpr,
    TOP_P: tl.constexpr,
):
    """Return the probabilities p and q of some tokens after k kept ones, float64; q is 0 where nothing was drafted."""
    num_distributions = length
    if draft_logits_ptr is None:
        token = tl.load(draft_ptr + row * (length - 1) + k, mask=k < drafted, other=-1)
        q = tl.where(ids == token, 1.0, 0.0)
    else:
        num_distributions = 2 * length - 1
        known = tl.where(k < drafted, vocabulary, 0)  # no logit is read where nothing was drafted
        row_ptr = draft_logits_ptr + (row * (length - 1) + k) * vocabulary
        q = probability(
            row_ptr, distribution_ptr + (row * num_distributions + k) * NUMBERS, ids, known, temperature, TOP_K, TOP_P
        )
        q = tl.where(ids < known, q, 0.0)
    distribution_ptr += (row * num_distributions + num_distributions - length + k) * NUMBERS
    row_ptr = logits_ptr + (row * length + k) * vocabulary
    p = probability(row_ptr, distribution_ptr, ids, vocabulary, temperature, TOP_K, TOP_P)
    return p.to(tl.float64), q.to(tl.float64)


@triton.jit
def _residual_units(
    draft_ptr,
    draft_logits_ptr,
    logits_ptr,
    distribution_ptr,
    row,
    k,
    weight,
    drafted,
    length,
    vocabulary,
    temperature,
    TOP_K: tl.constexpr,
    TOP_P: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Return the units of max(w p - q, 0) after k kept tokens in every block of the vocabulary, int64 [BLOCKS]."""
    blocks = tl.arange(0, BLOCKS)
    units = tl.zeros([BLOCKS], tl.int64)
    for start in range(0, vocabulary, BLOCK):
        ids = start + tl.arange(0, BLOCK)
        p, q = _pair(
            draft_ptr, draft_logits_ptr, logits_ptr, distribution_ptr, row, k, ids, drafted, length, vocabulary,
            temperature, TOP_K, TOP_P,
        )  # fmt: skip
        units += tl.where(blocks == start // BLOCK, tl.sum(whole_units(tl.maximum(weight * p - q, 0.0))), 0)
    return units


@triton.jit
def verify_kernel(
    draft_ptr,  # [B, K]
    drafted_ptr,  # [B]
    draft_logits_ptr,  # [B, K, V]; None if every draft was certain
    logits_ptr,  # [B, L, V]
    distribution_ptr,  # [B, R, NUMBERS]
    u_ptr,  # [B, L]
    accepted_ptr,  # [B]
    tokens_ptr,  # [B, L]
    probability_ptr,  # [B, L]
    length,
    vocabulary,
    temperature,
    BY_BLOCK: tl.constexpr,
    TOP_K: tl.constexpr,
    TOP_P: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write how much of its draft one text keeps, the tokens with the next one, and their probabilities."""
    row = tl.program_id(0).to(tl.int64)
    drafted = tl.load(drafted_ptr + row)
    accepted, going = 0, 1
    weight = tl.full([], 1.0, tl.float64)
    weight_here = tl.full([], 1.0, tl.float64)  # w after the kept tokens
    for k in range(length - 1):
        token = tl.load(draft_ptr + row * (length - 1) + k)
        p, q = _pair(
            draft_ptr, draft_logits_ptr, logits_ptr, distribution_ptr, row, k, token + tl.arange(0, 1), drafted, length,
            vocabulary, temperature, TOP_K, TOP_P,
        )  # fmt: skip
        p, q = tl.sum(p), tl.sum(q)
        tl.store(tokens_ptr + row * length + k, token)
        tl.store(probability_ptr + row * length + k, p.to(tl.float32))
        ratio = tl.where(q > 0, p / tl.where(q > 0, q, 1.0), 0.0)
        u = tl.load(u_ptr + row * length + k)
        if BY_BLOCK:
            weight = tl.minimum(weight * ratio, 1.0)
            units = _residual_units(
                draft_ptr, draft_logits_ptr, logits_ptr, distribution_ptr, row, k + 1, weight, drafted, length,
                vocabulary, temperature, TOP_K, TOP_P, BLOCKS, BLOCK,
            )  # fmt: skip
            mass = tl.sum(units).to(tl.float64) * UNIT
            success = (mass > 0) & (u < mass / tl.where(mass > 0, mass + 1.0 - weight, 1.0))
            accepted = tl.where(success, k + 1, accepted)
            weight_here = tl.where(success, weight, weight_here)
        else:
            going = tl.where(u < tl.minimum(ratio, 1.0), going, 0)
            accepted += going
    units = _residual_units(
        draft_ptr, draft_logits_ptr, logits_ptr, distribution_ptr, row, accepted, weight_here, drafted, length,
        vocabulary, temperature, TOP_K, TOP_P, BLOCKS, BLOCK,
    )  # fmt: skip
    if tl.sum(units) == 0:  # a residual of 0 has probability 0 but for rounding, and then p and q are equal
        weight_here = tl.full([], 1.0, tl.float64)
        drafted = tl.zeros_like(drafted)  # p alone remains
        units = _residual_units(
            draft_ptr, draft_logits_ptr, logits_ptr, distribution_ptr, row, accepted, weight_here, drafted, length,
            vocabulary, temperature, TOP_K, TOP_P, BLOCKS, BLOCK,
        )  # fmt: skip
    threshold = tl.load(u_ptr + row * length + length - 1) * tl.sum(units).to(tl.float64)
    # The first block that goes beyond the threshold, and in it the first token.
    block = tl.sum(tl.where(tl.cumsum(units, 0).to(tl.float64) > threshold, 0, 1))
    before = tl.sum(tl.where(tl.arange(0, BLOCKS) < block, units, 0))
    ids = block * BLOCK + tl.arange(0, BLOCK)
    p, q = _pair(
        draft_ptr, draft_logits_ptr, logits_ptr, distribution_ptr, row, accepted, ids, drafted, length, vocabulary,
        temperature, TOP_K, TOP_P,
    )  # fmt: skip
    through = before + tl.cumsum(whole_units(tl.maximum(weight_here * p - q, 0.0)), 0)
    token = block * BLOCK + tl.sum(tl.where(through.to(tl.float64) > threshold, 0, 1))
    p = tl.sum(tl.where(ids == token, p, 0.0)).to(tl.float32)
    tl.store(accepted_ptr + row, accepted)
    tokens_ptr += row * length
    probability_ptr += row * length
    tl.store(tokens_ptr + length - 1, token)  # the position that no draft fills
    tl.store(probability_ptr + length - 1, p)
    tl.store(tokens_ptr + accepted, token)
    tl.store(probability_ptr + accepted, p)

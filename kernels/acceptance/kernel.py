"""Triton for `acceptance`: draws, policies, and here verification and sampling.

Verification is two launches. The first adds up the residual of every position, a program a block of the vocabulary; the
second is a program a row: it decides what is kept from those sums, and looks for the token in one block alone. Both
equal the reference bit by bit: float64 without fused multiply-add, and sums of whole units of 2^-52, which no order of
adding can change.

B rows, K drafted tokens, L = K + 1 verified positions, V vocabulary.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import MODELS, Launch
from . import draws_kernel, policy_kernel
from .policy_kernel import UNIT, whole_units
from .reference import Verification, Verified

BLOCK = 2048  # tokens of a row at once; not measured on a GPU
OPTIONS = {"num_warps": 8, "enable_fp_fusion": False}  # fused, w p - q would be rounded once instead of twice


@triton.jit
def _token_ratio(draft_ptr, q_ptr, p_ptr, row, k, num_draft, vocabulary):
    """Ratio p / q of drafted token k + 1 of a row, 0 where q is 0; float64."""
    token = tl.load(draft_ptr + row * num_draft + k)
    q = tl.load(q_ptr + (row * num_draft + k) * vocabulary + token).to(tl.float64)
    p = tl.load(p_ptr + (row * (num_draft + 1) + k) * vocabulary + token).to(tl.float64)
    return tl.where(q > 0, p / tl.where(q > 0, q, 1.0), 0.0)


@triton.jit
def _residual_units(q_ptr, p_ptr, weight, row, k, num_draft, vocabulary, is_drafted, place):
    """max(w p - q, 0) after k kept tokens of a row, in units; q is 0 where nothing is drafted after them."""
    p_ptr += (row * (num_draft + 1) + k) * vocabulary
    q_ptr += (row * num_draft + k) * vocabulary
    p = tl.load(p_ptr + place, mask=place < vocabulary, other=0.0).to(tl.float64)
    q = tl.load(q_ptr + place, mask=place < tl.where(is_drafted, vocabulary, 0), other=0.0).to(tl.float64)
    return whole_units(tl.maximum(weight * p - q, 0.0))


@triton.jit
def _residual_kernel(
    draft_ptr, q_ptr, p_ptr, units_ptr, num_draft, vocabulary, num_blocks, BY_BLOCK: tl.constexpr, BLOCK: tl.constexpr
):
    """Units of the residual in one block of the vocabulary, [B, L, blocks]."""
    place = tl.program_id(0).to(tl.int64)
    row, k = place // (num_draft + 1), place % (num_draft + 1)
    weight = tl.full([], 1.0, tl.float64)
    if BY_BLOCK:
        for i in range(k):
            weight = tl.minimum(weight * _token_ratio(draft_ptr, q_ptr, p_ptr, row, i, num_draft, vocabulary), 1.0)
    block = tl.program_id(1)
    tokens = block * BLOCK + tl.arange(0, BLOCK)
    units = _residual_units(q_ptr, p_ptr, weight, row, k, num_draft, vocabulary, k < num_draft, tokens)
    tl.store(units_ptr + place * num_blocks + block, tl.sum(units))


@triton.jit
def _verify_kernel(
    draft_ptr,
    q_ptr,
    p_ptr,
    u_ptr,
    units_ptr,
    accepted_ptr,
    token_ptr,
    num_draft,
    vocabulary,
    num_blocks,
    BY_BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """How much of one row is kept, and the token after it."""
    row = tl.program_id(0).to(tl.int64)
    blocks = tl.arange(0, BLOCKS)
    length = num_draft + 1
    accepted = 0
    going = 1
    weight = tl.full([], 1.0, tl.float64)
    weight_here = tl.full([], 1.0, tl.float64)  # w after the kept tokens
    for k in range(num_draft):
        ratio = _token_ratio(draft_ptr, q_ptr, p_ptr, row, k, num_draft, vocabulary)
        u = tl.load(u_ptr + row * length + k)
        if BY_BLOCK:
            weight = tl.minimum(weight * ratio, 1.0)
            found = tl.load(units_ptr + (row * length + k + 1) * num_blocks + blocks, mask=blocks < num_blocks, other=0)
            mass = tl.sum(found).to(tl.float64) * UNIT
            divisor = mass + 1.0 - weight
            hit = (mass > 0) & (u < mass / tl.where(mass > 0, divisor, 1.0))
            accepted = tl.where(hit, k + 1, accepted)
            weight_here = tl.where(hit, weight, weight_here)
        else:
            going = tl.where(u < tl.minimum(ratio, 1.0), going, 0)
            accepted += going
    units = tl.load(units_ptr + (row * length + accepted) * num_blocks + blocks, mask=blocks < num_blocks, other=0)
    drafted = num_draft
    if tl.sum(units) == 0:  # a residual of 0 has probability 0 but for rounding, and then p and q are equal
        weight_here = tl.full([], 1.0, tl.float64)
        drafted = 0  # takes p alone
        for block in range(num_blocks):
            place = block * BLOCK + tl.arange(0, BLOCK)
            p = tl.load(p_ptr + (row * length + accepted) * vocabulary + place, mask=place < vocabulary, other=0.0)
            units = tl.where(blocks == block, tl.sum(whole_units(p)), units)
    total = tl.sum(units).to(tl.float64)
    threshold = tl.load(u_ptr + row * length + num_draft) * total
    through = tl.cumsum(units, 0)
    # The first block that goes beyond the threshold, and in it the first token.
    block = tl.sum(tl.where(through.to(tl.float64) > threshold, 0, 1))
    before = tl.sum(tl.where(blocks < block, units, 0))
    place = block * BLOCK + tl.arange(0, BLOCK)
    units = _residual_units(q_ptr, p_ptr, weight_here, row, accepted, num_draft, vocabulary, accepted < drafted, place)
    through = before + tl.cumsum(units, 0)
    token = block * BLOCK + tl.sum(tl.where(through.to(tl.float64) > threshold, 0, 1))
    tl.store(accepted_ptr + row, accepted)
    tl.store(token_ptr + row, token)


def verify_draft_triton(
    draft_BK: Tensor, q_BKV: Tensor, p_BLV: Tensor, u_BL: Tensor, verification: Verification
) -> Verified:
    """`verify_draft_reference`, bit for bit, in two launches."""
    draft_BK, q_BKV, p_BLV, u_BL = (x.contiguous() for x in (draft_BK, q_BKV, p_BLV, u_BL))
    rows, length, vocabulary = p_BLV.shape
    num_blocks = triton.cdiv(vocabulary, BLOCK)
    units = torch.empty(rows, length, num_blocks, dtype=torch.int64, device=p_BLV.device)
    accepted_B, token_B = torch.empty_like(units[:, 0, 0]), torch.empty_like(units[:, 0, 0])
    if rows:
        settings = {"BY_BLOCK": verification is Verification.block, "BLOCK": BLOCK, **OPTIONS}
        sizes = (length - 1, vocabulary, num_blocks)
        _residual_kernel[(rows * length, num_blocks)](draft_BK, q_BKV, p_BLV, units, *sizes, **settings)
        _verify_kernel[(rows,)](
            draft_BK,
            q_BKV,
            p_BLV,
            u_BL,
            units,
            accepted_B,
            token_B,
            *sizes,
            BLOCKS=triton.next_power_of_2(num_blocks),
            **settings,
        )
    return Verified(accepted_B, token_B)


def sample_tokens_triton(weight_BV: Tensor, u_B: Tensor) -> Tensor:
    """`sample_tokens_reference`, bit for bit: the token after a draft of nothing."""
    draft_B0 = torch.empty(len(u_B), 0, dtype=torch.int64, device=u_B.device)
    q_B0V = weight_BV[:, None][:, :0]
    return verify_draft_triton(draft_B0, q_B0V, weight_BV[:, None], u_B[:, None], Verification.token).token_B


def launches() -> list[Launch]:
    """What is compiled ahead of time: at the vocabulary that V4-Flash and V4-Pro share."""
    (vocabulary,) = {shapes.vocabulary for shapes in MODELS.values()}
    common = {"draft_ptr": "*i64:16", "q_ptr": "*fp32:16", "p_ptr": "*fp32:16", "units_ptr": "*i64:16"}
    common |= {"num_draft": "i32", "num_blocks": "i32", "vocabulary": "i32:16" if vocabulary % 16 == 0 else "i32"}
    ends = {"u_ptr": "*fp64:16", "accepted_ptr": "*i64:16", "token_ptr": "*i64:16"}
    blocks = {"BLOCKS": triton.next_power_of_2(triton.cdiv(vocabulary, BLOCK))}
    return [
        *draws_kernel.launches(),
        *policy_kernel.launches(),
        *(
            Launch(
                kernel=kernel,
                label=way.value,
                arguments=common | more_arguments,
                constants={"BY_BLOCK": way is Verification.block, "BLOCK": BLOCK, **more_constants},
                options=OPTIONS,
            )
            for way in Verification
            for kernel, more_arguments, more_constants in ((_residual_kernel, {}, {}), (_verify_kernel, ends, blocks))
        ),
    ]

"""Triton for `acceptance`.

Draws, verification and sampling equal their references bit by bit: integers, float64 without fused multiply-add, and
sums of whole units of 2^-52, which no order of adding can change. The softmax of a policy differs from torch's in the
last bits of fp32.

Verification is two launches. The first adds up the residual of every position, a program a block of the vocabulary; the
second is a program a row: it decides what is kept from those sums, and looks for the token in one block alone.

Top-k and top-p need no sort. For probabilities p >= 0 the bits of an fp32 are an integer that grows with it, so the
smallest kept probability is found bit by bit: it is the largest t for which the tokens with p >= t are k, or weigh
top_p. Each bit reads the row once more, out of the cache; a plain softmax reads it twice in all.

B rows, K drafted tokens, L = K + 1 verified positions, V vocabulary, N draws a row.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from mtptrain.kernels.acceptance.draws import KEY_STEPS, MULTIPLIERS, ROUNDS, Stream
from mtptrain.kernels.acceptance.reference import GRID, Verification, Verified
from mtptrain.kernels.launch import MODELS, Launch

BLOCK = 2048  # tokens of a row at once; not measured on a GPU
DRAWS_BLOCK = 256  # draws a program; not measured on a GPU
OPTIONS = {"num_warps": 8, "enable_fp_fusion": False}  # fused, w p - q would be rounded once instead of twice
_CIPHER = {
    "M0": MULTIPLIERS[0],
    "M1": MULTIPLIERS[1],
    "STEP0": KEY_STEPS[0],
    "STEP1": KEY_STEPS[1],
    "ROUNDS": ROUNDS,
}


@triton.jit
def _uniforms_kernel(
    seed_ptr,
    position_ptr,
    out_ptr,
    stream,
    num_draws,
    total,
    M0: tl.constexpr,
    M1: tl.constexpr,
    STEP0: tl.constexpr,
    STEP1: tl.constexpr,
    ROUNDS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Draw number `place % num_draws` of row `place // num_draws`, BLOCK of them a program."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < total
    row = place // num_draws
    seed = tl.load(seed_ptr + row, mask=inside, other=0)
    position = tl.load(position_ptr + row, mask=inside, other=0)
    c0, c1 = position.to(tl.uint32), (position >> 32).to(tl.uint32)
    c2, c3 = (place % num_draws).to(tl.uint32), tl.full([BLOCK], stream, tl.uint32)
    k0, k1 = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    m0, m1 = tl.full([BLOCK], M0, tl.uint32), tl.full([BLOCK], M1, tl.uint32)
    step0, step1 = tl.full([BLOCK], STEP0, tl.uint32), tl.full([BLOCK], STEP1, tl.uint32)
    for _ in tl.static_range(ROUNDS):
        high0, high1 = tl.umulhi(c0, m0), tl.umulhi(c2, m1)
        low0, low1 = c0 * m0, c2 * m1
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = k0 + step0, k1 + step1
    words = (c0 >> 5).to(tl.int64) * 67108864 + (c1 >> 6).to(tl.int64)
    tl.store(out_ptr + place, words.to(tl.float64) * 1.1102230246251565e-16, mask=inside)


def uniforms_triton(seed_B: Tensor, position_B: Tensor, stream: Stream, num_draws: int) -> Tensor:
    """`uniforms_reference`, bit for bit, in one launch."""
    out_BN = torch.empty(len(seed_B), num_draws, dtype=torch.float64, device=seed_B.device)
    if out_BN.numel():
        _uniforms_kernel[(triton.cdiv(out_BN.numel(), DRAWS_BLOCK),)](
            seed_B.contiguous(),
            position_B.contiguous(),
            out_BN,
            int(stream),
            num_draws,
            out_BN.numel(),
            BLOCK=DRAWS_BLOCK,
            **_CIPHER,
            **OPTIONS,
        )
    return out_BN


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
def _units(x):
    """Whole units of 2^-52 in probabilities, int64."""
    return (x.to(tl.float64) * 4503599627370496.0).to(tl.int64)


@triton.jit
def _size(p, MASS: tl.constexpr):
    """What a token counts towards the limit: 1 for top-k, its units for top-p."""
    return _units(p) if MASS else tl.where(p >= 0, 1, 0).to(tl.int64)


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
    return _units(tl.maximum(weight * p - q, 0.0))


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
            mass = tl.sum(found).to(tl.float64) * 2.220446049250313e-16
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
            units = tl.where(blocks == block, tl.sum(_units(p)), units)
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
    size = "i32:16" if vocabulary % 16 == 0 else "i32"
    draws = {"seed_ptr": "*i64:16", "position_ptr": "*i64:16", "out_ptr": "*fp64:16"}
    draws |= {"stream": "i32", "num_draws": "i32", "total": "i32"}
    policy = {"logits_ptr": "*fp32:16", "out_ptr": "*fp32:16", "vocabulary": size}
    policy |= {"temperature": "fp32", "top_k": "i32", "top_p_units": "i64"}
    common = {"draft_ptr": "*i64:16", "q_ptr": "*fp32:16", "p_ptr": "*fp32:16", "units_ptr": "*i64:16"}
    common |= {"num_draft": "i32", "vocabulary": size, "num_blocks": "i32"}
    verify = {**common, "u_ptr": "*fp64:16", "accepted_ptr": "*i64:16", "token_ptr": "*i64:16"}
    blocks = triton.next_power_of_2(triton.cdiv(vocabulary, BLOCK))

    def launch(kernel, label, arguments, **constants):
        return Launch(kernel=kernel, label=label, arguments=arguments, constants=constants, options=OPTIONS)

    found = [launch(_uniforms_kernel, "", draws, BLOCK=DRAWS_BLOCK, **_CIPHER)]
    for label, cut in (("softmax", False), ("top-k and top-p", True)):
        found.append(launch(_policy_kernel, label, policy, GREEDY=False, TOP_K=cut, TOP_P=cut, BLOCK=BLOCK))
    for way in Verification:
        settings = {"BY_BLOCK": way is Verification.block, "BLOCK": BLOCK}
        found.append(launch(_residual_kernel, way.value, common, **settings))
        found.append(launch(_verify_kernel, way.value, verify, BLOCKS=blocks, **settings))
    return found

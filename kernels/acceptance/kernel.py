"""Triton for `acceptance`: verification, sampling and the distributions of policies, from logits.

Each takes two launches. In the first, a program takes one row of logits of the draft or the target and writes its
distribution as eight numbers (`distribution_kernel.py`). In the second launch of a verification, a program takes one
text (`verify_kernel.py`).

B rows, K drafted tokens, L = K + 1 verified positions, V vocabulary, R row distributions of a text.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..choices import Verification
from ..device import on_its_device
from ..launch import MODELS, Constants, Launch
from . import draws_kernel
from .distribution_kernel import GROUP, NUMBERS, OPTIONS, probability, write_distribution
from .reference import GRID, Emission, Sampling
from .verify_kernel import verify_kernel


@triton.jit
def _row_distributions_kernel(
    draft_logits_ptr,  # [B, K, V]; None if every draft was certain
    logits_ptr,  # [B, L, V]
    distribution_ptr,  # [B, R, NUMBERS]: of the K drafts, if they have logits, then of the L targets
    scratch_ptr,  # [B, R, V]; None without top-k and top-p
    top_ptr,  # [B, L]
    gap_ptr,  # [B, L]
    length,
    vocabulary,
    temperature,
    top_k,
    top_p_units,
    floor,
    TOP_K: tl.constexpr,
    TOP_P: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Write the distribution of one row; for a target also its likeliest token and this one's lead over the next."""
    row, distribution = tl.program_id(0).to(tl.int64), tl.program_id(1)
    position = distribution - tl.num_programs(1) + length  # of the target; negative for a draft
    row_ptr = logits_ptr + (row * length + position) * vocabulary
    if draft_logits_ptr is not None:  # noqa: SIM102  # known when compiling; the next condition is not
        if position < 0:
            row_ptr = draft_logits_ptr + (row * (length - 1) + distribution) * vocabulary
    distribution += row * tl.num_programs(1)
    if TOP_K or TOP_P:
        scratch_ptr += distribution * vocabulary
    top, gap = write_distribution(
        row_ptr,
        distribution_ptr + distribution * NUMBERS,
        scratch_ptr,
        vocabulary,
        temperature,
        top_k,
        top_p_units,
        floor,
        TOP_K,
        TOP_P,
        BLOCK,
        GROUP,
    )
    tl.store(top_ptr + row * length + position, top, mask=position >= 0)
    tl.store(gap_ptr + row * length + position, gap, mask=position >= 0)


@triton.jit
def _probabilities_kernel(
    logits_ptr,  # [rows, V]
    distribution_ptr,  # [rows, NUMBERS]
    out_ptr,  # [rows, V]
    vocabulary,
    temperature,
    TOP_K: tl.constexpr,
    TOP_P: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write the probabilities of one block of a row."""
    row = tl.program_id(0).to(tl.int64)
    ids = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    distribution_ptr += row * NUMBERS
    p = probability(logits_ptr + row * vocabulary, distribution_ptr, ids, vocabulary, temperature, TOP_K, TOP_P)
    tl.store(out_ptr + row * vocabulary + ids, p, mask=ids < vocabulary)


# Tokens of a row at once; not measured on a GPU. A verification has few programs, one for each text: large blocks keep
# more loads in flight in each.
BLOCK = 2048
VERIFY_BLOCK, VERIFY_OPTIONS = 4096, OPTIONS | {"num_warps": 16}


class _RowDistributions(NamedTuple):
    """Results of the first launch, and the constants of the second."""

    distribution: Tensor  # int32 [B, R, NUMBERS]
    top_BL: Tensor  # int64
    gap_BL: Tensor  # float32
    constants: Constants


def _row_distributions(draft_logits_BKV: Tensor | None, logits_BLV: Tensor, sampling: Sampling) -> _RowDistributions:
    rows, length, vocabulary = logits_BLV.shape
    num_distributions = length + (0 if draft_logits_BKV is None else length - 1)
    top_k, top_p = sampling.top_k or vocabulary, sampling.top_p
    constants = {"TOP_K": top_k < vocabulary, "TOP_P": top_p < 1}
    new = logits_BLV.new_empty
    distribution = new(rows, num_distributions, NUMBERS.value, dtype=torch.int32)
    top_BL, gap_BL = new(rows, length, dtype=torch.int64), new(rows, length, dtype=torch.float32)
    is_cut = any(constants.values())
    if distribution.numel():
        _row_distributions_kernel[(rows, num_distributions)](
            draft_logits_BKV,
            logits_BLV,
            distribution,
            new(rows, num_distributions, vocabulary, dtype=torch.float32) if is_cut else None,
            top_BL,
            gap_BL,
            length,
            vocabulary,
            float(sampling.temperature),
            top_k,
            math.ceil(top_p / GRID),
            (1 - top_p) / vocabulary / 2,
            BLOCK=BLOCK,
            GROUP=GROUP,
            **constants,
            **OPTIONS,
        )
    return _RowDistributions(distribution, top_BL, gap_BL, constants)


@on_its_device
def top_tokens_triton(logits_BLV: Tensor) -> tuple[Tensor, Tensor]:
    """Return `top_tokens_reference`, in one launch."""
    _, top_BL, gap_BL, _ = _row_distributions(None, logits_BLV.contiguous(), Sampling(1.0))
    return top_BL, gap_BL


@on_its_device
def policy_probabilities_triton(logits_BLV: Tensor, sampling: Sampling) -> Tensor:
    """Return `policy_probabilities_reference`, in two launches: fp32, bf16 or fp16 logits, a temperature above 0."""
    logits_BLV = logits_BLV.contiguous()
    vocabulary = logits_BLV.shape[-1]
    distribution, _, _, constants = _row_distributions(None, logits_BLV.view(-1, 1, vocabulary), sampling)
    out_BLV = torch.empty_like(logits_BLV, dtype=torch.float32)
    if out_BLV.numel():
        _probabilities_kernel[(out_BLV.numel() // vocabulary, triton.cdiv(vocabulary, BLOCK))](
            logits_BLV,
            distribution,
            out_BLV,
            vocabulary,
            float(sampling.temperature),
            BLOCK=BLOCK,
            **constants,
            **OPTIONS,
        )
    return out_BLV


@on_its_device
def verify_logits_triton(
    draft_BK: Tensor,
    drafted_B: Tensor,
    draft_logits_BKV: Tensor | None,
    logits_BLV: Tensor,
    u_BL: Tensor,
    sampling: Sampling,
    verification: Verification,
) -> Emission:
    """Return `verify_logits_reference` at a temperature above 0, in two launches."""
    draft_BK, drafted_B, logits_BLV, u_BL = (x.contiguous() for x in (draft_BK, drafted_B, logits_BLV, u_BL))
    draft_logits_BKV = None if draft_logits_BKV is None else draft_logits_BKV.contiguous()
    rows, length, vocabulary = logits_BLV.shape
    distribution, _, gap_BL, constants = _row_distributions(draft_logits_BKV, logits_BLV, sampling)
    accepted_B, tokens_BL = torch.empty_like(drafted_B), draft_BK.new_empty(rows, length)
    probability_BL = torch.empty_like(gap_BL)
    if rows:
        verify_kernel[(rows,)](
            draft_BK,
            drafted_B,
            draft_logits_BKV,
            logits_BLV,
            distribution,
            u_BL,
            accepted_B,
            tokens_BL,
            probability_BL,
            length,
            vocabulary,
            float(sampling.temperature),
            BY_BLOCK=verification is Verification.block,
            BLOCKS=triton.next_power_of_2(triton.cdiv(vocabulary, VERIFY_BLOCK)),
            BLOCK=VERIFY_BLOCK,
            **constants,
            **VERIFY_OPTIONS,
        )
    return Emission(accepted_B, tokens_BL, gap_BL, probability_BL)


def launches() -> list[Launch]:
    """Return the launches to compile ahead of time, at the vocabulary that V4-Flash and V4-Pro share."""
    (vocabulary,) = {shapes.vocabulary for shapes in MODELS.values()}
    types = {
        "draft_logits_ptr": "*bf16:16",
        "logits_ptr": "*bf16:16",
        "distribution_ptr": "*i32:16",
        "scratch_ptr": "*fp32:16",
    }
    types |= dict.fromkeys(["top_ptr", "draft_ptr", "drafted_ptr", "accepted_ptr", "tokens_ptr"], "*i64:16")
    types |= dict.fromkeys(["gap_ptr", "probability_ptr", "out_ptr"], "*fp32:16") | {"u_ptr": "*fp64:16"}
    types |= {"length": "i32", "vocabulary": "i32:16" if vocabulary % 16 == 0 else "i32", "temperature": "fp32"}
    types |= {"top_k": "i32", "top_p_units": "i64", "floor": "fp32"}
    blocks = {"BLOCK": VERIFY_BLOCK, "BLOCKS": triton.next_power_of_2(triton.cdiv(vocabulary, VERIFY_BLOCK))}

    def launch(kernel: Any, label: str, is_cut: bool, options: Constants = OPTIONS, **constants: Any) -> Launch:
        constants = {"BLOCK": BLOCK, "GROUP": GROUP, "TOP_K": is_cut, "TOP_P": is_cut, **constants}
        constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
        arguments = {name: types[name] for name in kernel.arg_names if name not in constants}
        return Launch(kernel=kernel, label=label, arguments=arguments, constants=constants, options=options)

    listed = draws_kernel.launches()
    for label, is_cut in (("softmax", False), ("top-k and top-p", True)):
        no_scratch: Constants = {} if is_cut else {"scratch_ptr": None}
        listed.append(launch(_row_distributions_kernel, label, is_cut, **no_scratch))
        listed.append(launch(_probabilities_kernel, label, is_cut))
        for verification in Verification:
            by_block = {"BY_BLOCK": verification is Verification.block}
            listed.append(
                launch(verify_kernel, f"{verification} {label}", is_cut, VERIFY_OPTIONS, **blocks, **by_block)
            )
    # An argument of 1 is compiled as a constant.
    listed.append(launch(_row_distributions_kernel, "top-k of 1 and top-p", True, top_k=1))
    return listed

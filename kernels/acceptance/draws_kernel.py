"""Triton for the draws: Philox in 32-bit integers, bit by bit equal to the reference.

B rows, N draws a row.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..device import on_its_device
from ..launch import Launch
from .draws import KEY_STEPS, MULTIPLIERS, ROUNDS, DrawKind

BLOCK = 256  # draws a program; not measured on a GPU
OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}
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
    kind,
    num_draws,
    total,
    M0: tl.constexpr,
    M1: tl.constexpr,
    STEP0: tl.constexpr,
    STEP1: tl.constexpr,
    ROUNDS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write draw `index % num_draws` of row `index // num_draws`; a program takes BLOCK indices."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < total
    row = index // num_draws
    seed = tl.load(seed_ptr + row, mask=inside, other=0)
    position = tl.load(position_ptr + row, mask=inside, other=0)
    c0, c1 = position.to(tl.uint32), (position >> 32).to(tl.uint32)
    c2, c3 = (index % num_draws).to(tl.uint32), tl.full([BLOCK], kind, tl.uint32)
    k0, k1 = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    m0, m1 = tl.full([BLOCK], M0, tl.uint32), tl.full([BLOCK], M1, tl.uint32)
    step0, step1 = tl.full([BLOCK], STEP0, tl.uint32), tl.full([BLOCK], STEP1, tl.uint32)
    for _ in tl.static_range(ROUNDS):
        high0, high1 = tl.umulhi(c0, m0), tl.umulhi(c2, m1)
        low0, low1 = c0 * m0, c2 * m1
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = k0 + step0, k1 + step1
    words = (c0 >> 5).to(tl.int64) * 67108864 + (c1 >> 6).to(tl.int64)
    tl.store(out_ptr + index, words.to(tl.float64) * 1.1102230246251565e-16, mask=inside)


@on_its_device
def uniforms_triton(seed_B: Tensor, position_B: Tensor, kind: DrawKind, num_draws: int) -> Tensor:
    """Return `uniforms_reference`, bit by bit, in one launch."""
    out_BN = torch.empty(len(seed_B), num_draws, dtype=torch.float64, device=seed_B.device)
    if out_BN.numel():
        _uniforms_kernel[(triton.cdiv(out_BN.numel(), BLOCK),)](
            seed_B.contiguous(),
            position_B.contiguous(),
            out_BN,
            int(kind),
            num_draws,
            out_BN.numel(),
            BLOCK=BLOCK,
            **_CIPHER,
            **OPTIONS,
        )
    return out_BN


def launches() -> list[Launch]:
    """Return the launches to compile ahead of time."""
    arguments = {"seed_ptr": "*i64:16", "position_ptr": "*i64:16", "out_ptr": "*fp64:16"}
    arguments |= {"kind": "i32", "num_draws": "i32", "total": "i32"}
    constants = {"BLOCK": BLOCK, **_CIPHER}
    return [Launch(kernel=_uniforms_kernel, label="", arguments=arguments, constants=constants, options=OPTIONS)]

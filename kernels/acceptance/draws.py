"""Counter-based uniform draws: each draw is a pure function of its row, position and purpose, whatever the batch.

B rows, N draws a row.
"""

from enum import IntEnum

import torch
from torch import Tensor

# Philox 4x32-10: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3", section 3.3 and table 1.
ROUNDS = 10
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
MASK = 0xFFFFFFFF


class DrawKind(IntEnum):
    """The purpose of a draw; draws of different kinds are independent of each other."""

    draft = 0  # draw k chooses drafted token k + 1
    verify = 1  # draw k < K keeps or drops drafted token k + 1, draw K chooses the token after the kept ones


def philox(counter: tuple[Tensor, ...], key: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Return four random words of 32 bits for every counter, exact on every device.

    Args:
        counter: four int64 tensors with values in [0, 2^32), of shapes that broadcast.
        key: two such tensors.

    Returns:
        Four int64 tensors with values in [0, 2^32).

    Source: Philox 4x32-10 of Random123.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        # int64 products wrap, and the arithmetic shift only spoils bits that the mask takes away.
        product_0, product_1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0, c2 = (product_1 >> 32 & MASK) ^ c1 ^ k0, (product_0 >> 32 & MASK) ^ c3 ^ k1
        c1, c3 = product_1 & MASK, product_0 & MASK
        k0, k1 = k0 + KEY_STEPS[0] & MASK, k1 + KEY_STEPS[1] & MASK
    return c0, c1, c2, c3


def uniforms_reference(seed_B: Tensor, position_B: Tensor, kind: DrawKind, num_draws: int) -> Tensor:
    """Return uniform draws in [0, 1) that depend only on the row's seed and position, their kind and their index.

    No two passes of a row may share a position: pass the slot of the last known token. The slot of the drafted token
    will not do, because a slot is drafted again after a rejection and must then get fresh draws.

    Args:
        seed_B: int64, one seed for each row; any value.
        position_B: int64, at least 0.
        kind: the purpose of the draws.
        num_draws: N, draws for each row, at least 0.

    Returns:
        float64 [B, N], multiples of 2^-53: fine enough for the rarest token of a large vocabulary.
    """
    seed_B1, position_B1 = seed_B.unsqueeze(-1), position_B.unsqueeze(-1)
    index_N = torch.arange(num_draws, device=seed_B.device)
    counter = (position_B1 & MASK, position_B1 >> 32 & MASK, index_N, torch.full_like(index_N, int(kind)))
    high_BN, low_BN, _, _ = philox(counter, (seed_B1 & MASK, seed_B1 >> 32 & MASK))
    return ((high_BN >> 5) * 2**26 + (low_BN >> 6)).double() * 2.0**-53

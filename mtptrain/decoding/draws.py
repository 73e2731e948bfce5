"""The random draws of a run: of each, the row's seed, the slot of the last known token and its use decide alone."""

# B rows, E tokens that a row may emit, N draws a token, K drafted tokens, L = K + 1

from __future__ import annotations

import torch
from torch import Tensor

from mtptrain.kernels.acceptance import Stream, uniforms


def row_seed(seed: int, number: int) -> int:
    """Seed of the prompt `number` in a run of seed `seed`: the same whatever prompts are decoded beside it.

    Args:
        seed: at least 0; only its low 31 bits count.
        number: in [0, 2^32).
    """
    return (seed % 2**31 << 32) + number


class Draws:
    """All draws that a run may need, computed at once because many small steps would cost more.

    A row reads its own entry of how many tokens it has emitted, so its draws are those of the slot of its last known
    token.

    Args:
        seeds: one a row.
        lengths: tokens of the prompts.
        max_new_tokens: E.
        draft_length: K.
        device: of the run.
    """

    def __init__(
        self, seeds: list[int], lengths: list[int], max_new_tokens: int, draft_length: int, device: torch.device
    ) -> None:
        slot_BE = torch.tensor(lengths, device=device).unsqueeze(1) - 1 + torch.arange(max_new_tokens, device=device)
        seed_BE = torch.tensor(seeds, device=device).unsqueeze(1).expand_as(slot_BE)
        self.row_B = torch.arange(len(seeds), device=device)
        self.draft_BEK, self.verify_BEL = (
            uniforms(seed_BE.flatten(), slot_BE.flatten(), stream, num).view(*slot_BE.shape, num)
            for stream, num in ((Stream.draft, draft_length), (Stream.verify, draft_length + 1))
        )

    def draft(self, emitted_B: Tensor) -> Tensor:
        """Float64 [B, K], of the drafted tokens after `emitted_B` emitted ones."""
        return self.draft_BEK[self.row_B, self._place(emitted_B)]

    def verify(self, emitted_B: Tensor, drafted: int) -> Tensor:
        """Float64 [B, drafted + 1]: the last, which chooses the verifier's own token, whatever was drafted."""
        u_BL = self.verify_BEL[self.row_B, self._place(emitted_B)]
        return torch.cat([u_BL[:, :drafted], u_BL[:, -1:]], dim=1)

    def _place(self, emitted_B: Tensor) -> Tensor:
        return emitted_B.clamp(max=self.draft_BEK.shape[1] - 1)  # a row that has ended draws for nothing

"""The random draws of a run: each is a function of the row's seed, the slot of the last known token and its use."""

# B rows, E tokens that a row may emit, K drafted tokens, L = K + 1 verified positions

from __future__ import annotations

import torch
from torch import Tensor

from mtptrain.kernels.acceptance import DrawKind, uniforms


def row_seed(seed: int, number: int) -> int:
    """Return the seed of prompt `number` in a run of seed `seed`; it does not depend on the rest of the batch.

    Args:
        seed: at least 0; only its low 31 bits count.
        number: in [0, 2^32).
    """
    return (seed % 2**31 << 32) + number


class Draws:
    """All draws that a run may need, computed at once because many small steps would cost more.

    A row indexes its draws by its number of emitted tokens, that is, by the slot of its last known token.

    Args:
        seeds: one per row.
        lengths: tokens of each prompt.
        max_new_tokens: E.
        draft_length: K.
        device: device of the run.
    """

    def __init__(
        self, seeds: list[int], lengths: list[int], max_new_tokens: int, draft_length: int, device: torch.device
    ) -> None:
        slot_BE = torch.tensor(lengths, device=device).unsqueeze(1) - 1 + torch.arange(max_new_tokens, device=device)
        seed_BE = torch.tensor(seeds, device=device).unsqueeze(1).expand_as(slot_BE)
        self.row_B = torch.arange(len(seeds), device=device)
        self.draft_BEK, self.verify_BEL = (
            uniforms(seed_BE.flatten(), slot_BE.flatten(), use, num).view(*slot_BE.shape, num)
            for use, num in ((DrawKind.draft, draft_length), (DrawKind.verify, draft_length + 1))
        )

    def draft(self, emitted_B: Tensor) -> Tensor:
        """Return the draws of the tokens drafted after `emitted_B` emitted ones, float64 [B, K]."""
        return self.draft_BEK[self.row_B, self._index(emitted_B)]

    def verify(self, emitted_B: Tensor, drafted: int) -> Tensor:
        """Return the draws of a verification, float64 [B, drafted + 1].

        The last draw chooses the verifier's own token, and is the same for every `drafted`.
        """
        u_BL = self.verify_BEL[self.row_B, self._index(emitted_B)]
        return torch.cat([u_BL[:, :drafted], u_BL[:, -1:]], dim=1)

    def _index(self, emitted_B: Tensor) -> Tensor:
        return emitted_B.clamp(
            max=self.draft_BEK.shape[1] - 1
        )  # a row that has ended still draws, and its result is unused

"""A batch of packed rows: what the backbone, the rollout and the losses read."""

# B rows, S tokens a row, N residual streams, D model width

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Batch:
    """Packed rows.

    Attributes:
        tokens_BS: int64 token ids; 0 in padding.
        segment_BS: int64, 1, 2, ... for the pieces of a row, 0 in padding.
        position_BS: int64 position inside the piece.
        loss_mask_BS: bool, which tokens may be targets; None where all may.
        streams_BSND: the backbone's streams of N times D channels, zeros in padding, where they come from a cache.
        source_B: int64, which source of a mixture a row comes from; None where there is one.
    """

    tokens_BS: Tensor
    segment_BS: Tensor
    position_BS: Tensor
    loss_mask_BS: Tensor | None = None
    streams_BSND: Tensor | None = None
    source_B: Tensor | None = None

    def to(self, device: torch.device) -> Batch:
        """The same batch on another device."""
        parts = {name: getattr(self, name) for name in self.__slots__}
        return Batch(**{name: part.to(device) for name, part in parts.items() if part is not None})

    def source_tokens(self, num_sources: int) -> Tensor:
        """Tokens of the rows of each source, padding left out, float64 [num_sources]."""
        sizes_B = (self.segment_BS > 0).sum(1).double()
        source_B = torch.zeros_like(self.segment_BS[:, 0]) if self.source_B is None else self.source_B
        return sizes_B.new_zeros(num_sources).index_add(0, source_B, sizes_B)

    def target_mask(self, step: int) -> Tensor:
        """Anchors whose draft step `step` (1-based) has its target token t_{i+step+1} inside the piece, bool [B, S].

        `step=0` marks the backbone's own targets t_{i+1}. Where only some tokens may be targets, all that the steps up
        to this one draft must be such tokens: a draft whose beginning is somebody else's word is never asked for.
        """
        shift = step + 1
        mask_BS = torch.zeros_like(self.segment_BS, dtype=torch.bool)
        same = self.segment_BS[:, shift:] == self.segment_BS[:, :-shift]
        mask_BS[:, :-shift] = same & (self.segment_BS[:, :-shift] > 0)
        if self.loss_mask_BS is not None:
            for ahead in range(min(2, shift), shift + 1):
                mask_BS &= self.loss_mask_BS.roll(-ahead, dims=1)
        return mask_BS

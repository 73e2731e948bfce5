"""A batch of packed rows, the input of the backbone, the rollout and the losses."""

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
        loss_mask_BS: bool, true for tokens that may be targets; None if all may.
        streams_BSND: the backbone's residual streams, N of D channels each, zeros in padding; None unless cached.
        source_B: int64 index of each row's source in a mixture; None if there is only one source.
    """

    tokens_BS: Tensor
    segment_BS: Tensor
    position_BS: Tensor
    loss_mask_BS: Tensor | None = None
    streams_BSND: Tensor | None = None
    source_B: Tensor | None = None

    def to(self, device: torch.device) -> Batch:
        """Return this batch on another device."""
        parts = {name: getattr(self, name) for name in self.__slots__}
        return Batch(**{name: part.to(device) for name, part in parts.items() if part is not None})

    def source_tokens(self, num_sources: int) -> Tensor:
        """Return the number of tokens from each source without padding, float64 [num_sources]."""
        sizes_B = (self.segment_BS > 0).sum(1).double()
        source_B = torch.zeros_like(self.segment_BS[:, 0]) if self.source_B is None else self.source_B
        return sizes_B.new_zeros(num_sources).index_add(0, source_B, sizes_B)

    def target_mask(self, step: int) -> Tensor:
        """Return the anchors i whose target t_{i+step+1} of draft step `step` is in the same piece, bool [B, S].

        With a `loss_mask_BS`, the targets of all steps up to this one must be allowed: drafts that begin before the
        assistant speaks are masked.

        Args:
            step: 1-based draft step; 0 for the backbone's own targets t_{i+1}.
        """
        shift = step + 1
        mask_BS = torch.zeros_like(self.segment_BS, dtype=torch.bool)
        same = self.segment_BS[:, shift:] == self.segment_BS[:, :-shift]
        mask_BS[:, :-shift] = same & (self.segment_BS[:, :-shift] > 0)
        if self.loss_mask_BS is not None:
            for ahead in range(min(2, shift), shift + 1):
                mask_BS &= self.loss_mask_BS.roll(-ahead, dims=1)
        return mask_BS

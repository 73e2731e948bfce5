"""The index arithmetic of one decode step, computed once and shared by all layers."""

# B rows, S new tokens, R ring slots, Q raw ring slots, M windows that may close in the step, W compressed entries,
# r channel pairs that are rotated

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from mtptrain.backbone.cache import BackboneCache, CompressorState


@dataclass(slots=True, frozen=True)
class WindowPlan:
    """The compressed entries that a step closes, for one compression rate.

    At most M = (S - 1) // rate + 1 windows close, so shapes depend on S only; windows that stay open are written to
    the scratch entry.

    Attributes:
        source: int64 [B * (M + span - 1) * rate] rows of concat(raw ring, new inputs) viewed as [B * (Q + S), F].
        raw_slots: int64 slots of the new inputs in the raw ring.
        target: int64 [B * M] rows of the entries viewed as [B * (W + 1), C].
        first_BM11: bool, true for window 0, which has no window before it.
        rope_BMr: complex64 rotation of each entry, taken at its window's first position.
    """

    source: Tensor
    raw_slots: Tensor
    target: Tensor
    first_BM11: Tensor
    rope_BMr: Tensor

    def to(self, device: torch.device) -> Self:
        """Return the plan on the device of a layer."""
        return type(self)(*(getattr(self, name).to(device) for name in self.__slots__))


@dataclass(slots=True, frozen=True)
class StepPlan:
    """The indices, rotations and masks that all layers of a step share.

    Attributes:
        length_B: int64 positions before the new ones.
        rope_BSr: by rope type, complex64 rotation of the new positions.
        unrope_BSr: its inverse; empty in a plan without masks, whose attention takes the rotation itself.
        ring_slots: int64 slots of the new keys in the sliding rings.
        local_BSL: 0 or -inf for the L = R + S keys concat(ring before the write, new keys); None in a plan without
            masks.
        windows: a `WindowPlan` for each type of compressing layer, by (rate, span).
        visible_BSW: by the same keys, 0 for entries that a query may see and -inf elsewhere; only if a layer reads it.
    """

    length_B: Tensor
    rope_BSr: dict[str, Tensor]
    unrope_BSr: dict[str, Tensor]
    ring_slots: Tensor
    local_BSL: Tensor | None
    windows: dict[tuple[int, int], WindowPlan]
    visible_BSW: dict[tuple[int, int], Tensor]

    def to(self, device: torch.device) -> Self:
        """Return the plan on the device of a layer."""
        return type(self)(
            length_B=self.length_B.to(device),
            rope_BSr={kind: rope.to(device) for kind, rope in self.rope_BSr.items()},
            unrope_BSr={kind: rope.to(device) for kind, rope in self.unrope_BSr.items()},
            ring_slots=self.ring_slots.to(device),
            local_BSL=None if self.local_BSL is None else self.local_BSL.to(device),
            windows={kind: plan.to(device) for kind, plan in self.windows.items()},
            visible_BSW={kind: mask.to(device) for kind, mask in self.visible_BSW.items()},
        )


def plan_step(cache: BackboneCache, num_tokens: int, dtype: torch.dtype, has_masks: bool) -> StepPlan:
    """Return the plan for decoding `num_tokens` new tokens in every row.

    Args:
        cache: state of the rows.
        num_tokens: S, at least 1.
        dtype: dtype of the masks.
        has_masks: whether attention reads masks. Attention that derives visibility from positions needs none, and only
            indexers do.
    """
    length_B = cache.length_B
    positions_BS = length_B.unsqueeze(1) + torch.arange(num_tokens, device=length_B.device)
    rope_BSr = {kind: table_Pr[positions_BS] for kind, table_Pr in cache.rope_Pr.items()}
    ring = cache.layers[0].ring
    windows: dict[tuple[int, int], WindowPlan] = {}
    visible_BSW: dict[tuple[int, int], Tensor] = {}
    for layer in cache.layers:
        state = layer.compressor
        if state is not None and (state.rate, state.span) not in windows:
            windows[state.rate, state.span] = _plan_windows(cache, state, positions_BS)
            if has_masks or layer.indexer is not None:
                visible_BSW[state.rate, state.span] = _entry_mask(cache, state.rate, positions_BS, dtype)
    return StepPlan(
        length_B=length_B,
        rope_BSr=rope_BSr,
        unrope_BSr={kind: rope.conj_physical() for kind, rope in rope_BSr.items() if has_masks},
        ring_slots=ring.slots(positions_BS),
        local_BSL=_local_mask(ring.positions(length_B), positions_BS, cache.window, dtype) if has_masks else None,
        windows=windows,
        visible_BSW=visible_BSW,
    )


def _local_mask(ring_positions_BR: Tensor, positions_BS: Tensor, window: int, dtype: torch.dtype) -> Tensor:
    """Return 0 if query position t sees key position p, that is 0 <= p and t - window < p <= t; else -inf."""
    key_BL = torch.cat([ring_positions_BR, positions_BS], dim=1)
    age_BSL = positions_BS.unsqueeze(2) - key_BL.unsqueeze(1)
    oldest_BS1 = positions_BS.clamp(max=window - 1).unsqueeze(2)  # an age above the position means an empty slot
    return _bias((age_BSL >= 0) & (age_BSL <= oldest_BS1), dtype)


def _entry_mask(cache: BackboneCache, rate: int, positions_BS: Tensor, dtype: torch.dtype) -> Tensor:
    """Return 0 for entries that a query may see and -inf elsewhere, [B, S, W]."""
    entry_1W = torch.arange(cache.max_length // rate, device=positions_BS.device)
    return _bias(entry_1W < ((positions_BS + 1) // rate).unsqueeze(2), dtype)


def _plan_windows(cache: BackboneCache, state: CompressorState, positions_BS: Tensor) -> WindowPlan:
    rate, span, device = state.rate, state.span, positions_BS.device
    batch, num_tokens = positions_BS.shape
    num_windows, num_entries = (num_tokens - 1) // rate + 1, cache.max_length // rate
    row_B1 = torch.arange(batch, device=device).unsqueeze(1)
    length_B1 = cache.length_B.unsqueeze(1)
    open_B1 = length_B1 // rate
    window_BM = open_B1 + torch.arange(num_windows, device=device)
    closes_BM = (window_BM + 1) * rate <= length_B1 + num_tokens
    entry_BM = torch.where(closes_BM, window_BM, num_entries)

    read = (num_windows + span - 1) * rate
    token_BT = (open_B1 - (span - 1)) * rate + torch.arange(read, device=device)
    # Tokens past the step belong to windows that stay open, so any readable row will do.
    new_BT = (token_BT - length_B1).clamp(max=num_tokens - 1) + state.raw.size
    source_BT = torch.where(token_BT < length_B1, token_BT % state.raw.size, new_BT)

    return WindowPlan(
        source=(source_BT + row_B1 * (state.raw.size + num_tokens)).flatten(),
        raw_slots=state.raw.slots(positions_BS),
        target=(entry_BM + row_B1 * (num_entries + 1)).flatten(),
        first_BM11=(window_BM == 0)[:, :, None, None],
        rope_BMr=cache.rope_Pr["compress"][(window_BM * rate).clamp(max=cache.max_length - 1)],
    )


def _bias(allowed: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill_(~allowed, float("-inf"))

"""A position-indexed cache of static shapes for decoding with DeepSeek-V4; setting `length_B` back rewinds it.

transformers' cache appends to its buffers and drains them, so it cannot take a rejected draft back. Here absolute
positions address every tensor: a position that is decoded again goes to the same slot as before.
"""

# B rows, R ring slots, C channels of a cached vector, F channels of the raw compressor inputs,
# W compressed entries, S tokens of a step, P positions of a table, r channel pairs that are rotated

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor
from transformers import DeepseekV4Config
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4RotaryEmbedding


@dataclass(slots=True)
class SlidingRing:
    """The newest R vectors of every row; slot p % R holds position p.

    Why a rewind of at most `max_step` never misses an overwritten slot when R = reach + max_step, `reach` being the
    number of newest positions (the query's own included) that a reader uses: let n be the highest length ever written
    and m >= n - max_step the length after the rewind. Slots overwritten by n - 1 and below used to hold positions up to
    n - 1 - R <= m - 1 - reach, while a reader at position m or later uses positions above m - reach only. The same
    bound shows that the slots that hold a rejected token, for which `positions(m)` is wrong, are out of reach.
    """

    values_BRC: Tensor

    @classmethod
    def allocate(
        cls, batch: int, size: int, channels: int, dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> Self:
        """Return an empty ring of `size` slots."""
        return cls(torch.zeros(batch, size, channels, dtype=dtype, device=device))

    @property
    def size(self) -> int:
        """Number of slots of a row, R."""
        return self.values_BRC.shape[1]

    def slots(self, positions_BS: Tensor) -> Tensor:
        """Return the slots for `write`, int64 [B * min(S, R)]: rows of the ring viewed as [B * R, C].

        Of more than R consecutive positions, only the last R get a slot. Rings of the same size share the result.
        """
        row_B1 = torch.arange(positions_BS.shape[0], device=positions_BS.device).unsqueeze(1)
        return (positions_BS[:, -self.size :] % self.size + row_B1 * self.size).flatten()

    def write(self, slots: Tensor, values_BSC: Tensor) -> None:
        """Store `values_BSC` at `slots(positions_BS)`."""
        channels = values_BSC.shape[-1]
        kept_BSC = values_BSC[:, -self.size :]
        self.values_BRC.view(-1, channels).index_copy_(0, slots, kept_BSC.reshape(-1, channels))

    def positions(self, length_B: Tensor) -> Tensor:
        """Return the position in each slot once all positions below `length_B` are written; negative: empty slot.

        Returns:
            int64 [B, R]: the largest p < length with p % R == slot. Length 5, R 4 -> [[4, 1, 2, 3]].
        """
        slot_1R = torch.arange(self.size, device=length_B.device).unsqueeze(0)
        last_B1 = length_B.unsqueeze(1) - 1
        return last_B1 - (last_B1 - slot_1R) % self.size

    def to(self, device: torch.device) -> Self:
        """Return the ring on a device."""
        return type(self)(self.values_BRC.to(device))

    def rows(self, part: slice) -> Self:
        """Return a view of some rows; writes to it change this ring."""
        return type(self)(self.values_BRC[part])


@dataclass(slots=True)
class CompressorState:
    """The state of one compressor, or of the indexer of CSA.

    Attributes:
        raw: projected inputs [kv | gate] of the newest tokens. A closing window reads the `span * rate` newest
            positions, so the ring holds `span * rate + max_step` of them.
        entries_BWC: entry w summarises positions [w * rate, (w + 1) * rate) and, with span 2, the window before.
            It is valid once (w + 1) * rate <= length, and is written again when a rewound window closes again. The
            last slot is scratch space for the windows that a step does not close.
        rate: tokens in a window.
        span: windows that an entry reads, 2 for the overlapping windows of CSA and 1 for HCA.
    """

    raw: SlidingRing
    entries_BWC: Tensor
    rate: int
    span: int

    def to(self, device: torch.device) -> Self:
        """Return the state on a device."""
        return type(self)(self.raw.to(device), self.entries_BWC.to(device), self.rate, self.span)

    def rows(self, part: slice) -> Self:
        """Return a view of some rows."""
        return type(self)(self.raw.rows(part), self.entries_BWC[part], self.rate, self.span)

    def tensors(self) -> list[Tensor]:
        """Return the tensors that a step reads and writes."""
        return [self.raw.values_BRC, self.entries_BWC]


@dataclass(slots=True)
class LayerCache:
    """The state of one decoder layer; the compressor is None in a sliding layer, the indexer outside CSA.

    The indexer is also None in a cache too short for it to discard any entry.
    """

    ring: SlidingRing
    compressor: CompressorState | None = None
    indexer: CompressorState | None = None

    @property
    def device(self) -> torch.device:
        """The device of the layer."""
        return self.ring.values_BRC.device

    def to(self, device: torch.device) -> Self:
        """Return the state on a device."""
        return type(self)(
            self.ring.to(device),
            self.compressor and self.compressor.to(device),
            self.indexer and self.indexer.to(device),
        )

    def rows(self, part: slice) -> Self:
        """Return a view of some rows."""
        compressor = self.compressor and self.compressor.rows(part)
        indexer = self.indexer and self.indexer.rows(part)
        return type(self)(self.ring.rows(part), compressor, indexer)

    def tensors(self) -> list[Tensor]:
        """Return the tensors that a step reads and writes."""
        states = [state for state in (self.compressor, self.indexer) if state is not None]
        return [self.ring.values_BRC, *(tensor for state in states for tensor in state.tensors())]


@dataclass(slots=True)
class BackboneCache:
    """All state of a decode step, in static shapes; rows have independent lengths.

    Attributes:
        layers: the state of each decoder layer.
        length_B: int64 positions decoded and kept.
        written_B: int64 highest length ever reached; rewinds are measured from here, because slots overwritten by a
            longer, rejected draft stay overwritten.
        rope_Pr: per rope type (`main`, `compress`) complex64 cos + i sin of every position.
        window: positions that a query sees through the sliding ring, including its own.
        max_length: positions that a row can hold.
        max_step: largest number of positions that a rewind may take back.
    """

    layers: list[LayerCache]
    length_B: Tensor
    written_B: Tensor
    rope_Pr: dict[str, Tensor]
    window: int
    max_length: int
    max_step: int

    @classmethod
    def allocate(
        cls,
        config: DeepseekV4Config,
        batch: int,
        max_length: int,
        max_step: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> Self:
        """Return an empty cache.

        Args:
            config: the backbone's configuration.
            batch: number of rows decoded together, B.
            max_length: most tokens of a row, including prompt and rejected drafts.
            max_step: most tokens of one verify step, K + 1 for K drafts.
            dtype: the backbone's dtype.
            device: the backbone's device.

        Raises:
            ValueError: batch, max_length or max_step is below 1.
        """
        for name, value in (("batch", batch), ("max_length", max_length), ("max_step", max_step)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        return cls(
            layers=[
                _allocate_layer(config, kind, batch, max_length, max_step, dtype, device)
                for kind in config.layer_types or []
            ],
            length_B=torch.zeros(batch, dtype=torch.int64, device=device),
            written_B=torch.zeros(batch, dtype=torch.int64, device=device),
            rope_Pr=rope_tables(config, max_length, dtype, device),
            window=config.sliding_window,
            max_length=max_length,
            max_step=max_step,
        )

    def spread(self, devices: list[torch.device]) -> None:
        """Move the state of every layer to the device of its layer; the lengths and tables stay."""
        self.layers = [layer.to(device) for layer, device in zip(self.layers, devices, strict=True)]

    def tensors(self) -> list[Tensor]:
        """Return the tensors that a step reads and writes."""
        of_layers = [tensor for layer in self.layers for tensor in layer.tensors()]
        return [*of_layers, self.length_B, self.written_B, *self.rope_Pr.values()]

    def require_room(self, num_tokens: int) -> None:
        """Raise a ValueError if a row has no room for `num_tokens` more tokens."""
        longest = int(self.length_B.max())
        if longest + num_tokens > self.max_length:
            raise ValueError(
                f"max_length={self.max_length} leaves no room for {num_tokens} more tokens after {longest}: "
                "allocate a longer cache"
            )

    def advance(self, num_tokens: int) -> None:
        """Add `num_tokens` to the length of every row."""
        self.length_B += num_tokens
        torch.maximum(self.written_B, self.length_B, out=self.written_B)

    def rewind(self, length_B: Tensor) -> None:
        """Forget the positions from `length_B` on, row by row.

        Args:
            length_B: int64 new lengths, 0 <= new <= current, and at most `max_step` below the highest length written.

        Raises:
            ValueError: a length is out of that range; the cache is then unchanged.
        """
        if length_B.shape != self.length_B.shape:
            raise ValueError(f"one length a row is needed: {tuple(self.length_B.shape)}, got {tuple(length_B.shape)}")
        if bool(((length_B < 0) | (length_B > self.length_B)).any()):
            raise ValueError(f"lengths must lie between 0 and {self.length_B.tolist()}, got {length_B.tolist()}")
        if bool((self.written_B - length_B > self.max_step).any()):
            raise ValueError(
                f"max_step={self.max_step} tokens can be taken back from {self.written_B.tolist()}, "
                f"got lengths {length_B.tolist()}: allocate the cache with a larger max_step"
            )
        self.length_B.copy_(length_B)

    def rows(self, part: slice) -> Self:
        """Return a view of consecutive rows as a cache, to prefill them alone; writes to it change this cache."""
        return type(self)(
            layers=[layer.rows(part) for layer in self.layers],
            length_B=self.length_B[part],
            written_B=self.written_B[part],
            rope_Pr=self.rope_Pr,
            window=self.window,
            max_length=self.max_length,
            max_step=self.max_step,
        )


def rope_tables(
    config: DeepseekV4Config, max_length: int, dtype: torch.dtype, device: torch.device | str
) -> dict[str, Tensor]:
    """Return cos + i sin of every position by rope type, complex64 [max_length, r], rounded like the backbone's."""
    rotary = DeepseekV4RotaryEmbedding(config).to(device)
    positions_1P = torch.arange(max_length, device=device).unsqueeze(0)
    like = torch.empty(0, dtype=dtype, device=device)
    tables = {}
    for kind in rotary.layer_types:
        cos_1Pr, sin_1Pr = rotary(like, positions_1P, layer_type=kind)
        tables[kind] = torch.complex(cos_1Pr[0].float(), sin_1Pr[0].float())
    return tables


def _allocate_layer(
    config: DeepseekV4Config,
    kind: str,
    batch: int,
    max_length: int,
    max_step: int,
    dtype: torch.dtype,
    device: torch.device | str,
) -> LayerCache:
    ring = SlidingRing.allocate(batch, config.sliding_window + max_step, config.head_dim, dtype, device)
    if kind == "sliding_attention":
        return LayerCache(ring)
    rate = (config.compress_rates or config.default_compress_rates)[kind]
    span = 2 if kind == "compressed_sparse_attention" else 1

    def compressor(channels: int) -> CompressorState:
        # kv and gate side by side; with overlap, each has a second half for the window after.
        raw = SlidingRing.allocate(batch, span * rate + max_step, 2 * span * channels, dtype, device)
        entries_BWC = torch.zeros(batch, max_length // rate + 1, channels, dtype=dtype, device=device)
        return CompressorState(raw, entries_BWC, rate, span)

    discards = span == 2 and max_length // rate > config.index_topk
    return LayerCache(ring, compressor(config.head_dim), compressor(config.index_head_dim) if discards else None)

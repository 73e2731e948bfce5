"""Make a stream cache: plan its shards, compute their streams and write their files."""

# T tokens of a shard, N residual streams, D model width

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import DeepseekV4ForCausalLM

from mtptrain.backbone.streams import backbone_streams
from mtptrain.config import StreamFormat
from mtptrain.data.packing import Piece, cut_document, fill_rows, pack_pieces
from mtptrain.data.tokens import TokenizedCorpus
from mtptrain.hidden_cache.format import encode_streams, shard_file
from mtptrain.run.artifact import add_part
from mtptrain.run.storage import atomic_file

ROWS_PER_FORWARD = 8
ShardDocuments = list[list[Piece]]  # the pieces of each document of a shard


def plan_shards(corpus: TokenizedCorpus, sequence_length: int, shard_tokens: int) -> list[ShardDocuments]:
    """Cut documents into pieces and assign them to shards, in order; a document is never split over shards.

    A piece of one token has no target and is left out, and so is a document that has no other piece.
    """
    shards: list[ShardDocuments] = []
    room = 0
    for start, end in zip(corpus.offsets[:-1].tolist(), corpus.offsets[1:].tolist(), strict=True):
        cut = cut_document(start, end - start, sequence_length) if end > start else []
        pieces = [piece for piece in cut if piece[1] > 1]
        if not pieces:
            continue
        if room <= 0:
            shards.append([])
            room = shard_tokens
        shards[-1].append(pieces)
        room -= sum(size for _, size in pieces)
    return shards


def piece_streams(
    model: DeepseekV4ForCausalLM, corpus: TokenizedCorpus, pieces: list[Piece], sequence_length: int
) -> Tensor:
    """Return the streams of pieces, one after another, [T, N, D] on the CPU; pieces do not attend to each other."""
    starts = np.cumsum([0, *(size for _, size in pieces)]).tolist()
    start_of = dict(zip(pieces, starts, strict=False))
    rows = pack_pieces(pieces, sequence_length)
    streams_TND: Tensor | None = None
    for first in range(0, len(rows), ROWS_PER_FORWARD):
        group = rows[first : first + ROWS_PER_FORWARD]
        batch = fill_rows(corpus.tokens, group, sequence_length).to(model.lm_head.weight.device)
        streams_BSND = backbone_streams(model, batch)[0].cpu()
        if streams_TND is None:
            streams_TND = streams_BSND.new_empty(starts[-1], *streams_BSND.shape[2:])
        for row, members in enumerate(group):
            begin = 0
            for piece in members:
                start, size = start_of[piece], piece[1]
                streams_TND[start : start + size] = streams_BSND[row, begin : begin + size]
                begin += size
    assert streams_TND is not None
    return streams_TND


def num_forwards(documents: ShardDocuments, sequence_length: int) -> int:
    """Return the number of backbone forwards that `piece_streams` runs for a shard."""
    return -(
        -len(pack_pieces([piece for pieces in documents for piece in pieces], sequence_length)) // ROWS_PER_FORWARD
    )


def write_shard(
    folder: Path,
    number: int,
    documents: ShardDocuments,
    corpus: TokenizedCorpus,
    streams_TND: Tensor,
    stored_as: StreamFormat,
) -> None:
    """Write the file of a shard, then its record."""
    pieces = [piece for parts in documents for piece in parts]
    spans = np.concatenate([np.arange(start, start + size) for start, size in pieces])
    tensors = {
        "tokens": torch.from_numpy(corpus.tokens[spans]),
        "loss_mask": torch.from_numpy(
            corpus.loss_mask[spans] if corpus.loss_mask is not None else np.ones(len(spans), bool)
        ),
        "piece_sizes": torch.tensor([size for _, size in pieces]),
        "document_pieces": torch.tensor([len(parts) for parts in documents]),
        **encode_streams(streams_TND, stored_as),
    }
    with atomic_file(folder / shard_file(number)) as temporary:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary)
    add_part(folder, shard_file(number), {"documents": len(documents), "pieces": len(pieces), "tokens": len(spans)})

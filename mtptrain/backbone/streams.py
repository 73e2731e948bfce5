"""Compute the backbone's residual streams and final hidden states of packed tokens.

V4's compressed attention pools windows that are aligned to the row, and its indexer ranks entries of the whole row: in
a packed row they would mix documents in spite of any mask. So the backbone runs on every piece as a separate row.
"""

# B packed rows, S tokens a row, P pieces, W width of a group of pieces, N residual streams, D model width

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from transformers import DeepseekV4ForCausalLM

from mtptrain.backbone.placement import is_shared
from mtptrain.backbone.traced import Traced, tracing_obstacle
from mtptrain.batch import Batch
from mtptrain.run.distributed import max_over_processes

MOST_TRACED = 2**33  # tokens times weights of a traced forward: 2,200 tokens of tiny12


def run_backbone(model: DeepseekV4ForCausalLM, tokens_BS: Tensor) -> tuple[Tensor, Tensor]:
    """Run a full forward of rows that each hold one document from slot 0 on (padding at the end is harmless).

    Returns:
        streams_BSND: output of the last decoder layer, before `hc_head` and the final norm. A hook captures it, because
            transformers overwrites the last entry of `hidden_states` with the post-norm tensor.
        hidden_BSD: norm(hc_head(streams)), the input of the lm_head.

    On a CPU, a small forward of a shape that occurs often is traced, unless gradients are wanted.
    """
    if torch.is_grad_enabled() or not _is_small(model, tokens_BS) or is_shared(model) or tracing_obstacle([model]):
        return _forward(model, tokens_BS)
    forward = Traced(partial(_forward, model), [model], state=(), constants="whole sequences", calls=1)
    with torch.inference_mode():
        outputs = forward(tokens_BS)
    if torch.is_inference_mode_enabled():
        return outputs[0], outputs[1]
    return outputs[0].clone(), outputs[1].clone()  # autograd cannot save a tensor of inference mode


def _is_small(model: DeepseekV4ForCausalLM, tokens_BS: Tensor) -> bool:
    """Return whether Python takes much of a forward; a recording holds every tensor of it."""
    num_weights = sum(parameter.numel() for parameter in model.parameters())
    return tokens_BS.is_cpu and tokens_BS.numel() * num_weights <= MOST_TRACED


def _forward(model: DeepseekV4ForCausalLM, tokens_BS: Tensor) -> tuple[Tensor, Tensor]:
    captured: list[Tensor] = []
    handle = model.model.layers[-1].register_forward_hook(lambda _module, _args, output: captured.append(output))
    try:
        hidden_BSD = model.model(input_ids=tokens_BS, use_cache=False).last_hidden_state
    finally:
        handle.remove()
    return captured[0].to(hidden_BSD.device), hidden_BSD


def _piece_index(segment_BS: Tensor) -> list[Tensor]:
    """Return the slots of the pieces, grouped by size: int64 [P, W] of flat slots b * S + s, padded with -1.

    A group's width is at most twice its shortest piece, which bounds the padding.
    """
    num_rows, row_length = segment_BS.shape
    numbers = segment_BS.tolist()
    groups: dict[int, list[list[int]]] = {}
    for row in range(num_rows):
        start = 0
        while start < row_length and numbers[row][start] > 0:
            end = start
            while end < row_length and numbers[row][end] == numbers[row][start]:
                end += 1
            slots = list(range(row * row_length + start, row * row_length + end))
            groups.setdefault((end - start).bit_length(), []).append(slots)
            start = end
    index = []
    for _, pieces in sorted(groups.items(), reverse=True):
        width = max(len(slots) for slots in pieces)
        index.append(torch.tensor([slots + [-1] * (width - len(slots)) for slots in pieces]))
    return index


def _pad_forwards(model: DeepseekV4ForCausalLM, forwards: int) -> None:
    """Pad with dummy forwards so that every process of a shared backbone runs the same number."""
    if is_shared(model):
        for _ in range(max_over_processes(forwards) - forwards):
            run_backbone(model, torch.zeros(1, 1, dtype=torch.int64, device=model.lm_head.weight.device))


def backbone_streams(model: DeepseekV4ForCausalLM, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return streams [B, S, N, D] and hidden states [B, S, D] of packed rows, zeros in padding; see `run_backbone`.

    If the batch already holds streams, they are used unchanged and no decoder layer runs.
    """
    if batch.streams_BSND is not None:
        hidden_BSD: Tensor = model.model.norm(model.model.hc_head(batch.streams_BSND))
        return batch.streams_BSND, hidden_BSD
    if int(batch.segment_BS.max()) <= 1:
        _pad_forwards(model, 1)
        return run_backbone(model, batch.tokens_BS)
    flat_tokens = batch.tokens_BS.flatten()
    slots, streams, hidden = [], [], []
    index = _piece_index(batch.segment_BS)
    _pad_forwards(model, len(index))
    for index_PW in index:
        index_PW = index_PW.to(flat_tokens.device)
        valid_PW = index_PW >= 0
        streams_PWND, hidden_PWD = run_backbone(model, flat_tokens[index_PW.clamp(min=0)])
        slots.append(index_PW[valid_PW])
        streams.append(streams_PWND[valid_PW])
        hidden.append(hidden_PWD[valid_PW])
    slot_index = torch.cat(slots)

    def spread(parts: list[Tensor]) -> Tensor:
        joined = torch.cat(parts)
        full = joined.new_zeros(flat_tokens.numel(), *joined.shape[1:])
        return full.index_copy(0, slot_index, joined).unflatten(0, batch.tokens_BS.shape)

    return spread(streams), spread(hidden)

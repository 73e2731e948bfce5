"""Next-token cross-entropy of the backbone, and the output type that all objectives share."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import DeepseekV4ForCausalLM

from mtptrain.backbone.streams import backbone_streams
from mtptrain.batch import Batch
from mtptrain.data.packing import pack_corpus, split_rows, spread_rows
from mtptrain.data.tokens import TokenizedCorpus

LOGITS_AT_ONCE = 1 << 26  # of [targets, V], 256 MB in float32


@dataclass(frozen=True, slots=True)
class LossOutput:
    """Loss and metric sums of one micro-batch.

    Attributes:
        loss: scalar, already divided by the counts of the whole step, so that micro-batches add up.
        sums_K: float64 [K] per metric: sums over the valid tokens of each draft step. They are divided by the counts
            only when logged.
    """

    loss: Tensor
    sums_K: dict[str, Tensor]


def next_token_nats(model: DeepseekV4ForCausalLM, batch: Batch) -> Tensor:
    """Return the negative log-likelihood of every target token of a batch, float32 [targets]."""
    mask_BS = batch.target_mask(0)
    _, hidden_BSD = backbone_streams(model, batch)
    targets = batch.tokens_BS.roll(-1, dims=1)[mask_BS]
    return F.cross_entropy(model.lm_head(hidden_BSD[mask_BS]).float(), targets, reduction="none")


@torch.no_grad()
def heldout_nats(model: DeepseekV4ForCausalLM, batch: Batch) -> Tensor:
    """Return `next_token_nats`, computed for a bounded number of logits at a time."""
    mask_BS = batch.target_mask(0)
    _, hidden_BSD = backbone_streams(model, batch)
    targets = batch.tokens_BS.roll(-1, dims=1)[mask_BS]
    size = max(1, LOGITS_AT_ONCE // model.lm_head.weight.shape[0])
    parts = zip(hidden_BSD[mask_BS].split(size), targets.split(size), strict=True)
    nats = [F.cross_entropy(model.lm_head(hidden).float(), target, reduction="none") for hidden, target in parts]
    return torch.cat(nats) if nats else hidden_BSD.new_zeros(0)


@torch.no_grad()
def bits_per_byte(
    model: DeepseekV4ForCausalLM, corpus: TokenizedCorpus, row_length: int, max_rows: int | None = None
) -> tuple[float, float]:
    """Return the loss on a corpus in nats per token and in bits per byte of text.

    Args:
        model: the backbone.
        corpus: the documents.
        row_length: tokens per row, the longest context that the model sees.
        max_rows: measure this many rows, spread over the corpus; bits per byte then uses the tokens per byte of the
            whole corpus. None measures the whole corpus.
    """
    device = model.lm_head.weight.device
    rows = pack_corpus(corpus, row_length)
    num_targets = sum(size - 1 for row in rows for _, size in row)
    rows = spread_rows(rows, max_rows)
    nats, count = 0.0, 0
    for batch in split_rows(corpus.tokens, rows, row_length):
        losses = heldout_nats(model, batch.to(device))
        nats, count = nats + losses.double().sum().item(), count + losses.numel()
    return nats / count, nats / count * num_targets / math.log(2) / corpus.num_bytes


class NextTokenObjective:
    """Cross-entropy of the backbone's next token; the only metric is the loss, in nats.

    Args:
        model: the backbone, which is trained.
    """

    def __init__(self, model: DeepseekV4ForCausalLM) -> None:
        self.model = model

    def counts(self, batch: Batch) -> Tensor:
        """Return the number of targets in the batch, float64 [1]."""
        return batch.target_mask(0).sum().double().unsqueeze(0)

    def __call__(self, batch: Batch, counts_K: Tensor) -> LossOutput:
        """Return this micro-batch's share of the mean cross-entropy over the targets of the step."""
        nats = next_token_nats(self.model, batch)
        return LossOutput(nats.sum() / counts_K[0].float(), {"loss": nats.detach().sum().double().unsqueeze(0)})

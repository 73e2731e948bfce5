"""`+recipe=backbone`: train a small DeepSeek-V4 backbone from scratch, then its stock MTP head.

python -m mtptrain +recipe=backbone output_dir=outputs/tiny
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import DeepseekV4ForCausalLM

from mtptrain.backbone.build import build_model
from mtptrain.backbone.streams import backbone_streams
from mtptrain.checkpoint import newest_checkpoint
from mtptrain.config import RunConfig
from mtptrain.data.batches import PackedBatches
from mtptrain.data.packing import Batch, fill_rows, pack_corpus
from mtptrain.data.splits import heldout_documents, training_documents
from mtptrain.data.tokenizer import load_tokenizer, save_tokenizer, train_tokenizer
from mtptrain.data.tokens import TokenizedCorpus, cache_folder, tokenize_corpus
from mtptrain.distributed import bound_threads, choose_device
from mtptrain.losses.outcome import Outcome
from mtptrain.run_folder import RunFolder
from mtptrain.storage import atomic_folder
from mtptrain.trainer import Trainer

MARKS = ([0], [1])  # begin and end of text, DeepSeek-V4's own ids


class NextTokenObjective:
    """Cross-entropy of the backbone's next token; the only metric is the loss, in nats."""

    def __init__(self, model: DeepseekV4ForCausalLM) -> None:
        self.model = model

    def counts(self, batch: Batch) -> Tensor:
        """Targets in the batch, float64 [1]."""
        return batch.target_mask(0).sum().double().unsqueeze(0)

    def __call__(self, batch: Batch, counts_K: Tensor) -> Outcome:
        """Mean cross-entropy over the targets of the step."""
        nats = next_token_nats(self.model, batch)
        return Outcome(nats.sum() / counts_K[0].float(), {"loss": nats.detach().sum().double().unsqueeze(0)})


def next_token_nats(model: DeepseekV4ForCausalLM, batch: Batch) -> Tensor:
    """Negative log-likelihood of every target token of a batch, float32 [targets]."""
    mask_BS = batch.target_mask(0)
    _, hidden_BSD = backbone_streams(model, batch)
    targets = batch.tokens_BS.roll(-1, dims=1)[mask_BS]
    return F.cross_entropy(model.lm_head(hidden_BSD[mask_BS]).float(), targets, reduction="none")


@torch.no_grad()
def bits_per_byte(model: DeepseekV4ForCausalLM, corpus: TokenizedCorpus, row_length: int) -> tuple[float, float]:
    """Held-out loss in nats a token and in bits a byte of text; the model sees at most `row_length` tokens."""
    device = next(model.parameters()).device
    rows = pack_corpus(corpus, row_length)
    nats, count = 0.0, 0
    for start in range(0, len(rows), 16):
        losses = next_token_nats(model, fill_rows(corpus.tokens, rows[start : start + 16], row_length).to(device))
        nats, count = nats + losses.double().sum().item(), count + losses.numel()
    return nats / count, nats / math.log(2) / corpus.num_bytes


def train_backbone(config: RunConfig, run: RunFolder) -> Path:
    """Train the backbone and return the folder it was written to."""
    device = choose_device(config.device)
    folder = run.path / "backbone"
    documents = training_documents(config.data)
    heldout = heldout_documents(config.data)
    tokenizer_folder = run.path / "tokenizer"
    if not tokenizer_folder.is_dir():
        with atomic_folder(tokenizer_folder) as temporary:
            save_tokenizer(
                train_tokenizer((document.text for document in documents), config.backbone.shape.vocab_size), temporary
            )
    tokenizer = load_tokenizer(tokenizer_folder, config.backbone.shape.vocab_size)
    cache = cache_folder(config.data.cache_dir)
    corpus = tokenize_corpus(documents, tokenizer, MARKS, cache)
    heldout_corpus = tokenize_corpus(heldout, tokenizer, MARKS, cache)
    length = config.data.sequence_length
    run.say(
        f"{len(documents)} training documents, {corpus.num_bytes / 1e6:.1f} MB, {len(corpus.tokens) / 1e6:.2f} M tokens; "
        f"{len(heldout)} held out, {heldout_corpus.num_bytes / 1e6:.2f} MB"
    )
    model = build_model(config.backbone.shape, config.seed).to(device)
    run.say(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters on {device}")
    batches = PackedBatches(corpus, length, config.train.batch_size, config.seed)
    owner = {"task": "backbone", "seed": config.seed}
    trainer = Trainer(
        model, NextTokenObjective(model), batches, config.train, run.path / "checkpoints", owner, "backbone"
    )
    checkpoint = newest_checkpoint(run.path / "checkpoints", run.say) if config.resume == "auto" else None
    if checkpoint is not None:
        trainer.restore(checkpoint)
        run.say(f"continuing from step {trainer.step}")
    log = run.open_log(trainer.step)
    trainer.run(log)
    nats, bits = bits_per_byte(model, heldout_corpus, length)
    log.write(trainer.step, {"heldout/nats_per_token": nats, "heldout/bits_per_byte": bits})
    log.close()
    run.say(f"held-out loss {nats:.4f} nats a token, {bits:.4f} bits a byte")
    with atomic_folder(folder) as temporary:
        model.save_pretrained(temporary)
        save_tokenizer(tokenizer, temporary)
    return folder


def run(config: RunConfig, run: RunFolder) -> None:
    """Train a backbone and its stock head."""
    bound_threads(config.threads, config.backbone.shape.hidden_size)
    folder = train_backbone(config, run)
    run.say(f"backbone written to {folder}")

"""`+recipe=backbone`: train a small DeepSeek-V4 backbone from scratch, then its stock MTP head.

python -m mtptrain +recipe=backbone output_dir=outputs/tiny
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import DeepseekV4ForCausalLM
from transformers.utils import logging as transformers_logging

from mtptrain.backbone.build import build_model, model_config
from mtptrain.backbone.grow import grow, layer_positions
from mtptrain.backbone.load import backbone_folder, load_backbone, open_source, smaller_backbone
from mtptrain.backbone.stored import save_bf16
from mtptrain.config import MtpConfig, RunConfig
from mtptrain.config.data import require_documents
from mtptrain.config.reads import (
    ALWAYS,
    Settings,
    of_backbone,
    of_documents,
    of_loss,
    of_probe,
    of_training,
    settings,
)
from mtptrain.data.batches import PackedBatches
from mtptrain.data.chat import open_chat_template
from mtptrain.data.documents import Document
from mtptrain.data.text import heldout_documents, training_documents
from mtptrain.data.tokenizer import load_tokenizer, save_tokenizer, train_tokenizer
from mtptrain.data.tokens import Encoder, tokenize_corpus
from mtptrain.errors import UserError
from mtptrain.evaluation.backbone_card import HEAD_FILE, backbone_card
from mtptrain.evaluation.heads import teacher_forced
from mtptrain.losses.next_token import NextTokenObjective, bits_per_byte
from mtptrain.recipes.distill import train_head
from mtptrain.recipes.resume import resume
from mtptrain.recipes.session import Session
from mtptrain.run.distributed import bound_threads, choose_device
from mtptrain.run.storage import atomic_file, atomic_folder, write_text
from mtptrain.training.checkpoint import BackboneIdentity
from mtptrain.training.data_parallel import ReplicatedEngine
from mtptrain.training.resume import result_settings
from mtptrain.training.trainer import Trainer

BOS_EOS = ([0], [1])  # begin and end of text, DeepSeek-V4's own ids


def train_backbone(session: Session) -> Path:
    """Train the backbone and return its folder."""
    config, run_folder = session.config, session.folder
    folder, vocab_size = run_folder.path / "backbone", config.backbone.shape.vocab_size
    documents, heldout = training_documents(config.data), heldout_documents(config.data)
    tokenizer_folder = _tokenizer_folder(session, documents)
    tokenizer = load_tokenizer(tokenizer_folder, vocab_size)
    chat = open_chat_template(config.data, tokenizer_folder, tokenizer, BOS_EOS[0])
    corpus = tokenize_corpus(
        documents, Encoder(tokenizer, BOS_EOS, chat, config.data.on_bad_row), session.cache, config.data.max_tokens
    )
    run_folder.print_status(
        f"{len(documents)} training documents, {corpus.num_bytes / 1e6:.1f} MB, {len(corpus.tokens) / 1e6:.2f} M "
        f"tokens; {len(heldout)} documents held out"
    )
    model = _initial_model(config)
    run_folder.print_status(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters")
    length, size = config.data.sequence_length, config.train.batch_size
    batches = PackedBatches(corpus, length, size, config.seed, min(length, config.backbone.shape.max_positions))
    checkpoints = run_folder.path / "checkpoints"
    settings = result_settings(config, ["backbone.shape", "data", "train"], str(model.dtype).removeprefix("torch."))
    settings["backbone.grow_from"] = config.backbone.grow_from
    identity = BackboneIdentity("backbone", corpus.digest(), settings)
    engine = ReplicatedEngine(model, config.train)
    trainer = Trainer(engine, NextTokenObjective(model), batches, config.train, checkpoints, identity, "backbone")
    resume(session, trainer)
    with run_folder.open_trackers() as trackers:
        log = run_folder.open_log(trackers, trainer.step)
        trainer.run(log)
        log.close()
    transformers_logging.disable_progress_bar()
    with atomic_folder(folder) as temporary:
        save_bf16(model, temporary)
        save_tokenizer(tokenizer, temporary)
    return folder


def _tokenizer_folder(session: Session, documents: Sequence[Document]) -> Path:
    """Return the folder of the tokenizer: the smaller backbone's own, or one trained on the documents."""
    config, folder = session.config.backbone, session.folder.path / "tokenizer"
    if config.grow_from is not None:
        return backbone_folder(smaller_backbone(config))
    if not folder.is_dir():
        texts = (document.text for document in documents)
        with atomic_folder(folder) as temporary:
            save_tokenizer(train_tokenizer(texts, config.shape.vocab_size), temporary)
    return folder


def _initial_model(config: RunConfig) -> DeepseekV4ForCausalLM:
    """Return a fresh backbone, or one that begins with the weights of a smaller one."""
    device = choose_device(config.device)
    model = build_model(config.backbone.shape, config.seed, device)
    if config.backbone.grow_from is not None:
        grow(model, load_backbone(smaller_backbone(config.backbone), device, torch.float32).model)
    return model


def train_stock_head(session: Session, folder: Path) -> None:
    """Train the stock head as DeepSeek trains its own, and write it and a model card beside the backbone's weights."""
    config, run_folder = session.config, session.folder
    head_config = replace(
        config,
        task="pretrain",
        train=config.stock_head,
        evaluate_at_end=False,
        mtp=MtpConfig(init="fresh"),
        backbone=replace(config.backbone, path=str(folder)),
    )
    head_folder = replace(run_folder, path=run_folder.path / "stock_head", config=head_config)
    head_folder.path.mkdir(exist_ok=True)
    with head_folder.open_trackers() as trackers:
        head_session = Session(head_config, head_folder)
        stack = train_head(head_session, trackers)
    backbone = head_session.backbone
    with atomic_file(folder / HEAD_FILE) as temporary:
        save_file({name: tensor.contiguous() for name, tensor in stack.state_dict().items()}, temporary)
    corpus, length = head_session.heldout_corpus, head_session.piece_length
    nats, bits = bits_per_byte(backbone.model, corpus, length)
    run_folder.print_status(f"held-out loss {nats:.4f} nats a token, {bits:.4f} bits a byte")
    figures = teacher_forced(backbone.model, stack, corpus, length, config.evaluation.heldout_sequences, 4)
    write_text(folder / "MODEL_CARD.md", backbone_card(run_folder, backbone, (nats, bits), figures))


def reads(config: RunConfig) -> Settings:
    """Return the settings that training a backbone and its stock head read."""
    used = ALWAYS | of_backbone(config) | of_documents(config) | of_training(config) | of_loss(config)
    used |= settings("backbone.shape", "backbone.grow_from", "stock_head", "evaluation.heldout_sequences")
    used |= of_probe(config)  # while the stock head trains
    return used - {"backbone.path", "backbone.revision", "backbone.weights", "train.recompute"}


def check(config: RunConfig) -> None:
    """Refuse data that is no text, and sizes of which no backbone can be built."""
    config.backbone.shape.require_computable()
    require_documents(config.data, config.task)
    if config.backbone.grow_from is not None:
        try:
            source = open_source(smaller_backbone(config.backbone))
        except UserError as error:
            raise UserError(str(error).replace("backbone.path", "backbone.grow_from")) from None
        layer_positions(source.config, model_config(config.backbone.shape))


def run(session: Session) -> None:
    """Train a backbone and its stock head."""
    config = session.config
    bound_threads(config.threads, config.backbone.shape.hidden_size)
    folder = train_backbone(session)
    train_stock_head(session, folder)
    session.folder.print_status(f"backbone and stock head written to {folder}; use them with backbone.path={folder}")

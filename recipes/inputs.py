"""What several programs start from: the backbone, its heads and held-out text."""

from __future__ import annotations

from transformers import DeepseekV4Config

from mtptrain.backbone.load import Backbone, load_backbone
from mtptrain.checkpoint import Checkpoint
from mtptrain.config import SHARED_PLACEMENTS, RunConfig
from mtptrain.data.chat import ChatTemplate, open_chat_template
from mtptrain.data.encoder import Encoder
from mtptrain.data.splits import heldout_documents
from mtptrain.data.tokens import TokenizedCorpus, cache_folder, tokenize_corpus
from mtptrain.distributed import bound_threads, choose_device, choose_dtype
from mtptrain.errors import UserError
from mtptrain.evaluation.heads import Head
from mtptrain.evaluation.result import BackboneResult
from mtptrain.losses.next_token import bits_per_byte
from mtptrain.mtp.initial import place, stock_tensors
from mtptrain.mtp.stack import num_modules, stack_from_tensors


def open_backbone(config: RunConfig, has_layers: bool = True) -> Backbone:
    """The frozen backbone on the run's device, in its arithmetic, with torch's threads bounded.

    Without its decoder layers it cannot run; training from cached streams needs none.
    """
    device = choose_device(config.device)
    backbone = load_backbone(config.backbone, device, choose_dtype(config.precision, device), has_layers)
    bound_threads(config.threads, backbone.config.hidden_size)
    check_window(config, backbone)
    return backbone


def can_decode(config: RunConfig, backbone: Backbone) -> bool:
    """Whether this process holds every layer of the backbone."""
    return len(backbone.model.model.layers) > 0 and config.backbone.placement not in SHARED_PLACEMENTS


def check_window(config: RunConfig, backbone: Backbone) -> None:
    """A draft must fit in the sliding window."""
    window = backbone.config.sliding_window
    lengths = {
        "mtp.steps": config.mtp.num_steps,
        "decoding.draft_length": config.decoding.draft_length,
        "on_policy.draft_length": config.on_policy.draft_length,
    }
    name, longest = max(lengths.items(), key=lambda item: item[1])
    if longest >= window:
        raise UserError(
            f"{name}={longest}: a draft must be shorter than the backbone's sliding window of {window} tokens"
        )


def piece_length(config: RunConfig, model: DeepseekV4Config) -> int:
    """Most tokens of a document that the backbone reads at once: a row's, or its context where that is shorter."""
    return min(config.data.sequence_length, int(model.max_position_embeddings))


def stock_head(backbone: Backbone) -> Head:
    """The head that came with the backbone."""
    tensors = stock_tensors(backbone)
    depth = num_modules(tensors)
    stack = stack_from_tensors(backbone.config, depth, tensors, str(backbone.folder))
    return Head("stock", "stock", "shared" if depth == 1 else "stacked", place(stack, backbone).eval())


def check_owner(backbone: Backbone, checkpoint: Checkpoint) -> None:
    """Refuse a checkpoint that holds no head of this backbone.

    Raises:
        UserError: it holds no head, or one that was trained on another backbone.
    """
    owner = checkpoint.owner
    if owner.get("task") == "backbone":
        raise UserError(
            f"checkpoint={checkpoint.folder}: holds a backbone, not a head; for the head that was trained with it set "
            "checkpoint=stock and backbone.path to the run's folder `backbone`"
        )
    if owner.get("backbone") != backbone.fingerprint:
        raise UserError(
            f"checkpoint={checkpoint.folder}: was trained on the backbone {str(owner.get('backbone'))[:12]} and this "
            f"one is {backbone.fingerprint[:12]}; set backbone.path to the backbone it belongs to"
        )


def trained_head(backbone: Backbone, checkpoint: Checkpoint) -> Head:
    """The head of a checkpoint; see `check_owner`."""
    check_owner(backbone, checkpoint)
    owner = checkpoint.owner
    stack = stack_from_tensors(backbone.config, owner["depth"], checkpoint.tensors(), str(checkpoint.folder))
    return Head("trained", str(checkpoint.folder), owner["mode"], place(stack, backbone).eval())


def open_chat(config: RunConfig, backbone: Backbone) -> ChatTemplate | None:
    """The template that conversations are rendered with, or None."""
    return open_chat_template(config.data.chat_template, backbone.folder, backbone.tokenizer, backbone.marks[0])


def open_encoder(config: RunConfig, backbone: Backbone) -> Encoder:
    """How the backbone reads documents."""
    return Encoder(backbone.tokenizer, backbone.marks, open_chat(config, backbone))


def heldout_corpus(config: RunConfig, backbone: Backbone) -> TokenizedCorpus:
    """The held-out documents as tokens of the backbone's tokenizer."""
    encoder, cache = open_encoder(config, backbone), cache_folder(config.data.cache_dir)
    return tokenize_corpus(heldout_documents(config.data), encoder, cache)


def describe_backbone(config: RunConfig, backbone: Backbone, corpus: TokenizedCorpus) -> BackboneResult:
    """Return the backbone's entry in evaluation.json, with its loss on held-out text."""
    rows = config.evaluation.heldout_sequences
    nats, bits = bits_per_byte(backbone.model, corpus, piece_length(config, backbone.config), rows)
    return BackboneResult(
        name=config.backbone.name,
        fingerprint=backbone.fingerprint,
        parameters=sum(p.numel() for p in backbone.model.parameters()),
        heldout_nats_per_token=nats,
        heldout_bits_per_byte=bits,
    )

"""Load a backbone and its heads once, and look at their training data."""

from __future__ import annotations

from dataclasses import dataclass, field
from os import PathLike
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import DeepseekV4Config, DeepseekV4ForCausalLM

from mtptrain.api.composed import Composed, Settings, arguments_of, compose_run
from mtptrain.backbone.load import Backbone
from mtptrain.config import DataSource
from mtptrain.data.batches import BatchSource
from mtptrain.errors import UserError
from mtptrain.evaluation.heads import Head
from mtptrain.recipes.session import Session
from mtptrain.recipes.streams import stream_batches
from mtptrain.run.distributed import join
from mtptrain.run.folder import RunFolder, default_output_dir
from mtptrain.run.provenance import describe_run

Path = str | PathLike[str]
STOCK = "stock"
OF_BACKBONE = ("backbone", "device", "precision", "threads")  # settings and sections of loading


@dataclass(frozen=True, slots=True)
class LoadedBackbone:
    """A frozen backbone in memory, which every function of this interface shares.

    Attributes:
        loaded: model, folder, tokenizer and fingerprint.
        settings: the settings that it was loaded with, by their names on the command line.
    """

    loaded: Backbone = field(repr=False)
    settings: dict[str, Any]

    @property
    def model(self) -> DeepseekV4ForCausalLM:
        """The model of transformers, in eval mode; no parameter requires a gradient."""
        return self.loaded.model

    @property
    def config(self) -> DeepseekV4Config:
        """The model's config."""
        return self.loaded.config

    @property
    def tokenizer(self) -> Tokenizer:
        """The backbone's tokenizer."""
        return self.loaded.tokenizer

    @property
    def fingerprint(self) -> str:
        """Hash of config and weights; heads trained on this backbone carry it."""
        return self.loaded.fingerprint

    @property
    def device(self) -> torch.device:
        """Device of the lm_head."""
        return self.model.lm_head.weight.device

    def encode(self, text: str) -> list[int]:
        """Return a text's token ids, with those that begin a document."""
        begin = self.loaded.source.bos_eos[0]
        return begin + list(self.tokenizer.encode(text, add_special_tokens=False).ids)

    def text(self, tokens: list[int]) -> str:
        """Return token ids as text, special tokens included."""
        return str(self.tokenizer.decode(tokens, skip_special_tokens=False))

    def __repr__(self) -> str:
        count = sum(parameter.numel() for parameter in self.model.parameters())
        return (
            f"<LoadedBackbone {self.loaded.folder.name}: {count / 1e6:.2f} M parameters, "
            f"{self.config.num_hidden_layers} layers, {self.config.vocab_size:,} words, on {self.device}>"
        )


def load_backbone(path: Path | None = None, *, settings: Settings | None = None) -> LoadedBackbone:
    """Load a frozen backbone; torch's CPU threads are limited to a number that fits its size.

    Args:
        path: folder of a DeepSeek-V4 checkpoint or its name on the hub; None is a shipped one, by default `tiny`.
        settings: `device`, `precision`, `threads` and those of `backbone`, such as {"backbone": "tiny12"}.

    Raises:
        UserError: the backbone cannot be loaded, or a setting is not one of loading.

    Example:
        >>> backbone = mtptrain.load_backbone()
        >>> backbone.text(backbone.encode("def add(a, b):"))
    """
    given = dict(settings or {}) | ({} if path is None else {"backbone.path": str(path)})
    wrong = next((name for name in given if not is_of_backbone(name)), None)
    if wrong is not None:
        raise UserError(
            f"{wrong}={given[wrong]}: is no setting of loading a backbone; give it to the function it is for"
        )
    composed = compose_run(arguments_of("evaluate", {"checkpoint": STOCK} | given))
    join(composed.config, "one")
    return LoadedBackbone(open_session(composed).backbone, given)


def is_of_backbone(name: str) -> bool:
    """Return whether a setting belongs to loading a backbone."""
    return name.partition(".")[0] in OF_BACKBONE


def own_settings(backbone: LoadedBackbone, settings: Settings | None) -> dict[str, Any]:
    """Return the settings of a run on a loaded backbone.

    Raises:
        UserError: one of them would load another backbone.
    """
    for name, value in (settings or {}).items():
        if is_of_backbone(name):
            raise UserError(f"{name}={value}: the backbone is loaded already; give it to load_backbone")
    return {**backbone.settings, **(settings or {})}


def check_head(backbone: LoadedBackbone, head: Head) -> None:
    """Refuse a head that was loaded with another backbone, whose streams it reads.

    Raises:
        UserError: the backbones differ.
    """
    if head.backbone not in (None, backbone.fingerprint):
        raise UserError(
            f"head={head.checkpoint}: is a head of another backbone; give the backbone that it was loaded with, or "
            "load_head(backbone, ...) with this one"
        )


def open_session(composed: Composed, backbone: LoadedBackbone | None = None) -> Session:
    """Return a session that writes nothing."""
    config, settings, _ = composed
    folder = RunFolder(default_output_dir(config.task), config, settings, describe_run(config.seed))
    session = Session(config, folder)
    if backbone is not None:
        session.adopt(backbone.loaded)
    return session


def load_head(backbone: LoadedBackbone, checkpoint: Path = STOCK) -> Head:
    """Return a head of a backbone; `head.stack` holds its modules, in eval mode.

    Args:
        backbone: of the head.
        checkpoint: folder of a run, of one of its checkpoints or of an export, or hf://ORGANISATION/NAME; `stock` is
            the head that came with the backbone.

    Raises:
        UserError: there is no such head, or it was trained on another backbone.

    Example:
        >>> stock = mtptrain.load_head(backbone)
        >>> best = mtptrain.load_head(backbone, "outputs/distill/RUN/checkpoints/best")
    """
    given = own_settings(backbone, {"checkpoint": checkpoint})
    return open_session(compose_run(arguments_of("evaluate", given)), backbone).head(str(checkpoint))


def training_batches(backbone: LoadedBackbone, *, settings: Settings | None = None) -> BatchSource:
    """Return the batches that `train` would read; `batch(index)` is micro-batch `index` as a `Batch`.

    Args:
        backbone: encodes the texts.
        settings: of +recipe=distill, such as {"data.path": "corpus.jsonl", "train.batch_size": 4}.

    Returns:
        Packed rows: `tokens_BS` int64 token ids [batch_size, sequence_length], `segment_BS` and `position_BS` of the
        same shape.

    Raises:
        UserError: the text cannot be read, or the backbone is to write it itself (`data=on_policy`).

    Example:
        >>> batch = mtptrain.training_batches(backbone).batch(0)
        >>> backbone.text(batch.tokens_BS[0].tolist())
    """
    session = open_session(compose_run(arguments_of("distill", own_settings(backbone, settings))), backbone)
    source = session.config.data.source
    if source is DataSource.on_policy:
        raise UserError("data.source=on_policy: its texts are written when a training starts; train on them first")
    return stream_batches(session) if source is DataSource.streams else session.text_batches

"""The resources of a run, each opened at its first use; those that need no weights come first."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from mtptrain.config import DataConfig, DataSource, Placement, RunConfig, require
from mtptrain.errors import UserError
from mtptrain.recipes import find_recipe
from mtptrain.run.folder import RunFolder
from mtptrain.run.progress import waiting

if TYPE_CHECKING:  # a plan uses none of these and starts without torch
    from mtptrain.backbone.load import Backbone, BackboneSource
    from mtptrain.data.batches import BatchSource
    from mtptrain.data.chat import ChatTemplate
    from mtptrain.data.documents import Document
    from mtptrain.data.passages import PassageHasher
    from mtptrain.data.tokens import Encoder, TokenizedCorpus
    from mtptrain.decoding.policy import Policy
    from mtptrain.decoding.results import Limits
    from mtptrain.evaluation.heads import Head
    from mtptrain.evaluation.result import BackboneResult
    from mtptrain.losses.rollout import RolloutObjective
    from mtptrain.mtp.stack import MtpStack
    from mtptrain.training.checkpoint import Checkpoint


class Session:
    """One run of a recipe, and everything that it opens.

    Args:
        config: the settings.
        folder: the run's output folder.

    Attributes:
        objective: the training objective of a head, which a recipe of one's own may set; None is `RolloutObjective`.
    """

    def __init__(self, config: RunConfig, folder: RunFolder) -> None:
        self.config, self.folder = config, folder
        self.objective: type[RolloutObjective] | None = None
        self._checkpoints: dict[str, Checkpoint] = {}

    # Without weights

    @cached_property
    def source(self) -> BackboneSource:
        """The backbone's folder, config and tokenizer. Also bounds torch's threads by the size of the model.

        Raises:
            UserError: the backbone cannot be opened, or a draft does not fit in its sliding window.
        """
        from mtptrain.backbone.load import open_source
        from mtptrain.run.distributed import bound_threads

        source = open_source(self.config.backbone)
        bound_threads(self.config.threads, source.config.hidden_size)
        self._check_window(source)
        return source

    def _check_window(self, source: BackboneSource) -> None:
        window = source.config.sliding_window
        config, read = self.config, find_recipe(self.config.task).reads(self.config)
        lengths = {
            "mtp.steps": config.mtp.num_steps,
            "decoding.draft_length": config.decoding.draft_length,
            "on_policy.draft_length": config.on_policy.draft_length,
        }
        for name in [name for name in lengths if name in read]:
            rule = f"a draft must be shorter than the backbone's sliding window of {window} tokens"
            require(lengths[name] < window, name, lengths[name], rule)

    @cached_property
    def known_fingerprint(self) -> str | None:
        """The fingerprint of the backbone if it is known without reading large files; None otherwise."""
        from mtptrain.release.fingerprint import known_fingerprint
        from mtptrain.run.distributed import on_rank0

        return on_rank0(lambda: known_fingerprint(self.source.shards))

    @cached_property
    def chat(self) -> ChatTemplate | None:
        """The chat template; None if the run has none."""
        from mtptrain.data.chat import open_chat_template

        source = self.source
        return open_chat_template(self.config.data, source.folder, source.tokenizer, source.bos_eos[0])

    @cached_property
    def hasher(self) -> PassageHasher:
        """Hashes passages, to compare prompts with the training text."""
        from mtptrain.data.passages import PassageHasher

        return PassageHasher(self.source.tokenizer, int(self.source.config.vocab_size))

    @cached_property
    def encoder(self) -> Encoder:
        """The encoder from documents to the backbone's tokens."""
        from mtptrain.data.tokens import Encoder

        return Encoder(self.source.tokenizer, self.source.bos_eos, self.chat, self.config.data.on_bad_row)

    @property
    def cache(self) -> Path:
        """The folder of tokenised text and other files that later runs reuse."""
        from mtptrain.data.tokens import cache_folder

        return cache_folder(self.config.data.cache_dir)

    @cached_property
    def training_corpus(self) -> TokenizedCorpus:
        """The training documents as tokens. With several processes, all of them call it."""
        from mtptrain.data.text import training_documents

        return self._tokenized("training", training_documents, self.config.data)

    @cached_property
    def heldout_corpus(self) -> TokenizedCorpus:
        """The held-out documents as tokens. With several processes, all of them call it."""
        from mtptrain.data.text import heldout_documents

        return self._tokenized("held-out", heldout_documents, self.document_settings)

    def _tokenized(self, name: str, read: Callable[[DataConfig], list[Document]], data: DataConfig) -> TokenizedCorpus:
        from mtptrain.data.tokens import share_corpus, tokenize_corpus

        def make() -> TokenizedCorpus:
            with waiting(f"reading the {name} documents"):
                documents = read(data)
            return tokenize_corpus(documents, self.encoder, self.cache, data.max_tokens)

        return share_corpus(make)

    @cached_property
    def text_batches(self) -> BatchSource:
        """The packed rows of the training documents, tokenised before training or, if they are streamed, during it."""
        data, size, seed = self.config.data, self.config.train.batch_size, self.config.seed
        if not data.is_streamed:
            from mtptrain.data.batches import PackedBatches

            return PackedBatches(self.training_corpus, data.sequence_length, size, seed, self.piece_length)
        from mtptrain.data.streaming.batches import StreamingBatches
        from mtptrain.data.streaming.dataset import StreamingPlan
        from mtptrain.data.streaming.row_stream import RowShape

        shape = RowShape(data.sequence_length, self.piece_length)
        plan = StreamingPlan(data.sources(), data.weights(), self.encoder, shape, size, seed)
        return StreamingBatches(plan, data.workers)

    def checkpoint(self, path: str) -> Checkpoint:
        """Return the checkpoint at a user's path; its files are verified once a run.

        Raises:
            UserError: the path holds no usable checkpoint.
        """
        from mtptrain.training.checkpoint import find_checkpoint

        if path not in self._checkpoints:
            with waiting(f"verifying the checkpoint {path}"):
                self._checkpoints[path] = find_checkpoint(Path(path))
        return self._checkpoints[path]

    @property
    def document_settings(self) -> DataConfig:
        """The settings of the documents; for cached hidden states, those of the text behind them."""
        from mtptrain.hidden_cache.growing_cache import open_streams

        data = self.config.data
        if data.source is not DataSource.streams:
            return data
        return open_streams(data, self.config.distributed_timeout).identity.data.config()

    @property
    def piece_length(self) -> int:
        """Most tokens of a document that the backbone reads at once: the row length, at most its context."""
        return min(self.config.data.sequence_length, int(self.source.config.max_position_embeddings))

    @cached_property
    def policy(self) -> Policy:
        """The decoding policy under which heads are measured."""
        from mtptrain.decoding.policy import decoding_policy

        return decoding_policy(self.config.decoding)

    @cached_property
    def limits(self) -> Limits:
        """The length, stop tokens and stop strings that end a measured text.

        Raises:
            UserError: an entry of `decoding.stop` is not one token.
        """
        from mtptrain.decoding.results import Limits, StopStrings

        decoding = self.config.decoding
        strings = StopStrings(tuple(decoding.stop_strings), self.source.tokenizer) if decoding.stop_strings else None
        return Limits(decoding.max_new_tokens, self.stop_ids, strings)

    @cached_property
    def stop_ids(self) -> frozenset[int]:
        """The tokens that end a text: the backbone's end tokens and those of `decoding.stop`.

        Raises:
            UserError: an entry of `decoding.stop` is not one token.
        """
        tokenizer = self.source.tokenizer
        size = tokenizer.get_vocab_size()
        stop = set(self.source.ends.stop)
        for entry in self.config.decoding.stop:
            if isinstance(entry, int):
                ids = [entry] if 0 <= entry < size else []
            else:
                token = tokenizer.token_to_id(entry)
                ids = tokenizer.encode(entry, add_special_tokens=False).ids if token is None else [token]
            if len(ids) != 1:
                raise UserError(
                    f"decoding.stop={entry}: is not one token of the backbone's {size}; give the text of a single "
                    "token, or its id"
                )
            stop.update(ids)
        return frozenset(stop)

    @property
    def prompt_room(self) -> int:
        """Most tokens of a prompt: the backbone's context minus the tokens emitted and drafted after it.

        Raises:
            UserError: no room is left.
        """
        context, decoding = int(self.source.config.max_position_embeddings), self.config.decoding
        room = context - decoding.max_new_tokens - decoding.draft_length
        if room < 1:
            raise UserError(
                f"decoding.max_new_tokens={decoding.max_new_tokens}: leaves no room for a prompt in the backbone's "
                f"context of {context} tokens at decoding.draft_length={decoding.draft_length}; lower it"
            )
        return room

    # With weights

    def adopt(self, backbone: Backbone) -> None:
        """Use a backbone that is loaded already, in place of the one that the settings name.

        Raises:
            UserError: a draft does not fit in its sliding window.
        """
        self._check_window(backbone.source)
        self.__dict__ |= {"source": backbone.source, "backbone": backbone}

    @cached_property
    def backbone(self) -> Backbone:
        """The whole frozen backbone, on the run's device and in its dtype; it replaces one without decoder layers."""
        self.__dict__.pop("training_backbone", None)
        return self._load(has_layers=True)

    @cached_property
    def training_backbone(self) -> Backbone:
        """The backbone that training needs: without decoder layers if it reads cached streams and none is loaded."""
        is_partial = self.config.data.source is DataSource.streams and "backbone" not in self.__dict__
        return self._load(has_layers=False) if is_partial else self.backbone

    def _load(self, has_layers: bool) -> Backbone:
        from mtptrain.backbone.load import load_backbone
        from mtptrain.run.distributed import LOAD, choose_device, choose_dtype, joining_others

        device, source = choose_device(self.config.device), self.source
        dtype = choose_dtype(self.config.precision, device)
        with joining_others(LOAD):
            return load_backbone(self.config.backbone, device, dtype, has_layers, source)

    @property
    def fingerprint(self) -> str:
        """The fingerprint of the backbone; loads it for training if that is not known without its weights."""
        loaded = self.__dict__.get("backbone") or self.__dict__.get("training_backbone")
        return loaded.fingerprint if loaded else self.known_fingerprint or self.training_backbone.fingerprint

    @property
    def dtype_name(self) -> str:
        """Dtype of the backbone's arithmetic, e.g. `float32`."""
        from mtptrain.run.distributed import choose_device, choose_dtype

        return str(choose_dtype(self.config.precision, choose_device(self.config.device))).removeprefix("torch.")

    @property
    def can_decode(self) -> bool:
        """Whether the backbone decodes during training."""
        is_streams = self.config.data.source is DataSource.streams
        return not is_streams and self.config.backbone.placement is not Placement.zero3

    def head(self, setting: str) -> Head:
        """Return the head that a setting names: `stock`, or the path of a checkpoint.

        Raises:
            UserError: the head does not exist or belongs to another backbone.
        """
        return self.stock_head() if setting == "stock" else self.trained_head(self.checkpoint(setting))

    def stock_head(self) -> Head:
        """Return the head that came with the backbone."""
        from mtptrain.evaluation.heads import Head
        from mtptrain.mtp.stack import num_modules, stack_from_tensors
        from mtptrain.mtp.start import place, stock_tensors

        tensors = stock_tensors(self.backbone)
        depth = num_modules(tensors)
        stack = stack_from_tensors(self.backbone.config, depth, tensors, str(self.source.folder))
        stack = self.serve(place(stack, self.backbone).eval(), zero_first=False)
        return Head("stock", "stock", "shared" if depth == 1 else "stacked", stack, backbone=self.backbone.fingerprint)

    def trained_head(self, checkpoint: Checkpoint) -> Head:
        """Return the head of a checkpoint.

        Raises:
            UserError: the head was trained on another backbone.
        """
        from mtptrain.evaluation.heads import Head
        from mtptrain.mtp.stack import stack_from_tensors
        from mtptrain.mtp.start import place

        identity = checkpoint.head_identity(self.backbone.fingerprint)
        stack = stack_from_tensors(self.backbone.config, identity.depth, checkpoint.tensors(), str(checkpoint.folder))
        stack = self.serve(place(stack, self.backbone).eval(), identity.zero_first)
        folder, mode = str(checkpoint.folder), identity.mode.value
        passages, selection = checkpoint.passages(), checkpoint.selection()
        return Head("trained", folder, mode, stack, passages, selection, identity.backbone)

    def serve(self, stack: MtpStack, zero_first: bool) -> MtpStack:
        """Return modules after giving them the numerics of `decoding.served_as`; `zero_first` is that of training."""
        from mtptrain.mtp.numerics import served_numerics

        stack.compute_as(served_numerics(self.config.decoding.served_as, zero_first, stack.depth))
        return stack

    def describe_backbone(self) -> BackboneResult:
        """Return the backbone's entry in evaluation.json, with its loss on held-out text."""
        from mtptrain.evaluation.result import BackboneResult
        from mtptrain.losses.next_token import bits_per_byte

        backbone, rows = self.backbone, self.config.evaluation.heldout_sequences
        nats, bits = bits_per_byte(backbone.model, self.heldout_corpus, self.piece_length, rows)
        return BackboneResult(
            name=self.config.backbone.name,
            fingerprint=backbone.fingerprint,
            parameters=sum(p.numel() for p in backbone.model.parameters()),
            heldout_nats_per_token=nats,
            heldout_bits_per_byte=bits,
        )

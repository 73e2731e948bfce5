"""Settings of the training data: documents and their sequences, cached streams, and on-policy texts."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from mtptrain.config.choices import CollectEngine, DataFormat, DataSource, OnBadRow, StreamFormat, Turns
from mtptrain.config.rules import HELDOUT, MAX_DRAFT_LENGTH, TRAINING, check_fields, prompt_names, ranged, require

TEMPLATE_VARIABLES = {"messages", "tools", "documents", "add_generation_prompt", "conversations", "chat_template"}
DOCUMENTS = (DataSource.stdlib, DataSource.text)  # sources of separate documents


@dataclass(kw_only=True, slots=True)
class MixtureConfig:
    """One source of a mixture."""

    name: str | None = None  # in the metrics; null = file name of the path without its extension
    weight: float = ranged(1.0, above=0)  # share of the rows = weight / sum of all weights
    source: DataSource = DataSource.text
    path: str | None = None  # see DataConfig
    subset: str | None = None  # see DataConfig
    split: str | None = None  # see DataConfig
    field_name: str = "text"  # see DataConfig
    format: DataFormat = DataFormat.auto  # see DataConfig

    @property
    def label(self) -> str:
        """Name of the source in the metrics."""
        return self.name or Path(self.path or self.source.value).stem


@dataclass(kw_only=True, slots=True)
class DataConfig:
    """Documents and their conversion to sequences."""

    source: DataSource = DataSource.stdlib
    # text: a .txt, .jsonl, .json, .csv or .parquet file, a folder, or a `datasets` name; streams: a cache.
    path: str | None = None
    subset: str | None = None  # configuration of a `datasets` name; null = the only one
    split: str | None = None  # split of a `datasets` name; null = train
    field_name: str = "text"  # the column of rows: a text, or a list of messages
    format: DataFormat = DataFormat.auto  # of the rows; auto recognises it by their columns
    on_bad_row: OnBadRow = OnBadRow.error  # skip leaves out rows that cannot be used, and counts them
    streaming: bool = False  # tokenise documents during training instead of before it
    # data=streams: train shard by shard, also while +recipe=collect is still writing the cache.
    follow: bool = False
    # data.follow: delete the shards that neither training nor its newest checkpoint needs; there is one epoch then.
    delete_consumed: bool = False
    mixture: list[MixtureConfig] = field(default_factory=list)  # weighted sources, all tokenised during training
    # Worker processes that read and tokenise texts per training process; 0 = the training process itself.
    workers: int = ranged(1, at_least=0)
    packages: list[str] = field(default_factory=list)  # data=stdlib: installed packages added to the training split
    # Tokens of a row, into which documents are packed.
    sequence_length: int = ranged(256, at_least=3, rule="must be at least 3 tokens (depth + 2)")
    # A jinja file for conversations, or `builtin`; null = the tokenizer's own template.
    chat_template: str | None = None
    # Further variables of the chat template, for prompts too, such as enable_thinking: false.
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    # Answers of a conversation that are targets: all in one row, the last, each in its own row.
    turns: Turns = Turns.all
    max_documents: int | None = ranged(None, at_least=1)  # read at most so many on each side of the hold-out
    max_tokens: int | None = ranged(None, at_least=1)  # tokenise whole documents up to so many on each side
    heldout_every: int = ranged(16, at_least=2)  # one document in this many is held out, by the hash of its name
    cache_dir: str | None = None  # null = $XDG_CACHE_HOME/mtptrain or ~/.cache/mtptrain

    def __post_init__(self) -> None:
        check_fields(self, "data")
        self._check_mixture()
        taken = sorted(TEMPLATE_VARIABLES.intersection(self.chat_template_kwargs))
        require(not taken, "data.chat_template_kwargs", taken, "are set by mtptrain; give other variables")
        require(
            self.source is DataSource.text or not self.streaming,
            "data.streaming",
            self.streaming,
            "is for data=text; leave it false for other sources, which are finite",
        )
        require(
            self.source is DataSource.streams or not self.follow,
            "data.follow",
            self.follow,
            "waits for the shards of a stream cache; train with +recipe=distill data=streams, and data.path set to the "
            "output_dir of +recipe=collect",
        )
        require(
            self.follow or not self.delete_consumed,
            "data.delete_consumed",
            self.delete_consumed,
            "is for one pass over a cache in the order of its shards; set data.follow=true",
        )
        require(
            self.max_tokens is None or not self.is_streamed,
            "data.max_tokens",
            self.max_tokens,
            "is for text that is tokenised before training; set data.max_documents or train.steps instead",
        )

    def require_path(self) -> None:
        """Raise a `UserError` if the source needs a path and has none."""
        require(
            self.source is not DataSource.text or bool(self.path) or bool(self.mixture),
            "data.path",
            self.path,
            "data=text and data=chat need a .txt, .jsonl, .json, .csv or .parquet file, a folder of them, or a "
            "`datasets` name",
        )
        require(
            self.source is not DataSource.streams or bool(self.path),
            "data.path",
            self.path,
            "data=streams needs the folder that +recipe=collect wrote",
        )

    @property
    def is_streamed(self) -> bool:
        """Whether documents are tokenised during training."""
        return self.streaming or bool(self.mixture)

    def sources(self) -> dict[str, DataConfig]:
        """Return the settings of each source by its name; without a mixture, these settings under the name `data`."""
        if not self.mixture:
            return {"data": self}
        return {one.label: self._of_source(one) for one in self.mixture}

    def weights(self) -> list[float]:
        """Return the weights of the sources in their order."""
        return [one.weight for one in self.mixture] or [1.0]

    def _of_source(self, one: MixtureConfig) -> DataConfig:
        own = {part.name: getattr(one, part.name) for part in fields(one) if part.name not in ("name", "weight")}
        return replace(self, mixture=[], streaming=one.source is DataSource.text, **own)

    def _check_mixture(self) -> None:
        labels = [one.label for one in self.mixture]
        require(len(set(labels)) == len(labels), "data.mixture", labels, "sources need names of their own; set `name`")
        for one in self.mixture:
            setting = f"data.mixture.{one.label}"
            check_fields(one, setting)
            require(one.source in DOCUMENTS, f"{setting}.source", one.source.value, "a mixture is of documents")
            require(
                one.source is not DataSource.text or bool(one.path),
                f"{setting}.path",
                one.path,
                "a source of text needs a file, a folder or a data set",
            )
        require(
            not self.mixture or self.source in DOCUMENTS,
            "data",
            self.source.value,
            "data.mixture brings its own sources, of documents; leave one of them out",
        )
        require(
            not self.mixture or self.path is None,
            "data.path",
            self.path,
            "data.mixture brings its own sources; leave one of them out",
        )


@dataclass(kw_only=True, slots=True)
class CollectConfig:
    """Collection of the backbone's streams into a cache."""

    format: StreamFormat = StreamFormat.bf16
    # A shard ends with the document that reaches this many tokens; a killed run loses at most one shard. A process that
    # trains hashes each shard that it reads a row of; 1e9 tokens make 30,500 files, of 1.1 GB each for V4-Flash.
    shard_tokens: int = ranged(32768, at_least=1)
    plan_only: bool = False  # print the required disk space and stop; `--plan` is short for true
    engine: CollectEngine = CollectEngine.transformers
    tensor_parallel: int | None = ranged(None, at_least=1)  # GPUs among which vLLM splits each layer; null = all
    # vLLM is refused outside of these bounds; both engines run 64 documents before the first shard.
    min_cosine: float = ranged(0.99, at_least=-1, at_most=1)  # between their streams, the mean of the worst document
    min_agreement: float = ranged(0.95, at_least=0, at_most=1)  # share of tokens with the same most likely next token
    max_kl: float = ranged(0.05, at_least=0)  # nats a token, of vLLM's distributions from those of transformers

    def __post_init__(self) -> None:
        check_fields(self, "collect")


@dataclass(kw_only=True, slots=True)
class OnPolicyConfig:
    """`data=on_policy`: prompts and their continuation by the backbone."""

    path: str | None = None  # folder of the texts; null = one in data.cache_dir, named by their identity
    prompts: Any = TRAINING  # `training`, or any value of the setting `prompts` except `heldout`
    num_prompts: int = ranged(512, at_least=1)  # or conversations, evenly spread over `prompts`; files may hold fewer
    prompt_tokens: int = ranged(32, at_least=1)  # tokens of a prompt sliced from training documents
    max_new_tokens: int = ranged(224, at_least=1)  # tokens a prompt; with prompt_tokens a row of data.sequence_length
    # 0 = greedy.
    temperature: float = ranged(1.0, at_least=0, rule="must be 0 (greedy) or above")
    # Number of most likely tokens that may be sampled; null = all.
    top_k: int | None = ranged(None, at_least=1, rule="must be at least 1, or null to keep all tokens")
    # Smallest probability mass of the most likely tokens that may be sampled.
    top_p: float = ranged(1.0, above=0, at_most=1, rule="must lie in (0, 1]; 1 keeps all tokens")
    min_p: float = ranged(0.0, at_least=0, at_most=1)  # see DecodingConfig, as the three penalties
    repetition_penalty: float = ranged(1.0, above=0)
    frequency_penalty: float = ranged(0.0, at_least=-2, at_most=2)
    presence_penalty: float = ranged(0.0, at_least=-2, at_most=2)
    # Tokens drafted per pass by the head that training starts from; 0 = plain decoding.
    draft_length: int = ranged(1, at_least=0, at_most=MAX_DRAFT_LENGTH)
    batch_size: int = ranged(64, at_least=1)  # prompts decoded and written together; a killed process loses one batch

    def __post_init__(self) -> None:
        check_fields(self, "on_policy")
        self.prompts = prompt_names("on_policy.prompts", self.prompts, TRAINING)
        require(HELDOUT not in self.prompts, "on_policy.prompts", HELDOUT, "is for measuring heads; name other prompts")


def require_documents(data: DataConfig, task: str) -> None:
    """Refuse data other than documents, for a recipe that reads a text once.

    Args:
        data: section of the settings.
        task: name of the recipe.

    Raises:
        UserError: the data are cached hidden states, the backbone's own texts, a mixture, or read during training.
    """
    generated = {
        DataSource.streams: "the hidden states of a text",
        DataSource.on_policy: "text that the backbone writes during training",
    }
    require(
        data.source not in generated,
        "data",
        data.source.value,
        f"is {generated.get(data.source)}, and +recipe={task} reads the text itself; set data=stdlib or text",
    )
    rule = f"is for the training of heads, and +recipe={task} reads its text before it starts; leave it false"
    require(not data.streaming, "data.streaming", data.streaming, rule)
    require(
        not data.mixture,
        "data.mixture",
        list(data.sources()),
        f"weighs the training text of heads, and +recipe={task} reads a text once; set data.path",
    )

"""Documents and how they become sequences."""

from __future__ import annotations

from dataclasses import dataclass, field

from mtptrain.config.choices import DataSource
from mtptrain.config.rules import require


@dataclass(kw_only=True, slots=True)
class DataConfig:
    """Documents and how they become sequences."""

    source: DataSource = DataSource.stdlib
    path: str | None = None  # text: a .txt/.jsonl/.parquet file, a folder, or a `datasets` name; streams: a cache
    field_name: str = (
        "text"  # the column of .jsonl, .parquet and `datasets` rows that holds the text, or lists of messages
    )
    streaming: bool = False  # read documents as training needs them instead of tokenising all first
    packages: list[str] = field(default_factory=list)  # data=stdlib: installed packages that join the training split
    sequence_length: int = 256  # tokens
    chat_template: str | None = None  # a jinja file for conversations; null = the one that came with the tokenizer
    heldout_every: int = 16  # one document in this many is held out, by hash of its name
    cache_dir: str | None = None  # null = $XDG_CACHE_HOME/mtptrain or ~/.cache/mtptrain

    def __post_init__(self) -> None:
        length = self.sequence_length
        require(length >= 3, "data.sequence_length", length, "must be at least 3 tokens (depth + 2)")
        require(self.heldout_every >= 2, "data.heldout_every", self.heldout_every, "must be at least 2")
        require(
            self.source is not DataSource.text or bool(self.path),
            "data.path",
            self.path,
            "data=text needs a .txt, .jsonl or .parquet file, a folder of them, or a name for datasets.load_dataset",
        )
        require(
            self.source is not DataSource.streams or bool(self.path),
            "data.path",
            self.path,
            "data=streams needs the folder that +recipe=collect wrote",
        )
        require(
            self.source is DataSource.text or not self.streaming,
            "data.streaming",
            self.streaming,
            "is for data=text; what else there is has an end, leave it false",
        )

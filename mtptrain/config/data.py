"""Documents and how they become sequences."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from pathlib import Path

from mtptrain.config.choices import DataSource
from mtptrain.config.rules import require

DOCUMENTS = (DataSource.stdlib, DataSource.text)  # sources that are read document by document


@dataclass(kw_only=True, slots=True)
class MixtureConfig:
    """One source of a mixture."""

    name: str | None = None  # in the metrics; null = the last part of the path without its ending
    weight: float = 1.0  # above 0; its share of the rows is its weight over the sum of all
    source: DataSource = DataSource.text
    path: str | None = None  # see DataConfig
    field_name: str = "text"  # see DataConfig

    @property
    def label(self) -> str:
        """What it is called in the metrics."""
        return self.name or Path(self.path or self.source.value).stem


@dataclass(kw_only=True, slots=True)
class DataConfig:
    """Documents and how they become sequences."""

    source: DataSource = DataSource.stdlib
    path: str | None = None  # text: a .txt/.jsonl/.parquet file, a folder, or a `datasets` name; streams: a cache
    field_name: str = "text"  # the column of .jsonl, .parquet and `datasets` rows: a text, or a list of messages
    streaming: bool = False  # read documents as training needs them instead of tokenising all first
    mixture: list[MixtureConfig] = field(default_factory=list)  # sources with weights, all read as streams
    workers: int = 1  # processes that read and tokenise streams for one of training; 0 = that one itself
    packages: list[str] = field(default_factory=list)  # data=stdlib: installed packages that join the training split
    sequence_length: int = 256  # tokens
    chat_template: str | None = None  # a jinja file for conversations; null = the one that came with the tokenizer
    heldout_every: int = 16  # one document in this many is held out, by hash of its name
    cache_dir: str | None = None  # null = $XDG_CACHE_HOME/mtptrain or ~/.cache/mtptrain

    def __post_init__(self) -> None:
        length = self.sequence_length
        require(self.workers >= 0, "data.workers", self.workers, "must not be negative")
        self._check_mixture()
        require(length >= 3, "data.sequence_length", length, "must be at least 3 tokens (depth + 2)")
        require(self.heldout_every >= 2, "data.heldout_every", self.heldout_every, "must be at least 2")
        require(
            self.source is not DataSource.text or bool(self.path) or bool(self.mixture),
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

    @property
    def is_streamed(self) -> bool:
        """Whether documents are read as training needs them."""
        return self.streaming or bool(self.mixture)

    def sources(self) -> dict[str, DataConfig]:
        """The settings of each source by its name; of `data` itself where there is no mixture."""
        if not self.mixture:
            return {"data": self}
        return {one.label: self._of_source(one) for one in self.mixture}

    def weights(self) -> list[float]:
        """Weights of the sources, in their order."""
        return [one.weight for one in self.mixture] or [1.0]

    def _of_source(self, one: MixtureConfig) -> DataConfig:
        is_text = one.source is DataSource.text
        return replace(self, mixture=[], source=one.source, path=one.path, field_name=one.field_name, streaming=is_text)

    def _check_mixture(self) -> None:
        labels = [one.label for one in self.mixture]
        require(len(set(labels)) == len(labels), "data.mixture", labels, "sources need names of their own; set `name`")
        for one in self.mixture:
            setting = f"data.mixture.{one.label}"
            require(0 < one.weight < math.inf, f"{setting}.weight", one.weight, "must be above 0")
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

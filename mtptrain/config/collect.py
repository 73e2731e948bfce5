"""How streams are collected into a cache."""

from __future__ import annotations

from dataclasses import dataclass

from mtptrain.config.choices import StreamFormat
from mtptrain.config.rules import require


@dataclass(kw_only=True, slots=True)
class CollectConfig:
    """How streams are collected into a cache."""

    format: StreamFormat = StreamFormat.bf16
    shard_tokens: int = 16384  # a shard ends with the document that reaches this many tokens; a kill loses one at most
    plan_only: bool = False  # print the disk need and stop; `--plan` is short for true

    def __post_init__(self) -> None:
        require(self.shard_tokens >= 1, "collect.shard_tokens", self.shard_tokens, "must be at least 1")

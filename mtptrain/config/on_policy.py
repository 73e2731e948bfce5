"""How the backbone's own texts are made, to train from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mtptrain.config.rules import HELDOUT, MAX_DRAFT_LENGTH, TRAINING, check_policy, prompt_names, require


@dataclass(kw_only=True, slots=True)
class OnPolicyConfig:
    """`data=on_policy`: prompts and how the backbone continues them."""

    path: str | None = None  # folder of the texts; null = one in data.cache_dir, named by what they are
    prompts: Any = TRAINING  # `training`, or what the setting `prompts` takes but for `heldout`
    num_prompts: int = 512  # prompts or conversations, evenly spread over `prompts`; files may hold fewer
    prompt_tokens: int = 32  # tokens of a prompt cut from training documents
    max_new_tokens: int = 224  # tokens a prompt; with prompt_tokens a row of data.sequence_length
    temperature: float = 1.0  # 0 = greedy
    top_k: int | None = None  # likeliest tokens that may be sampled; null = all
    top_p: float = 1.0  # in (0, 1], smallest mass of likeliest tokens that may be sampled
    draft_length: int = 1  # tokens that the head the training starts from drafts a pass; 0 = plain decoding
    batch_size: int = 64  # prompts decoded and written together; a kill loses one batch a process

    def __post_init__(self) -> None:
        for name in ("num_prompts", "prompt_tokens", "max_new_tokens", "batch_size"):
            require(getattr(self, name) >= 1, f"on_policy.{name}", getattr(self, name), "must be at least 1")
        check_policy("on_policy", self.temperature, self.top_k, self.top_p)
        length = self.draft_length
        require(0 <= length <= MAX_DRAFT_LENGTH, "on_policy.draft_length", length, "must lie between 0 and 8")
        self.prompts = prompt_names("on_policy.prompts", self.prompts, TRAINING)
        require(HELDOUT not in self.prompts, "on_policy.prompts", HELDOUT, "is what heads are measured on; name others")

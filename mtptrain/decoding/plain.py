"""Plain decoding through the same engine that verifies drafts: the baseline of every comparison."""

from __future__ import annotations

from transformers import DeepseekV4ForCausalLM

from mtptrain.decoding.policy import GREEDY, Policy
from mtptrain.decoding.records import DecodedBatch, Limits
from mtptrain.decoding.speculative import decode_speculative


def decode_plain(
    model: DeepseekV4ForCausalLM,
    prompts: list[list[int]],
    limits: Limits,
    policy: Policy = GREEDY,
    seeds: list[int] | None = None,
) -> DecodedBatch:
    """Continuations of some prompts, a token a pass; see `decode_speculative`."""
    return decode_speculative(model, None, prompts, 0, limits, policy, seeds)

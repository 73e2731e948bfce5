"""The speculative-decoding counters of vLLM and SGLang, read from their Prometheus text.

Names: vLLM 0.33.0, vllm/v1/spec_decode/metrics.py; SGLang 0.5.23, sglang/srt/observability/metrics_collector.py, read
in 2026-11.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

SAMPLE = re.compile(r"^([a-zA-Z_:][\w:]*)(?:\{(.*)\})? (\S+)", re.MULTILINE)
LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')
VLLM, SGLANG = "vLLM", "SGLang"
PASSES = {VLLM: "vllm:spec_decode_num_drafts_total", SGLANG: "sglang:spec_verify_calls_total"}
TOKENS = {VLLM: "vllm:generation_tokens_total", SGLANG: "sglang:generation_tokens_total"}
ACCEPTED = "vllm:spec_decode_num_accepted_tokens_per_pos_total"  # SGLang counts none by position
STEPS = "sglang:spec_num_steps"  # a gauge; 0 before the first draft


@dataclass(frozen=True, slots=True)
class Counters:
    """Counters at one moment, summed over all engines of the server.

    Attributes:
        server: `vLLM` or `SGLang`.
        passes: verify passes.
        tokens: generated tokens of all requests.
        accepted: drafts kept at each position; empty for SGLang.
        draft_length: K; 0 if SGLang has not drafted yet.
    """

    server: str
    passes: float
    tokens: float
    accepted: list[float]
    draft_length: int


def parse_counters(text: str) -> Counters | None:
    """Return the counters in a Prometheus text; None without counters of speculative decoding."""
    samples = [
        (name, dict(LABEL.findall(labels)), float(value))
        for name, labels, value in SAMPLE.findall(text)
        if name.startswith(("vllm:", "sglang:"))
    ]
    names = {name for name, _, _ in samples}
    # SGLang shows a counter from its first increment on, and the gauge from the start.
    server = VLLM if PASSES[VLLM] in names else SGLANG if {PASSES[SGLANG], STEPS} & names else None
    if server is None:
        return None

    def total(wanted: str) -> float:
        return sum(value for name, _, value in samples if name == wanted)

    positions = {int(labels["position"]) for name, labels, _ in samples if name == ACCEPTED}
    accepted = [
        sum(value for name, labels, value in samples if name == ACCEPTED and int(labels["position"]) == k)
        for k in sorted(positions)
    ]
    steps = max((int(value) for name, _, value in samples if name == STEPS), default=0)
    return Counters(server, total(PASSES[server]), total(TOKENS[server]), accepted, len(accepted) or steps)

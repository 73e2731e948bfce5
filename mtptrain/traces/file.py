"""Traces: prompts with the backbone's own continuations, recorded, written to a file and read back."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from transformers import DeepseekV4ForCausalLM

from mtptrain.config.backbone import BACKBONE_CHOICE
from mtptrain.data.files import check_readable, json_lines
from mtptrain.decoding.draws import row_seed
from mtptrain.decoding.policy import Policy
from mtptrain.decoding.results import Limits
from mtptrain.decoding.speculative import decode_plain
from mtptrain.errors import UserError
from mtptrain.run.artifact import check_identity
from mtptrain.run.storage import write_text
from mtptrain.run.typed_json import MismatchError, from_json
from mtptrain.traces.prompts import Prompt, Source

TRACES_FILE = "traces.jsonl"  # of an evaluation
SCHEMA = 1
PROMPTS_PER_BATCH = 16


@dataclass(frozen=True, slots=True)
class Trace:
    """A prompt and the backbone's continuation of it.

    Attributes:
        prompt: the prompt.
        tokens: emitted token ids.
        gaps: top-2 logit gap of the backbone at each token.
        probabilities: probability of each token under the decoding policy; 1 in greedy decoding.
    """

    prompt: Prompt
    tokens: list[int]
    gaps: list[float]
    probabilities: list[float]


def record_traces(
    model: DeepseekV4ForCausalLM,
    prompts: list[Prompt],
    limits: Limits,
    policy: Policy,
    seed: int,
    report: Callable[[int, int], None] = lambda prompts, tokens: None,
) -> list[Trace]:
    """Continue every prompt with the backbone alone; return traces in the order of the prompts.

    Args:
        model: the backbone.
        prompts: prompts of any length; prompts of similar length are decoded together.
        limits: maximum length and stop tokens of a text.
        policy: decoding policy.
        seed: seed of the draws, which depend only on it and on the prompt's index.
        report: gets the number of prompts and of tokens of each group that is done.
    """
    traces: dict[int, Trace] = {}
    order = sorted(range(len(prompts)), key=lambda number: len(prompts[number].tokens))
    for start in range(0, len(order), PROMPTS_PER_BATCH):
        group = order[start : start + PROMPTS_PER_BATCH]
        tokens = [prompts[number].tokens for number in group]
        run = decode_plain(model, tokens, limits, policy, [row_seed(seed, number) for number in group])
        for number, record in zip(group, run.rows, strict=True):
            traces[number] = Trace(prompts[number], record.tokens, record.gaps, record.probabilities)
        report(len(group), sum(len(record.tokens) for record in run.rows))
    return [traces[number] for number in range(len(prompts))]


@dataclass(frozen=True, slots=True)
class TraceHeader:
    """The provenance of a set of traces.

    Attributes:
        backbone: fingerprint of the model that wrote the texts.
        dtype: dtype of its arithmetic.
        temperature, top_k, top_p: the decoding policy.
        max_new_tokens, stop: end of a text; `stop` in ascending order.
        seed: seed of the draws.
        chat_template: SHA-256 of the chat template, or None.
        sources: sources of the prompts.
        dropped: number of turns left out because their conversation had outgrown the context.
        min_p, repetition_penalty, frequency_penalty, presence_penalty: of the decoding policy.
        stop_strings: texts that ended a text.
    """

    backbone: str
    dtype: str
    temperature: float
    top_k: int | None
    top_p: float
    max_new_tokens: int
    stop: list[int]
    seed: int
    chat_template: str | None
    sources: list[Source]
    dropped: int
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    stop_strings: list[str] = field(default_factory=list)


# Fields that must agree with the run that reads the traces, with the setting of each.
BINDING = {
    "backbone": BACKBONE_CHOICE,
    "dtype": "precision",
    "temperature": "decoding.temperature",
    "top_k": "decoding.top_k",
    "top_p": "decoding.top_p",
    "max_new_tokens": "decoding.max_new_tokens",
    "stop": "decoding.stop",
    **{
        name: f"decoding.{name}"
        for name in ("min_p", "repetition_penalty", "frequency_penalty", "presence_penalty", "stop_strings")
    },
}


@dataclass(frozen=True, slots=True)
class TraceSet:
    """Traces and their provenance."""

    header: TraceHeader
    traces: list[Trace]


def write_trace_set(path: Path, traces: TraceSet) -> None:
    """Write a trace set; docs/prompts.md describes its lines."""
    lines = [{"schema": SCHEMA, "traces": len(traces.traces), **asdict(traces.header)}]
    for trace in traces.traces:
        prompt = trace.prompt
        lines.append(
            {
                "prompt": prompt.tokens,
                "tokens": trace.tokens,
                "gaps": trace.gaps,
                "probabilities": trace.probabilities,
                "domain": prompt.domain,
                "group": prompt.group,
            }
        )
    write_text(path, "".join(json.dumps(line) + "\n" for line in lines))


def read_trace_set(path: Path, setting: str = "evaluation.traces") -> TraceSet:
    """Read the file of `write_trace_set`; errors name `setting`.

    Raises:
        UserError: the file cannot be read, has another schema, or is damaged.
    """
    if path.is_dir():
        raise UserError(f"{setting}={path}: is a folder; give the file, such as {path / TRACES_FILE}")
    setting = f"{setting}={path}"
    check_readable(setting, path)
    lines = [row for _, row in json_lines(setting, path)]
    first = lines[0] if lines else {}
    if first.pop("schema", None) != SCHEMA:
        raise UserError(f"{setting}: is no trace set of schema {SCHEMA}; give the traces.jsonl of an evaluation")
    try:
        count = first.pop("traces")
        header = from_json(TraceHeader, first)
        traces = [
            Trace(Prompt(row["prompt"], row["domain"], row["group"]), row["tokens"], row["gaps"], row["probabilities"])
            for row in lines[1:]
        ]
    except (KeyError, TypeError, MismatchError) as error:
        raise UserError(f"{setting}: is damaged ({error}); record it anew") from None
    if len(traces) != count or not count:
        raise UserError(f"{setting}: holds {len(traces)} traces of {count}; record it anew")
    return TraceSet(header, traces)


def check_trace_set(path: Path, have: TraceHeader, want: TraceHeader) -> None:
    """Raise a `UserError` unless traces come from the distribution that this run would record."""
    check_identity(f"evaluation.traces={path}", have, want, BINDING, "record traces of your own")

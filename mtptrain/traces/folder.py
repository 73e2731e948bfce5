"""The artifact of `data=on_policy`: a folder of trace sets, one for each batch of prompts (docs/data.md)."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from mtptrain.run.artifact import Artifact, Kind, add_part, check_identity, open_artifact
from mtptrain.traces.file import Trace, TraceSet, read_trace_set, write_trace_set

SETTING = "on_policy.path"
ENDS = ("stopped", "full", "empty")


@dataclass(frozen=True, slots=True)
class TextIdentity:
    """The identity of a folder of texts.

    Attributes:
        backbone: fingerprint of the model that writes them.
        dtype: of its arithmetic.
        temperature, top_k, top_p: of the decoding policy.
        max_new_tokens, stop: where a text ends; `stop` in rising order.
        prompts: SHA-256 of all prompts and turns in tokens, and of the chat template.
    """

    backbone: str
    dtype: str
    temperature: float
    top_k: int | None
    top_p: float
    max_new_tokens: int
    stop: list[int]
    prompts: str


@dataclass(frozen=True, slots=True)
class TextMaking:
    """How texts are made, which does not change their distribution; a folder is finished the way it was begun.

    Attributes:
        seed: of the draws.
        draft_length: tokens that a head drafts a pass.
        batch_size: prompts a file.
    """

    seed: int
    draft_length: int
    batch_size: int


@dataclass(frozen=True, slots=True)
class TextContent:
    """How texts were made, and counts of prompts, texts, tokens and failures."""

    making: TextMaking
    counts: dict[str, int]


Texts = Artifact[TextIdentity, TextContent]
TEXTS: Kind[TextIdentity, TextContent] = Kind(
    name="folder of texts",
    schema=2,
    identity=TextIdentity,
    content=TextContent,
    settings={
        "backbone": "backbone.path",
        "dtype": "precision",
        "temperature": "on_policy.temperature",
        "top_k": "on_policy.top_k",
        "top_p": "on_policy.top_p",
        "max_new_tokens": "on_policy.max_new_tokens",
        "stop": "decoding.stop",
        "prompts": "on_policy.prompts",
    },
    missing="choose another folder",
    damaged="choose another folder",
    repair="restore it, or delete it and manifest.json: the next run makes it again",
)


def text_file(number: int) -> str:
    """Name of a batch's file."""
    return f"texts_{number:05d}.jsonl"


def outcome(trace: Trace, stop: list[int]) -> str:
    """`stopped` at a stop token, `full` at the limit, or `empty`: nothing but a stop token came."""
    if trace.tokens[-1] not in stop:
        return "full"
    return "stopped" if len(trace.tokens) > 1 else "empty"


def write_batch(folder: Path, number: int, traces: TraceSet) -> None:
    """Write the file of a batch and, once that is on disk, its record."""
    write_trace_set(folder / text_file(number), traces)
    ends = Counter(outcome(trace, traces.header.stop) for trace in traces.traces)
    counts = {
        "prompts": len({trace.prompt.group for trace in traces.traces}),
        "texts": ends["stopped"] + ends["full"],
        "tokens": sum(len(trace.tokens) for trace in traces.traces),
        **{name: ends[name] for name in ENDS},
        "dropped_turns": traces.header.dropped,
    }
    add_part(folder, text_file(number), counts)


def open_texts(folder: Path, identity: TextIdentity) -> Texts | None:
    """The whole folder at `on_policy.path`, its files unverified; None if it is not whole yet.

    Raises:
        UserError: it is damaged, or holds other texts than `identity` asks for.
    """
    if not (folder / TEXTS.manifest).exists():
        return None
    texts = open_artifact(TEXTS, SETTING, folder)
    check_identity(texts.where, texts.identity, identity, TEXTS.settings)
    return texts


def read_texts(texts: Texts) -> list[Trace]:
    """Every trace of a folder; raises a `UserError` for a file that is missing or altered."""
    texts.verify(texts.files)
    return [trace for name in texts.files for trace in read_trace_set(texts.folder / name, SETTING).traces]

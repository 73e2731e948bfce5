"""The artifact of `data=on_policy`: a folder of trace sets, one per batch of prompts; see docs/data.md."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from mtptrain.config.backbone import BACKBONE_CHOICE
from mtptrain.run.artifact import Artifact, Kind, add_part, check_identity, is_begun, open_artifact, read_begun
from mtptrain.traces.file import Trace, TraceSet, read_trace_set, write_trace_set

SETTING = "on_policy.path"
ENDS = ("stopped", "full", "empty")
PENALTIES = ("repetition_penalty", "frequency_penalty", "presence_penalty")
POLICY = ("temperature", "top_k", "top_p", "min_p", *PENALTIES)


@dataclass(frozen=True, slots=True)
class TextIdentity:
    """The identity of a folder of texts.

    Attributes:
        backbone: fingerprint of the model that writes them.
        dtype: dtype of its arithmetic.
        temperature, top_k, top_p, min_p, repetition_penalty, frequency_penalty, presence_penalty: the decoding policy.
        max_new_tokens, stop, stop_strings: end of a text; `stop` in ascending order.
        prompts: SHA-256 of the chat template's hash, all prompts in tokens and all turns.
    """

    backbone: str
    dtype: str
    temperature: float
    top_k: int | None
    top_p: float
    min_p: float
    repetition_penalty: float
    frequency_penalty: float
    presence_penalty: float
    max_new_tokens: int
    stop: list[int]
    stop_strings: list[str]
    prompts: str


@dataclass(frozen=True, slots=True)
class TextMaking:
    """Settings of the decoding that do not change the texts' distribution; a folder keeps them until it is finished.

    Attributes:
        seed: seed of the draws.
        draft_length: tokens that a head drafts per pass.
        batch_size: prompts per file.
    """

    seed: int
    draft_length: int
    batch_size: int


@dataclass(frozen=True, slots=True)
class TextContent:
    """The decoding settings of texts, and counts of prompts, texts, tokens and failures."""

    making: TextMaking
    counts: dict[str, int]


TextFolder = Artifact[TextIdentity, TextContent]
TEXTS: Kind[TextIdentity, TextContent] = Kind(
    name="folder of texts",
    schema=3,
    identity=TextIdentity,
    content=TextContent,
    settings={
        "backbone": BACKBONE_CHOICE,
        "dtype": "precision",
        **{name: f"on_policy.{name}" for name in POLICY},
        "max_new_tokens": "on_policy.max_new_tokens",
        "stop": "decoding.stop",
        "stop_strings": "decoding.stop_strings",
        "prompts": "on_policy.prompts",
    },
    missing="choose another folder",
    damaged="choose another folder",
    repair="restore it, or delete it and manifest.json: the next run makes it again",
)


def text_file(number: int) -> str:
    """Return the name of a batch's file."""
    return f"texts_{number:05d}.jsonl"


def outcome(trace: Trace, stop: list[int], max_new_tokens: int) -> str:
    """Return how a text ended: `stopped` by token or string, `full` at the limit, or `empty`: a stop token only."""
    if trace.tokens[-1] in stop:
        return "stopped" if len(trace.tokens) > 1 else "empty"
    return "stopped" if len(trace.tokens) < max_new_tokens else "full"


def write_batch(folder: Path, number: int, traces: TraceSet) -> None:
    """Write the file of a batch, then its record."""
    write_trace_set(folder / text_file(number), traces)
    header = traces.header
    ends = Counter(outcome(trace, header.stop, header.max_new_tokens) for trace in traces.traces)
    counts = {
        "prompts": len({trace.prompt.group for trace in traces.traces}),
        "texts": ends["stopped"] + ends["full"],
        "tokens": sum(len(trace.tokens) for trace in traces.traces),
        **{name: ends[name] for name in ENDS},
        "dropped_turns": header.dropped,
    }
    add_part(folder, text_file(number), counts)


def open_texts(folder: Path, identity: TextIdentity) -> TextFolder | None:
    """Return the complete folder at `on_policy.path` without verifying its files; None if it is not complete yet.

    Raises:
        UserError: the folder is damaged or has another identity.
    """
    if not (folder / TEXTS.manifest).exists():
        return None
    texts = open_artifact(TEXTS, SETTING, folder)
    check_identity(texts.where, texts.identity, identity, TEXTS.settings)
    return texts


def stored_identity(folder: Path) -> TextIdentity | None:
    """Return the identity of the texts at `on_policy.path`, complete or not; None if the folder holds none.

    Raises:
        UserError: the folder is damaged.
    """
    if (folder / TEXTS.manifest).exists():
        return open_artifact(TEXTS, SETTING, folder).identity
    return read_begun(TEXTS, SETTING, folder) if is_begun(folder) else None


def read_texts(texts: TextFolder) -> list[Trace]:
    """Return all traces of a folder; raise a `UserError` if a file is missing or altered."""
    texts.verify(texts.files)
    return [trace for name in texts.files for trace in read_trace_set(texts.folder / name, SETTING).traces]

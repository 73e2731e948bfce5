"""Traces that are made batch by batch: a folder of trace sets, one a batch, and a manifest once it is whole."""

from __future__ import annotations

import json
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mtptrain.errors import UserError
from mtptrain.evaluation.trace import Trace
from mtptrain.evaluation.trace_set import TraceSet, read_trace_set, write_trace_set
from mtptrain.storage import sha256_file, write_json

MANIFEST, BEGUN, SCHEMA = "manifest.json", "begun.json", 1
SETTING = "on_policy.path"
STALE_SECONDS = 60.0  # a file is written in far less


@dataclass(frozen=True, slots=True)
class TextIdentity:
    """What the texts of a folder are; texts that differ in any of it are others.

    Attributes:
        backbone: fingerprint of the model that writes them.
        dtype: of its arithmetic.
        temperature, top_k, top_p: what they are drawn with.
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


# The setting that each part of the identity comes from.
SAID_BY = {
    "backbone": "backbone.path",
    "dtype": "precision",
    "temperature": "on_policy.temperature",
    "top_k": "on_policy.top_k",
    "top_p": "on_policy.top_p",
    "max_new_tokens": "on_policy.max_new_tokens",
    "stop": "decoding.stop",
    "prompts": "on_policy.prompts",
}


@dataclass(frozen=True, slots=True)
class TextMaking:
    """How texts are made, which does not change what they are; a folder is finished the way it was begun.

    Attributes:
        seed: of the draws.
        draft_length: tokens that a head drafts a pass.
        batch_size: prompts a file.
    """

    seed: int
    draft_length: int
    batch_size: int


@dataclass(frozen=True, slots=True)
class TextManifest:
    """A whole folder: what it holds, the SHA-256 of each file by name, and counts of what became of the prompts."""

    folder: Path
    making: TextMaking
    files: dict[str, str]
    counts: dict[str, int]

    def traces(self) -> list[Trace]:
        """Every trace.

        Raises:
            UserError: a file is missing or altered.
        """
        found: list[Trace] = []
        for name, sha256 in self.files.items():
            path = self.folder / name
            if not path.is_file() or sha256_file(path) != sha256:
                raise UserError(
                    f"{SETTING}={self.folder}: {name} is missing or altered (its SHA-256 differs); restore it, or "
                    f"delete it and {MANIFEST}: the next run makes it again"
                )
            found += read_trace_set(path, SETTING).traces
        return found


def begin_folder(folder: Path, identity: TextIdentity, making: TextMaking) -> TextMaking:
    """Begin a folder, or continue the one that an interrupted run began; returns how it is to be made.

    Raises:
        UserError: it holds other texts, or something else.
    """
    if not (folder / BEGUN).exists():
        if folder.exists() and any(folder.iterdir()):
            raise UserError(f"{SETTING}={folder}: holds something else than texts; choose an empty or a new folder")
        write_json(folder / BEGUN, {"schema": SCHEMA, "identity": asdict(identity), "making": asdict(making)})
    for leftover in folder.glob(".*.tmp"):  # of a run that was killed, unless another one writes it right now
        if time.time() - leftover.stat().st_mtime > STALE_SECONDS:
            leftover.unlink(missing_ok=True)
    return TextMaking(**_read(folder, BEGUN, identity)["making"])


def text_file(number: int) -> str:
    """Name of a batch's file."""
    return f"texts_{number:05d}.jsonl"


def has_batch(folder: Path, number: int) -> bool:
    """Whether the file of a batch is there; files are whole or absent."""
    return (folder / text_file(number)).exists()


def write_batch(folder: Path, number: int, traces: TraceSet) -> None:
    """Write the file of a batch, unless another run that makes the same texts was faster."""
    if not has_batch(folder, number):
        write_trace_set(folder / text_file(number), traces)


def outcome(trace: Trace, stop: list[int]) -> str:
    """`stopped` at a stop token, `full` at the limit, or `empty`: nothing but a stop token came."""
    if trace.tokens[-1] not in stop:
        return "full"
    return "stopped" if len(trace.tokens) > 1 else "empty"


def write_manifest(folder: Path, identity: TextIdentity, making: TextMaking, num_files: int, too_long: int) -> None:
    """Count what became of the prompts, and write the manifest, which makes the folder a whole one.

    Args:
        folder: holds the files of all batches.
        identity: what the texts are.
        making: how they were made.
        num_files: batches.
        too_long: prompts that were not continued, because the backbone's context had no room.
    """
    names = [text_file(number) for number in range(num_files)]
    batches = [read_trace_set(folder / name, SETTING) for name in names]
    traces = [trace for batch in batches for trace in batch.traces]
    ends = Counter(outcome(trace, identity.stop) for trace in traces)
    counts = {
        "prompts": len({trace.prompt.group for trace in traces}) + too_long,
        "texts": ends["stopped"] + ends["full"],
        "tokens": sum(len(trace.tokens) for trace in traces),
        **{name: ends[name] for name in ("stopped", "full", "empty")},
        "too_long": too_long,
        "dropped_turns": sum(batch.header.dropped for batch in batches),
    }
    files = {name: sha256_file(folder / name) for name in names}
    content = {"identity": asdict(identity), "making": asdict(making), "counts": counts, "files": files}
    write_json(folder / MANIFEST, {"schema": SCHEMA, **content})


def read_manifest(folder: Path, identity: TextIdentity) -> TextManifest | None:
    """The manifest of a folder, None where there is none yet.

    Raises:
        UserError: it is damaged, or the texts are others than `identity` says.
    """
    if not (folder / MANIFEST).exists():
        return None
    stored = _read(folder, MANIFEST, identity)
    return TextManifest(folder, TextMaking(**stored["making"]), stored["files"], stored["counts"])


def _read(folder: Path, name: str, identity: TextIdentity) -> dict[str, Any]:
    """A file of the folder that says what its texts are, which must be those of `identity`."""
    try:
        stored = json.loads((folder / name).read_text(encoding="utf-8"))
        schema, found = stored["schema"], stored["identity"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{SETTING}={folder}: {name} is damaged ({error}); choose another folder") from None
    if schema != SCHEMA:
        raise UserError(f"{SETTING}={folder}: has schema {schema} and this version of mtptrain reads {SCHEMA}")
    for part, wanted in asdict(identity).items():
        have, want = (one[:12] if part in ("backbone", "prompts") else one for one in (found.get(part, ""), wanted))
        if have != want:
            raise UserError(
                f"{SETTING}={folder}: holds texts of {part}={have} and this run has {part}={want}; set "
                f"{SAID_BY[part]} to what it was, or choose another folder"
            )
    return dict(stored)

"""The content of curve.json as types: the acceptance of every checkpoint of a run."""

# K draft length

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mtptrain.config.backbone import BACKBONE_CHOICE
from mtptrain.errors import UserError
from mtptrain.evaluation.head_result import Acceptance, ChosenOn, Gain, SeenPrompts
from mtptrain.evaluation.result import BackboneResult, PolicyResult, PromptsResult
from mtptrain.evaluation.stored import ResultFile, read_json
from mtptrain.run.folder import CURVE_FILE
from mtptrain.run.provenance import Provenance
from mtptrain.run.storage import write_json
from mtptrain.run.typed_json import to_json

CURVE_SCHEMA = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class CurveIdentity:
    """The choices that all points of a curve share, so that an interrupted measurement can go on.

    Attributes:
        run: folder of the run's checkpoints.
        backbone: its fingerprint.
        dtype: of the backbone's arithmetic.
        prompts, traces, num_prompts, prompt_tokens: settings of the texts.
        draft_length: the longest K.
        policy: of decoding.
    """

    run: str
    backbone: str
    dtype: str
    prompts: list[str]
    traces: str | None
    num_prompts: int
    prompt_tokens: int
    draft_length: int
    policy: PolicyResult


CURVE_SETTINGS = {  # the setting behind each part of the identity
    "run": "checkpoint",
    "backbone": BACKBONE_CHOICE,
    "dtype": "precision",
    "prompts": "prompts",
    "traces": "evaluation.traces",
    "num_prompts": "evaluation.num_prompts",
    "prompt_tokens": "evaluation.prompt_tokens",
    "draft_length": "decoding.draft_length",
    "policy": "decoding",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class CurvePoint:
    """The replay of one checkpoint.

    Attributes:
        step: optimiser steps done.
        tokens: trained on.
        checkpoint: its folder.
        digest: SHA-256 of its tensors.
        replay: by draft length.
        gain: over the stock head by draft length, paired; None without a stock head.
        seen_prompts: prompts that the head saw in training; None if its training text is unknown.
        chosen_on: prompts that chose the checkpoint as the best of its run; None for any other.
    """

    step: int
    tokens: int
    checkpoint: str
    digest: str
    replay: dict[int, Acceptance]
    gain: dict[int, Gain | None] | None
    seen_prompts: SeenPrompts | None
    chosen_on: ChosenOn | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """The content of curve.json.

    Attributes:
        schema: `CURVE_SCHEMA`.
        provenance: of the measurement.
        identity: what all points share.
        backbone, prompts: of the measurement.
        stock: replay of the stock head by draft length; None if it was not measured.
        best_step: step of the checkpoint that the run calls `best`; None if it kept none.
        points: by step.
        skipped: a line for each checkpoint that could not be measured.
    """

    schema: int
    provenance: Provenance
    identity: CurveIdentity
    backbone: BackboneResult
    prompts: PromptsResult
    stock: dict[int, Acceptance] | None
    best_step: int | None
    points: list[CurvePoint]
    skipped: list[str]

    @property
    def draft_lengths(self) -> range:
        """The measured K, from 1 to the longest."""
        return range(1, self.identity.draft_length + 1)


def write_curve(path: Path, curve: Curve) -> None:
    """Write a curve.json, atomically."""
    write_json(path, to_json(curve))


_FILE = ResultFile(
    content=Curve,
    name=CURVE_FILE,
    schema=CURVE_SCHEMA,
    wanted=f"a {CURVE_FILE} or its folder",
    again="measure again",
)


def read_curve(path: Path, setting: str) -> Curve:
    """Return the curve of a file or a folder; see `ResultFile.read`."""
    return _FILE.read(path, setting)


def continued_curve(path: Path) -> Curve:
    """Return the curve of a file, to add points to it.

    Raises:
        UserError: the file cannot be read, or is no curve.json of this schema.
    """
    try:
        return read_json(Curve, path, CURVE_SCHEMA)
    except (OSError, ValueError) as error:
        raise UserError(
            f"output_dir={path.parent}: {path.name} cannot be continued ({error}); delete it, or choose another folder"
        ) from None

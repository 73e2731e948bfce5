"""The content of comparison.json as types: a comparison of heads on the same traces."""

# K draft length

from __future__ import annotations

from dataclasses import dataclass

from mtptrain.evaluation.head_result import Acceptance, Gain, SeenPrompts
from mtptrain.evaluation.result import BackboneResult, PromptsResult
from mtptrain.run.provenance import Provenance


@dataclass(frozen=True, slots=True, kw_only=True)
class ComparedHead:
    """One of the compared heads.

    Attributes:
        name: a letter and the checkpoint.
        checkpoint: its folder, or `stock`.
        mode: `shared` or `stacked`.
        depth: modules.
        parameters: of all modules.
        replay: by draft length.
        domains: by domain, at the longest draft length; None for a domain without verify passes.
        seen_prompts: prompts that the head saw in training; None if its training text is unknown.
    """

    name: str
    checkpoint: str
    mode: str
    depth: int
    parameters: int
    replay: dict[int, Acceptance]
    domains: dict[str, Acceptance | None]
    seen_prompts: SeenPrompts | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptGains:
    """Gain of one head over another on some prompts.

    Attributes:
        prompts: their number.
        gain: in acceptance length, by draft length.
        gain_by_position: in conditional acceptance at the longest K; None if a resample never reached it.
        verdict: one sentence about the longest K.
    """

    prompts: int
    gain: dict[int, Gain]
    gain_by_position: list[Gain | None]
    verdict: str


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadComparison(PromptGains):
    """Gain of `other` over `base` on all prompts.

    Attributes:
        base, other: names of the heads.
        domains: the gains by domain; None for a domain without verify passes.
        worse_on: domains in which `other` is worse at the longest K.
    """

    base: str
    other: str
    domains: dict[str, PromptGains | None]
    worse_on: list[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """The content of comparison.json; `comparisons` has an entry for every head after the first."""

    schema: int
    provenance: Provenance
    backbone: BackboneResult
    prompts: PromptsResult
    draft_length: int
    heads: list[ComparedHead]
    comparisons: list[HeadComparison]

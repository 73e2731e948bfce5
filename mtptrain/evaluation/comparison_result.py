"""The content of comparison.json as types: a comparison of heads on the same traces."""

# K draft length

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from mtptrain.evaluation.head_result import Acceptance, ChosenOn, Gain, SeenPrompts
from mtptrain.evaluation.result import BackboneResult, PolicyResult, PromptsResult
from mtptrain.evaluation.stored import ResultFile
from mtptrain.run.provenance import Provenance

COMPARISON_FILE = "comparison.json"
COMPARISON_SCHEMA = 6
NO_PASSES = "no verify pass: every text ends at its first token"


@dataclass(frozen=True, slots=True, kw_only=True)
class ComparedRun:
    """One run of a compared setting.

    Attributes:
        checkpoint: its folder, or `stock`.
        acceptance_length: by draft length; None without verify passes.
        seen_prompts: prompts that the head saw in training; None if its training text is unknown.
        chosen_on: prompts that chose the head as the best of its run; None if it was not chosen or this is unknown.
    """

    checkpoint: str
    acceptance_length: dict[int, float | None]
    seen_prompts: SeenPrompts | None = None
    chosen_on: ChosenOn | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ComparedHead:
    """One of the compared settings: a head, or those of several runs.

    Attributes:
        name: a letter and the checkpoint, or the number of runs.
        mode: `shared` or `stacked`.
        depth: modules.
        parameters: of all modules.
        runs: the runs.
        replay: by draft length; of several runs, the mean with an interval over runs and prompts.
        domains: by domain, at the longest draft length; None for a domain without verify passes.
    """

    name: str
    mode: str
    depth: int
    parameters: int
    runs: list[ComparedRun]
    replay: dict[int, Acceptance]
    domains: dict[str, Acceptance | None]

    @property
    def letter(self) -> str:
        """The letter at the beginning of the name."""
        return self.name.partition(" ")[0]

    @property
    def shown(self) -> str:
        """The name without its letter and brackets: the checkpoint, or the number of runs and their folders."""
        return self.name.partition(" ")[2].removeprefix("(").removesuffix(")")


@dataclass(frozen=True, slots=True)
class SettingDifference:
    """A training setting that is not the same in all compared runs.

    Attributes:
        name: as on the command line.
        values: of every compared head in their order, as on the command line, those of several runs with commas; None
            for a head without a record of its training, such as the stock head.
    """

    name: str
    values: list[str | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptGains:
    """Gain of one head over another on some prompts.

    Attributes:
        prompts: their number.
        gain: in acceptance length, by draft length; None without verify passes.
        gain_by_position: in conditional acceptance at the longest K; None if a resample never reached it.
        verdict: one sentence about the longest K.
    """

    prompts: int
    gain: dict[int, Gain | None]
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
    """The content of comparison.json.

    Attributes:
        schema: `COMPARISON_SCHEMA`.
        provenance, backbone, prompts: of the measurement.
        draft_length: the longest K.
        heads: the compared settings.
        comparisons: of every head after the first with the first.
        differences: training settings that are not the same in all runs.
    """

    schema: int
    provenance: Provenance
    backbone: BackboneResult
    prompts: PromptsResult
    policy: PolicyResult
    draft_length: int
    heads: list[ComparedHead]
    comparisons: list[HeadComparison]
    differences: list[SettingDifference] = field(default_factory=list)


_FILE = ResultFile(
    content=Comparison,
    name=COMPARISON_FILE,
    schema=COMPARISON_SCHEMA,
    wanted=f"a {COMPARISON_FILE} or its folder",
    again="compare again",
)


def read_comparison(path: Path, setting: str) -> Comparison:
    """Return the comparison of a file or a folder; see `ResultFile.read`."""
    return _FILE.read(path, setting)

"""The facts of an export: those of its manifest for programs and of its model card."""

from __future__ import annotations

from dataclasses import dataclass, replace

from mtptrain.config import ExportForm, ExportTarget, ServedAs
from mtptrain.decoding.policy import GREEDY, Policy
from mtptrain.evaluation.head_result import ChosenOn, Gain
from mtptrain.evaluation.heads import describe_policy
from mtptrain.export.draft_length import DraftLength
from mtptrain.export.origin import Origin
from mtptrain.release.encoding_error import EncodingError
from mtptrain.run.artifact import Kind
from mtptrain.run.provenance import Provenance
from mtptrain.run.typed_json import to_json
from mtptrain.training.checkpoint import HeadIdentity
from mtptrain.training.exported import EXPORTED
from mtptrain.training.selection import Selection


@dataclass(frozen=True, slots=True)
class Measured:
    """Acceptance of a head on the prompts of its export.

    Attributes:
        prompts: their number.
        policy: how tokens were drawn and drafted, for people to read.
        before, after: acceptance length by K of the trained head, and as read back from the folder; None without verify
            passes, as if every text ends at its first token.
        positions: share kept at each position of the longest draft, as read back; None if never reached.
        gain: of the head as read back over the model's own, by K; None if the model came without one,
            or without verify passes.
        other: the policy with greedy instead of sampled drafts, or the reverse, and acceptance length by K under it, as
            read back; None at temperature 0.
        served: acceptance length by K with the target's numerics, as read back; None for `hf`. The drafts are greedy if
            the target has no other ones.
        chosen_on: prompts that chose the head as the best of its run; None if it was not chosen.
        samples: whether drafts are sampled at a temperature above 0.
    """

    prompts: int
    policy: str
    before: dict[int, float | None]
    after: dict[int, float | None]
    positions: list[float | None]
    gain: dict[int, Gain] | None
    other: tuple[str, dict[int, float | None]] | None = None
    served: dict[int, float | None] | None = None
    chosen_on: ChosenOn | None = None
    samples: bool = True

    @property
    def longest(self) -> int:
        """The longest measured K."""
        return max(self.before)


@dataclass(frozen=True, slots=True)
class Export:
    """The facts of an export besides the identity of its head.

    Attributes:
        target, form, scheme: the server, the form of the folder, and the storage of the head.
        checkpoint: folder and step of the head.
        selection: how the head was chosen as the best of its run; None if it was not.
        untouched: number of tensors outside the head; their bytes equal the source's.
        changed: number of stored weights that differ from the source's head, and number of all stored weights.
        acceptance: of the head on the export's prompts; None if only tensors were compared.
        draft_length: the K to serve it with.
        errors: rounding error of every stored weight, by released name.
        head_files: files that hold the head.
        warnings: warnings for serving.
        origin: model and training.
        provenance: provenance of the export.
    """

    target: ExportTarget
    form: ExportForm
    scheme: str
    checkpoint: str
    selection: Selection | None
    untouched: int
    changed: tuple[int, int]
    acceptance: Measured | None
    draft_length: DraftLength
    errors: dict[str, EncodingError]
    head_files: list[str]
    warnings: list[str]
    origin: Origin
    provenance: Provenance

    @property
    def samples(self) -> bool:
        """Whether the head is served with sampled drafts: unless it was measured with greedy ones."""
        return self.acceptance is None or self.acceptance.samples


EXPORT: Kind[HeadIdentity, Export] = replace(EXPORTED, content=Export)


def drawn(policy: Policy) -> str:
    """Return how tokens are drawn and drafted, for people to read; settings of `decoding` only if they differ."""
    kind = "temperature 0" if policy.is_greedy else f"temperature {policy.temperature:g}, {policy.draft.value} drafts"
    stated, default = (to_json(describe_policy(one, ServedAs.exact)) for one in (policy, GREEDY))
    differing = {name: value for name, value in stated.items() if value != default[name]}
    named = (f"{name} {value}" for name, value in differing.items() if name not in ("temperature", "draft"))
    return ", ".join([kind, *named])

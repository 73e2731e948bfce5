"""What is measured: one op at one shape, its definition, ours and the peers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

Outputs = tuple[Tensor, ...]


@dataclass(kw_only=True, slots=True)
class Case:
    """One comparison. Everything a candidate needs lies in its closure; it returns values and gradients alike.

    Attributes:
        label: shape and dtype, for people.
        ours: what the op does here.
        definition: what it must equal; `reference.py`. It is timed too.
        in_pieces: the definition a piece at a time, for a device whose memory the whole does not fit.
        peers: other implementations by name. One that returns fewer outputs is compared with the first of ours.
        missing: peers that cannot run here, and why.
        bytes: least number of bytes that must be read and written, inputs and outputs once.
        flops: floating-point operations of the matrix products.
        rtol, atol: how far a floating output may be from the definition's, relative and as a share of its largest
            magnitude. Others must be equal.
        off: share of the entries of such another output that may differ all the same, where rounding decides them.
    """

    label: str
    ours: Callable[[], Outputs]
    definition: Callable[[], Outputs]
    in_pieces: Callable[[], Outputs] | None = None
    peers: dict[str, Callable[[], Outputs]] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    bytes: int
    flops: int = 0
    rtol: float = 1e-4
    atol: float = 1e-5
    off: float = 0.0

    def difference(self, outputs: Outputs, expected: Outputs) -> str | None:
        """What is wrong with some outputs; None when nothing is."""
        for place, (found, wanted) in enumerate(zip(outputs, expected, strict=False)):
            if found.shape != wanted.shape:
                return f"output {place} is {tuple(found.shape)}, not {tuple(wanted.shape)}"
            if not wanted.is_floating_point():
                differing = int((found != wanted).sum())
                if differing <= self.off * wanted.numel():
                    continue
                return f"output {place} differs in {differing} of {wanted.numel()} entries"
            wanted = wanted.double()
            allowed = self.rtol * wanted.abs() + self.atol * wanted.abs().amax().clamp(min=1e-30)
            off = (found.double() - wanted).abs()
            if not (off <= allowed).all():
                return f"output {place} is off by {off.max():.3g}, where {allowed.max():.3g} is allowed"
        return None

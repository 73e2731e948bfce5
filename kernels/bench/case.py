"""A case of the bench: one op at one shape, with its definition, our implementation and its peers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

Outputs = tuple[Tensor, ...]


@dataclass(kw_only=True, slots=True)
class Case:
    """One comparison. A candidate is a closure over its inputs and returns values and gradients alike.

    Attributes:
        label: shape and dtype, for people.
        ours: our implementation of the op.
        definition: `reference.py`, which every candidate must equal. It is timed too.
        in_pieces: the definition, computed in pieces, for a device without the memory for the whole.
        peers: other implementations by name. If one returns fewer outputs, these are compared with our first ones.
        bare: the matrix products alone, timed as a floor that no implementation can pass; its outputs are not compared.
        missing: peers that cannot run here, with the reasons.
        bytes: lower bound on the bytes read and written: inputs and outputs once.
        flops: floating-point operations of the matrix products.
        rtol, atol: allowed distance of a floating output from the definition's, relative and as a share of its largest
            magnitude. Other outputs must be equal.
        off: share of the entries of a non-floating output that may differ nevertheless, because rounding decides them.
    """

    label: str
    ours: Callable[[], Outputs]
    definition: Callable[[], Outputs]
    in_pieces: Callable[[], Outputs] | None = None
    peers: dict[str, Callable[[], Outputs]] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    bare: Callable[[], object] | None = None
    bytes: int
    flops: int = 0
    rtol: float = 1e-4
    atol: float = 1e-5
    off: float = 0.0

    def difference(self, outputs: Outputs, expected: Outputs) -> str | None:
        """Return the first fault of some outputs, or None if there is none."""
        for number, (actual, wanted) in enumerate(zip(outputs, expected, strict=False)):
            if actual.shape != wanted.shape:
                return f"output {number} is {tuple(actual.shape)}, not {tuple(wanted.shape)}"
            if not wanted.is_floating_point():
                differing = int((actual != wanted).sum())
                if differing <= self.off * wanted.numel():
                    continue
                return f"output {number} differs in {differing} of {wanted.numel()} entries"
            wanted = wanted.double()
            allowed = self.rtol * wanted.abs() + self.atol * wanted.abs().amax().clamp(min=1e-30)
            error = (actual.double() - wanted).abs()
            if not (error <= allowed).all():
                return f"output {number} is off by {error.max():.3g}, but at most {allowed.max():.3g} is allowed"
        return None

"""The faults of a release's tensors, collected and reported together."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mtptrain.errors import UserError
from mtptrain.release.shards import HEAD_PREFIX

LISTED = 8  # names that an error lists for each kind of fault
DSPARK = (
    "DSpark blocks, another kind of draft (dspark_block_size in config.json, or tensors such as markov_head), "
    "regardless of num_nextn_predict_layers; train a new MTP module with mtp.init=fresh, or with mtp.init=backbone "
    "from the backbone's sliding-window layer (docs/dspark.md)"
)
# Parts of a tensor's name that only DSpark blocks have, and that only MTP modules have.
DSPARK_PARTS = frozenset({"markov_head", "confidence_head", "main_proj", "main_norm"})
MTP_PARTS = frozenset({"enorm", "hnorm", "e_proj", "h_proj"})


@dataclass
class Problems:
    """The faults of a set of tensors, as lines that begin with a tensor's name.

    Attributes:
        missing, unexpected: names.
        misshaped: names, with actual and expected shape and dtype.
        damaged: names, with the fault of their values.
        expected: number of tensors that a complete set has.
        is_dspark: result of the function `is_dspark`.
    """

    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    misshaped: list[str] = field(default_factory=list)
    damaged: list[str] = field(default_factory=list)
    expected: int = 0
    is_dspark: bool = False

    def any(self) -> bool:
        """Return whether a tensor has a fault."""
        return bool(self.missing or self.unexpected or self.misshaped or self.damaged)

    def raise_any(self, subject: str) -> None:
        """Raise one error that lists all faults; `subject` names the tensors.

        Raises:
            UserError: a tensor has a fault.
        """
        kinds = {
            "missing": self.missing,
            "unexpected": self.unexpected,
            "of another shape or dtype": self.misshaped,
            "damaged": self.damaged,
        }
        parts = []
        for kind, names in kinds.items():
            if names:
                more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
                parts.append(f"{len(names)} {kind}: {', '.join(names[:LISTED])}{more}")
        if parts:
            raise UserError(f"{subject} do not fit this backbone: {'; '.join(parts)}")


def is_dspark(names: Collection[str], config: Any) -> bool:
    """Return whether tensors under `mtp.` are DSpark blocks, which later releases keep under the same prefix.

    Args:
        names: tensor names of a release; names outside `mtp.` are ignored.
        config: config of the release; a `dspark_block_size` means DSpark.
    """
    modules = [name for name in names if name.startswith(HEAD_PREFIX)]
    parts = {part for name in modules for part in name.split(".")}
    has_own_parts = not DSPARK_PARTS.isdisjoint(parts) and MTP_PARTS.isdisjoint(parts)
    return bool(modules) and (getattr(config, "dspark_block_size", None) is not None or has_own_parts)


def refuse_dspark(names: Collection[str], config: Any) -> None:
    """Refuse DSpark blocks in place of MTP modules, with an explanation.

    Raises:
        UserError: the tensors are DSpark blocks.
    """
    if is_dspark(names, config):
        raise UserError(f"the mtp.* tensors of this release are {DSPARK}")


def mismatch(name: str, stored: Tensor, shape: tuple[int, ...], *dtypes: torch.dtype) -> list[str]:
    """Return one line if a stored tensor has another shape than expected, or none of `dtypes`, the usual one first."""
    if tuple(stored.shape) == shape and stored.dtype in dtypes:
        return []
    return [f"{name} {_described(stored.dtype, tuple(stored.shape))} instead of {_described(dtypes[0], shape)}"]


def _described(dtype: torch.dtype, shape: tuple[int, ...]) -> str:
    return f"{str(dtype).removeprefix('torch.')} {list(shape)}"

"""What can be wrong with the tensors of a release, collected and said at once."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mtptrain.errors import UserError

LISTED = 8  # names that an error spells out of each kind
DSPARK = (
    "DSpark blocks, another kind of draft (no enorm, or dspark_block_size in config.json), whatever "
    "num_nextn_predict_layers says; train a new MTP module with mtp.init=fresh, or with mtp.init=backbone from the "
    "backbone's own sliding-window layer"
)


@dataclass
class Problems:
    """What is wrong with a set of tensors: lines that begin with a tensor's name.

    Attributes:
        missing, unexpected: names.
        misshaped, damaged: with what they are, or what is wrong with their values.
        expected: how many tensors there should be.
        is_dspark: see `is_dspark`.
    """

    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    misshaped: list[str] = field(default_factory=list)
    damaged: list[str] = field(default_factory=list)
    expected: int = 0
    is_dspark: bool = False

    def any(self) -> bool:
        """Whether there is one."""
        return bool(self.missing or self.unexpected or self.misshaped or self.damaged)

    def raise_any(self, what: str) -> None:
        """Raise one error that lists them.

        Raises:
            UserError: there is a problem.
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
            raise UserError(f"{what} do not fit this backbone: {'; '.join(parts)}")


def is_dspark(names: Collection[str], config: Any) -> bool:
    """Whether tensors under `mtp.` are DSpark blocks, which later releases keep under the same prefix.

    Args:
        names: of a release; those outside `mtp.` are passed over.
        config: the release's; `dspark_block_size` marks DSpark.
    """
    modules = [name for name in names if name.startswith("mtp.")]
    has_embedding_norm = any(name.endswith(".enorm.weight") for name in modules)
    return bool(modules) and (getattr(config, "dspark_block_size", None) is not None or not has_embedding_norm)


def refuse_dspark(names: Collection[str], config: Any) -> None:
    """Explain what DSpark blocks are to a user who wants an MTP module.

    Raises:
        UserError: `is_dspark`.
    """
    if is_dspark(names, config):
        raise UserError(f"the mtp.* tensors of this release are {DSPARK}")


def mismatch(name: str, stored: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> list[str]:
    """One line if a stored tensor is not as the table has it; scale bytes may also come as uint8."""
    is_scale = dtype == torch.float8_e8m0fnu
    if tuple(stored.shape) == shape and (stored.dtype == dtype or (is_scale and stored.dtype == torch.uint8)):
        return []
    return [f"{name} {_described(stored.dtype, tuple(stored.shape))} instead of {_described(dtype, shape)}"]


def _described(dtype: torch.dtype, shape: tuple[int, ...]) -> str:
    return f"{str(dtype).removeprefix('torch.')} {list(shape)}"

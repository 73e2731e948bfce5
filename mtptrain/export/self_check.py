"""The self-check of an export: read it back from disk and compare every tensor with the trained head and the source."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import DeepseekV4Config

from mtptrain.errors import UserError
from mtptrain.release.codec import FP4_BLOCK, FP8_BLOCK, decode_fp4, decode_fp8
from mtptrain.release.encoding_error import EncodingError, encoding_error, rounding_error
from mtptrain.release.fingerprint import tensor_hash
from mtptrain.release.modules import module_numbers, part_of, release_scheme
from mtptrain.release.names import Row, Scheme, release_table
from mtptrain.release.shards import HEAD_PREFIX, Shards

BOUNDS = {"fp8": 16.0, "fp4": 1.0}  # half the coarsest step of the grid, in units of a block's scale


def compare_head(
    trained: Mapping[str, Tensor], stored: Mapping[str, Tensor], config: DeepseekV4Config, scheme: Scheme
) -> dict[str, EncodingError]:
    """Return the error of every stored weight, by released name.

    Args:
        trained: our `mtp.{d}.*`, floating point.
        stored: the exported `mtp.*`, read from disk.
        config: config of the backbone.
        scheme: scheme of the stored tensors.

    Raises:
        UserError: a name is missing or left over, an unquantised tensor is not bit-exact, or the error of a quantised
            one exceeds the bound of its grid.
    """
    errors: dict[str, EncodingError] = {}
    left = set(stored)
    for d in module_numbers(trained.keys()):
        for row in release_table(config, scheme):
            left.discard(f"mtp.{d}.{row.released}")
            if not row.is_scale:
                weight = part_of(row, trained[f"mtp.{d}.{row.ours}"])
                errors[f"mtp.{d}.{row.released}"] = _compare(row, f"mtp.{d}.", weight, stored)
    if left:
        raise UserError(f"the export holds tensors of no module: {', '.join(sorted(left)[:3])}; nothing was kept")
    return errors


def _compare(row: Row, prefix: str, weight: Tensor, stored: Mapping[str, Tensor]) -> EncodingError:
    name = prefix + row.released
    if name not in stored:
        raise UserError(f"{name}: is missing in the export; nothing was kept")
    if row.scale == "none":
        if not torch.equal(stored[name], weight.to(row.dtype)):
            raise UserError(f"{name}: is not in the export as it was trained; nothing was kept")
        return rounding_error(weight, stored[name])
    block = FP4_BLOCK if row.scale == "fp4" else FP8_BLOCK
    error = encoding_error(weight, _value(row, prefix, stored), stored[prefix + row.scale_name], block)
    if not error.relative <= BOUNDS[row.scale]:
        raise UserError(
            f"{name}: is off by {error.relative:.3g} scale steps after reading it back and {row.scale.upper()} allows "
            f"{BOUNDS[row.scale]:g}; nothing was kept"
        )
    return error


def check_unchanged(source: Shards, written: Shards) -> None:
    """Raise a `UserError` if a tensor outside the head differs from the source, compared by SHA-256 of its bytes.

    A file that both folders share (hard link or symlink) is not read.
    """
    for name, entry in written.entries.items():
        if name.startswith(HEAD_PREFIX):
            continue
        old = source.entries.get(name)
        if old is None or (old.dtype, old.shape) != (entry.dtype, entry.shape):
            raise UserError(f"{name}: is not in the source as it is in the export; nothing was kept")
        if (source.folder / old.file).samefile(written.folder / entry.file):
            continue
        if tensor_hash(source.folder, old) != tensor_hash(written.folder, entry):
            raise UserError(f"{name}: its bytes in the export are not those of the source; nothing was kept")


def changed_weights(
    before: Mapping[str, Tensor], after: Mapping[str, Tensor], config: DeepseekV4Config
) -> tuple[int, int]:
    """Return how many stored weights have other values than in the head before, and how many weights there are.

    Values are compared, not bytes: a value may be stored under another code and scale.

    Args:
        before: `mtp.*` of the source; empty or DSpark blocks if it has no MTP head.
        after: `mtp.*` of the export.
        config: config of the backbone.
    """
    numbers = module_numbers(after.keys())
    old_rows = {row.released: row for row in release_table(config, release_scheme(before))} if before else {}
    changed = total = 0
    for d in numbers:
        for row in release_table(config, release_scheme(after)):
            if not row.is_scale:
                old = old_rows.get(row.released)
                total += 1
                if old is None or f"mtp.{d}.{row.released}" not in before:
                    changed += 1
                else:
                    changed += not torch.equal(_value(old, f"mtp.{d}.", before), _value(row, f"mtp.{d}.", after))
    return changed, total


def _value(row: Row, prefix: str, stored: Mapping[str, Tensor]) -> Tensor:
    """Return a stored weight, decoded to fp32."""
    name = prefix + row.released
    if row.scale == "none":
        return stored[name].float()
    decode = decode_fp4 if row.scale == "fp4" else decode_fp8
    return decode(stored[name], stored[prefix + row.scale_name], torch.float32, name)

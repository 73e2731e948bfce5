"""Training against the encoding of an export: modules compute with the values that their weights will have there."""

# E routed experts

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DeepseekV4Config

from mtptrain.mtp.stack import MtpStack
from mtptrain.release.codec import decode_fp4, decode_fp8, encode_fp4, encode_fp8
from mtptrain.release.modules import part_of
from mtptrain.release.names import Row, ScaleKind, Scheme, release_table


class _StraightThrough(torch.autograd.Function):
    """The stored value forward, the gradient unchanged backward."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, rows: list[Row]) -> Tensor:
        return stored_value(weight, rows)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


def straight_through(weight: Tensor, rows: list[Row]) -> Tensor:
    """`stored_value` whose gradient is that of `weight`.

    Source: Bengio, Leonard and Courville 2013, arXiv:1308.3432, section 3.
    """
    out: Tensor = _StraightThrough.apply(weight, rows)
    return out


def stored_value(weight: Tensor, rows: list[Row]) -> Tensor:
    """What a weight becomes by encoding and decoding it, in its own dtype.

    Args:
        weight: one of our tensors.
        rows: of the release table, those that it is stored as; more than one where it holds experts.

    Raises:
        UserError: a value is NaN or infinite.
    """
    kind = rows[0].scale
    if rows[0].dtype == torch.float32:
        return weight
    if kind != "fp8":  # rounded value by value, or row by row: all experts at once
        return _round_trip(weight.flatten(0, -2) if weight.ndim > 1 else weight, kind).view_as(weight)
    out = torch.empty_like(weight)
    for row in rows:
        part_of(row, out).copy_(_round_trip(part_of(row, weight), kind))
    return out


def _round_trip(weight: Tensor, kind: ScaleKind) -> Tensor:
    if kind == "none":
        return weight.to(torch.bfloat16).to(weight.dtype)
    encode, decode = (encode_fp4, decode_fp4) if kind == "fp4" else (encode_fp8, decode_fp8)
    return decode(*encode(weight), torch.float32).to(weight.dtype)


def rows_by_tensor(config: DeepseekV4Config, scheme: Scheme) -> dict[str, list[Row]]:
    """The rows, those of scales apart, that each of our tensors is stored as, below `mtp.{d}.`."""
    found: dict[str, list[Row]] = defaultdict(list)
    for row in release_table(config, scheme):
        if not row.is_scale:
            found[row.ours].append(row)
    return dict(found)


@contextmanager
def as_stored(stack: MtpStack, rows: dict[str, list[Row]]) -> Iterator[None]:
    """Inside, the modules compute with `stored_value` of their weights, and gradients reach the weights themselves.

    Args:
        stack: the modules; their parameters are theirs again afterwards.
        rows: of `rows_by_tensor`.
    """
    taken: list[tuple[nn.Module, str, nn.Parameter]] = []
    try:
        for block in stack.mtp:
            for name, parameter in list(block.named_parameters()):
                owner, _, leaf = name.rpartition(".")
                module = block.get_submodule(owner)
                taken.append((module, leaf, parameter))
                delattr(module, leaf)
                setattr(module, leaf, straight_through(parameter, rows[name]))
        yield
    finally:
        for module, leaf, parameter in taken:
            delattr(module, leaf)
            module.register_parameter(leaf, parameter)

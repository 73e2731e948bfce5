"""Quantisation-aware training: modules compute with the values that their weights will have once exported."""

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
    """`stored_value` in the forward pass; the backward pass leaves the gradient unchanged."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, rows: list[Row]) -> Tensor:
        return stored_value(weight, rows)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


def straight_through(weight: Tensor, rows: list[Row]) -> Tensor:
    """Return `stored_value` with the gradient of `weight`.

    Source: Bengio, Leonard and Courville 2013, arXiv:1308.3432, section 3.
    """
    out: Tensor = _StraightThrough.apply(weight, rows)
    return out


def stored_value(weight: Tensor, rows: list[Row]) -> Tensor:
    """Return decode(encode(weight)), in the weight's dtype.

    Args:
        weight: a tensor of an `MtpBlock`, any floating-point dtype.
        rows: its rows of the release table; more than one if the tensor holds experts.

    Raises:
        UserError: a value is NaN or infinite.
    """
    kind = rows[0].scale
    if rows[0].dtype == torch.float32:
        return weight
    if kind != "fp8":  # rounded by value or by row, so all experts at once
        return _round_trip(weight.flatten(0, -2) if weight.ndim > 1 else weight, kind).view_as(weight)
    out = torch.empty_like(weight)
    for row in rows:
        if row.expert is not None and row.expert >= len(weight):  # a share has fewer experts, all of one form
            continue
        part_of(row, out).copy_(_round_trip(part_of(row, weight), kind))
    return out


def _round_trip(weight: Tensor, kind: ScaleKind) -> Tensor:
    if kind == "none":
        return weight.to(torch.bfloat16).to(weight.dtype)
    encode, decode = (encode_fp4, decode_fp4) if kind == "fp4" else (encode_fp8, decode_fp8)
    return decode(*encode(weight), torch.float32).to(weight.dtype)


def rows_by_tensor(config: DeepseekV4Config, scheme: Scheme) -> dict[str, list[Row]]:
    """Return the rows of the release table for each of our tensors, by name below `mtp.{d}.`, without scales."""
    rows: dict[str, list[Row]] = defaultdict(list)
    for row in release_table(config, scheme):
        if not row.is_scale:
            rows[row.ours].append(row)
    return dict(rows)


@contextmanager
def as_stored(stack: MtpStack, rows: dict[str, list[Row]]) -> Iterator[None]:
    """Make the modules compute with `stored_value` of their weights inside the context; gradients reach the weights.

    Args:
        stack: the modules; the context restores their parameters on exit.
        rows: result of `rows_by_tensor`.
    """
    replaced: list[tuple[nn.Module, str, nn.Parameter]] = []
    try:
        for block in stack.mtp:
            for name, parameter in list(block.named_parameters()):
                parent, _, leaf = name.rpartition(".")
                module = block.get_submodule(parent)
                replaced.append((module, leaf, parameter))
                delattr(module, leaf)
                setattr(module, leaf, straight_through(parameter, rows[name]))
        yield
    finally:
        for module, leaf, parameter in replaced:
            delattr(module, leaf)
            module.register_parameter(leaf, parameter)

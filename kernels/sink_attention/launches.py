"""Launches of `sink_attention` to compile ahead of time."""

from __future__ import annotations

from typing import Any

from ..launch import MODELS, Launch
from .backward_kernel import (
    sink_attention_chain_backward_kernel,
    sink_attention_key_backward_kernel,
    sink_attention_query_backward_kernel,
)
from .blocks import BLOCKS, constants
from .forward_kernel import CHAIN, CHOSEN, CLOSED, sink_attention_forward_kernel

TENSOR_CORES = {"sm_90": "wgmma.mma_async", "sm_100": "tcgen05.mma"}  # instructions for products of 64 rows


def _argument_types() -> dict[str, str]:
    """Return the type of every non-constant argument of the kernels."""
    pointers = dict.fromkeys(
        ["query", "local", "extra", "context", "chain", "out", "grad_out", "grad", "grad_query", "grad_context"],
        "*bf16:16",
    )
    pointers |= dict.fromkeys(["sinks", "lse", "delta", "grad_chain", "turn"], "*fp32:16")
    pointers |= {"start": "*i64:16", "length": "*i64:16", "chosen": "*i64:16"}
    types = {f"{name}_ptr": kind for name, kind in pointers.items()}
    types |= dict.fromkeys(["S", "X", "E", "rate", "local_window"], "i32") | {"scale": "fp32", "H": "i32:16"}
    types |= dict.fromkeys(
        ["query_stride_b", "query_stride_s", "query_stride_h", "extra_stride", "turn_stride_b", "window"], "i32:16"
    )
    return types


def _on_each(kernel: Any, blocks: str, label: str = "", **fixed: Any) -> list[Launch]:
    """Return one launch for every GPU, at the width of V4's heads."""
    types, listed = _argument_types(), []
    for target, chosen in BLOCKS[blocks].items():
        sized = constants(chosen, MODELS["V4-Flash"].head_width) | {"PAIRS": 32} | fixed
        sized = {name: value for name, value in sized.items() if name in kernel.arg_names}
        rows = sized["BLOCK_N" if kernel is sink_attention_key_backward_kernel else "BLOCK_H"]
        listed.append(
            Launch(
                kernel=kernel,
                label=label,
                arguments={name: types[name] for name in kernel.arg_names if name not in sized},
                constants=sized,
                options=chosen.options(),
                target=target,
                instruction=TENSOR_CORES.get(target, "") if rows == 64 else "",
            )
        )
    return listed


def launches() -> list[Launch]:
    """Return all launches; the number of heads is an argument, so one launch serves V4-Flash and V4-Pro."""
    forward = sink_attention_forward_kernel
    hca = {"EXTRA": CLOSED.value, "CACHED": True, "chosen_ptr": None, "start_ptr": None}
    csa = {"EXTRA": CHOSEN.value, "CACHED": True, "start_ptr": None}
    return [
        *_on_each(forward, "forward", "rollout", EXTRA=CHAIN.value, CACHED=False, chosen_ptr=None, length_ptr=None),
        *_on_each(forward, "forward", "HCA", **hca),
        *_on_each(forward, "forward", "CSA", **csa),
        *_on_each(forward, "forward", "CSA verify", **csa, BLOCK_H=16),
        *_on_each(sink_attention_chain_backward_kernel, "chain_backward", EXTRA=CHAIN.value),
        *_on_each(sink_attention_query_backward_kernel, "query_backward", EXTRA=CHAIN.value),
        *_on_each(sink_attention_key_backward_kernel, "key_backward"),
    ]

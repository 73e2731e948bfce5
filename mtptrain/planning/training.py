"""The plan of training MTP heads: memory, FLOPs, communication, hours and the disk of a stream cache."""

# D model width, N residual streams, K draft steps, V vocabulary

from __future__ import annotations

from typing import Any

from mtptrain.config import HardwareConfig, Placement, PlanConfig, ShapeConfig, WeightFormat
from mtptrain.planning.parameters import (
    active_parameters,
    backbone_parts,
    expert_weights,
    head_weights,
    module_parts,
    total_weights,
)
from mtptrain.planning.roofline import find_ceilings
from mtptrain.planning.training_memory import TrainingLoad, memory_by_kind, trained_weights
from mtptrain.planning.work import Arithmetic, attended_keys

FORWARD_AND_BACKWARD = 3  # a product, and one each for the gradients of its input and of its weights
STREAM_BYTES = 2  # a channel of a cached stream in bf16
GRADIENT_BYTES = 4  # gradients are summed over processes in fp32


def attention_flops(shape: ShapeConfig, kinds: list[str], row_length: int) -> float:
    """FLOPs a token of attention over the keys that a query in the middle of a row sees, summed over layers."""
    keys = sum(attended_keys(shape, kind, row_length // 2) for kind in kinds)
    return 4.0 * shape.num_attention_heads * shape.head_dim * keys


def step_flops(shape: ShapeConfig, load: TrainingLoad) -> dict[str, float]:
    """FLOPs of one optimiser step over all GPUs.

    The backbone runs forward only. The lm_head is frozen: K student products, as many for the gradients of their
    inputs, and one for the teacher. With recomputing the rollout runs forward twice.
    """
    tokens = load.num_gpus * load.micro_batches * load.tokens
    head = head_weights(shape).total
    backbone = 2.0 * (active_parameters(shape) - head) + attention_flops(shape, shape.layer_types, load.row_length)
    idle = (shape.num_experts - shape.experts_per_token) * expert_weights(shape)
    module = 2.0 * (total_weights(module_parts(shape)).total - idle)
    module += attention_flops(shape, ["sliding"], load.row_length)
    passes = FORWARD_AND_BACKWARD + (1 if load.recompute else 0)
    return {
        "backbone forward": 0.0 if load.from_streams else backbone * tokens,
        "rollout": passes * load.steps * module * tokens,
        "lm_head and loss": 2.0 * (2 * load.steps + 1) * head * tokens,
    }


def step_communication(shape: ShapeConfig, load: TrainingLoad) -> dict[str, float]:
    """Bytes that each GPU sends in one optimiser step; ring collectives send (n - 1) / n of what they carry."""
    ring = (load.num_gpus - 1) / load.num_gpus
    trained = trained_weights(shape, load)
    gradients = ring * GRADIENT_BYTES * trained.total
    times = load.micro_batches if load.zero_stage >= 2 else 1  # no process has room to add them up whole
    sent = {"heads' gradients": times * gradients if load.zero_stage else 2 * gradients}  # scattered, or summed
    if load.zero_stage in (1, 2):
        sent["heads' weights"] = ring * trained.bytes(load.heads)
    if load.zero_stage == 3:  # gathered for the forward and for the backward pass of every micro-batch
        whole = load.modules * total_weights(module_parts(shape)).bytes(load.heads)
        sent["heads' weights"] = 2 * ring * whole * load.micro_batches
    if not load.from_streams and load.placement is Placement.zero3:
        whole = total_weights(backbone_parts(shape)).bytes(load.backbone)
        sent["backbone weights"] = ring * whole * load.micro_batches
    if not load.from_streams and load.placement is Placement.expert_parallel:
        # every token's row goes to each of its experts, and back
        rows = load.tokens * shape.experts_per_token * shape.hidden_size * 2
        sent["expert rows"] = 2 * ring * rows * len(shape.layer_types) * load.micro_batches
    return sent


def step_seconds(
    flops: dict[str, float], sent: dict[str, float], load: TrainingLoad, hardware: HardwareConfig, plan: PlanConfig
) -> dict[str, float]:
    """Time of an optimiser step with products at the bf16 (fp32) ceiling, then communication; nothing overlaps."""
    arithmetic = Arithmetic.fp32 if load.heads is WeightFormat.fp32 else Arithmetic.bf16
    rate = find_ceilings(hardware, plan.measured).flops[arithmetic]
    computing = sum(flops.values()) / load.num_gpus / rate
    return {"computing": computing, "communication": sum(sent.values()) / hardware.interconnect if sent else 0.0}


def plan_training(
    shape: ShapeConfig, hardware: HardwareConfig, plan: PlanConfig, load: TrainingLoad, num_steps: int
) -> dict[str, Any]:
    """The body of plan.json for `plan.what=training` of `num_steps` optimiser steps; docs/plan.md describes it."""
    memory = memory_by_kind(shape, load)
    flops = step_flops(shape, load)
    sent = step_communication(shape, load) if load.num_gpus > 1 else {}
    seconds = step_seconds(flops, sent, load, hardware, plan)
    step_tokens = load.num_gpus * load.micro_batches * load.tokens
    tokens = num_steps * step_tokens
    used = sum(memory["gpu"].values())
    stream = shape.hc_mult * shape.hidden_size * STREAM_BYTES
    rate = step_tokens / sum(seconds.values())
    return {
        "memory": {
            **memory,
            "bytes_a_gpu": used,
            "memory_bytes_a_gpu": hardware.memory,
            "fits": used <= hardware.memory,
        },
        "step": {"tokens": step_tokens, "flops": flops, "sent_bytes_a_gpu": sent, "seconds": seconds},
        "tokens": tokens,
        "tokens_per_second": rate,
        "hours": tokens / rate / 3600,
        "stream_cache": {"bytes_a_token": stream, "bytes": stream * tokens},
    }

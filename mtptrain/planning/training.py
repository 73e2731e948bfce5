"""The plan of training MTP heads: memory, FLOPs, communication, hours and the size of a stream cache."""

# D model width, N residual streams, K draft steps, V vocabulary

from __future__ import annotations

from dataclasses import replace

from mtptrain.config import BackboneConfig, HardwareConfig, Placement, PlanConfig, ShapeConfig, WeightFormat
from mtptrain.planning.head_memory import trained_weights
from mtptrain.planning.parameters import (
    active_parameters,
    backbone_parts,
    expert_weights,
    head_weights,
    model_sizes,
    module_parts,
    total_weights,
)
from mtptrain.planning.result import StepCost, StepSeconds, StreamCacheSize, TrainingPlan
from mtptrain.planning.roofline import peak_rates
from mtptrain.planning.training_load import TrainingLoad
from mtptrain.planning.training_memory import training_memory
from mtptrain.planning.work import Arithmetic, attended_keys
from mtptrain.run.provenance import Provenance

FORWARD_AND_BACKWARD = 3  # matrix products: forward, gradient of the input, gradient of the weights
STREAM_BYTES = 2  # per channel of a cached stream, bf16
GRADIENT_BYTES = 4  # gradients are summed over processes in fp32
# Share of the data sheet's bf16 rate that DeepSeek-V3's pre-training reached: 6 x 37e9 active parameters x 14.8e12
# tokens in 2.664e6 H800 hours (arXiv 2412.19437, table 1) are 3.4e14 FLOP/s of 9.89e14.
REACHED = 0.35


def attention_flops(shape: ShapeConfig, kinds: list[str], row_length: int) -> float:
    """Return the FLOPs per token of attention, for a query in the middle of a row, summed over layers."""
    keys = sum(attended_keys(shape, kind, row_length // 2) for kind in kinds)
    return 4.0 * shape.num_attention_heads * shape.head_dim * keys


def step_flops(shape: ShapeConfig, load: TrainingLoad) -> dict[str, float]:
    """Return the FLOPs of one optimiser step over all GPUs, by part.

    The backbone runs forward only. The frozen lm_head takes K products for the student, K for the gradients of their
    inputs, and one for the teacher. With recomputation the rollout runs forward twice.
    """
    tokens = load.step_tokens
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
    """Return the bytes that each GPU sends per optimiser step; a ring collective sends (n - 1) / n of its data."""
    ring = (load.num_gpus - 1) / load.num_gpus
    trained = trained_weights(shape, load)
    if load.share_experts:  # their gradients stay where they are
        trained = replace(trained, expert=0)
    gradients = ring * GRADIENT_BYTES * trained.total
    times = load.micro_batches if load.zero_stage >= 2 else 1  # no process can hold the full sum
    sent = {
        "heads' gradients": times * gradients if load.zero_stage else 2 * gradients
    }  # reduce-scatter, or all-reduce
    if load.zero_stage in (1, 2):
        sent["heads' weights"] = ring * trained.bytes(load.heads)
    if load.zero_stage == 3:  # gathered for the forward and for the backward pass of every micro-batch
        whole = load.modules * total_weights(module_parts(shape)).bytes(load.heads)
        sent["heads' weights"] = 2 * ring * whole * load.micro_batches
    if not load.from_streams and load.placement is Placement.zero3:
        whole = total_weights(backbone_parts(shape)).bytes(load.backbone)
        sent["backbone weights"] = ring * whole * load.micro_batches
    if not load.from_streams and load.placement is Placement.expert_parallel:
        # every token's row travels to each of its experts and back
        rows = load.tokens * shape.experts_per_token * shape.hidden_size * 2
        sent["expert rows"] = 2 * ring * rows * len(shape.layer_types) * load.micro_batches
    if load.share_experts:  # forward, gradients, and with recomputation the forward again
        passes = 3 if load.recompute else 2
        rows = load.tokens * shape.experts_per_token * shape.hidden_size * 2
        sent["heads' expert rows"] = 2 * ring * rows * passes * load.steps * load.micro_batches
    return sent


def step_seconds(
    flops: dict[str, float], sent: dict[str, float], load: TrainingLoad, hardware: HardwareConfig, plan: PlanConfig
) -> StepSeconds:
    """Return the time of an optimiser step: products at the bf16 (fp32) ceiling, then communication, no overlap.

    The time to expect has products at `REACHED` of the data sheet's rate, or at the ceiling if that is slower.

    Raises:
        UserError: see `peak_rates`.
    """
    arithmetic = Arithmetic.fp32 if load.heads is WeightFormat.fp32 else Arithmetic.bf16
    rate = peak_rates(hardware, plan.measured).flops[arithmetic]
    sheet = hardware.fp32_flops if arithmetic is Arithmetic.fp32 else hardware.bf16_flops
    flops_a_gpu = sum(flops.values()) / load.num_gpus
    computing, expected = flops_a_gpu / rate, flops_a_gpu / (REACHED * sheet)
    communication = sum(sent.values()) / hardware.interconnect if sent else 0.0
    return StepSeconds(computing, communication, max(computing, expected))


def step_cost(shape: ShapeConfig, hardware: HardwareConfig, plan: PlanConfig, load: TrainingLoad) -> StepCost:
    """Return FLOPs, communication and time of one optimiser step.

    Raises:
        UserError: see `peak_rates`.
    """
    flops = step_flops(shape, load)
    sent = step_communication(shape, load) if load.num_gpus > 1 else {}
    return StepCost(load.step_tokens, flops, sent, step_seconds(flops, sent, load, hardware, plan))


def plan_training(
    model: BackboneConfig,
    hardware: HardwareConfig,
    plan: PlanConfig,
    load: TrainingLoad,
    num_steps: int,
    provenance: Provenance,
) -> TrainingPlan:
    """Return the plan of `num_steps` optimiser steps of training on some hardware.

    Raises:
        UserError: `plan.measured` is set and the hardware has no measured rates.
    """
    shape = model.shape
    step = step_cost(shape, hardware, plan, load)
    tokens = num_steps * step.tokens
    rate, expected = step.tokens / step.seconds.total, step.tokens / step.seconds.expected
    stream = shape.hc_mult * shape.hidden_size * STREAM_BYTES
    return TrainingPlan(
        provenance=provenance,
        hardware=hardware,
        load=plan,
        model=model_sizes(model),
        training=load,
        memory=training_memory(shape, load, hardware.memory),
        step=step,
        tokens=tokens,
        tokens_per_second=rate,
        hours=tokens / rate / 3600,
        expected_tokens_per_second=expected,
        expected_hours=tokens / expected / 3600,
        stream_cache=StreamCacheSize(bytes_a_token=stream, bytes=stream * tokens),
    )

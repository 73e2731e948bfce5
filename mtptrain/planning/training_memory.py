"""Memory per GPU and per process for training MTP heads on a frozen backbone, by kind of tensor, at its peak.

A step has four moments: the backbone's forward, the rollout with its backward, the sum of gradients over processes, and
the optimiser's update. Their temporaries follow each other, so the peak is that of the largest moment.
"""

# D model width, N residual streams, H heads, C channels of a head, R query latent, E experts, k of them per token,
# I inner width of an expert, S tokens of a row, T tokens of a GPU's micro-batch, V vocabulary

from __future__ import annotations

from mtptrain.config import Placement, ShapeConfig, WeightFormat
from mtptrain.planning.head_memory import (
    MASTERS,
    STATE,
    Kinds,
    backward_bytes,
    held_bytes,
    own_weights,
    reduction_bytes,
    trained_weights,
    update_bytes,
)
from mtptrain.planning.parameters import Weights, backbone_parts, layer_parts, total_weights
from mtptrain.planning.result import TrainingMemory
from mtptrain.planning.training_load import TrainingLoad

CHUNK_ROWS = 1024  # of kernels/linear_loss/kernel.py
QUANTISED = (WeightFormat.release, WeightFormat.fp8)


def backbone_bytes(shape: ShapeConfig, load: TrainingLoad) -> Kinds:
    """Return the bytes of the frozen backbone's weights in one GPU."""
    parts = backbone_parts(shape)
    if load.from_streams:
        kept = parts["embedding"] + parts["lm_head"]  # in bf16 in a release too
        return {"backbone weights": kept.bytes(load.backbone)}
    whole = total_weights(parts)
    if load.placement is Placement.replicate:
        return {"backbone weights": whole.bytes(load.backbone)}
    if load.placement is Placement.zero3:
        return {"backbone weights": whole.bytes(load.backbone) / load.num_gpus}
    experts = Weights(expert=whole.expert).bytes(load.backbone)
    return {"backbone weights": whole.bytes(load.backbone) - experts + experts / load.num_gpus}


def forward_bytes(shape: ShapeConfig, load: TrainingLoad) -> Kinds:
    """Return the temporaries of the backbone's forward, which keeps nothing but its output.

    Counted from transformers' layers with our attention, on the meta device: queries in fp32 while they are rotated,
    the routed rows of the experts, and the streams. With kept weights a layer's share is decoded: gate and up to bf16,
    and down through a table with 7 bytes a value.
    """
    if load.from_streams:
        return {}
    width, head_width = shape.hidden_size, shape.num_attention_heads * shape.head_dim
    size = 4 if load.heads is WeightFormat.fp32 else 2
    queries = (2 * size + 4) * head_width
    routed = shape.experts_per_token * (2 * width + 3 * shape.expert_size) * size
    streams = (2 * size + 12) * shape.hc_mult * width
    kinds: Kinds = {"backbone forward": load.tokens * (streams + max(queries, routed))}
    if load.placement is Placement.zero3:
        largest = max(total_weights(layer_parts(shape, kind)).bytes(load.backbone) for kind in set(shape.layer_types))
        kinds["backbone layer gathered"] = largest
    if load.backbone in QUANTISED:
        share = load.num_gpus if load.placement is Placement.expert_parallel else 1
        kinds["weights decoded for a layer"] = 11.0 * shape.num_experts / share * shape.expert_size * width
    return kinds


def saved_by_step(shape: ShapeConfig, load: TrainingLoad) -> float:
    """Return the bytes that one draft step saves for its backward pass, counted tensor by tensor in `mtp/block.py`.

    Norms, hyper-connections and rotations run in fp32; attention saves queries and outputs, and no scores. Counted for
    the definitions: Triton, and a CPU with many tokens, save less.
    """
    width, heads, experts = shape.hidden_size, shape.num_attention_heads, shape.experts_per_token
    streams, head_width, inner = shape.hc_mult * width, heads * shape.head_dim, shape.expert_size
    in_fp32 = 8 * streams + 9 * width + 3 * shape.q_lora_rank + head_width
    routed = experts * (2 * width + 6 * inner)
    latent = shape.o_groups * shape.o_lora_rank
    others = 6 * width + 2 * head_width + 4 * shape.head_dim + latent + 4 * shape.num_experts + routed + 6 * inner
    if load.heads is WeightFormat.fp32:  # without a GPU, where attention saves weights, about as large as outputs
        return load.tokens * 4.0 * (in_fp32 + head_width + others)
    return load.tokens * (4.0 * in_fp32 + 2.0 * (others + 4 * streams))  # and rounded copies of the streams


def activation_bytes(shape: ShapeConfig, load: TrainingLoad) -> Kinds:
    """Return the bytes that the rollout and the loss hold: what the backward pass needs, and one chunk of logits."""
    size = 4 if load.heads is WeightFormat.fp32 else 2
    streams = load.tokens * shape.hc_mult * shape.hidden_size
    one = saved_by_step(shape, load)
    collapsed = (12 + size) * streams  # hc_head and norm of a step's output, which are not recomputed
    kept = (load.steps - 1) * collapsed + one if load.recompute else load.steps * one
    return {
        "rollout activations": kept,
        "streams": size * streams,
        "one chunk of logits": 10.0 * min(CHUNK_ROWS, load.tokens) * shape.vocab_size,
    }


def host_bytes(shape: ShapeConfig, load: TrainingLoad, moved: Kinds) -> Kinds:
    """Return the bytes in a process's CPU memory: what is offloaded, and the larger of start and checkpoint.

    At the start a process holds its own part of the head, new weights in fp32 and others in less; a checkpoint passes
    through its own pieces of masters and state. Files of the backbone are mapped, and count as no process's own.
    """
    start = 4.0 * own_weights(shape, load).total
    pieces = 12.0 * trained_weights(shape, load).total / load.num_gpus
    if start >= pieces:
        return {"head in fp32, at the start": start, **moved}
    return {"pieces of a checkpoint, while it is written": pieces, **moved}


def training_memory(shape: ShapeConfig, load: TrainingLoad, gpu_bytes: float) -> TrainingMemory:
    """Return the bytes that training holds at its peak, in a GPU of `gpu_bytes` bytes and in CPU memory."""
    held = held_bytes(shape, load)
    moved = {name: held.pop(name) for name in (MASTERS, STATE)} if load.offload else {}
    held = {**backbone_bytes(shape, load), **held}
    backward, activations = backward_bytes(shape, load), activation_bytes(shape, load)
    streams = {"streams": activations["streams"]}
    moments = {
        "the backbone's forward": {**held, **backward, **forward_bytes(shape, load), **streams},
        "the rollout and its backward": {**held, **backward, **activations},
        "the sum of gradients": {**held, **reduction_bytes(shape, load), **streams},
        "the optimiser's update": {**held, **update_bytes(shape, load)},
    }
    totals = {name: sum(kinds.values()) for name, kinds in moments.items()}
    peak = max(totals, key=lambda name: totals[name])
    gpu = {name: size for name, size in moments[peak].items() if size}
    used, host = totals[peak], host_bytes(shape, load, moved)
    return TrainingMemory(gpu, host, used, gpu_bytes, fits=used <= gpu_bytes, moment=peak, moments=totals)

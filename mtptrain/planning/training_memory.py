"""Memory per GPU for training MTP heads on a frozen backbone, by kind of tensor."""

# D model width, N residual streams, H heads, C channels of a head, R query latent, E experts, k of them per token,
# I inner width of an expert, S tokens of a row, T tokens of a GPU's micro-batch, V vocabulary

from __future__ import annotations

from mtptrain.config import OptimizerName, Placement, ShapeConfig, WeightFormat
from mtptrain.planning.parameters import (
    Weights,
    backbone_parts,
    connection_matrices,
    layer_parts,
    module_parts,
    total_weights,
)
from mtptrain.planning.result import TrainingMemory
from mtptrain.planning.training_load import TrainingLoad


def backbone_bytes(shape: ShapeConfig, load: TrainingLoad) -> dict[str, float]:
    """Return the bytes of the frozen backbone's weights in one GPU, and of the layer that ZeRO-3 gathers."""
    parts = backbone_parts(shape)
    if load.from_streams:
        kept = parts["embedding"] + parts["lm_head"]
        return {"backbone weights": kept.bytes(load.backbone)}
    whole = total_weights(parts)
    if load.placement is Placement.replicate:
        return {"backbone weights": whole.bytes(load.backbone)}
    if load.placement is Placement.zero3:
        largest = max(total_weights(layer_parts(shape, kind)).bytes(load.backbone) for kind in set(shape.layer_types))
        held = whole.bytes(load.backbone) / load.num_gpus
        return {"backbone weights": held, "backbone layer gathered": largest}
    experts = Weights(expert=whole.expert).bytes(load.backbone)
    return {"backbone weights": whole.bytes(load.backbone) - experts + experts / load.num_gpus}


def trained_weights(shape: ShapeConfig, load: TrainingLoad) -> Weights:
    """Return the trained parameters of the heads."""
    module = total_weights(module_parts(shape))
    expert = module.expert if load.train_experts else 0
    return Weights(
        load.modules * expert, load.modules * module.matrix, load.modules * module.plain, load.modules * module.strict
    )


def heads_bytes(shape: ShapeConfig, load: TrainingLoad) -> dict[str, float]:
    """Return the bytes of the heads' weights, gradients, masters and optimiser state per process.

    A parameter held in fp32 is its own master. Gradients are summed in fp32. AdamW keeps two fp32 values per parameter
    and Muon one. Muon takes two-dimensional tensors only; transformers stacks a layer's experts in three dimensions.
    """
    module, trained = total_weights(module_parts(shape)), trained_weights(shape, load)
    masters = 0.0 if load.heads is WeightFormat.fp32 else 4.0 * (trained.total - trained.strict)
    matrices = trained.matrix + trained.plain + load.modules * connection_matrices(shape)
    saved = 4.0 * matrices if load.optimizer is OptimizerName.muon else 0.0
    return {
        "heads' weights": load.modules * module.bytes(load.heads) * load.share(3),
        "heads' gradients": 4.0 * trained.total * load.share(2),
        "heads' fp32 masters": masters * load.share(1),
        "optimiser state": (8.0 * trained.total - saved) * load.share(1),
    }


def saved_by_step(shape: ShapeConfig, load: TrainingLoad) -> float:
    """Return the bytes that one draft step saves for its backward pass, counted tensor by tensor in `mtp/block.py`.

    Norms, hyper-connections, rotations and the softmax run in fp32. Attention saves the weights [H, S] of every query.
    """
    width, heads, experts = shape.hidden_size, shape.num_attention_heads, shape.experts_per_token
    streams, head_width, inner = shape.hc_mult * width, heads * shape.head_dim, shape.expert_size
    in_fp32 = 8 * streams + 9 * width + 3 * shape.q_lora_rank + 4 * head_width
    routed = experts * (2 * width + 6 * inner)
    latent = shape.o_groups * shape.o_lora_rank
    others = 6 * width + 2 * head_width + 4 * shape.head_dim + latent + 4 * shape.num_experts + routed + 6 * inner
    size = 4 if load.heads is WeightFormat.fp32 else 2
    return load.tokens * (4 * in_fp32 + size * others + heads * load.row_length * 4)


def activation_bytes(shape: ShapeConfig, load: TrainingLoad) -> dict[str, float]:
    """Return the bytes that the rollout saves for its backward pass, and temporaries of the backbone's forward."""
    streams = load.tokens * shape.hc_mult * shape.hidden_size * (4 if load.heads is WeightFormat.fp32 else 2)
    one = saved_by_step(shape, load)
    kept = load.steps * streams + one if load.recompute else load.steps * one
    activations = {"rollout activations": kept, "streams": streams}
    if not load.from_streams:
        # eager attention of transformers: fp32 scores and weights of one layer at a time, over S + S / rate keys
        keys = load.row_length * (1 + 1 / shape.csa_rate)
        activations["backbone attention"] = 2 * 4 * load.rows * shape.num_attention_heads * load.row_length * keys
    return activations


def training_memory(shape: ShapeConfig, load: TrainingLoad, gpu_bytes: float) -> TrainingMemory:
    """Return the bytes that training holds in a GPU of `gpu_bytes` bytes, and per process in CPU memory."""
    heads = heads_bytes(shape, load)
    moved = {name: heads.pop(name) for name in ("heads' fp32 masters", "optimiser state")} if load.offload else {}
    kinds = {**backbone_bytes(shape, load), **heads, **activation_bytes(shape, load)}
    used = sum(kinds.values())
    return TrainingMemory(kinds, moved, used, gpu_bytes, fits=used <= gpu_bytes)

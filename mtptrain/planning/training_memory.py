"""Bytes that training MTP heads on a frozen backbone holds in a GPU, by kind of tensor."""

# D model width, N residual streams, H heads, C channels of a head, R query latent, E experts, k of them a token,
# I inner width of an expert, S tokens of a row, T tokens of a GPU's micro-batch, V vocabulary

from __future__ import annotations

from dataclasses import dataclass

from mtptrain.config import OptimizerName, Placement, ShapeConfig, WeightFormat
from mtptrain.planning.parameters import Weights, backbone_parts, layer_parts, module_parts, stream_maps, total_weights


@dataclass(frozen=True, slots=True)
class TrainingLoad:
    """How heads are trained.

    Attributes:
        num_gpus: processes, one a GPU.
        zero_stage: of DeepSpeed for the heads; 0 keeps everything in every process.
        offload: masters and optimiser state live in the CPU's memory.
        optimizer: AdamW, or Muon for the matrices.
        placement: of the frozen backbone: `replicate`, `zero3` or `expert_parallel`.
        backbone: format of its weights.
        heads: bf16 with fp32 masters, or fp32.
        train_experts: whether the heads' routed experts are trained.
        modules: MTP modules.
        steps: draft steps of the rollout.
        rows: sequences of a micro-batch that a GPU works on.
        row_length: tokens of a sequence.
        micro_batches: of an optimiser step.
        recompute: rollout steps keep only the streams between them and are computed again in the backward pass.
        from_streams: streams come from a cache; of the backbone only embedding, hc_head, norm and lm_head are held.
    """

    num_gpus: int = 8
    zero_stage: int = 0
    offload: bool = False
    optimizer: OptimizerName = OptimizerName.adamw
    placement: Placement = Placement.replicate
    backbone: WeightFormat = WeightFormat.bf16
    heads: WeightFormat = WeightFormat.bf16
    train_experts: bool = True
    modules: int = 1
    steps: int = 3
    rows: int = 1
    row_length: int = 4096
    micro_batches: int = 1
    recompute: bool = False
    from_streams: bool = False

    @property
    def tokens(self) -> int:
        """Tokens of a GPU's micro-batch."""
        return self.rows * self.row_length

    def share(self, stage: int) -> float:
        """Part that a GPU holds of what ZeRO divides from `stage` on."""
        return 1 / self.num_gpus if self.zero_stage >= stage else 1.0


def backbone_bytes(shape: ShapeConfig, load: TrainingLoad) -> dict[str, float]:
    """Weights of the frozen backbone in a GPU, and the layer that ZeRO-3 gathers to use it."""
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
    """Parameters of the heads that take gradients."""
    module = total_weights(module_parts(shape))
    expert = module.expert if load.train_experts else 0
    return Weights(
        load.modules * expert, load.modules * module.matrix, load.modules * module.plain, load.modules * module.strict
    )


def heads_bytes(shape: ShapeConfig, load: TrainingLoad) -> dict[str, float]:
    """Weights, gradients, masters and optimiser state of the heads in a GPU, or in the CPU beside it if offloaded.

    A parameter held in fp32 is its own master. Gradients are summed in fp32. AdamW keeps two fp32 values a parameter,
    Muon one; but it takes two-dimensional tensors only, and transformers stacks a layer's experts in three.
    """
    module, trained = total_weights(module_parts(shape)), trained_weights(shape, load)
    masters = 0.0 if load.heads is WeightFormat.fp32 else 4.0 * (trained.total - trained.strict)
    matrices = trained.matrix + trained.plain + load.modules * stream_maps(shape)
    spared = 4.0 * matrices if load.optimizer is OptimizerName.muon else 0.0
    return {
        "heads' weights": load.modules * module.bytes(load.heads) * load.share(3),
        "heads' gradients": 4.0 * trained.total * load.share(2),
        "heads' fp32 masters": masters * load.share(1),
        "optimiser state": (8.0 * trained.total - spared) * load.share(1),
    }


def saved_by_step(shape: ShapeConfig, load: TrainingLoad) -> float:
    """Bytes that one draft step keeps for its backward pass, counted tensor by tensor in `mtp/block.py`.

    Norms, hyper-connections, rotations and the softmax work in fp32; attention keeps the weights [H, S] of every query.
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
    """What the rollout keeps for its backward pass, and what the backbone's forward needs while it runs."""
    streams = load.tokens * shape.hc_mult * shape.hidden_size * (4 if load.heads is WeightFormat.fp32 else 2)
    one = saved_by_step(shape, load)
    kept = load.steps * streams + one if load.recompute else load.steps * one
    found = {"rollout activations": kept, "streams": streams}
    if not load.from_streams:
        # transformers' attention is eager: fp32 scores and weights of one layer at a time, over S + S / rate keys
        keys = load.row_length * (1 + 1 / shape.csa_rate)
        found["backbone attention"] = 2 * 4 * load.rows * shape.num_attention_heads * load.row_length * keys
    return found


def memory_by_kind(shape: ShapeConfig, load: TrainingLoad) -> dict[str, dict[str, float]]:
    """Bytes by kind of tensor: `gpu`, and `cpu` (a process's share) for what is offloaded."""
    heads = heads_bytes(shape, load)
    moved = {name: heads.pop(name) for name in ("heads' fp32 masters", "optimiser state")} if load.offload else {}
    return {"gpu": {**backbone_bytes(shape, load), **heads, **activation_bytes(shape, load)}, "cpu": moved}

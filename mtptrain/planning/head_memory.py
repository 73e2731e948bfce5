"""Bytes that a process holds for the heads while it trains them, at each moment of an optimiser step.

Counted tensor by tensor from the engines in `mtptrain/training` and from DeepSpeed 0.19.8; `tests/planning` compares
the counts with the tensors that are alive while an engine runs.
"""

# E experts, D model width, I inner width of an expert

from __future__ import annotations

from dataclasses import dataclass

from mtptrain.config import OptimizerName, ShapeConfig, WeightFormat
from mtptrain.planning.parameters import Weights, connection_matrices, module_parts, total_weights
from mtptrain.planning.training_load import TrainingLoad

ADAMW_STATE, MUON_STATE = 8, 4  # bytes a parameter
MUON_BATCH = 2**26  # values of matrices that Muon orthogonalises together; `mtptrain.training.muon.BATCH`
BUCKET = 4.0 * 5e8  # DeepSpeed's `reduce_bucket_size`, in fp32
Kinds = dict[str, float]  # bytes by kind of tensor
WEIGHTS, MASTERS, STATE = "heads' weights", "heads' fp32 masters", "optimiser state"


@dataclass(frozen=True, slots=True)
class Trained:
    """Sizes of the trained tensors that one engine holds, in parameters.

    Attributes:
        total: all of them.
        rounded: those that are held in bf16 if the heads are.
        largest: the largest tensor.
        matrices: those that Muon would update.
    """

    total: int
    rounded: int
    largest: int
    matrices: int


def trained_weights(shape: ShapeConfig, load: TrainingLoad) -> Weights:
    """Return the trained parameters of the heads, over all processes."""
    module = total_weights(module_parts(shape))
    expert = module.expert if load.train_experts else 0
    return Weights(
        load.modules * expert, load.modules * module.matrix, load.modules * module.plain, load.modules * module.strict
    )


def own_weights(shape: ShapeConfig, load: TrainingLoad) -> Weights:
    """Return the parameters of the heads in one process, trained or not, before ZeRO divides them."""
    module = total_weights(module_parts(shape))
    expert = module.expert // load.num_gpus if load.share_experts else module.expert
    return Weights(*(load.modules * size for size in (expert, module.matrix, module.plain, module.strict)))


def _in_engine(shape: ShapeConfig, load: TrainingLoad) -> Trained:
    """Return the tensors of the engine: all that are trained, without shared experts."""
    trained = trained_weights(shape, load)
    expert = 0 if load.share_experts else trained.expert
    others = max(shape.q_lora_rank * shape.num_attention_heads * shape.head_dim, shape.hidden_size**2)
    stacked = 2 * shape.num_experts * shape.hidden_size * shape.expert_size  # gate and up of all experts
    return Trained(
        total=expert + trained.matrix + trained.plain + trained.strict,
        rounded=expert + trained.matrix + trained.plain,
        largest=stacked if expert else others,
        matrices=expert + trained.matrix + trained.plain + load.modules * connection_matrices(shape),
    )


def _shared(shape: ShapeConfig, load: TrainingLoad) -> int:
    """Return the expert parameters that this process trains alone."""
    return trained_weights(shape, load).expert // load.num_gpus if load.share_experts else 0


def held_bytes(shape: ShapeConfig, load: TrainingLoad) -> Kinds:
    """Return the bytes between two steps: weights, masters and the optimiser's state.

    AdamW keeps two fp32 values per parameter and Muon, which leaves the vectors to AdamW, one. DeepSpeed makes fp32
    masters of fp32 parameters too.
    """
    one, shared, is_fp32 = _in_engine(shape, load), _shared(shape, load), load.heads is WeightFormat.fp32
    mastered = one.total if load.zero_stage else 0 if is_fp32 else one.rounded
    is_muon = load.optimizer is OptimizerName.muon
    state = ADAMW_STATE * one.total - (is_muon * (ADAMW_STATE - MUON_STATE) * one.matrices)
    return {
        WEIGHTS: own_weights(shape, load).bytes(load.heads) * load.share(3),
        MASTERS: 4.0 * mastered * load.share(1) + (0.0 if is_fp32 else 4.0 * shared),
        STATE: state * load.share(1) + (MUON_STATE if is_muon else ADAMW_STATE) * shared,
    }


def backward_bytes(shape: ShapeConfig, load: TrainingLoad) -> Kinds:
    """Return the bytes of gradients while a rollout runs backward; fp32 sums come on top at stages 2 and 3.

    Micro-batches are added up in fp32, where stage 1 and shared experts otherwise hold the gradients of one backward.
    """
    one, shared = _in_engine(shape, load), _shared(shape, load)
    size, kept = 4.0 if load.heads is WeightFormat.fp32 else 2.0, _gradient_size(load)
    gradients = kept * shared
    if load.zero_stage < 2:
        gradients += kept * one.rounded + size * one.largest + 4.0 * (one.total - one.rounded)
        return {"heads' gradients": gradients}
    if load.zero_stage == 2:
        return {"heads' gradients": gradients + size * one.largest, "sums of gradients": _summed(one, load)}
    # gathered for the pass, with gradients of the whole tensors until they are summed
    gathered = {"heads' weights, gathered": size * one.total, "heads' gradients": size * (one.total + 2 * one.largest)}
    return gathered | {"sums of gradients": 4.0 * one.total * load.share(1)}


def reduction_bytes(shape: ShapeConfig, load: TrainingLoad) -> Kinds:
    """Return the bytes of gradients while processes sum them; activations are gone by then."""
    one, shared = _in_engine(shape, load), _shared(shape, load)
    is_fp32 = load.heads is WeightFormat.fp32
    size, kept = 4.0 if is_fp32 else 2.0, _gradient_size(load)
    if load.zero_stage == 3:
        return backward_bytes(shape, load)
    if load.zero_stage == 0:
        cat = 8.0 * one.total if load.num_gpus > 1 else 0.0  # all gradients in a row, and their sums
        return {"heads' gradients": 4.0 * one.total + kept * shared, "sums of gradients": cat}
    is_summed = is_fp32 or (load.zero_stage == 1 and load.micro_batches > 1)  # in fp32 already
    casts = 0.0 if is_summed else 4.0 * _piece(one, load)
    whole = kept * one.rounded + 4.0 * (one.total - one.rounded) if load.zero_stage == 1 else size * one.largest
    buffers = 1 if load.zero_stage == 1 or load.micro_batches == 1 else 2  # one more while micro-batches are added up
    return {
        "heads' gradients": whole + kept * shared,
        "sums of gradients": buffers * _summed(one, load) + casts,
        "DeepSpeed's bucket": BUCKET,
    }


def _gradient_size(load: TrainingLoad) -> float:
    """Return the bytes of a gradient that waits for the other micro-batches, or for none: of a rounded parameter."""
    return 4.0 if load.heads is WeightFormat.fp32 or load.micro_batches > 1 else 2.0


def update_bytes(shape: ShapeConfig, load: TrainingLoad) -> Kinds:
    """Return the bytes of gradients and temporaries while the optimiser updates the masters."""
    one, shared = _in_engine(shape, load), _shared(shape, load)
    adamw = 4.0 * one.total * load.share(1)  # the square root of the second moments, of all tensors at once
    if load.zero_stage == 0:
        is_muon = load.optimizer is OptimizerName.muon
        own = _muon_temporaries(shape, load) if is_muon else adamw + 4.0 * shared
        return {"heads' gradients": 4.0 * (one.total + shared), "temporaries of the optimiser": own}
    if load.zero_stage == 3:
        return {"sums of gradients": adamw, "temporaries of the optimiser": adamw}
    norm = 8.0 * _piece(one, load)  # DeepSpeed's norm of a gradient, in float64
    return {
        "heads' gradients": 4.0 * shared,
        "sums of gradients": _summed(one, load),
        "temporaries of the optimiser": max(adamw, norm, 4.0 * shared),
    }


def _muon_temporaries(shape: ShapeConfig, load: TrainingLoad) -> float:
    """Return the bytes of Muon's largest batch in fp32: the matrices twice, and two products of their shorter side."""
    inner, width, experts = shape.expert_size, shape.hidden_size, shape.num_experts
    stacks = [(2, width, width), (1, shape.q_lora_rank, shape.num_attention_heads * shape.head_dim)]
    if load.train_experts:
        stacks.append((experts // load.num_gpus if load.share_experts else experts, 2 * inner, width))
    counts = [(min(load.modules * number, max(1, MUON_BATCH // (p * q))), p, q) for number, p, q in stacks]
    return max(4.0 * number * (2 * p * q + 2 * min(p, q) ** 2) for number, p, q in counts)


def _piece(one: Trained, load: TrainingLoad) -> float:
    """Return the largest part of one tensor in a process's share."""
    return min(one.largest, one.total / load.num_gpus)


def _summed(one: Trained, load: TrainingLoad) -> float:
    """Return the bytes of the fp32 sums that stages 1 and 2 keep: all tensors that the share touches, whole."""
    return 4.0 * min(one.total, one.total / load.num_gpus + (2 * one.largest if load.num_gpus > 1 else 0))

"""The plan of speculative decoding: gain and cost of K = 0..8 drafts per pass."""

from __future__ import annotations

from mtptrain.config import MAX_DRAFT_LENGTH, BackboneConfig, HardwareConfig, PlanConfig, ShapeConfig
from mtptrain.planning.parameters import backbone_parts, model_sizes, module_parts, total_weights
from mtptrain.planning.result import DecodingMemory, DecodingPlan, DraftCost, DraftLengthRow, PassCost, Profile
from mtptrain.planning.roofline import pass_cost
from mtptrain.planning.speedup import predict_speedups, predicted_acceptance_length
from mtptrain.planning.work import attended_keys, backbone_pass, key_bytes, module_pass
from mtptrain.run.provenance import Provenance


def verify_cost(shape: ShapeConfig, per_row: int, hardware: HardwareConfig, plan: PlanConfig) -> PassCost:
    """Return the cost of one backbone pass over `per_row` new tokens of every row."""
    work = backbone_pass(shape, per_row, plan)
    return pass_cost(work, shape, plan.batch * per_row, len(shape.layer_types), hardware, plan)


def module_cost(shape: ShapeConfig, per_row: int, hardware: HardwareConfig, plan: PlanConfig) -> PassCost:
    """Return the cost of one pass of an MTP module over `per_row` slots and of the lm_head, for one draft per row."""
    return pass_cost(module_pass(shape, per_row, plan), shape, plan.batch * per_row, 1, hardware, plan)


def draft_cost(shape: ShapeConfig, draft_length: int, hardware: HardwareConfig, plan: PlanConfig) -> DraftCost:
    """Return the cost of drafting K tokens for every row.

    The first step runs over the K + 1 slots of the last verify pass, as in servers, because their keys must come from
    the backbone's own streams. Each later step runs over one slot.
    """
    first = module_cost(shape, draft_length + 1, hardware, plan)
    later = module_cost(shape, 1, hardware, plan)
    repeats = draft_length - 1
    return DraftCost(
        seconds=first.seconds + repeats * later.seconds,
        bytes=first.bytes + repeats * later.bytes,
        flops=first.flops + repeats * later.flops,
        first_step=first,
        later_step=later,
    )


def row_cache_bytes(shape: ShapeConfig, plan: PlanConfig) -> float:
    """Return the bytes of cached keys of one row of `plan.context` tokens, including the module's window."""
    window = min(plan.context, shape.sliding_window)
    total = window * key_bytes(shape, plan.cache, shape.head_dim)
    for kind in shape.layer_types:
        rate = {"csa": shape.csa_rate, "hca": shape.hca_rate}.get(kind)
        entries = plan.context // rate if rate else 0
        total += (window + entries) * key_bytes(shape, plan.cache, shape.head_dim)
        if kind == "csa":
            total += entries * key_bytes(shape, plan.cache, shape.index_head_dim)
    return total


def decoding_memory(shape: ShapeConfig, hardware: HardwareConfig, plan: PlanConfig) -> DecodingMemory:
    """Return the bytes in one GPU: its share of the weights, one module included, and the keys of every row."""
    weights = total_weights(backbone_parts(shape)) + total_weights(module_parts(shape))
    held = weights.bytes(plan.weights) / hardware.num_gpus
    keys = plan.batch * row_cache_bytes(shape, plan)
    return DecodingMemory(held, keys, hardware.memory, fits=held + keys <= hardware.memory)


def draft_length_rows(
    shape: ShapeConfig, hardware: HardwareConfig, plan: PlanConfig, profile: Profile
) -> list[DraftLengthRow]:
    """Return gain and cost of K = 0..8 drafts per pass."""
    drafted = range(1, MAX_DRAFT_LENGTH + 1)
    verify = {k: verify_cost(shape, k + 1, hardware, plan) for k in (0, *drafted)}
    draft = {k: draft_cost(shape, k, hardware, plan) for k in drafted}
    predictions = predict_speedups(
        {k + 1: cost.seconds for k, cost in verify.items()},
        {k: cost.seconds for k, cost in draft.items()},
        {k: predicted_acceptance_length(profile.conditional, k) for k in verify},
    )
    plain_rate = plan.batch / verify[0].seconds
    return [
        DraftLengthRow(
            draft_length=one.draft_length,
            acceptance_length=one.acceptance_length,
            speedup=one.speedup,
            tokens_per_second=plain_rate * one.speedup,
            break_even=one.break_even,
            verify=verify[one.draft_length],
            draft=draft.get(one.draft_length),
        )
        for one in predictions
    ]


def plan_decoding(
    model: BackboneConfig, hardware: HardwareConfig, plan: PlanConfig, profile: Profile, provenance: Provenance
) -> DecodingPlan:
    """Return the plan of decoding with a model on some hardware.

    Raises:
        UserError: `plan.measured` is set and the hardware has no measured rates.
    """
    shape = model.shape
    rows = draft_length_rows(shape, hardware, plan, profile)
    return DecodingPlan(
        provenance=provenance,
        hardware=hardware,
        load=plan,
        model=model_sizes(model),
        acceptance=profile,
        keys_a_query={kind: attended_keys(shape, kind, plan.context) for kind in ("sliding", "csa", "hca")},
        memory=decoding_memory(shape, hardware, plan),
        draft_lengths=rows,
        best_draft_length=max(rows, key=lambda row: row.speedup).draft_length,
    )

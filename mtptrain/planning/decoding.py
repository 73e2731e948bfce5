"""The plan of speculative decoding: for K = 0..8 drafts what is gained, and the work behind it."""

from __future__ import annotations

from typing import Any

from mtptrain.config import MAX_DRAFT_LENGTH, HardwareConfig, PlanConfig, ShapeConfig
from mtptrain.planning.parameters import active_parameters, backbone_parts, module_parts, total_weights
from mtptrain.planning.profile import Profile
from mtptrain.planning.roofline import sum_parts, time_pass
from mtptrain.planning.speedup import acceptance_length, predict_speedups
from mtptrain.planning.work import attended_keys, backbone_pass, expected_experts, key_bytes, module_pass


def verify_cost(shape: ShapeConfig, per_row: int, hardware: HardwareConfig, plan: PlanConfig) -> dict[str, Any]:
    """Seconds, bytes and FLOPs of one backbone pass over `per_row` new tokens of every row."""
    tokens = plan.batch * per_row
    work = backbone_pass(shape, per_row, plan)
    parts = time_pass(work, shape, tokens, len(shape.layer_types), hardware, plan)
    return {"tokens": tokens, "experts": expected_experts(shape, tokens), **sum_parts(parts)}


def module_cost(shape: ShapeConfig, per_row: int, hardware: HardwareConfig, plan: PlanConfig) -> dict[str, Any]:
    """The same of one pass of an MTP module and the lm_head, for one draft a row."""
    tokens = plan.batch * per_row
    parts = time_pass(module_pass(shape, per_row, plan), shape, tokens, 1, hardware, plan)
    return {"tokens": tokens, "experts": expected_experts(shape, tokens), **sum_parts(parts)}


def draft_cost(shape: ShapeConfig, draft_length: int, hardware: HardwareConfig, plan: PlanConfig) -> dict[str, Any]:
    """Cost of drafting K tokens for every row.

    The first step runs over the K + 1 slots that were verified last, as servers do, because their keys must come from
    true streams; each later step runs over one slot.
    """
    first = module_cost(shape, draft_length + 1, hardware, plan)
    later = module_cost(shape, 1, hardware, plan)
    totals = {key: first[key] + (draft_length - 1) * later[key] for key in ("seconds", "bytes", "flops")}
    return {**totals, "first_step": first, "later_step": later}


def cache_bytes(shape: ShapeConfig, plan: PlanConfig) -> float:
    """Bytes that one row of `plan.context` tokens keeps, the module's window included."""
    window = min(plan.context, shape.sliding_window)
    total = window * key_bytes(shape, plan.cache, shape.head_dim)
    for kind in shape.layer_types:
        rate = {"csa": shape.csa_rate, "hca": shape.hca_rate}.get(kind)
        entries = plan.context // rate if rate else 0
        total += (window + entries) * key_bytes(shape, plan.cache, shape.head_dim)
        if kind == "csa":
            total += entries * key_bytes(shape, plan.cache, shape.index_head_dim)
    return total


def memory(shape: ShapeConfig, hardware: HardwareConfig, plan: PlanConfig) -> dict[str, Any]:
    """What a GPU holds: its share of the weights, one module included, and the keys of every row."""
    weights = total_weights(backbone_parts(shape)) + total_weights(module_parts(shape))
    held = weights.bytes(plan.weights) / hardware.num_gpus
    keys = plan.batch * cache_bytes(shape, plan)
    return {
        "weights_bytes_a_gpu": held,
        "cache_bytes_a_gpu": keys,
        "memory_bytes_a_gpu": hardware.memory,
        "fits": held + keys <= hardware.memory,
    }


def describe_model(name: str, shape: ShapeConfig) -> dict[str, Any]:
    """Sizes of the model, in parameters."""
    module = total_weights(module_parts(shape))
    return {
        "name": name,
        "parameters": total_weights(backbone_parts(shape)).total,
        "active_parameters": active_parameters(shape),
        "module_parameters": module.total,
        "module_parameters_without_routed_experts": module.total - module.expert,
        "layers": {kind: shape.layer_types.count(kind) for kind in ("sliding", "csa", "hca")},
    }


def plan_decoding(shape: ShapeConfig, hardware: HardwareConfig, plan: PlanConfig, profile: Profile) -> dict[str, Any]:
    """The body of plan.json for `plan.what=decoding`; docs/plan.md describes it."""
    drafted = range(1, MAX_DRAFT_LENGTH + 1)
    verify = {k: verify_cost(shape, k + 1, hardware, plan) for k in (0, *drafted)}
    draft = {k: draft_cost(shape, k, hardware, plan) for k in drafted}
    predictions = predict_speedups(
        {k + 1: cost["seconds"] for k, cost in verify.items()},
        {k: cost["seconds"] for k, cost in draft.items()},
        {k: acceptance_length(profile.conditional, k) for k in verify},
    )
    plain_rate = plan.batch / verify[0]["seconds"]
    rows = [
        {
            "draft_length": one.draft_length,
            "acceptance_length": one.acceptance_length,
            "speedup": one.speedup,
            "tokens_per_second": plain_rate * one.speedup,
            "break_even": one.break_even,
            "verify": verify[one.draft_length],
            "draft": draft.get(one.draft_length),
        }
        for one in predictions
    ]
    return {
        "acceptance": {"conditional": profile.conditional, "source": profile.source},
        "keys_a_query": {kind: attended_keys(shape, kind, plan.context) for kind in ("sliding", "csa", "hca")},
        "memory": memory(shape, hardware, plan),
        "draft_lengths": rows,
        "best_draft_length": max(predictions, key=lambda one: one.speedup).draft_length,
    }

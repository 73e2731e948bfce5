import sys
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from mtptrain.backbone.build import build_model
from mtptrain.config import (
    BackboneConfig,
    HardwareConfig,
    LossConfig,
    OptimizerName,
    Placement,
    PlanConfig,
    ShapeConfig,
    TrainConfig,
    WeightFormat,
)
from mtptrain.kernels import hyper_connection, norm_rotate
from mtptrain.losses.rollout import RolloutObjective
from mtptrain.mtp.stack import fresh_stack
from mtptrain.mtp.tensors import STRICT_FP32
from mtptrain.planning.head_memory import held_bytes, update_bytes
from mtptrain.planning.parameters import module_parts, total_weights
from mtptrain.planning.result import StreamCacheSize
from mtptrain.planning.training import plan_training, step_communication, step_flops
from mtptrain.planning.training_load import TrainingLoad
from mtptrain.planning.training_memory import activation_bytes, saved_by_step, training_memory
from mtptrain.training.optim import MasterWeights, make_optimizers
from tests.planning.presets import PROVENANCE, preset_shape
from tests.tiny import random_batch

HARDWARE = HardwareConfig(
    num_gpus=8, memory=141e9, bandwidth=4.8e12, fp8_flops=2e15, bf16_flops=1e15, fp32_flops=5e14, interconnect=450e9
)


def tiny_stack(heads: WeightFormat) -> tuple[torch.nn.Module, torch.nn.Module]:
    """Return the tiny backbone and one module with its matrices in the given format."""
    model = build_model(ShapeConfig(), 0, torch.device("cpu")).eval().requires_grad_(False)
    stack = fresh_stack(model, 1, 0)
    if heads is WeightFormat.bf16:
        for name, parameter in stack.named_parameters():
            path = name.split(".")
            if STRICT_FP32.isdisjoint(path) and not path[-2].endswith("norm"):
                parameter.data = parameter.data.bfloat16()
    return model, stack


def size(tensors: list[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@pytest.mark.parametrize("heads", [WeightFormat.fp32, WeightFormat.bf16])
@pytest.mark.parametrize("optimizer", OptimizerName)
def test_bytes_of_parameters_and_optimiser_are_those_that_training_holds(
    optimizer: OptimizerName, heads: WeightFormat
) -> None:
    _, stack = tiny_stack(heads)
    masters = MasterWeights(stack)
    optimizers = make_optimizers(masters.parameters, TrainConfig(optimizer=optimizer))
    for parameter in stack.parameters():
        parameter.grad = torch.zeros_like(parameter)
    masters.pull_gradients()
    for one in optimizers:
        one.step()
    states = [state for one in optimizers for state in one.state.values()]
    load = TrainingLoad(num_gpus=1, heads=heads, optimizer=optimizer)
    counted = held_bytes(ShapeConfig(), load) | update_bytes(ShapeConfig(), load)
    rounded = [master for master in masters.parameters if not any(master is p for p in stack.parameters())]
    assert counted["heads' weights"] == size(list(stack.parameters()))
    assert counted["heads' fp32 masters"] == size(rounded)
    assert counted["heads' gradients"] == size([m.grad for m in masters.parameters if m.grad is not None])
    assert counted["optimiser state"] == size([v for state in states for key, v in state.items() if key != "step"])


@pytest.mark.parametrize(("rows", "row_length"), [(1, 63), (2, 128)])
def test_bytes_that_a_rollout_keeps_are_estimated_within_a_tenth(
    rows: int, row_length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of the definitions; the ops for many tokens on a CPU keep less."""
    load = TrainingLoad(heads=WeightFormat.fp32, rows=rows, row_length=row_length)
    estimate = 3 * saved_by_step(ShapeConfig(), load)
    assert _kept_by_rollout(rows, row_length) < 1.1 * estimate
    monkeypatch.setattr(hyper_connection, "FEWEST", sys.maxsize)
    monkeypatch.setattr(norm_rotate, "FEWEST", sys.maxsize)
    assert estimate == pytest.approx(_kept_by_rollout(rows, row_length), rel=0.1)


def _kept_by_rollout(rows: int, row_length: int) -> int:
    """Return the bytes that three draft steps save for their backward."""
    model, stack = tiny_stack(WeightFormat.fp32)
    batch = random_batch(ShapeConfig().vocab_size, [[row_length]] * rows, row_length)
    weights = {p.untyped_storage().data_ptr() for module in (model, stack) for p in module.parameters()}
    kept: dict[int, Tensor] = {}  # by storage, so that views of one tensor count once

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    objective = RolloutObjective(model, stack, LossConfig(), 3)  # type: ignore[arg-type]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outcome = objective(batch, objective.counts(batch))
    assert outcome.loss.requires_grad
    return sum(t.untyped_storage().nbytes() for address, t in kept.items() if address not in weights)


def test_the_whole_adamw_state_of_a_module_matches_a_count_by_hand() -> None:
    # 16 bytes a parameter: fp32 weights, gradient and two moments; 106 GB for Flash, 413 GB for Pro.
    for name, gigabytes in (("v4_flash", 106), ("v4_pro", 413)):
        load = TrainingLoad(num_gpus=1, heads=WeightFormat.fp32)
        held = held_bytes(preset_shape(name), load) | update_bytes(preset_shape(name), load)
        held.pop("temporaries of the optimiser")
        assert sum(held.values()) / 1e9 == pytest.approx(gigabytes, abs=0.5)


def test_each_stage_of_zero_divides_more() -> None:
    shape = preset_shape("v4_flash")
    loads = [TrainingLoad(zero_stage=stage, heads=WeightFormat.fp32) for stage in range(4)]
    held = [sum(held_bytes(shape, load).values()) for load in loads]
    assert held == sorted(held, reverse=True)
    assert held[3] == pytest.approx(16 * total_weights(module_parts(shape)).total / 8)


def test_placements_and_offloading_take_what_they_divide_out_of_a_gpu() -> None:
    shape, load = preset_shape("v4_pro"), TrainingLoad(zero_stage=2)
    held = {one: training_memory(shape, replace(load, placement=one), 141e9).gpu for one in Placement}
    weights = {placement: kinds["backbone weights"] for placement, kinds in held.items()}
    assert weights[Placement.zero3] == pytest.approx(weights[Placement.replicate] / 8)
    assert weights[Placement.zero3] < weights[Placement.expert_parallel] < weights[Placement.replicate] / 7
    whole, moved = (training_memory(shape, one, 141e9) for one in (load, replace(load, offload=True)))
    kinds = {"heads' fp32 masters", "optimiser state"}
    assert moved.bytes_a_gpu + sum(moved.cpu[kind] for kind in kinds) == pytest.approx(whole.bytes_a_gpu)
    assert moved.cpu.keys() - whole.cpu.keys() == kinds


def test_training_without_experts_needs_little_state() -> None:
    shape, load = preset_shape("v4_flash"), TrainingLoad()
    full = held_bytes(shape, load)["optimiser state"]
    assert held_bytes(shape, replace(load, train_experts=False))["optimiser state"] < 0.03 * full  # 168 M of 6.61 B


def test_cached_streams_spare_the_backbone() -> None:
    shape, load = preset_shape("v4_flash"), TrainingLoad(placement=Placement.zero3)
    cached = replace(load, from_streams=True)
    assert step_flops(shape, cached)["backbone forward"] == 0
    assert "backbone weights" not in step_communication(shape, cached)
    model = BackboneConfig(shape=shape)
    plan, online = (plan_training(model, HARDWARE, PlanConfig(), one, 10, PROVENANCE) for one in (cached, load))
    assert plan.stream_cache == StreamCacheSize(bytes_a_token=32 * 1024, bytes=32 * 1024 * 10 * 8 * 4096)
    assert plan.hours < online.hours


def test_gradients_that_are_shared_out_are_sent_for_every_micro_batch() -> None:
    shape = preset_shape("v4_flash")
    loads = [TrainingLoad(zero_stage=stage, micro_batches=4) for stage in (1, 2)]
    once, often = (step_communication(shape, load)["heads' gradients"] for load in loads)
    assert often == 4 * once


def test_recomputing_trades_activations_for_flops() -> None:
    shape, load = preset_shape("v4_flash"), TrainingLoad(steps=4)
    again = replace(load, recompute=True)
    kept, fewer = (activation_bytes(shape, one)["rollout activations"] for one in (load, again))
    assert fewer < kept / 2  # hc_head and norm of every step are kept
    assert step_flops(shape, again)["rollout"] == pytest.approx(step_flops(shape, load)["rollout"] * 4 / 3)


def test_more_steps_cost_what_they_compute() -> None:
    shape = preset_shape("v4_flash")
    one, two = (step_flops(shape, TrainingLoad(steps=steps)) for steps in (1, 2))
    assert two["rollout"] == 2 * one["rollout"]
    assert two["backbone forward"] == one["backbone forward"]
    assert two["lm_head and loss"] == pytest.approx(one["lm_head and loss"] * 5 / 3)

"""Print the bytes of a head that its engine holds, at its peaks, by engine: a JSON object on rank 0.

python -m torch.distributed.run --standalone --nproc-per-node 2 -m tests.planning.engine_memory
"""

import json
import sys
from dataclasses import replace
from types import SimpleNamespace

import torch
from transformers import DeepseekV4ForCausalLM

from mtptrain.backbone.build import build_model
from mtptrain.config import (
    EngineName,
    HeadExperts,
    LossConfig,
    MtpConfig,
    OptimizerName,
    RunConfig,
    ShapeConfig,
    TrainConfig,
)
from mtptrain.losses.rollout import RolloutObjective
from mtptrain.mtp.start import freeze_untrained, initial_stack
from mtptrain.run.distributed import join, max_over_processes, rank
from mtptrain.training.engine import make_engine
from tests.planning.live import LiveBytes, total_bytes
from tests.tiny import random_batch

# Like V4-Flash's head nearly all experts, and few tokens, so that activations do not matter.
SHAPE = ShapeConfig(
    vocab_size=300,
    hidden_size=64,
    layer_types=["sliding"],
    num_attention_heads=2,
    q_lora_rank=32,
    o_lora_rank=16,
    num_experts=32,
    expert_size=256,
    sinkhorn_iterations=1,
)
ACCUMULATION = 2
CASES = {
    "single": (EngineName.single, {}),
    "single_shared": (EngineName.single, {"experts": HeadExperts.expert_parallel}),
    "single_muon": (EngineName.single, {}),
    "single_shared_muon": (EngineName.single, {"experts": HeadExperts.expert_parallel}),
    "zero1": (EngineName.zero1, {}),
    "zero1_no_experts": (EngineName.zero1, {"trainable": "no_experts"}),
    "zero1_shared": (EngineName.zero1, {"experts": HeadExperts.expert_parallel}),
    "zero2": (EngineName.zero2, {}),
}


def optimizer_of(case: str) -> OptimizerName:
    """Return the optimiser of a case."""
    return OptimizerName.muon if case.endswith("muon") else OptimizerName.adamw


def measure(
    model: DeepseekV4ForCausalLM, engine_name: EngineName, mtp: MtpConfig, optimizer: OptimizerName
) -> dict[str, int]:
    """Return the bytes held between steps, and the peaks of the last backward and of the update; largest process."""
    stack = initial_stack(mtp, SimpleNamespace(model=model), None, 0)  # type: ignore[arg-type]
    freeze_untrained(stack, mtp.trainable)
    batch = random_batch(SHAPE.vocab_size, [[8]], 8)
    streams = torch.randn(1, 8, SHAPE.hc_mult, SHAPE.hidden_size, dtype=torch.bfloat16)
    batch = replace(batch, streams_BSND=streams)  # the backbone does not run
    live = LiveBytes("meta", model, stack)
    with live:
        around = total_bytes([*model.parameters(), *model.buffers(), *stack.buffers(), streams])
        config = TrainConfig(accumulation=ACCUMULATION, optimizer=optimizer)
        engine = make_engine(engine_name, stack, config, False, {"zero_optimization": {"reduce_bucket_size": 1000}})
        objective = RolloutObjective(model, stack, LossConfig(), 1)
        peaks = {}
        for _ in range(2):  # the first step of `single` creates the optimiser's state
            for _ in range(ACCUMULATION):
                live.reset()
                engine.backward(objective(batch, objective.counts(batch)).loss)
            peaks["reduction"] = live.peak
            live.reset()
            engine.step(1e-3)
            peaks["update"], peaks["held"] = live.peak, live.now
    return {name: max_over_processes(size - around) for name, size in sorted(peaks.items())}


if __name__ == "__main__":
    join(RunConfig(task="distill", engine=EngineName.zero1), "any")
    backbone = build_model(SHAPE, 0, torch.device("cpu")).eval().requires_grad_(False).bfloat16()
    results = {
        name: measure(backbone, engine, MtpConfig(init="fresh", **mtp), optimizer_of(name))  # type: ignore[arg-type]
        for name, (engine, mtp) in CASES.items()
    }
    if rank() == 0:
        print(json.dumps(results), file=sys.stdout)

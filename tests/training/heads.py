"""Train a random head on rows with very different numbers of tokens, in one process or several.

python -m torch.distributed.run --nproc-per-node 2 -m tests.training.heads FOLDER ENGINE...
"""

from __future__ import annotations

import gc
import math
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DeepseekV4ForCausalLM

from mtptrain.backbone.streams import backbone_streams
from mtptrain.batch import Batch
from mtptrain.config import (
    EngineName,
    HeadExperts,
    LossConfig,
    MtpConfig,
    MtpMode,
    OptimizerName,
    RunConfig,
    TrainConfig,
)
from mtptrain.data.batches import BatchSource
from mtptrain.errors import UserError
from mtptrain.losses.next_token import LossOutput
from mtptrain.losses.rollout import RolloutObjective
from mtptrain.mtp.expert_parallel import whole_digest
from mtptrain.mtp.stack import MtpStack
from mtptrain.mtp.start import freeze_untrained, initial_stack, place
from mtptrain.mtp.tensors import HeldTensors
from mtptrain.run.distributed import join, leave, rank, rank_rows, world_size
from mtptrain.run.tracking import MetricsLog, Trackers
from mtptrain.training.checkpoint import OPTIMIZER, BackboneIdentity, checkpoint_name, open_checkpoint
from mtptrain.training.engine import make_engine
from mtptrain.training.trainer import Step, Trainer
from tests.tiny import TINY, random_backbone, random_batch, random_stack

# A step before the interruption, and two after it: only the second one's loss depends on the state of the optimiser.
STEPS, MIDDLE = 3, 1
CONFIG = TrainConfig(
    steps=STEPS,
    batch_size=4,
    accumulation=2,
    learning_rate=1e-2,
    warmup_steps=2,
    router_bias_rate=0.01,
    checkpoint_every=STEPS,  # and `train` saves at MIDDLE: no save, which gathers tensors, between the others
    keep_checkpoints=99,
)
ROWS = [[16], [5, 9], [3], [2, 2]]  # the first two rows hold most tokens; the others have no target at step 2
DRAFT_STEPS = 2

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
HALF, NO_EXPERTS = {"dtype": torch.bfloat16}, {"trainable": "no_experts"}
VARIANTS: list[tuple[str, EngineName, dict[str, Any]]] = [
    ("offloaded", EngineName.zero2, {"offload": True}),
    ("recomputed", EngineName.zero3, {"config": replace(CONFIG, recompute=True)}),
    ("no_experts_zero2", EngineName.zero2, NO_EXPERTS),
    ("no_experts_zero3", EngineName.zero3, NO_EXPERTS),
    ("half_single", EngineName.single, HALF),
    ("half_zero1", EngineName.zero1, HALF),
    ("half_zero2", EngineName.zero2, HALF),
    ("shared_half_zero1", EngineName.zero1, {**HALF, "is_shared": True}),
    ("shared_offloaded", EngineName.zero2, {"offload": True, "is_shared": True}),
    ("shared_no_experts", EngineName.zero1, {**NO_EXPERTS, "is_shared": True}),
    ("shared_only_experts", EngineName.single, {"trainable": "*.mlp.experts.*", "is_shared": True}),
    ("shared_recomputed", EngineName.single, {"config": replace(CONFIG, recompute=True), "is_shared": True}),
    ("shared_muon", EngineName.single, {"config": replace(CONFIG, optimizer=OptimizerName.muon), "is_shared": True}),
]
# Engines that do all checks, with the experts replicated or shared.
ENGINES: dict[str, tuple[EngineName, bool]] = {
    **{engine.value: (engine, False) for engine in EngineName},
    **{f"shared_{engine.value}": (engine, True) for engine in EngineName if engine is not EngineName.zero3},
}


SUMMED = [EngineName.single, EngineName.zero1, EngineName.zero2]  # stage 3 needs parameters of one dtype


@cache
def one_layer(dtype: torch.dtype) -> DeepseekV4ForCausalLM:
    """Return a backbone: a head learns from its streams alone, so one layer is enough."""
    sizes = {"num_hidden_layers": 1, "layer_types": ["sliding_attention"], "mlp_layer_types": ["moe"]}
    return random_backbone(**sizes, hc_sinkhorn_iters=1).to(dtype)


@cache
def whole_batch(dtype: torch.dtype, index: int) -> Batch:
    """Return the rows of all processes, with their streams."""
    batch = random_batch(TINY["vocab_size"], ROWS, 16, seed=index)
    with torch.no_grad():
        return replace(batch, streams_BSND=backbone_streams(one_layer(dtype), batch)[0])


class UnevenBatches(BatchSource):
    """Random rows that do not depend on the number of processes."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def batch(self, index: int) -> Batch:
        whole, rows = whole_batch(self.dtype, index), rank_rows(4)
        names = ("tokens_BS", "segment_BS", "position_BS", "streams_BSND")
        return Batch(**{name: getattr(whole, name)[rows.start : rows.stop] for name in names})


class BadObjective(RolloutObjective):
    """Objective whose loss is NaN in the last process."""

    def __call__(self, batch: Batch, counts_K: Tensor) -> LossOutput:
        output = super().__call__(batch, counts_K)
        return LossOutput(output.loss * torch.nan, output.sums_K) if rank_rows(4).stop == 4 else output


class SilentLog(MetricsLog):
    """Writes nothing."""

    def __init__(self) -> None:
        super().__init__(None, Trackers())


def start(
    backbone: DeepseekV4ForCausalLM,
    stored: HeldTensors | None,
    init: str = "stored",
    experts: HeadExperts = HeadExperts.expert_parallel,
    depth: int = 1,
) -> MtpStack:
    """Return the modules before training, of stored tensors or from `mtp.init=fresh|backbone`."""
    mode = MtpMode.shared if depth == 1 else MtpMode.stacked
    config = MtpConfig(mode=mode, depth=depth, init=init, experts=experts)
    return initial_stack(config, SimpleNamespace(model=backbone, config=backbone.config), stored, 3)


def start_digests(experts: HeadExperts) -> dict[str, str]:
    """Return the digests of two modules from every kind of start, on an fp32 and on a bf16 backbone."""
    backbones = {name: random_backbone().to(dtype) for name, dtype in DTYPES.items()}
    return {
        f"{init} {dtype}": whole_digest(start(backbone, HeldTensors(stored), init, experts, depth=2))
        for init in ("stored", "fresh", "backbone")
        for dtype, backbone in backbones.items()
        for stored in [random_stack(backbone).state_dict()]
    }


class DamagedHead(HeldTensors):
    """A head of which the last expert cannot be read."""

    def expert(self, name: str, number: int) -> Tensor:
        if number == TINY["n_routed_experts"] - 1:
            raise UserError(f"{name}: expert {number} is damaged")
        return super().expert(name, number)


def damage() -> str:
    """Return the error of a start from a damaged head."""
    backbone = random_backbone()
    try:
        start(backbone, DamagedHead(random_stack(backbone).state_dict()))
    except UserError as error:
        return str(error)
    return ""


def head_trainer(
    engine: EngineName,
    folder: Path,
    objective: type[RolloutObjective] = RolloutObjective,
    config: TrainConfig = CONFIG,
    offload: bool = False,
    trainable: str = "all",
    dtype: torch.dtype = torch.float32,
    is_shared: bool = False,
) -> Trainer:
    """Return a trainer of a random head."""
    backbone = one_layer(dtype)
    stack = place(random_stack(backbone), SimpleNamespace(model=backbone))
    if is_shared:
        stack = start(backbone, HeldTensors(stack.state_dict()))
    freeze_untrained(stack, trainable)
    trained = make_engine(engine, stack, config, offload)
    loss = objective(backbone, stack, LossConfig(), DRAFT_STEPS, config.recompute)
    return Trainer(trained, loss, UnevenBatches(dtype), config, folder, BackboneIdentity("test", "ab" * 32, {}))


def train(trainer: Trainer) -> dict[str, Any]:
    """Train to the end; return mean losses and gradient norm of every step, and the final state as stored."""
    steps: list[Step] = []
    take = trainer.train_step

    def step() -> Step:
        steps.append(take())
        if trainer.step == MIDDLE:
            trainer.save()
        return steps[-1]

    trainer.train_step = step  # type: ignore[method-assign]
    trainer.run(SilentLog())
    last = open_checkpoint(trainer.checkpoints / checkpoint_name(trainer.step))
    return {
        "losses": [(step.sums_K["loss"] / step.counts_K).tolist() for step in steps if step.sums_K],
        "norms": [step.norm for step in steps],
        "tokens": trainer.counters["tokens"],
        "skipped": trainer.counters["skipped_steps"],
        "tensors": {name: value.clone() for name, value in last.tensors().items()},
        "optimizer": {name: value.clone() for name, value in last.stored(OPTIMIZER).items()},
    }


def resumed(engine: EngineName, source: Path, folder: Path, **options: Any) -> dict[str, Any]:
    """Continue from another run's checkpoint of step `MIDDLE`; return the results of `train`."""
    trainer = head_trainer(engine, folder, **options)
    trainer.restore(open_checkpoint(source / checkpoint_name(MIDDLE)))
    return train(trainer)


def small_gradients(engine_name: EngineName) -> float:
    """Return the gradient's norm of a bf16 number that gets 1 from one micro-batch and 2^-9 from each of 64 others."""
    module = nn.ParameterList([nn.Parameter(torch.zeros(1, dtype=torch.bfloat16)), nn.Parameter(torch.zeros(1))])
    engine = make_engine(engine_name, module, TrainConfig(accumulation=65, clip_norm=math.inf))
    for slope in [1.0] + 64 * [2**-9]:
        engine.backward(module[0].float().sum() * slope / world_size())
    return engine.step(1e-3)


def main(folder: Path, names: list[str]) -> None:
    """Train with the named engines: uninterrupted, resumed, continued from one process, or with bad gradients."""
    join(RunConfig(task="distill", train=CONFIG), processes="any")
    torch.set_num_threads(1)
    results: dict[str, Any] = {}
    for name, (engine, is_shared) in ENGINES.items():
        if name not in names:
            continue
        gc.freeze()  # for every engine of stage 3, DeepSpeed collects garbage
        run_folder = folder / name
        results[name] = {
            "whole": train(head_trainer(engine, run_folder, is_shared=is_shared)),
            "resumed": resumed(engine, run_folder, folder / "resumed" / name, is_shared=is_shared),
            "from_one": resumed(engine, folder / "one", folder / "from_one" / name, is_shared=is_shared),
            "bad": resumed(engine, run_folder, folder / "bad" / name, objective=BadObjective, is_shared=is_shared),
        }
    for name, engine, options in VARIANTS:
        if name not in names:
            continue
        run_folder = folder / name
        results[name] = {
            "whole": train(head_trainer(engine, run_folder, **options)),
            "resumed": resumed(engine, run_folder, folder / "resumed" / name, **options),
        }
    results["damage"] = damage()
    results["starts"] = start_digests(HeadExperts.expert_parallel)
    results["small gradients"] = {name.value: small_gradients(name) for name in SUMMED}
    leave()
    join(RunConfig(task="distill", train=CONFIG), processes="any")
    results["next job"] = small_gradients(EngineName.zero1)
    if rank() == 0:
        torch.save(results, folder / "results.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])

"""`+recipe=plan`: what drafting would gain, or training would cost, on some hardware; no model is loaded.

python -m mtptrain +recipe=plan model=v4_flash hardware=h200
python -m mtptrain +recipe=plan plan.what=training model=v4_flash hardware=h200 engine=zero2 backbone.placement=zero3
"""

from __future__ import annotations

from dataclasses import asdict
from enum import Enum

from rich.console import Console

from mtptrain.config import (
    SPREAD_PLACEMENTS,
    BackboneConfig,
    DataSource,
    EngineName,
    HardwareConfig,
    PlanConfig,
    PlanKind,
    Precision,
    RunConfig,
    WeightFormat,
)
from mtptrain.errors import UserError
from mtptrain.planning.decoding import describe_model, plan_decoding
from mtptrain.planning.decoding_table import print_decoding_plan
from mtptrain.planning.profile import read_profile
from mtptrain.planning.training import plan_training
from mtptrain.planning.training_memory import TrainingLoad
from mtptrain.planning.training_table import print_training_plan
from mtptrain.recipes.session import Session
from mtptrain.storage import write_json

SCHEMA = 1
PROCESSES = "none"  # a plan is of other machines than this one: torch is not loaded
STAGES = {EngineName.single: 0, EngineName.zero1: 1, EngineName.zero2: 2, EngineName.zero3: 3}


def training_load(config: RunConfig, plan: PlanConfig, processes: int) -> TrainingLoad:
    """The training that the other sections of a run describe.

    Raises:
        UserError: the processes cannot share a micro-batch evenly, the placement is one of a single process, or tensors
            are chosen by name.
    """
    if config.mtp.trainable not in ("all", "no_experts"):
        raise UserError(
            f"mtp.trainable={config.mtp.trainable}: a plan knows sizes of parts and no names of tensors; set all or "
            "no_experts, whichever is nearer"
        )
    if config.backbone.placement in SPREAD_PLACEMENTS:
        raise UserError(
            f"backbone.placement={config.backbone.placement.value}: is of one process on several GPUs, and a plan has "
            "one process a GPU; set replicate, zero3 or expert_parallel"
        )
    batch = config.train.batch_size
    if batch % processes:
        raise UserError(
            f"train.batch_size={batch}: must be a multiple of hardware.num_gpus={processes}, the processes that share "
            f"it; set train.batch_size={processes * max(1, batch // processes)}"
        )
    return TrainingLoad(
        num_gpus=processes,
        zero_stage=STAGES[config.engine],
        offload=config.offload,
        optimizer=config.train.optimizer,
        placement=config.backbone.placement,
        backbone=plan.weights,
        heads=WeightFormat.fp32 if config.precision is Precision.fp32 else WeightFormat.bf16,
        train_experts=config.mtp.trainable == "all",
        modules=config.mtp.depth,
        steps=config.mtp.num_steps,
        rows=batch // processes,
        row_length=config.data.sequence_length,
        micro_batches=config.train.accumulation,
        recompute=config.train.recompute,
        from_streams=config.data.source is DataSource.streams,
    )


def check(config: RunConfig) -> None:
    """Refuse a plan without shapes, hardware and a load."""
    planned(config)


def planned(config: RunConfig) -> tuple[BackboneConfig, HardwareConfig, PlanConfig]:
    """The model, the hardware and the load of a plan.

    Raises:
        UserError: one is not set.
    """
    if config.model is None or config.hardware is None or config.plan is None:
        raise UserError("model=null: plan needs shapes, hardware and a load; start from +recipe=plan")
    return config.model, config.hardware, config.plan


def run(session: Session) -> None:
    """Compute the plan, write plan.json and print it."""
    config, run_folder = session.config, session.folder
    model, hardware, plan = planned(config)
    shape = model.shape
    if plan.what is PlanKind.training:
        load = training_load(config, plan, hardware.num_gpus)
        described = {key: value.value if isinstance(value, Enum) else value for key, value in asdict(load).items()}
        body = {"training": described, **plan_training(shape, hardware, plan, load, config.train.steps)}
    else:
        body = plan_decoding(shape, hardware, plan, read_profile(plan))
    run_folder.write()
    result = {
        "schema": SCHEMA,
        "provenance": run_folder.provenance,
        "what": plan.what.value,
        "hardware": asdict(hardware),
        "load": run_folder.settings["plan"],
        "model": describe_model(model.name, shape),
        **body,
    }
    write_json(run_folder.path / "plan.json", result)
    show = print_training_plan if plan.what is PlanKind.training else print_decoding_plan
    show(result, Console())
    run_folder.say(f"wrote {run_folder.path / 'plan.json'}")

"""`+recipe=plan`: predict what drafting gains or what training costs on some hardware. No model is loaded.

python -m mtptrain +recipe=plan model=v4_flash hardware=h200
python -m mtptrain +recipe=plan plan.what=training model=v4_flash hardware=h200 engine=zero2 backbone.placement=zero3
"""

from __future__ import annotations

from pathlib import Path

from mtptrain.config import (
    DataSource,
    EngineName,
    HeadExperts,
    Placement,
    PlanConfig,
    PlanKind,
    Precision,
    RunConfig,
    WeightFormat,
)
from mtptrain.config.reads import ALWAYS, Settings, of_speed_plan, settings
from mtptrain.errors import UserError
from mtptrain.evaluation.result import read_evaluation
from mtptrain.planning.decoding import plan_decoding
from mtptrain.planning.result import DecodingPlan, Profile, TrainingPlan, write_plan
from mtptrain.planning.tables import print_plan
from mtptrain.planning.training import plan_training
from mtptrain.planning.training_load import TrainingLoad
from mtptrain.recipes.session import Session
from mtptrain.run.folder import FolderUse
from mtptrain.run.provenance import Provenance
from mtptrain.run.tables import open_console

FOLDER = FolderUse.result
PROCESSES = "none"  # shapes and data sheets only: torch is not loaded
DECODING_ONLY = {f"plan.{name}" for name in ("acceptance", "batch", "cache", "context", "evaluation", "head")}
DECODING_ONLY |= {"hardware.layer_seconds", "model.shape.rope_head_dim"}
# The settings of `training_load`.
TRAINING_LOAD = (
    "engine",
    "offload",
    "precision",
    "backbone.placement",
    "data.source",
    "data.sequence_length",
    "mtp.depth",
    "mtp.experts",
    "mtp.steps",
    "mtp.trainable",
    "train.accumulation",
    "train.batch_size",
    "train.optimizer",
    "train.recompute",
    "train.steps",
)
STAGES = {EngineName.single: 0, EngineName.zero1: 1, EngineName.zero2: 2, EngineName.zero3: 3}


def reads(config: RunConfig) -> Settings:
    """Return the settings that a plan reads: of training, also those of the training."""
    used = ALWAYS | of_speed_plan(config, "model.shape")
    used |= settings("hardware.memory", "model.name", "plan", "overwrite")
    plan = config.plan or PlanConfig()
    if plan.what is PlanKind.training:
        return used - DECODING_ONLY | settings(*TRAINING_LOAD)
    return used - {"plan.head" if plan.evaluation is None else "plan.acceptance"}


def read_profile(plan: PlanConfig) -> Profile:
    """Return the acceptance that the settings give or that an evaluation measured.

    Raises:
        UserError: the settings give neither, or the evaluation cannot be read or has no such head.
    """
    if plan.evaluation is not None:
        return _from_evaluation(Path(plan.evaluation), plan.head)
    if not plan.acceptance:
        raise UserError(
            "plan.acceptance=[]: must hold at least one share; give plan.acceptance=[0.8,0.6] or plan.evaluation=RUN"
        )
    return Profile(plan.acceptance, "assumed (plan.acceptance)")


def _from_evaluation(path: Path, name: str | None) -> Profile:
    """Rates of the longest draft; a position that no draft reached counts as never accepted."""
    evaluation = read_evaluation(path, "plan.evaluation")
    heads = {head.name: head for head in evaluation.heads}
    chosen = name or evaluation.last_head.name
    if chosen not in heads:
        raise UserError(f"plan.head={name}: {path} holds the heads {sorted(heads)}; choose one of them")
    rates = heads[chosen].replay[evaluation.draft_length].conditional
    return Profile([rate or 0.0 for rate in rates], f"head {chosen} of {path}")


def training_load(config: RunConfig, plan: PlanConfig, processes: int) -> TrainingLoad:
    """Return the load of a training that uses these settings on `processes` GPUs.

    Raises:
        UserError: the batch size is not a multiple of `processes`, the placement is for a single process, or
            `mtp.trainable` names tensors.
    """
    if config.mtp.trainable not in ("all", "no_experts"):
        raise UserError(
            f"mtp.trainable={config.mtp.trainable}: a plan knows the sizes of parts but no tensor names; set all or "
            "no_experts, whichever is closer"
        )
    if config.backbone.placement is Placement.auto:
        raise UserError(
            f"backbone.placement={config.backbone.placement.value}: spreads one process over several GPUs, and a plan "
            "has one process per GPU; set replicate, zero3 or expert_parallel"
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
        share_experts=config.mtp.experts is HeadExperts.expert_parallel,
        modules=config.mtp.depth,
        steps=config.mtp.num_steps,
        rows=batch // processes,
        row_length=config.data.sequence_length,
        micro_batches=config.train.accumulation,
        recompute=config.train.recompute,
        from_streams=config.data.source is DataSource.streams,
    )


def _check_shared_experts(load: TrainingLoad, num_experts: int) -> None:
    """Refuse a number of GPUs that cannot hold equal shares of the experts of a layer, as a training does."""
    is_split = load.placement is Placement.expert_parallel and not load.from_streams
    for setting, is_chosen in (("backbone.placement", is_split), ("mtp.experts", load.share_experts)):
        if is_chosen and num_experts % load.num_gpus:
            raise UserError(
                f"{setting}=expert_parallel: hardware.num_gpus={load.num_gpus} does not divide the {num_experts} "
                "experts of a layer; use a divisor of their number"
            )


def make_plan(config: RunConfig, provenance: Provenance) -> DecodingPlan | TrainingPlan:
    """Return the plan that `plan.what` selects.

    Raises:
        UserError: a section is missing, or its settings allow no plan.
    """
    model, hardware, plan = config.model, config.hardware, config.plan
    if model is None or hardware is None or plan is None:
        raise UserError("model=null: a plan needs model, hardware and plan; start from +recipe=plan")
    if plan.what is PlanKind.training:
        load = training_load(config, plan, hardware.num_gpus)
        _check_shared_experts(load, model.shape.num_experts)
        return plan_training(model, hardware, plan, load, config.train.steps, provenance)
    return plan_decoding(model, hardware, plan, read_profile(plan), provenance)


def run(session: Session) -> None:
    """Make the plan, write plan.json and print it."""
    run_folder = session.folder
    plan = make_plan(session.config, run_folder.provenance)
    run_folder.write()
    file = run_folder.path / "plan.json"
    write_plan(file, plan)
    print_plan(plan, open_console())
    run_folder.print_status(f"wrote {file}")

"""Settings that need several processes, or that several processes cannot share."""

from __future__ import annotations

from mtptrain.config import PARTITIONED_PLACEMENTS, EngineName, HeadExperts, Placement, RunConfig
from mtptrain.errors import UserError


def check_processes(config: RunConfig, processes: str, size: int) -> None:
    """Refuse several processes if the recipe, the placement or the batch cannot be shared by them."""
    placement = config.backbone.placement
    if processes == "one":
        raise UserError(f"task={config.task}: runs in one process and {size} were started; use one")
    if processes == "led" and placement is not Placement.expert_parallel:
        raise UserError(
            f"backbone.placement={placement.value}: +recipe={config.task} decodes texts, in one process or, to hold a "
            f"backbone that is too large for one, in several that share its experts; {size} were started: set "
            "backbone.placement=expert_parallel, or use one"
        )
    if placement is Placement.auto:
        raise UserError(
            f"backbone.placement={placement.value}: spreads layers within one process and {size} were started; "
            "set backbone.placement=replicate, zero3 or expert_parallel"
        )
    trains = processes == "any" and config.task != "collect"
    if trains and config.train.batch_size % size:
        raise UserError(
            f"train.batch_size={config.train.batch_size}: is the number of sequences of all processes together, and "
            f"{size} processes cannot share it evenly; use a multiple of {size}"
        )


def refuse_sharing(config: RunConfig) -> None:
    """Refuse settings that partition tensors over processes, in a run of one process without a launcher."""
    shares = {"engine": config.engine.value} if config.engine is not EngineName.single else {}
    if config.backbone.placement in PARTITIONED_PLACEMENTS:
        shares["backbone.placement"] = config.backbone.placement.value
    if config.mtp.experts is HeadExperts.expert_parallel:
        shares["mtp.experts"] = config.mtp.experts.value
    for setting, value in shares.items():
        raise UserError(
            f"{setting}={value}: shares tensors out over processes and this one was started alone; start it with "
            f"scripts/launch_torchrun.sh, or leave {setting} at its default"
        )

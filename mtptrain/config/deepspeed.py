"""The section `deepspeed`: DeepSpeed's own settings, passed through except for those that belong to the run.

Passed settings change memory, speed and reports, never the numbers, so a run can continue with others.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from os.path import expanduser
from typing import Any

from mtptrain.config.choices import EngineName
from mtptrain.config.rules import as_written, did_you_mean, require
from mtptrain.errors import UserError

FILE = "config"  # key of the section: a file of DeepSpeed's settings, over which the other keys take precedence
ZERO = "zero_optimization"
FLAGS = {"dump_state", "memory_breakdown", "wall_clock_breakdown"}
SECTIONS = {
    "comms_logger": {"debug", "enabled", "prof_all", "prof_ops", "verbose"},
    "flops_profiler": {
        "detailed",
        "enabled",
        "module_depth",
        "output_file",
        "profile_step",
        "recompute_fwd_factor",
        "top_modules",
    },
}
ZERO_ANY = {
    "allgather_bucket_size",
    "allgather_partitions",
    "contiguous_gradients",
    "offload_optimizer",
    "overlap_comm",
    "reduce_bucket_size",
    "reduce_scatter",
    "round_robin_gradients",
    "use_multi_rank_bucket_allreduce",
}
ZERO_3 = {
    "log_trace_cache_warnings",
    "offload_param",
    "stage3_max_live_parameters",
    "stage3_max_reuse_distance",
    "stage3_module_granularity_threshold",
    "stage3_prefetch_bucket_size",
    "stage3_use_all_reduce_for_fetch_params",
    "sub_group_size",
    "zero_hpz_partition_size",
}
OFFLOADS = {f"{ZERO}.offload_optimizer", f"{ZERO}.offload_param"}
ON_NVME = ("buffer_count", "buffer_size", "fast_init", "max_in_cpu", "nvme_path", "pipeline_read", "pipeline_write")
OFFLOAD = {"device", "pin_memory"}
ROUNDS_SENT = "rounds values while they are sent, so the numbers would depend on the number of processes; leave it out"
KEEPS_FP32 = "would also round the tensors that DeepSeek-V4 keeps in fp32; set precision=bf16"
COUNTS = "train.batch_size and train.accumulation give it; leave it out"
ONE_PLACE = "the trackers of the run log everything; set tracking"
OWNED = {
    "activation_checkpointing": "the rollout recomputes its own steps; set train.recompute",
    "aio": "tunes reads from NVMe, where a run keeps nothing; leave it out",
    "amp": KEEPS_FP32,
    "autotuning": "starts runs of its own; leave it out",
    "bf16": KEEPS_FP32,
    "checkpoint": "checkpoints are written by mtptrain, in one format for every engine; leave it out",
    "comet": ONE_PLACE,
    "communication_data_type": "gradients are summed in fp32; leave it out",
    "compression_training": "changes the weights that are trained; mtp.quant_aware trains for a rounded export",
    "csv_monitor": ONE_PLACE,
    "curriculum_learning": "the order of the data is that of every engine; leave it out",
    "data_efficiency": "the order of the data is that of every engine; leave it out",
    "data_types": "gradients are added up in fp32; leave it out",
    "elasticity": "a run continues on any number of processes by resume=auto; leave it out",
    "fp16": KEEPS_FP32,
    "gradient_accumulation_steps": "set train.accumulation",
    "gradient_clipping": "set train.clip_norm",
    "optimizer": "set train.optimizer, train.learning_rate, train.weight_decay, train.beta1 and train.beta2",
    "scheduler": "set train.learning_rate, train.warmup_steps and train.final_learning_rate_ratio",
    "steps_per_print": "set train.log_every",
    "tensorboard": ONE_PLACE,
    "torch_autocast": "rounds weights anew in every product, unlike replay and decoding; set precision=bf16",
    "train_batch_size": COUNTS,
    "train_micro_batch_size_per_gpu": COUNTS,
    "wandb": ONE_PLACE,
    "zero_allow_untested_optimizer": "the optimiser is torch's, with the same bits at every engine; leave it out",
    "zero_force_ds_cpu_optimizer": "the optimiser is torch's, with the same bits at every engine; leave it out",
    **dict.fromkeys(
        (f"{ZERO}.offload_optimizer.{name}" for name in ("cpuadam_cores_perc", "ratio", "super_offload")),
        "replaces the optimiser, which is torch's, with the same bits at every engine; leave it out",
    ),
    **dict.fromkeys(
        (f"{section}.{name}" for section in OFFLOADS for name in ON_NVME),
        "is read with device: nvme only, and a run keeps nothing there; leave it out",
    ),
    f"{ZERO}.stage": "set engine=zero1, zero2 or zero3",
    f"{ZERO}.cpu_offload": "DeepSpeed has replaced it by offload_optimizer; set offload=true",
    f"{ZERO}.elastic_checkpoint": "checkpoints are written by mtptrain; leave it out",
    f"{ZERO}.ignore_unused_parameters": "a module of a head may be unused in a step; leave it out",
    f"{ZERO}.load_from_fp32_weights": "checkpoints are written by mtptrain; leave it out",
    f"{ZERO}.param_persistence_threshold": "the rollout reads small tensors outside their layer; leave it out",
    f"{ZERO}.stage3_gather_16bit_weights_on_model_save": "checkpoints are written by mtptrain; leave it out",
    f"{ZERO}.stage3_param_persistence_threshold": "the rollout reads small tensors outside their layer; leave it out",
    f"{ZERO}.zenflow": "updates with gradients of earlier steps; leave it out",
    f"{ZERO}.zero_quantized_gradients": ROUNDS_SENT,
    f"{ZERO}.zero_quantized_nontrainable_weights": ROUNDS_SENT,
    f"{ZERO}.zero_quantized_weights": ROUNDS_SENT,
}
KNOWN = FLAGS | SECTIONS.keys() | {f"{ZERO}.{key}" for key in ZERO_ANY | ZERO_3}
NVME = (
    "DeepSpeed moves state there by its own optimiser step, and a run needs each tensor's state at any time, for its "
    "checkpoints; set device: cpu"
)

Section = dict[str, Any]  # settings by DeepSpeed's own names; values of any type of JSON


def passed_settings(given: Section, engine: EngineName, offload: bool) -> Section:
    """Return the settings to pass to DeepSpeed: those of the file `config`, overridden by the other keys.

    A setting of the run may have the value `auto`, as in files for other trainers, and is dropped.

    Args:
        given: the section as the user wrote it.
        engine: of the run; stages 1 and 2 do not read the settings of stage 3.
        offload: whether `offload=true` sets the optimiser's device already.

    Raises:
        UserError: the file cannot be read, or a setting belongs to the run or is unknown.
    """
    inline = {key: value for key, value in given.items() if key != FILE}
    merged = _merge(_read(given.get(FILE)), inline)
    zero = merged.get(ZERO, {})
    require(isinstance(zero, dict), f"deepspeed.{ZERO}", zero, "must be a section, such as {reduce_bucket_size: 5e8}")
    for name, value in list(_names(merged)):
        if value == "auto" and name in OWNED.keys() | KNOWN:
            _drop(merged, name)
        else:
            _check(name, value, engine)
    both = offload and "offload_optimizer" in zero
    require(not both, f"deepspeed.{ZERO}.offload_optimizer", zero.get("offload_optimizer"), "leave out offload=true")
    return merged


def _check(name: str, value: Any, engine: EngineName) -> None:
    """Refuse a setting that belongs to the run, that its engine does not read, that is unknown or of a wrong type."""
    if name in OWNED:
        raise UserError(f"deepspeed.{name}={as_written(value)}: {OWNED[name]}")
    _require_known(name, value, KNOWN)
    require(name not in FLAGS or isinstance(value, bool), f"deepspeed.{name}", value, "must be true or false")
    if name in SECTIONS:
        require(isinstance(value, dict), f"deepspeed.{name}", value, "must be a section, such as {enabled: true}")
        for key, one in value.items():
            _require_known(f"{name}.{key}", one, {f"{name}.{known}" for known in SECTIONS[name]})
    if name in OFFLOADS:
        _check_offload(name, value)
    is_of_3 = name.removeprefix(f"{ZERO}.") in ZERO_3
    require(not is_of_3 or engine is EngineName.zero3, f"deepspeed.{name}", value, "is read by engine=zero3 only")


def _check_offload(name: str, value: Any) -> None:
    """Refuse an offload to NVMe, and settings of it that have no effect in the memory of the CPU."""
    require(isinstance(value, dict), f"deepspeed.{name}", value, "must be a section, such as {device: cpu}")
    require(value.get("device") != "nvme", f"deepspeed.{name}.device", value.get("device"), NVME)
    for key, one in value.items():
        if f"{name}.{key}" in OWNED:
            raise UserError(f"deepspeed.{name}.{key}={as_written(one)}: {OWNED[f'{name}.{key}']}")
        _require_known(f"{name}.{key}", one, {f"{name}.{known}" for known in OFFLOAD})


def _require_known(name: str, value: Any, known: Collection[str]) -> None:
    near = did_you_mean(name, known)
    require(name in known, f"deepspeed.{name}", value, f"is not a setting that is passed to DeepSpeed{near}")


def _names(settings: Section) -> Iterator[tuple[str, Any]]:
    """Yield the names and values of all settings, those of `zero_optimization` one by one."""
    for name, value in settings.items():
        if name == ZERO:
            yield from ((f"{ZERO}.{key}", one) for key, one in value.items())
        else:
            yield name, value


def _drop(settings: Section, name: str) -> None:
    section = settings[ZERO] if name.startswith(f"{ZERO}.") else settings
    del section[name.removeprefix(f"{ZERO}.")]


def _merge(base: Section, over: Section) -> Section:
    """Return nested settings with those of `over` in place of those of `base`."""
    merged = dict(base)
    for key, value in over.items():
        below = merged.get(key)
        merged[key] = _merge(below, value) if isinstance(value, dict) and isinstance(below, dict) else value
    return merged


def _read(path: Any) -> Section:
    """Return the settings of a JSON file; none without a file."""
    if path is None:
        return {}
    try:
        with open(expanduser(str(path)), encoding="utf-8") as file:
            settings = json.load(file)
    except (OSError, ValueError) as error:
        raise UserError(f"deepspeed.{FILE}={path}: cannot be read as JSON ({error})") from None
    require(isinstance(settings, dict), f"deepspeed.{FILE}", path, "must hold a JSON object of DeepSpeed's settings")
    return dict(settings)

"""DeepSpeed's ZeRO as this project uses it: silent, without compiled extensions, small tensors whole at stage 3."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import deepspeed
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.utils import logger as deepspeed_logger
from deepspeed.utils import set_z3_leaf_modules
from pydantic import ValidationError
from torch import nn

from mtptrain.errors import UserError

# Tensors with fewer elements stay whole on every process at stage 3: vectors, small matrices, and attention sinks,
# which the rollout reads outside the forward of their layer. Gathering each of them would cost more than it saves.
PERSISTENT_BELOW = 8192


def quiet_deepspeed() -> None:
    """Silence DeepSpeed and disable its shared-memory collectives for CPUs, which take minutes to compile."""
    deepspeed_logger.setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")  # DeepSpeed causes them
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def check_settings(settings: Mapping[str, Any]) -> None:
    """Check the values of settings that are passed to DeepSpeed.

    Raises:
        UserError: names the first value that DeepSpeed refuses.
    """
    quiet_deepspeed()
    try:
        DeepSpeedZeroConfig(**settings.get("zero_optimization", {}))
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(["zero_optimization", *map(str, first["loc"])])
        raise UserError(f"deepspeed.{name}={first['input']}: is refused by DeepSpeed ({first['msg']})") from None


def gather_persistent(optimizer: Any) -> None:
    """All-gather ZeRO-3's persistent parameters now; DeepSpeed itself does so only after its first step."""
    small = getattr(optimizer, "persistent_parameters", None)
    if small:
        small[0].all_gather(small)


@contextmanager
def gathered(module: nn.Module) -> Iterator[None]:
    """Hold the partitioned parameters of a module whole, inside the block; every process must enter it."""
    with deepspeed.zero.GatheredParameters(list(module.parameters())):
        yield


def partition_layers(layers: nn.ModuleList) -> None:
    """Partition frozen layers over the processes with ZeRO-3; each layer is gathered whole when it runs.

    Layers are ZeRO-3 leaf modules: the submodules that run depend on the input (a compressor without a full window does
    nothing), so gathering by submodule would deadlock processes with documents of different lengths. Partitioning goes
    tensor by tensor, so no device needs to hold them all. The settings have no `bf16` section, because it would also
    round the tensors that DeepSeek-V4 keeps in fp32.
    """
    quiet_deepspeed()
    set_z3_leaf_modules(layers, list({type(layer) for layer in layers}))
    zero = {"stage": 3, "stage3_param_persistence_threshold": PERSISTENT_BELOW}
    settings = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero, "steps_per_print": 2**62}
    deepspeed.zero.Init(module=layers, config_dict_or_path=settings)
    engine, *_ = deepspeed.initialize(model=layers, config=settings, dist_init_required=False)
    gather_persistent(engine.optimizer)

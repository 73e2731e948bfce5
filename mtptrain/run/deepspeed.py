"""DeepSpeed's ZeRO as this project uses it: quiet, without compiled extensions, vectors kept whole at stage 3."""

from __future__ import annotations

import logging
import warnings
from typing import Any

import deepspeed
from deepspeed.utils import logger as deepspeed_logger
from deepspeed.utils import set_z3_leaf_modules
from torch import nn

# Tensors of fewer elements stay whole on every process at stage 3: vectors, attention sinks (which the rollout reads
# outside the forward of the layer that owns them), small maps. One message a tensor would cost more than it saves.
WHOLE_BELOW = 8192


def quiet_deepspeed() -> None:
    """Keep DeepSpeed's reports to itself, and off a CPU its shared-memory collectives, which build for minutes."""
    deepspeed_logger.setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")  # of calls it makes
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def gather_small(optimizer: Any) -> None:
    """Make the tensors that stay whole at stage 3 whole: DeepSpeed itself does so after its first step only."""
    small = getattr(optimizer, "persistent_parameters", None)
    if small:
        small[0].all_gather(small)


def share_layers(layers: nn.ModuleList) -> None:
    """Share frozen layers out over the processes; a layer is gathered whole when it runs.

    Which submodules of a layer run depends on its input: a compressor whose window does not fill does nothing. Gathered
    by submodule, processes that hold documents of different lengths would wait for each other for ever.

    Tensor by tensor, so that no device need hold all of them. Without a `bf16` section, which would round the tensors
    that DeepSeek-V4 keeps in fp32 as well.
    """
    quiet_deepspeed()
    set_z3_leaf_modules(layers, list({type(layer) for layer in layers}))
    zero = {"stage": 3, "stage3_param_persistence_threshold": WHOLE_BELOW}
    settings = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero, "steps_per_print": 2**62}
    deepspeed.zero.Init(module=layers, config_dict_or_path=settings)
    engine, *_ = deepspeed.initialize(model=layers, config=settings, dist_init_required=False)
    gather_small(engine.optimizer)

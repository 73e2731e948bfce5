"""`engine=zero1|zero2|zero3`: DeepSpeed ZeRO shares the optimiser's state, gradients or parameters out.

DeepSpeed keeps fp32 masters of lower-precision parameters itself. It is given no `bf16` section: that would round the
tensors that DeepSeek-V4 keeps in fp32 as well.
"""

from __future__ import annotations

from typing import Any

import deepspeed
import torch
from deepspeed.utils import (
    lazy_init_hp_params_optimizer_state,
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_get_local_fp32_param,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from torch import Tensor, nn

from mtptrain.config import ONE_DTYPE, TrainConfig
from mtptrain.errors import UserError
from mtptrain.run.deepspeed import WHOLE_BELOW, gather_small, quiet_deepspeed
from mtptrain.run.distributed import rank, world_size
from mtptrain.training.engine import OptimizerState
from mtptrain.training.optim import make_adamw

MOMENTS = ("exp_avg", "exp_avg_sq")  # of AdamW


def zero_settings(config: TrainConfig, stage: int, offload: bool) -> dict[str, Any]:
    """DeepSpeed's configuration of a stage."""
    zero: dict[str, Any] = {"stage": stage, "stage3_param_persistence_threshold": WHOLE_BELOW}
    if offload:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    return {
        "train_micro_batch_size_per_gpu": 1,  # of no effect but on DeepSpeed's own counters
        "gradient_accumulation_steps": config.accumulation,
        "gradient_clipping": config.clip_norm,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # its CPU AdamW differs from torch's in bits, and builds for minutes
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32"},
        "steps_per_print": 2**62,
    }


class _Held(nn.Module):
    """The module that DeepSpeed wraps. Its forward computes nothing, because the objective calls the head itself."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self) -> None:
        """Return nothing; DeepSpeed starts a micro-batch here."""


class ZeroEngine:
    """A stage of ZeRO, among processes that have joined; see `Engine`.

    Args:
        module: its parameters that require gradients are trained.
        config: optimiser, clipping and accumulation.
        stage: 1, 2 or 3.
        offload: keep the optimiser's state in the CPU's memory.

    Raises:
        UserError: stage 3, and the parameters are of several dtypes.
    """

    def __init__(self, module: nn.Module, config: TrainConfig, stage: int, offload: bool) -> None:
        quiet_deepspeed()
        self.module, self.stage, self.accumulation = module, stage, config.accumulation
        self.trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
        if stage == 3 and len({p.dtype for p in self.trained.values()}) > 1:
            raise UserError(f"engine=zero3: {ONE_DTYPE}")
        # DeepSpeed takes the first parameter's dtype for the whole; only as fp32 does it look at the gradient's norm.
        ordered = sorted(self.trained.values(), key=lambda p: p.dtype != torch.float32)
        self.optimizer = make_adamw(ordered, config)
        groups = [list(group["params"]) for group in self.optimizer.param_groups if group["params"]]
        self.engine, *_ = deepspeed.initialize(
            model=_Held(module),
            optimizer=self.optimizer,
            dist_init_required=False,
            config=zero_settings(config, stage, offload),
        )
        self.micro_batches = 0
        self._make_states(groups)
        gather_small(self.engine.optimizer)

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of a micro-batch; DeepSpeed averages over processes where shares must add up."""
        self.engine()  # without a forward, stage 3 takes every micro-batch for the first and drops earlier gradients
        self.engine.backward(loss * world_size(), scale_wrt_gas=False)
        self.micro_batches += 1
        if self.micro_batches < self.accumulation:
            self.engine.step()  # only counts

    def step(self, rate: float) -> float:
        """Clip and update; DeepSpeed has summed, and skips an update that is not finite."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.engine.step()
        self.micro_batches = 0
        return float(self.engine.get_global_grad_norm())

    def tensors(self) -> dict[str, Tensor]:
        """The module's state, gathered a tensor at a time."""
        found = {name: value.detach() for name, value in self.module.state_dict().items()}
        for name, parameter in self.module.named_parameters():
            if name in self.trained:
                found[name] = _for_first(safe_get_full_fp32_param(parameter))
            elif self.stage == 3:
                with deepspeed.zero.GatheredParameters([parameter]):
                    found[name] = _for_first(parameter.detach())
        gather_small(self.engine.optimizer)
        return found if rank() == 0 else {}

    def optimizer_state(self) -> OptimizerState:
        """AdamW's state by the tensor's name, gathered a tensor at a time."""
        step = next(iter(self.optimizer.state.values()))["step"]
        found = {}
        for name, parameter in self.trained.items():
            moments = {key: _for_first(safe_get_full_optimizer_state(parameter, key)) for key in MOMENTS}
            found[name] = {"step": step.clone(), **moments}
        return found if rank() == 0 else {}

    def load(self, tensors: dict[str, Tensor], state: OptimizerState) -> None:
        """Continue from stored tensors and state: each process keeps its share."""
        for name, buffer in self.module.named_buffers():
            if name in tensors:
                buffer.copy_(tensors[name])
        with torch.no_grad():
            for name, parameter in self.module.named_parameters():
                with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0, enabled=self.stage == 3):
                    parameter.copy_(tensors[name])
                if name in self.trained:
                    self._set(parameter, tensors[name])
        gather_small(self.engine.optimizer)
        for held in self.optimizer.state.values():
            held["step"].copy_(next(iter(state.values()))["step"])
        for name, parameter in self.trained.items():
            for key in MOMENTS:
                self._set(parameter, state[name][key], key)

    def _set(self, parameter: Tensor, value: Tensor, key: str | None = None) -> None:
        """Set this process's share of a master or of its moment `key`."""
        value = value.to(parameter.device)
        if self.stage < 3:
            if key is None:
                safe_set_full_fp32_param(parameter, value)
            else:
                safe_set_full_optimizer_state(parameter, value, key)
            return
        size = safe_get_local_fp32_param(parameter).numel()  # padded: processes may not divide the tensor
        padded = nn.functional.pad(value.flatten(), (0, size * world_size() - value.numel()))
        share = padded[rank() * size : (rank() + 1) * size]
        if key is None:
            safe_set_local_fp32_param(parameter, share)
        else:
            safe_set_local_optimizer_state(parameter, share, key)

    def _make_states(self, groups: list[list[Tensor]]) -> None:
        """Give every flat master of this process the state that AdamW would make at its first step.

        DeepSpeed ties the state to the parameters once, after the step of the first group of parameters: made later,
        the state of the other groups would never be found.

        Args:
            groups: the parameters of each group, of which DeepSpeed has made one flat master below stage 3.
        """
        if self.stage == 3:
            self._add_states(self.engine.optimizer.fp32_partitioned_groups_flat)
            return
        masters = [group["params"][0] for group in self.optimizer.param_groups]
        self._add_states(masters)
        for parameters, master in zip(groups, masters, strict=True):
            lazy_init_hp_params_optimizer_state(parameters, master, self.optimizer.state)

    def _add_states(self, masters: list[Tensor]) -> None:
        for master in masters:
            moments = {key: torch.zeros_like(master) for key in MOMENTS}
            self.optimizer.state[master] = {"step": torch.zeros(()), **moments}


def _for_first(value: Tensor) -> Tensor:
    """A copy in the CPU's memory on rank 0, nothing elsewhere: only rank 0 writes."""
    return value.detach().cpu().clone() if rank() == 0 else value.new_empty(0)

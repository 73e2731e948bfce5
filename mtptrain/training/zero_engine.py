"""`engine=zero1|zero2|zero3`: DeepSpeed ZeRO partitions the training state over processes.

Stage 1 partitions the optimiser's state, stage 2 the gradients too, stage 3 the parameters as well.

DeepSpeed itself keeps fp32 masters of lower-precision parameters. Its `bf16` section is not used, because it would also
round the tensors that DeepSeek-V4 keeps in fp32.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import deepspeed
import torch
from deepspeed.utils import (
    lazy_init_hp_params_optimizer_state,
    safe_get_local_fp32_param,
    safe_get_local_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from torch import Tensor, nn

from mtptrain.config import ONE_DTYPE, TrainConfig
from mtptrain.errors import UserError
from mtptrain.mtp.expert_parallel import is_share
from mtptrain.run.deepspeed import PERSISTENT_BELOW, gather_persistent, quiet_deepspeed
from mtptrain.run.distributed import rank, world_size
from mtptrain.training.engine import TrainingState
from mtptrain.training.expert_shares import ExpertShares
from mtptrain.training.optim import make_adamw
from mtptrain.training.pieces import Piece, StoredTensors, own_piece

MOMENTS = ("exp_avg", "exp_avg_sq")  # of AdamW


def zero_settings(config: TrainConfig, stage: int, offload: bool, passed: Mapping[str, Any]) -> dict[str, Any]:
    """Return DeepSpeed's configuration for a stage; settings of the run come before those that are passed."""
    zero = {**passed.get("zero_optimization", {}), "stage": stage}
    zero["stage3_param_persistence_threshold"] = PERSISTENT_BELOW
    if offload:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    return {
        **passed,
        "train_micro_batch_size_per_gpu": 1,  # affects only DeepSpeed's own counters
        "gradient_accumulation_steps": config.accumulation,
        "gradient_clipping": config.clip_norm,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # its CPU AdamW differs from torch's in bits and takes minutes to build
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32"},
        "steps_per_print": 2**62,
    }


class _EmptyForward(nn.Module):
    """The module that DeepSpeed wraps. Its forward computes nothing, because the objective calls the head itself."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self) -> None:
        """Return nothing; DeepSpeed starts a micro-batch here."""


class ZeroEngine:
    """A stage of ZeRO, for processes that have joined the group; see `Engine`.

    Args:
        module: its parameters that require gradients are trained.
        config: optimiser, clipping and accumulation.
        stage: 1, 2 or 3.
        offload: keep the optimiser's state in CPU memory.
        passed: settings of DeepSpeed that the run leaves open; see `passed_settings`.

    Raises:
        UserError: at stage 3 the trained parameters have several dtypes.
    """

    def __init__(
        self, module: nn.Module, config: TrainConfig, stage: int, offload: bool, passed: Mapping[str, Any]
    ) -> None:
        quiet_deepspeed()
        self.module, self.stage, self.accumulation = module, stage, config.accumulation
        passed_offload = passed.get("zero_optimization", {}).get("offload_optimizer") or {}
        self.shares = ExpertShares(module, config, 1 / world_size(), offload or passed_offload.get("device") == "cpu")
        self.trained = {name: p for name, p in self._whole_parameters() if p.requires_grad}
        if not self.trained:
            raise UserError(
                f"engine=zero{stage}: mtp.trainable leaves only experts to train, and mtp.experts=expert_parallel "
                "shares them already; set engine=single"
            )
        if stage == 3 and len({p.dtype for p in self.trained.values()}) > 1:
            raise UserError(f"engine=zero3: {ONE_DTYPE}")
        # DeepSpeed takes the first parameter's dtype for all; it checks the gradient's norm only if that is fp32.
        ordered = sorted(self.trained.values(), key=lambda p: p.dtype != torch.float32)
        self.optimizer = make_adamw(ordered, config)
        groups = [list(group["params"]) for group in self.optimizer.param_groups if group["params"]]
        self.engine, *_ = deepspeed.initialize(
            model=_EmptyForward(module if stage == 3 else nn.ParameterList(p for _, p in self._whole_parameters())),
            optimizer=self.optimizer,
            dist_init_required=False,
            config=zero_settings(config, stage, offload, passed),
        )
        if stage == 1 and self.accumulation > 1:
            # DeepSpeed sums micro-batches in fp32 only if the first parameter is rounded.
            self.engine.optimizer.use_grad_accum_attribute = True
        self.micro_batches = 0
        self._make_states(groups)
        gather_persistent(self.engine.optimizer)
        if self.shares.shares:  # stages 1 and 2
            self._norm_of_others = self.engine.optimizer.scaled_global_norm
            self.engine.optimizer.scaled_global_norm = self._whole_norm

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of a micro-batch; the factor undoes DeepSpeed's average over processes."""
        self.engine()  # without a forward, stage 3 treats every micro-batch as the first and drops earlier gradients
        self.engine.backward(loss * world_size(), scale_wrt_gas=False)
        self.micro_batches += 1
        if self.micro_batches < self.accumulation:
            self.engine.step()  # only advances DeepSpeed's counter

    def step(self, rate: float) -> float:
        """Clip and update; DeepSpeed has summed the gradients, and skips a non-finite update."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.engine.step()
        gather_persistent(self.engine.optimizer)  # a skipped update leaves them partitioned
        self.micro_batches = 0
        norm = float(self.engine.get_global_grad_norm())
        self.shares.step(rate, norm)
        return norm

    def state(self) -> TrainingState:
        """Return this process's partition of masters and moments, its share of all else, and its share of experts."""
        shared = self.shares.state()
        module, optimizer = shared.module, shared.optimizer
        others = {name: value for name, value in self.module.state_dict().items() if name not in self.shares.shares}
        step = next(iter(self.optimizer.state.values()))["step"]
        for name, parameter in self.trained.items():
            del others[name]
            module += self._pieces(name, parameter)
            optimizer += [piece for key in MOMENTS for piece in self._pieces(f"{name}/{key}", parameter, key)]
            optimizer.append(own_piece(f"{name}/step", step.clone()))
        parameters = dict(self.module.named_parameters())
        for name, value in others.items():
            whole = parameters.get(name, value)
            is_cut = self.stage == 3 and name in parameters
            with deepspeed.zero.GatheredParameters([whole], enabled=is_cut):
                piece = own_piece(name, whole)
                module.append(replace(piece, values=piece.values.clone()))
        gather_persistent(self.engine.optimizer)
        return TrainingState(module, optimizer)

    @torch.no_grad()
    def load(self, tensors: StoredTensors, state: StoredTensors) -> None:
        """Continue from stored tensors and state; each process keeps its share."""
        for name, buffer in self.module.named_buffers():
            if name in tensors:
                buffer.copy_(tensors[name])
        for name, parameter in self._whole_parameters():
            with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0, enabled=self.stage == 3):
                parameter.copy_(tensors[name])
            if name in self.trained:
                self._set(parameter, tensors, name)
        gather_persistent(self.engine.optimizer)
        self.shares.load(tensors, state)
        for entry in self.optimizer.state.values():
            entry["step"].copy_(state[f"{next(iter(self.trained))}/step"])
        for name, parameter in self.trained.items():
            for key in MOMENTS:
                self._set(parameter, state, f"{name}/{key}", key)

    def _fragment(self, parameter: Any, key: str | None) -> tuple[int, Tensor] | None:
        """Return this process's values of a master, or of its moment `key`, and the position of the first; or None."""
        if self.stage == 3:  # padded: processes may not divide the tensor
            own = (
                safe_get_local_fp32_param(parameter) if key is None else safe_get_local_optimizer_state(parameter, key)
            )
            start = min(rank() * own.numel(), parameter.ds_numel)
            return start, own.flatten()[: parameter.ds_numel - start]
        mapping = parameter._hp_mapping
        return None if mapping is None else (mapping.lp_fragment_address.start, mapping.get_hp_fragment(key))

    def _pieces(self, name: str, parameter: Tensor, key: str | None = None) -> list[Piece]:
        fragment = self._fragment(parameter, key)
        shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
        return [] if fragment is None else [Piece(name, shape, *fragment)]

    def _set(self, parameter: Tensor, stored: StoredTensors, name: str, key: str | None = None) -> None:
        """Set this process's share of a master or of its moment `key`."""
        fragment = self._fragment(parameter, key)
        if fragment is None:
            return
        start, values = fragment
        value = stored.part(name, start, start + values.numel()).to(values.device)
        if self.stage < 3:
            values.copy_(value)
            return
        size = safe_get_local_fp32_param(parameter).numel()
        share = nn.functional.pad(value, (0, size - value.numel()))
        if key is None:
            safe_set_local_fp32_param(parameter, share)
        else:
            safe_set_local_optimizer_state(parameter, share, key)

    def _whole_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """Return the parameters that DeepSpeed handles: all but shares of experts, which it would make equal."""
        return [(name, p) for name, p in self.module.named_parameters() if not is_share(p)]

    def _whole_norm(self, norm_type: int = 2) -> Any:
        """Return the norm by which DeepSpeed clips and detects a gradient that is not finite, with shared experts."""
        return self.shares.with_norm(self._norm_of_others(norm_type))

    def _make_states(self, groups: list[list[Tensor]]) -> None:
        """Give every flat master of this process the state that AdamW would create at its first step.

        DeepSpeed links the state to the parameters only once, after the step of the first parameter group. It would
        miss the state of the other groups if AdamW created it later.

        Args:
            groups: the parameters of each group; below stage 3, DeepSpeed has flattened each group into one master.
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

"""Differences between servers and the official model in an MTP module; docs/serving.md has the sources."""

# T tokens, D model width, k experts of a token, I width of an expert

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mtptrain.backbone.modules import Experts
from mtptrain.config import ServedAs
from mtptrain.errors import UserError

E4M3_TOP = 448.0
KEY_BLOCK, ACTIVATION_BLOCK = 64, 128  # channels that share a scale
SMALLEST = 1e-4  # largest magnitude of a block, at least, as in the official kernel


@dataclass(frozen=True, slots=True)
class Numerics:
    """Differences from the official model; with all of them off, a module computes as it was trained.

    Attributes:
        zero_first: the embedding of a module's base step at anchor 0 is zero.
        fp8_keys: keys are stored in e4m3, their rotated channels aside.
        fp8_activations: inputs of the matrices and of the experts are rounded to e4m3.
        extra_key: one more key before the first anchor, of the first token and a state of zeros.
    """

    zero_first: bool = False
    fp8_keys: bool = False
    fp8_activations: bool = False
    extra_key: bool = False


AS_TRAINED = Numerics()
SERVED = {
    ServedAs.vllm: Numerics(zero_first=True, fp8_keys=True, fp8_activations=True),
    ServedAs.sglang: Numerics(fp8_keys=True, fp8_activations=True),
    ServedAs.llama_cpp: Numerics(extra_key=True),
}
STACKED = (ServedAs.exact, ServedAs.vllm)  # the others run one module


def served_numerics(served_as: ServedAs, zero_first: bool, depth: int) -> Numerics:
    """Return the numerics of a server, or those of training for `exact`.

    Args:
        served_as: the server.
        zero_first: whether the head was trained with `mtp.zero_first_embedding`.
        depth: number of modules.

    Raises:
        UserError: the server cannot run so many modules.
    """
    if depth > 1 and served_as not in STACKED:
        raise UserError(
            f"decoding.served_as={served_as.value}: runs exactly one MTP module and this head has {depth}; set "
            "decoding.served_as=exact or vllm"
        )
    return SERVED.get(served_as, Numerics(zero_first=zero_first))


def round_fp8(x: Tensor, block: int) -> Tensor:
    """Return values rounded to e4m3 with a power of two as the scale of each block of the last dimension.

    Args:
        x: floating [..., C].
        block: channels that share a scale; the last block may be shorter.

    Source: `act_quant` of DeepSeek-V4's official inference code, with `scale_fmt="ue8m0"`.
    """
    parts = []
    for part in x.float().split(block, dim=-1):
        top = part.abs().amax(-1, keepdim=True).clamp(min=SMALLEST)
        scale = torch.exp2(torch.ceil(torch.log2(top / E4M3_TOP)))
        parts.append((part / scale).clamp(-E4M3_TOP, E4M3_TOP).to(torch.float8_e4m3fn).float() * scale)
    return torch.cat(parts, dim=-1).to(x.dtype)


def round_input(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Round the first input of a module to FP8; a forward pre-hook."""
    return round_fp8(inputs[0], ACTIVATION_BLOCK), *inputs[1:]


class Fp8Experts(Experts):
    """Routed experts with inputs rounded to FP8 before both products, one expert at a time."""

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Return the weighted sum of the outputs of every token's experts, [T, D]."""
        rounded_TD = round_fp8(hidden_states, ACTIVATION_BLOCK)
        out_TD = torch.zeros_like(hidden_states, dtype=torch.float32)
        for expert in top_k_index.unique().tolist():
            row_R, slot_R = (top_k_index == expert).nonzero().unbind(1)
            gate_RI, up_RI = (rounded_TD[row_R] @ self.gate_up_proj[expert].T).chunk(2, dim=-1)
            inner_RI = self.act_fn(gate_RI.clamp(max=self.limit)) * up_RI.clamp(min=-self.limit, max=self.limit)
            result_RD = round_fp8(inner_RI, ACTIVATION_BLOCK) @ self.down_proj[expert].T
            out_TD.index_add_(0, row_R, (result_RD * top_k_weights[row_R, slot_R].unsqueeze(-1)).float())
        return out_TD.to(hidden_states.dtype)


def round_activations(module: nn.Module, is_on: bool) -> None:
    """Turn the rounding of all inputs of matrices and experts of a module on or off."""
    for child in module.modules():
        if isinstance(child, nn.Linear):
            for number in [number for number, hook in child._forward_pre_hooks.items() if hook is round_input]:
                del child._forward_pre_hooks[number]
            if is_on:
                child.register_forward_pre_hook(round_input)
        elif type(child) in (Experts, Fp8Experts):
            child.__class__ = Fp8Experts if is_on else Experts

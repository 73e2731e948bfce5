"""MTP modules made from the backbone's own last sliding-window layer."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import DeepseekV4ForCausalLM

from mtptrain.errors import UserError
from mtptrain.mtp.block import MtpBlock
from mtptrain.mtp.stack import MtpStack, fresh_stack

SLIDING = "sliding_attention"


@torch.no_grad()
def stack_from_backbone(model: DeepseekV4ForCausalLM, depth: int, seed: int) -> MtpStack:
    """Modules whose decoder layer, hc_head and norm are the backbone's own, fp32.

    Attention, hyper-connections, norms and experts are those of its last sliding-window layer. The state passes
    through `h_proj` unchanged, at the size that the backbone's streams have there, and the token through `e_proj` at
    the size of its embedding. So a module starts as one more layer of the backbone that is told the next token.

    Args:
        model: the backbone.
        depth: number of modules; all start alike.
        seed: of what the layer does not have, e.g. the router's bias of a hash layer stays at zero.

    Raises:
        UserError: the backbone has no sliding-window layer, or its weights are kept quantised.
    """
    number = _last_sliding(model)
    source = model.model.layers[number].state_dict()
    stack = fresh_stack(model, depth, seed)
    for block in stack.mtp:
        assert isinstance(block, MtpBlock)
        target = block.layer.state_dict()
        shared = {name: tensor for name, tensor in source.items() if _fits(tensor, target.get(name))}
        lost = [name for name in target if name not in shared and not name.endswith("e_score_correction_bias")]
        if lost:
            raise UserError(
                f"mtp.init=backbone: layer {number} has no {lost[0]} of the module's shape and dtype; set "
                "backbone.weights=dequantize, or mtp.init=fresh"
            )
        block.layer.load_state_dict(shared, strict=False)
        block.hc_head.load_state_dict(model.model.hc_head.state_dict())
        block.norm.load_state_dict(model.model.norm.state_dict())
        _pass_through(block, model)
    return stack


def _last_sliding(model: DeepseekV4ForCausalLM) -> int:
    kinds = model.config.layer_types or []
    sliding = [number for number, kind in enumerate(kinds) if kind == SLIDING]
    if not sliding:
        raise UserError(
            "mtp.init=backbone: this backbone has no sliding-window layer to start from (DeepSeek-V4-Pro has none); "
            "use mtp.init=fresh"
        )
    return sliding[-1]


def _fits(tensor: Tensor, target: Tensor | None) -> bool:
    return target is not None and target.shape == tensor.shape and tensor.is_floating_point() and tensor.itemsize > 1


def _pass_through(block: MtpBlock, model: DeepseekV4ForCausalLM) -> None:
    """Identity projections; the norms give token and state the size of the backbone's embeddings."""
    size = model.model.embed_tokens.weight.float().pow(2).mean().sqrt()
    for projection in (block.e_proj, block.h_proj):
        nn.init.eye_(projection.weight)
    for norm in (block.enorm, block.hnorm):
        norm.weight.fill_(size)

"""`mtp.experts=expert_parallel`: each process holds its share of a head's routed experts, and tokens travel to them.

The exchange is transformers' own and differentiable: in the backward pass, the gradients of the tokens travel back. The
gradient of an expert therefore covers the tokens of all processes where the expert lies, and is never sent.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mtptrain.backbone.modules import Experts
from mtptrain.backbone.placement import expert_mesh
from mtptrain.mtp.block import MtpBlock
from mtptrain.mtp.stack import MtpStack
from mtptrain.run.distributed import rank, world_size

WHOLE_SHAPE = "whole_shape"  # attribute of a parameter that is this process's share of a larger tensor


class SharedExperts(Experts):
    """This process's share of the routed experts; every process must take part in a forward and in its backward."""

    def exchange(self) -> None:
        """Send tokens to the processes that hold their experts, from now on."""
        from transformers.distributed.expert_parallel import AllToAllEP  # not in transformers 5.17

        mesh = expert_mesh()
        self.num_experts //= world_size()
        self.exchanged = AllToAllEP(self, mesh["expert"], mesh["tensor"])
        self.exchanged.experts_forward = super().forward  # on numbers from 0

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Return the weighted sum of the outputs of every token's experts, [T, D]."""
        out_TD: Tensor = self.exchanged(hidden_states, top_k_index, top_k_weights)
        return out_TD.to(hidden_states.dtype)


@torch.no_grad()
def share_experts(stack: MtpStack) -> None:
    """Keep this process's equal share of the routed experts of every module, in the order of the ranks."""
    for block in stack.mtp:
        assert isinstance(block, MtpBlock)
        experts: Any = block.layer.mlp.experts
        for name, parameter in list(experts.named_parameters(recurse=False)):
            share = nn.Parameter(
                parameter.detach().chunk(world_size())[rank()].clone(), requires_grad=parameter.requires_grad
            )
            setattr(share, WHOLE_SHAPE, parameter.shape)
            setattr(experts, name, share)
        experts.__class__ = SharedExperts
        experts.exchange()


def is_share(parameter: Tensor) -> bool:
    """Return whether a parameter is this process's share of a larger tensor."""
    return hasattr(parameter, WHOLE_SHAPE)

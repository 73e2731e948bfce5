"""`mtp.experts=expert_parallel`: each process holds its share of a head's routed experts, and tokens travel to them.

The exchange is transformers' own and differentiable: in the backward pass, the gradients of the tokens travel back. The
gradient of an expert therefore covers the tokens of all processes where the expert lies, and is never sent.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from mtptrain.backbone.modules import Experts
from mtptrain.backbone.placement import expert_mesh
from mtptrain.config import HeadExperts
from mtptrain.mtp.block import MtpBlock
from mtptrain.mtp.stack import ALL_EXPERTS, MtpStack, Share, head_digest, pieces
from mtptrain.run.distributed import broadcast_object, rank, receive_from, send_to_rank0, world_size

WHOLE_SHAPE = "whole_shape"  # attribute of a parameter that is this process's share of a larger tensor


class SharedExperts(Experts):
    """This process's share of the routed experts; every process must take part in a forward and in its backward."""

    def exchange(self) -> None:
        """Send tokens to the processes that hold their experts, from now on."""
        from transformers.distributed.expert_parallel import AllToAllEP  # not in transformers 5.17

        mesh = expert_mesh()
        self.exchanged = AllToAllEP(self, mesh["expert"], mesh["tensor"])
        self.exchanged.experts_forward = super().forward  # on numbers from 0

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Return the weighted sum of the outputs of every token's experts, [T, D]."""
        out_TD: Tensor = self.exchanged(hidden_states, top_k_index, top_k_weights)
        return out_TD.to(hidden_states.dtype)


def own_share(experts: HeadExperts) -> Share:
    """Return the share of a head's experts that this process holds."""
    return Share(rank(), world_size()) if experts is HeadExperts.expert_parallel else ALL_EXPERTS


def exchange_tokens(stack: MtpStack) -> None:
    """Send tokens to the processes that hold their experts; every process calls it with its share, by its rank."""
    for block in stack.mtp:
        assert isinstance(block, MtpBlock)
        experts: Any = block.layer.mlp.experts
        for parameter in experts.parameters():
            setattr(parameter, WHOLE_SHAPE, torch.Size((world_size() * len(parameter), *parameter.shape[1:])))
        experts.__class__ = SharedExperts
        experts.exchange()


def whole_digest(stack: MtpStack) -> str:
    """Return `head_digest` of a head whose experts processes may share; every process must call it.

    Rank 0 receives the other experts one at a time.
    """
    state = stack.state_dict(keep_vars=True)
    if rank() == 0:
        return broadcast_object(head_digest(state, _gather_experts))
    for name in sorted(state):
        for expert in state[name].detach() if is_share(state[name]) else ():
            send_to_rank0(expert)
    return broadcast_object("")


def _gather_experts(tensor: Tensor) -> Iterable[Tensor]:
    """Return the pieces of a tensor, on rank 0; those of a share are the experts of all processes in order."""
    if not is_share(tensor):
        return pieces(tensor)
    others = (receive_from(source, expert) for source in range(1, world_size()) for expert in tensor.detach())
    return chain(tensor.detach(), others)


def is_share(parameter: Tensor) -> bool:
    """Return whether a parameter is this process's share of a larger tensor."""
    return hasattr(parameter, WHOLE_SHAPE)

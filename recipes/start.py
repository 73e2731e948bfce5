"""The modules before training: those of `mtp.init`, with this process's share of their experts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from mtptrain.config import HeadExperts
from mtptrain.config.reads import UNTRAINED
from mtptrain.errors import UserError
from mtptrain.mtp.expert_parallel import whole_digest
from mtptrain.mtp.stack import MtpStack
from mtptrain.mtp.start import describe_start, initial_stack, stock_head
from mtptrain.mtp.tensors import HeadTensors
from mtptrain.recipes.session import Session


def start_tensors(session: Session) -> HeadTensors | None:
    """Return the head of `mtp.init`, whose tensors are not read yet; None if the modules start from no head.

    Raises:
        UserError: `mtp.init` names no sound checkpoint of this backbone.
    """
    init, backbone = session.config.mtp.init, session.training_backbone
    if init == "stock":
        return stock_head(backbone)
    if init in UNTRAINED:
        return None
    try:
        start = session.checkpoint(init)
        start.head_identity(backbone.fingerprint)
    except UserError as error:
        raise UserError(f"mtp.init={init}: {error}") from None
    return start.head()


def whole_start(session: Session, stack: MtpStack) -> MtpStack:
    """Return the modules before training with all experts, given those of this process."""
    config = session.config.mtp
    if config.experts is HeadExperts.replicate:
        return stack
    whole = replace(config, experts=HeadExperts.replicate)
    return initial_stack(whole, session.training_backbone, start_tensors(session), session.config.seed)


def start_stack(session: Session) -> tuple[MtpStack, dict[str, Any]]:
    """Return the modules before training, from `mtp.init`, and the record of that start for checkpoints.

    Raises:
        UserError: `mtp.init` names no sound checkpoint of this backbone.
    """
    config, backbone = session.config.mtp, session.training_backbone
    tensors = start_tensors(session)
    stack = initial_stack(config, backbone, tensors, session.config.seed)
    names = None if tensors is None else tensors.shapes
    return stack, describe_start(config, names) | {"sha256": whole_digest(stack)}

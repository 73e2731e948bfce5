"""A loss of one's own: distil a head with the squared Hellinger distance, 1 - sum_v sqrt(p_v q_v).

cd examples/own && python -m mtptrain --config-dir . +recipe=hellinger
"""

# K draft steps, T targets, V vocabulary, D model width

from __future__ import annotations

import torch
from torch import Tensor

from mtptrain.config import RunConfig
from mtptrain.config.reads import Settings
from mtptrain.kernels.linear_loss import LinearLoss
from mtptrain.losses.rollout import RolloutObjective, SlotRows
from mtptrain.recipes import distill
from mtptrain.recipes.session import Session

PROCESSES = distill.PROCESSES
check = distill.check


def squared_hellinger(student_KTV: Tensor, teacher_TV: Tensor) -> Tensor:
    """Return 1 - sum_v sqrt(p_v q_v) of every draft distribution, float [K, T] in [0, 1], from logits."""
    log_q_KTV, log_p_TV = student_KTV.log_softmax(-1), teacher_TV.log_softmax(-1)
    return 1 - (0.5 * (log_q_KTV + log_p_TV)).exp().sum(-1)


class HellingerObjective(RolloutObjective):
    """The rollout objective with the squared Hellinger distance.

    It holds the logits of a whole batch, [K, T, V]. A loss for large vocabularies goes through them in chunks, as those
    of mtptrain do; CONTRIBUTING.md says how to add one there.
    """

    def token_loss(self, rows: SlotRows) -> LinearLoss:
        """Return the loss of every step and slot, with acceptance and top-1 match as mtptrain measures them."""
        with torch.no_grad():
            measured = super().token_loss(rows)
        weight_DV = self.model.lm_head.weight.float().T
        student_KTV, teacher_TV = rows.student_KTD.float() @ weight_DV, rows.teacher_TD.float() @ weight_DV
        loss_KT = squared_hellinger(student_KTV, teacher_TV)
        return measured._replace(loss_KT=loss_KT.masked_fill(~rows.mask_KT, 0))


def reads(config: RunConfig) -> Settings:
    """Return the settings of distillation without those of its losses."""
    return distill.reads(config) - {"loss.divergence", "loss.temperature"}


def run(session: Session) -> None:
    """Train a head with this loss, then measure it beside the stock head."""
    session.objective = HellingerObjective
    distill.run(session)

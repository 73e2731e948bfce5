"""The objective of a head: a K-step rollout on frozen streams, charged by a divergence from the backbone."""

# B rows, S slots, K draft steps, T slots that predict at least one target, D model width

from __future__ import annotations

from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import DeepseekV4ForCausalLM

from mtptrain.backbone.streams import backbone_streams
from mtptrain.config import LossConfig, LossName
from mtptrain.data.packing import Batch
from mtptrain.kernels.linear_loss import LinearLoss, linear_loss
from mtptrain.losses.objective import chain_loss, weighted_loss
from mtptrain.losses.outcome import Outcome
from mtptrain.losses.weights import step_weights
from mtptrain.mtp.fake_quantization import as_stored
from mtptrain.mtp.release_names import Row
from mtptrain.mtp.rollout import rollout
from mtptrain.mtp.stack import MtpStack


class SlotRows(NamedTuple):
    """Draft states lined up with their teachers.

    Step k at anchor i drafts token t_{i+k+1}, which the backbone predicts at slot j = i + k: all steps that share slot
    j share one teacher row and one target.

    Attributes:
        student_KTD: draft states of each slot.
        teacher_TD: the backbone's final hidden states.
        target_T: int64 token t_{j+1}.
        mask_KT: bool, whether step k reaches the slot from an anchor of the same document.
        index_T: int64, b * S + j.
    """

    student_KTD: Tensor
    teacher_TD: Tensor
    target_T: Tensor
    mask_KT: Tensor
    index_T: Tensor


def line_up(hidden: list[Tensor], teacher_BSD: Tensor, batch: Batch) -> SlotRows:
    """Shift the draft states of every step from their anchors to the slots of their teachers."""
    masks = [batch.target_mask(k).roll(k, dims=1).flatten() for k in range(1, len(hidden) + 1)]
    mask_KX = torch.stack(masks)
    index_T = mask_KX.any(0).nonzero().squeeze(1)
    student_KTD = torch.stack([state.roll(k, dims=1).flatten(0, 1)[index_T] for k, state in enumerate(hidden, start=1)])
    target_T = batch.tokens_BS.roll(-1, dims=1).flatten()[index_T]
    return SlotRows(student_KTD, teacher_BSD.flatten(0, 1)[index_T], target_T, mask_KX[:, index_T], index_T)


def anchor_alpha(loss_KT: Tensor, rows: SlotRows, batch: Batch) -> tuple[Tensor, Tensor]:
    """Acceptance 1 - TV of every step at its anchor, and which are valid: [K, B * S] each."""
    num_steps = loss_KT.shape[0]
    alphas, masks = [], []
    for k in range(1, num_steps + 1):
        full = loss_KT.new_zeros(batch.tokens_BS.numel()).index_copy(0, rows.index_T, loss_KT[k - 1])
        alphas.append(1 - full.view_as(batch.tokens_BS).roll(-k, dims=1).flatten())
        masks.append(batch.target_mask(k).flatten())
    return torch.stack(alphas), torch.stack(masks)


class RolloutObjective:
    """Loss of an MTP stack on packed batches.

    Args:
        model: the frozen backbone.
        stack: the modules.
        config: divergence, temperature, weights of the steps.
        steps: draft steps K.
        recompute: run each step again in the backward instead of keeping what it computed.
        stored: of `rows_by_tensor`, where the modules train with the values that an export would store.
    """

    def __init__(
        self,
        model: DeepseekV4ForCausalLM,
        stack: MtpStack,
        config: LossConfig,
        steps: int,
        recompute: bool = False,
        stored: dict[str, list[Row]] | None = None,
    ) -> None:
        self.model, self.stack, self.config, self.steps, self.recompute = model, stack, config, steps, recompute
        self.stored = stored
        self.weights_K = step_weights(steps, config.step_decay)

    def counts(self, batch: Batch) -> Tensor:
        """Targets of each draft step, float64 [K]."""
        return torch.stack([batch.target_mask(k).sum().double() for k in range(1, self.steps + 1)])

    def per_token(self, batch: Batch) -> tuple[LinearLoss, SlotRows]:
        """Loss, acceptance and top-1 hit of every step and slot."""
        with torch.no_grad():
            streams_BSND, hidden_BSD = backbone_streams(self.model, batch)
        embedding = self.model.model.embed_tokens
        with as_stored(self.stack, self.stored) if self.stored else nullcontext():
            drafts = rollout(self.stack, embedding, streams_BSND, batch, self.steps, recompute=self.recompute)
        rows = line_up(drafts, hidden_BSD, batch)
        result = linear_loss(
            rows.student_KTD,
            rows.teacher_TD,
            self.model.lm_head.weight,
            rows.target_T,
            divergence=self.config.divergence.per_token,
            temperature=self.config.temperature,
            mask_KT=rows.mask_KT,
        )
        return result, rows

    def __call__(self, batch: Batch, counts_K: Tensor) -> Outcome:
        """Share of this micro-batch in the loss of the step, and the sums that are logged."""
        result, rows = self.per_token(batch)
        if self.config.divergence is LossName.chain:
            loss = chain_loss(*anchor_alpha(result.loss_KT, rows, batch)).sum() / counts_K[0].float()
        else:
            loss = weighted_loss(result.loss_KT, counts_K, self.weights_K.to(counts_K.device))
        sums_K = {
            "loss": result.loss_KT.detach().double().sum(1),
            "alpha": result.alpha_KT.double().sum(1),
            "hit": result.hit_KT.double().sum(1),
        }
        return Outcome(self.config.scale * loss, sums_K)

"""The training objective of a head: a loss on every step of a K-step rollout from the backbone's frozen streams."""

# B rows, S slots, K draft steps, T slots with at least one target, A anchors, D model width

from __future__ import annotations

from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import DeepseekV4ForCausalLM

from mtptrain.backbone.streams import backbone_streams
from mtptrain.batch import Batch
from mtptrain.config import LossConfig
from mtptrain.kernels.linear_loss import LinearLoss, linear_loss
from mtptrain.losses.next_token import LossOutput
from mtptrain.mtp.fake_quantization import as_stored
from mtptrain.mtp.rollout import rollout
from mtptrain.mtp.stack import MtpStack
from mtptrain.release.names import Row


class SlotRows(NamedTuple):
    """Draft states aligned with the teacher's hidden states.

    Step k at anchor i drafts token t_{i+k+1}, which the backbone predicts at slot j = i + k. All steps of slot j
    therefore share one teacher row and one target.

    Attributes:
        student_KTD: the draft state of each step at each slot.
        teacher_TD: the backbone's final hidden states.
        target_T: int64 token t_{j+1}.
        mask_KT: bool, True if step k reaches the slot from an anchor of the same document.
        index_T: int64, the flat slot index b * S + j.
    """

    student_KTD: Tensor
    teacher_TD: Tensor
    target_T: Tensor
    mask_KT: Tensor
    index_T: Tensor


def align_slots(hidden: list[Tensor], teacher_BSD: Tensor, batch: Batch) -> SlotRows:
    """Shift the draft states of every step from their anchors to the slots that predict the same token.

    Args:
        hidden: K draft states [B, S, D], by anchor.
        teacher_BSD: the backbone's final hidden states.
        batch: packed documents.
    """
    masks = [batch.target_mask(k).roll(k, dims=1).flatten() for k in range(1, len(hidden) + 1)]
    mask_KX = torch.stack(masks)
    index_T = mask_KX.any(0).nonzero().squeeze(1)
    student_KTD = torch.stack([state.roll(k, dims=1).flatten(0, 1)[index_T] for k, state in enumerate(hidden, start=1)])
    target_T = batch.tokens_BS.roll(-1, dims=1).flatten()[index_T]
    return SlotRows(student_KTD, teacher_BSD.flatten(0, 1)[index_T], target_T, mask_KX[:, index_T], index_T)


def anchor_alpha(loss_KT: Tensor, rows: SlotRows, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return the acceptance 1 - TV of every step by anchor, and its bool validity mask, each [K, B * S]."""
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
        config: divergence, temperature and step weights.
        steps: draft steps K.
        recompute: run each step again in the backward instead of keeping its activations.
        stored: the result of `rows_by_tensor`, to train with the values that an export would store; None trains with
            unrounded values.
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
        """Return the number of targets of each draft step, float64 [K]."""
        return torch.stack([batch.target_mask(k).sum().double() for k in range(1, self.steps + 1)])

    def per_token(self, batch: Batch) -> tuple[LinearLoss, SlotRows]:
        """Return loss, acceptance and top-1 match of every step and slot, with the slots."""
        with torch.no_grad():
            streams_BSND, hidden_BSD = backbone_streams(self.model, batch)
        embedding = self.model.model.embed_tokens
        with as_stored(self.stack, self.stored) if self.stored else nullcontext():
            drafts = rollout(self.stack, embedding, streams_BSND, batch, self.steps, recompute=self.recompute)
        rows = align_slots(drafts, hidden_BSD, batch)
        return self.token_loss(rows), rows

    def token_loss(self, rows: SlotRows) -> LinearLoss:
        """Return loss, acceptance and top-1 match of every step and slot; a loss of one's own overrides this method."""
        return linear_loss(
            rows.student_KTD,
            rows.teacher_TD,
            self.model.lm_head.weight,
            rows.target_T,
            divergence=self.config.divergence.per_token,
            temperature=self.config.temperature,
            mask_KT=rows.mask_KT,
        )

    def __call__(self, batch: Batch, counts_K: Tensor) -> LossOutput:
        """Return this micro-batch's share of the step's loss, and the metric sums to log."""
        result, rows = self.per_token(batch)
        if self.config.divergence.is_chain:
            loss = chain_loss(*anchor_alpha(result.loss_KT, rows, batch)).sum() / counts_K[0].float()
        else:
            loss = weighted_loss(result.loss_KT, counts_K, self.weights_K.to(counts_K.device))
        sums_K = {
            "loss": result.loss_KT.detach().double().sum(1),
            "alpha": result.alpha_KT.double().sum(1),
            "top1_match": result.top1_match_KT.double().sum(1),
        }
        return LossOutput(self.config.scale * loss, sums_K)


def weighted_loss(loss_KT: Tensor, counts_K: Tensor, weights_K: Tensor) -> Tensor:
    """Return this micro-batch's share of sum_k w_k * (mean loss of step k over the global batch).

    The shares of all micro-batches and ranks ADD UP to the loss, so no share is divided again: a trainer that averages
    gradients over R ranks multiplies by R. A step without a valid token contributes 0.

    Args:
        loss_KT: floating, 0 at masked tokens, as returned by `linear_loss`.
        counts_K: int64 or float64, valid tokens of each step in the whole global batch.
        weights_K: floating; see `step_weights`.

    Returns:
        Scalar of loss_KT's dtype.

    Raises:
        ValueError: the arguments disagree on the number of steps.
    """
    steps = loss_KT.shape[0]
    if counts_K.shape != (steps,) or weights_K.shape != (steps,):
        raise ValueError(
            f"loss_KT has {steps} steps but counts_K is {tuple(counts_K.shape)} and weights_K {tuple(weights_K.shape)};"
            f" both must be [{steps}]"
        )
    scale_K = torch.where(counts_K > 0, weights_K.double() / counts_K.clamp(min=1), 0.0)
    return (loss_KT.sum(-1) * scale_K.to(loss_KT.dtype)).sum()


def chain_loss(alpha_KA: Tensor, mask_KA: Tensor) -> Tensor:
    """Return the shortfall of each anchor's expected accepted length: sum over valid k of 1 - prod_{j<=k} alpha_j.

    Minimising it maximises the expected number of accepted draft tokens; it is 0 for a perfect head.

    Args:
        alpha_KA: floating acceptance of step k at anchor a, in [0, 1], differentiable (1 - the `tv` loss).
        mask_KA: bool, True on the first steps of an anchor up to its last valid one. Masked values may be anything.

    Returns:
        [A] of alpha_KA's dtype, 0 for an anchor without a valid step.

    Raises:
        ValueError: the shapes differ, or a valid step follows a masked one.

    Source: arXiv:2606.12370.
    """
    if alpha_KA.shape != mask_KA.shape:
        raise ValueError(f"alpha_KA {tuple(alpha_KA.shape)} and mask_KA {tuple(mask_KA.shape)} must have one shape")
    if (mask_KA[1:] & ~mask_KA[:-1]).any():
        raise ValueError("mask_KA has a valid step after a masked one; a chain ends at its first masked step")
    accepted_KA = alpha_KA.masked_fill(~mask_KA, 1).cumprod(0)
    return (1 - accepted_KA).masked_fill(~mask_KA, 0).sum(0)


def step_weights(steps: int, decay: float) -> Tensor:
    """Return the weight of each draft step in the loss: decay^(k-1), normalised to sum 1.

    Args:
        steps: number of draft steps K, at least 1.
        decay: beta in (0, 1]; 1 weighs every step alike.

    Returns:
        float32 [K], non-increasing.

    Raises:
        ValueError: an argument is out of range.

    Source: FastMTP, arXiv:2509.18362, equation 2.
    """
    if steps < 1:
        raise ValueError(f"steps={steps} leaves no draft step to weigh; use at least 1")
    if not 0 < decay <= 1:
        raise ValueError(f"decay={decay} must lie in (0, 1]; use 1 to weigh every step alike")
    weights_K = decay ** torch.arange(steps, dtype=torch.float64)
    return (weights_K / weights_K.sum()).float()

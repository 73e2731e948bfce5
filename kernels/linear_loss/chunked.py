"""`linear_loss_reference` over chunks of tokens: [chunk, V] logits live one chunk at a time, gradients are analytic.

The forward also stores the gradient of each token's loss with respect to its own hidden row ("unit gradient"), so the
backward is one multiplication and the logits are never computed twice. With z the student's logits divided by the
temperature tau, and S = sum_v q_v [q_v < p_v], the unit gradient is (dloss/dz @ weight) / tau where dloss/dz_v is

    ce             q_v - [v = target]                                     (tau = 1)
    kl             q_v - p_v
    reverse_kl     q_v (log q_v/p_v - KL(q || p))
    jsd            q_v (log q_v/m_v - KL(q || m)) / 2,                    m = (p + q) / 2
    tv             q_v (S - [q_v < p_v])
    neg_log_alpha  q_v R - r_v,   r_v = min(p_v, q_v) [q_v < p_v] / alpha,   R = sum_v r_v
    hybrid         lambda (q_v - p_v) + (1 - lambda) q_v (S - [q_v < p_v])

r_v is a softmax of min(log p, log q), so neg_log_alpha stays finite where alpha underflows.

N rows of a chunk, K draft steps, T tokens, D model width, V vocabulary.
"""

from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..choices import Divergence
from .reference import LinearLoss


class Rows(Protocol):
    """What computes the rows of a chunk: `teacher` once, then `student` for every draft step against it.

    Attributes:
        capacity: rows of the largest chunk.
    """

    capacity: int

    def teacher(self, hidden_ND: Tensor) -> Tensor:
        """Entropy [N] at temperature 1. What the students are compared with is remembered."""

    def student(
        self, hidden_ND: Tensor, target_N: Tensor, needs_grad: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Loss [N], alpha [N], top1_match [N] and, where it is needed, the unit gradient [N, D]."""


class MakeRows(Protocol):
    """Constructor of a `Rows`: frozen lm_head, most tokens at once, what to compute."""

    def __call__(self, weight_VD: Tensor, tokens: int, divergence: Divergence, temperature: float) -> Rows:
        """Buffers and settings of one call."""


def linear_loss_in_chunks(
    make_rows: MakeRows,
    student_KTD: Tensor,
    teacher_TD: Tensor,
    weight_VD: Tensor,
    target_T: Tensor,
    *,
    divergence: Divergence,
    temperature: float = 1.0,
    mask_KT: Tensor | None = None,
) -> LinearLoss:
    """`linear_loss_reference`, one chunk of tokens at a time and one teacher pass for all steps."""
    if divergence is Divergence.ce:
        temperature = 1.0
    needs_grad = torch.is_grad_enabled() and student_KTD.requires_grad
    rows = make_rows(weight_VD.detach(), len(target_T), divergence, temperature)
    return LinearLoss(*_LinearLossFunction.apply(student_KTD, teacher_TD.detach(), target_T, mask_KT, rows, needs_grad))


class _LinearLossFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        student_KTD: Tensor,
        teacher_TD: Tensor,
        target_T: Tensor,
        mask_KT: Tensor | None,
        rows: Rows,
        needs_grad: bool,
    ) -> LinearLoss:
        unit_grad_KTD = torch.zeros_like(student_KTD) if needs_grad else None
        with torch.autocast(student_KTD.device.type, enabled=False):
            outputs = _walk_chunks(student_KTD, teacher_TD, target_T, mask_KT, rows, unit_grad_KTD)
        ctx.mark_non_differentiable(*outputs[1:])
        if unit_grad_KTD is not None:
            ctx.save_for_backward(unit_grad_KTD)
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss_KT: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        (unit_grad_KTD,) = ctx.saved_tensors
        return (unit_grad_KTD * grad_loss_KT[..., None]).to(unit_grad_KTD.dtype), *[None] * 5


def _walk_chunks(
    student_KTD: Tensor,
    teacher_TD: Tensor,
    target_T: Tensor,
    mask_KT: Tensor | None,
    rows: Rows,
    unit_grad_KTD: Tensor | None,
) -> LinearLoss:
    """All outputs; fills unit_grad_KTD, zero on entry, where it is given."""
    outputs = _zero_outputs(student_KTD)
    valid_T = torch.arange(len(target_T), device=target_T.device) if mask_KT is None else mask_KT.any(0).nonzero()[:, 0]
    for chunk_N in valid_T.split(rows.capacity) if len(valid_T) else ():  # nothing splits into one chunk of nothing
        outputs.entropy_T[chunk_N] = rows.teacher(teacher_TD[chunk_N])
        for k, student_TD in enumerate(student_KTD):
            keep_N = None if mask_KT is None else mask_KT[k, chunk_N]
            # Few rows are masked in some steps only, and picking the others would copy [N, V] of the teacher: they are
            # computed, whatever they hold, and dropped.
            target_N = target_T[chunk_N] if keep_N is None else target_T[chunk_N].masked_fill(~keep_N, 0)
            found = rows.student(student_TD[chunk_N], target_N, unit_grad_KTD is not None)
            for output_KT, value in zip((*outputs[:3], unit_grad_KTD), found, strict=True):
                if output_KT is not None and value is not None:
                    output_KT[k, chunk_N] = _kept(value, keep_N).to(output_KT.dtype)
    return outputs


def _kept(value_N: Tensor, keep_N: Tensor | None) -> Tensor:
    """A row's value [N, ...], zero where it is not kept."""
    return value_N if keep_N is None else value_N.masked_fill(~keep_N.view(-1, *[1] * (value_N.ndim - 1)), 0)


def _zero_outputs(student_KTD: Tensor) -> LinearLoss:
    steps, tokens, _ = student_KTD.shape
    dtype = torch.promote_types(student_KTD.dtype, torch.float32)
    loss_KT = torch.zeros(steps, tokens, dtype=dtype, device=student_KTD.device)
    return LinearLoss(loss_KT, loss_KT.clone(), loss_KT.bool(), loss_KT.new_zeros(tokens))


def matmul(left: Tensor, right: Tensor, out: Tensor | None = None) -> Tensor:
    """Left @ right in at least fp32, with left cast to the dtype of right."""
    left = left.to(right.dtype)
    if right.dtype in (torch.float32, torch.float64):
        return torch.mm(left, right, out=out)
    return torch.mm(left, right, out_dtype=torch.float32, out=out)

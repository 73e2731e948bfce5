"""`linear_loss_reference` over chunks of tokens: [chunk, V] logits live one chunk at a time, gradients are analytic.

The forward also stores the gradient of each token's loss with respect to the token's hidden row ("unit gradient"), so
the backward is one multiplication and the logits are never computed twice. With z the student's logits divided by the
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

from collections.abc import Iterable
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..choices import Divergence
from .reference import LinearLoss


class Rows(Protocol):
    """Computes the rows of a chunk: `teacher` once, then `student` for every draft step against it.

    Attributes:
        capacity: rows of the largest chunk.
    """

    capacity: int

    def teacher(self, hidden_ND: Tensor) -> Tensor:
        """Return the entropy [N] at temperature 1, and keep the teacher's distributions for `student`."""

    def student(
        self, hidden_ND: Tensor, target_N: Tensor, needs_grad: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Return loss [N], alpha [N], top1_match [N] and, if needed, the unit gradient [N, D]."""


class MakeRows(Protocol):
    """Constructor of `Rows`."""

    def __call__(self, weight_VD: Tensor, tokens: int, divergence: Divergence, temperature: float) -> Rows:
        """Return the rows of one call, with their buffers.

        Args:
            weight_VD: frozen lm_head, floating.
            tokens: upper bound on the rows of a chunk.
            divergence: the loss.
            temperature: above 0, of the loss.
        """


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
    """Return `linear_loss_reference`, one chunk of tokens at a time, with one teacher pass for all steps."""
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
    """Return all outputs; fill unit_grad_KTD, zero on entry, unless it is None."""
    outputs = _zero_outputs(student_KTD)
    for chunk in _chunks(mask_KT, len(target_T), rows.capacity):
        outputs.entropy_T[chunk] = rows.teacher(teacher_TD[chunk])
        for k, student_TD in enumerate(student_KTD):
            keep_N = None if mask_KT is None else mask_KT[k, chunk]
            # Only few rows are masked in some steps but not in all, and selecting the others would copy [N, V] of the
            # teacher. So these rows are computed, whatever they hold, and dropped.
            target_N = target_T[chunk] if keep_N is None else target_T[chunk].masked_fill(~keep_N, 0)
            values = rows.student(student_TD[chunk], target_N, unit_grad_KTD is not None)
            for output_KT, value in zip((*outputs[:3], unit_grad_KTD), values, strict=True):
                if output_KT is not None and value is not None:
                    output_KT[k, chunk] = _kept(value, keep_N).to(output_KT.dtype)
    return outputs


def _chunks(mask_KT: Tensor | None, tokens: int, capacity: int) -> Iterable[slice | Tensor]:
    """Return the tokens of every chunk: slices, which need no copies, unless some token is masked in all steps."""
    valid_T = None if mask_KT is None else mask_KT.any(0).nonzero()[:, 0]
    if valid_T is None or len(valid_T) == tokens:
        return [slice(begin, begin + capacity) for begin in range(0, tokens, capacity)]
    return valid_T.split(capacity) if len(valid_T) else ()  # an empty tensor splits into one empty chunk


def _kept(value_N: Tensor, keep_N: Tensor | None) -> Tensor:
    """Return the values [N, ...], zero in rows that are not kept."""
    return value_N if keep_N is None else value_N.masked_fill(~keep_N.view(-1, *[1] * (value_N.ndim - 1)), 0)


def _zero_outputs(student_KTD: Tensor) -> LinearLoss:
    steps, tokens, _ = student_KTD.shape
    dtype = torch.promote_types(student_KTD.dtype, torch.float32)
    loss_KT = torch.zeros(steps, tokens, dtype=dtype, device=student_KTD.device)
    return LinearLoss(loss_KT, loss_KT.clone(), loss_KT.bool(), loss_KT.new_zeros(tokens))


def matmul(left: Tensor, right: Tensor, out: Tensor | None = None) -> Tensor:
    """Return left @ right in at least fp32, with left cast to the dtype of right."""
    left = left.to(right.dtype)
    if right.dtype in (torch.float32, torch.float64):
        return torch.mm(left, right, out=out)
    return torch.mm(left, right, out_dtype=torch.float32, out=out)

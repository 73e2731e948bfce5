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

N valid rows of a chunk, K draft steps, T tokens, D model width, V vocabulary.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .divergence import Divergence
from .reference import HYBRID_ETA, LinearLoss

MIN_CHUNK_ROWS = 128
# One [rows, V] fp32 buffer. CPU: K = 3, T = 2048, V = 2048, D = 128, kl, forward and backward on one Xeon core with
# 2 MiB of L2, 2026-11: 133 ms at 1 MiB, 110-130 at 4 MiB, 168-289 at 64 MiB. CUDA: not measured.
CHUNK_BYTES = {"cpu": 1 << 22, "cuda": 1 << 26}
ARGMAX_BLOCK = 128  # V = 2048, one Xeon core, 2026-11: 0.9 us a row against 3.1 for torch.argmax


def linear_loss_chunked(
    student_KTD: Tensor,
    teacher_TD: Tensor,
    weight_VD: Tensor,
    target_T: Tensor,
    *,
    divergence: Divergence,
    temperature: float = 1.0,
    mask_KT: Tensor | None = None,
) -> LinearLoss:
    """`linear_loss_reference`, one chunk of tokens at a time and one teacher pass for all steps.

    Products of bf16 inputs accumulate in fp32. On CUDA dloss/dz is rounded to bf16 for its product with a bf16 weight.
    """
    if divergence is Divergence.ce:
        temperature = 1.0
    needs_grad = torch.is_grad_enabled() and student_KTD.requires_grad
    teacher_TD, weight_VD = teacher_TD.detach(), weight_VD.detach()
    return LinearLoss(
        *_LinearLossFunction.apply(
            student_KTD, teacher_TD, weight_VD, target_T, mask_KT, divergence, temperature, needs_grad
        )
    )


class _LinearLossFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        student_KTD: Tensor,
        teacher_TD: Tensor,
        weight_VD: Tensor,
        target_T: Tensor,
        mask_KT: Tensor | None,
        divergence: Divergence,
        temperature: float,
        needs_grad: bool,
    ) -> LinearLoss:
        unit_grad_KTD = torch.zeros_like(student_KTD) if needs_grad else None
        with torch.autocast(student_KTD.device.type, enabled=False):
            outputs = _walk_chunks(
                student_KTD, teacher_TD, weight_VD, target_T, mask_KT, divergence, temperature, unit_grad_KTD
            )
        ctx.mark_non_differentiable(*outputs[1:])
        if unit_grad_KTD is not None:
            ctx.save_for_backward(unit_grad_KTD)
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss_KT: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        (unit_grad_KTD,) = ctx.saved_tensors
        return (unit_grad_KTD * grad_loss_KT[..., None]).to(unit_grad_KTD.dtype), *[None] * 7


def _walk_chunks(
    student_KTD: Tensor,
    teacher_TD: Tensor,
    weight_VD: Tensor,
    target_T: Tensor,
    mask_KT: Tensor | None,
    divergence: Divergence,
    temperature: float,
    unit_grad_KTD: Tensor | None,
) -> LinearLoss:
    """All outputs; fills unit_grad_KTD, zero on entry, where it is given."""
    outputs = _zero_outputs(student_KTD)
    weight_VD = _operand(weight_VD)
    buffers = _Buffers.allocate(outputs.loss_KT, len(target_T), len(weight_VD))
    valid_T = torch.arange(len(target_T), device=target_T.device) if mask_KT is None else mask_KT.any(0).nonzero()[:, 0]
    for chunk_N in valid_T.split(len(buffers.p_NV)):
        chunk_teacher, outputs.entropy_T[chunk_N] = _teacher(teacher_TD[chunk_N], weight_VD, temperature, buffers)
        for k, student_TD in enumerate(student_KTD):
            rows_N, teacher = chunk_N, chunk_teacher
            if mask_KT is not None and not (keep_N := mask_KT[k, chunk_N]).all():
                rows_N, teacher = chunk_N[keep_N], chunk_teacher.select(keep_N.nonzero()[:, 0])
            rows, outputs.alpha_KT[k, rows_N], outputs.hit_KT[k, rows_N] = _student(
                student_TD[rows_N], weight_VD, target_T[rows_N], teacher, temperature, buffers
            )
            outputs.loss_KT[k, rows_N], dlogits_NV = _TOKEN_LOSS[divergence](rows)
            if unit_grad_KTD is not None:
                unit_grad_ND = _matmul(dlogits_NV, weight_VD).div_(temperature)
                unit_grad_KTD[k, rows_N] = unit_grad_ND.to(unit_grad_KTD.dtype)
    return outputs


class _Buffers(NamedTuple):
    """All [rows, V] memory of a call: touching fresh pages costs a CPU more than the arithmetic done on them."""

    log_p_NV: Tensor
    p_NV: Tensor
    plain_p_NV: Tensor
    log_q_NV: Tensor
    q_NV: Tensor
    logits_NV: Tensor

    @classmethod
    def allocate(cls, like: Tensor, tokens: int, vocabulary: int) -> "_Buffers":
        budget = CHUNK_BYTES["cpu" if like.device.type == "cpu" else "cuda"]
        rows = min(max(MIN_CHUNK_ROWS, budget // (4 * vocabulary)), max(tokens, 1))
        return cls(*(like.new_empty(rows, vocabulary) for _ in cls._fields))

    def first(self, rows: int) -> "_Buffers":
        return _Buffers(*(buffer[:rows] for buffer in self))


class _Teacher(NamedTuple):
    """What every draft step needs of the teacher's distribution over one chunk."""

    top_N: Tensor
    log_p_NV: Tensor  # at the temperature of the loss, as is p_NV
    p_NV: Tensor
    plain_p_NV: Tensor  # at temperature 1: p_NV itself where the loss has that temperature

    def select(self, index_N: Tensor) -> "_Teacher":
        log_p_NV, p_NV = self.log_p_NV[index_N], self.p_NV[index_N]
        plain_p_NV = p_NV if self.plain_p_NV is self.p_NV else self.plain_p_NV[index_N]
        return _Teacher(self.top_N[index_N], log_p_NV, p_NV, plain_p_NV)


class _Rows(NamedTuple):
    """What a loss reads. It may overwrite log_q, q and scratch, but not log_p and p: the next step reads those."""

    target_N: Tensor
    log_p_NV: Tensor
    p_NV: Tensor
    log_q_NV: Tensor
    q_NV: Tensor
    scratch_NV: Tensor


def _teacher(hidden_ND: Tensor, weight_VD: Tensor, temperature: float, buffers: _Buffers) -> tuple[_Teacher, Tensor]:
    """The teacher of one chunk, and its entropy [N] at temperature 1."""
    log_p_NV, p_NV, plain_p_NV, scratch_NV, _, logits_NV = buffers.first(len(hidden_ND))
    _matmul(hidden_ND, weight_VD.T, out=logits_NV)
    torch.log_softmax(logits_NV, -1, out=log_p_NV)
    torch.exp(log_p_NV, out=p_NV)
    entropy_N = -torch.mul(p_NV, log_p_NV, out=scratch_NV).sum(-1)
    top_N = _row_argmax(logits_NV)
    if temperature == 1:
        return _Teacher(top_N, log_p_NV, p_NV, p_NV), entropy_N
    plain_p_NV.copy_(p_NV)
    torch.log_softmax(logits_NV.div_(temperature), -1, out=log_p_NV)
    torch.exp(log_p_NV, out=p_NV)
    return _Teacher(top_N, log_p_NV, p_NV, plain_p_NV), entropy_N


def _student(
    hidden_ND: Tensor, weight_VD: Tensor, target_N: Tensor, teacher: _Teacher, temperature: float, buffers: _Buffers
) -> tuple[_Rows, Tensor, Tensor]:
    """What the loss of one step needs, with alpha [N] and hit [N] at temperature 1."""
    _, _, _, log_q_NV, q_NV, logits_NV = buffers.first(len(hidden_ND))
    _matmul(hidden_ND, weight_VD.T, out=logits_NV)
    hit_N = _row_argmax(logits_NV) == teacher.top_N
    torch.log_softmax(logits_NV, -1, out=log_q_NV)
    torch.exp(log_q_NV, out=q_NV)
    if temperature == 1:
        alpha_N = torch.minimum(q_NV, teacher.plain_p_NV, out=logits_NV).sum(-1)
    else:
        alpha_N = torch.minimum(q_NV, teacher.plain_p_NV, out=q_NV).sum(-1)
        torch.log_softmax(logits_NV.div_(temperature), -1, out=log_q_NV)
        torch.exp(log_q_NV, out=q_NV)
    return _Rows(target_N, teacher.log_p_NV, teacher.p_NV, log_q_NV, q_NV, logits_NV), alpha_N, hit_N


# Every loss returns its value [N] and dloss/dz [N, V]. Comparisons go through float buffers because mixing bool with
# float is five times slower on CPU.


def _ce(x: _Rows) -> tuple[Tensor, Tensor]:
    target_N1 = x.target_N[:, None]
    loss_N = -x.log_q_NV.gather(-1, target_N1)[:, 0]
    return loss_N, x.q_NV.scatter_add_(-1, target_N1, x.q_NV.new_full(target_N1.shape, -1))


def _kl(x: _Rows) -> tuple[Tensor, Tensor]:
    return -x.log_q_NV.sub_(x.log_p_NV).mul_(x.p_NV).sum(-1), x.q_NV.sub_(x.p_NV)


def _reverse_kl(x: _Rows) -> tuple[Tensor, Tensor]:
    term_NV = x.log_q_NV.sub_(x.log_p_NV).mul_(x.q_NV)
    loss_N = term_NV.sum(-1)
    return loss_N, term_NV.addcmul_(x.q_NV, loss_N[:, None], value=-1)


def _jsd(x: _Rows) -> tuple[Tensor, Tensor]:
    # Where p and q both underflow their terms are 0 whatever log m is, so long as it is finite.
    tiny = torch.finfo(x.q_NV.dtype).tiny
    log_m_NV = torch.add(x.p_NV, x.q_NV, out=x.scratch_NV).mul_(0.5).clamp_(min=tiny).log_()
    q_term_NV = x.log_q_NV.sub_(log_m_NV).mul_(x.q_NV)
    q_kl_N = q_term_NV.sum(-1)
    p_kl_N = -log_m_NV.sub_(x.log_p_NV).mul_(x.p_NV).sum(-1)
    return 0.5 * (p_kl_N + q_kl_N), q_term_NV.addcmul_(x.q_NV, q_kl_N[:, None], value=-1).mul_(0.5)


def _tv(x: _Rows) -> tuple[Tensor, Tensor]:
    loss_N = torch.sub(x.p_NV, x.q_NV, out=x.scratch_NV).relu_().sum(-1)
    below_NV = x.scratch_NV.sign_().mul_(x.q_NV)  # q where q < p, else 0
    return loss_N, x.q_NV.mul_(below_NV.sum(-1, keepdim=True)).sub_(below_NV)


def _neg_log_alpha(x: _Rows) -> tuple[Tensor, Tensor]:
    share_NV = torch.minimum(x.log_p_NV, x.log_q_NV, out=x.scratch_NV)
    log_alpha_N = share_NV.logsumexp(-1)
    share_NV.sub_(log_alpha_N[:, None]).exp_().mul_(x.log_q_NV.lt_(x.log_p_NV))
    return -log_alpha_N, x.q_NV.mul_(share_NV.sum(-1, keepdim=True)).sub_(share_NV)


def _hybrid(x: _Rows) -> tuple[Tensor, Tensor]:
    kl_N = -x.log_q_NV.sub_(x.log_p_NV).mul_(x.p_NV).sum(-1)
    tv_N, tv_grad_NV = _tv(x._replace(q_NV=x.log_q_NV.copy_(x.q_NV)))
    mix_N = torch.exp(-HYBRID_ETA * (1 - tv_N))
    return tv_N.lerp(kl_N, mix_N), tv_grad_NV.lerp_(x.q_NV.sub_(x.p_NV), mix_N[:, None])


_TOKEN_LOSS: dict[Divergence, Callable[[_Rows], tuple[Tensor, Tensor]]] = {
    Divergence.ce: _ce,
    Divergence.kl: _kl,
    Divergence.reverse_kl: _reverse_kl,
    Divergence.jsd: _jsd,
    Divergence.tv: _tv,
    Divergence.neg_log_alpha: _neg_log_alpha,
    Divergence.hybrid: _hybrid,
}


def _zero_outputs(student_KTD: Tensor) -> LinearLoss:
    steps, tokens, _ = student_KTD.shape
    dtype = torch.promote_types(student_KTD.dtype, torch.float32)
    loss_KT = torch.zeros(steps, tokens, dtype=dtype, device=student_KTD.device)
    return LinearLoss(loss_KT, loss_KT.clone(), loss_KT.bool(), loss_KT.new_zeros(tokens))


def _operand(weight_VD: Tensor) -> Tensor:
    """The weight as it enters matrix products: CUDA can accumulate bf16 products in fp32, CPU needs fp32 operands."""
    if weight_VD.is_cuda:
        return weight_VD
    return weight_VD.to(torch.promote_types(weight_VD.dtype, torch.float32))


def _matmul(left: Tensor, right: Tensor, out: Tensor | None = None) -> Tensor:
    """Left @ right in at least fp32, with left cast to the dtype of right."""
    left = left.to(right.dtype)
    if right.dtype in (torch.float32, torch.float64):
        return torch.mm(left, right, out=out)
    return torch.mm(left, right, out_dtype=torch.float32, out=out)


def _row_argmax(x_NV: Tensor) -> Tensor:
    """torch.argmax(x, -1), the first of equals, by way of the best block: torch's own is not vectorised on CPU."""
    rows, columns = x_NV.shape
    if columns % ARGMAX_BLOCK:
        return x_NV.max(-1).indices
    blocks = x_NV.view(rows, -1, ARGMAX_BLOCK)
    block_N = blocks.amax(-1).max(-1).indices
    inside_N = blocks[torch.arange(rows, device=x_NV.device), block_N].max(-1).indices
    return block_N * ARGMAX_BLOCK + inside_N

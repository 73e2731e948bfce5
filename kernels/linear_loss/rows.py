"""Losses of the rows of a chunk in PyTorch: passes over [N, V] buffers that are allocated once.

N rows of a chunk, D model width, V vocabulary, A logits of a block.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..choices import Divergence
from .chunked import matmul
from .reference import HYBRID_ETA

# Fewer rows waste a product with a large head. V = 129,280, D = 1024, AMD EPYC, 2026-11: 512 tokens take 2050 ms in
# chunks of 128 rows, 1600 ms in chunks of 256, 1531 ms in one of 512.
MIN_CHUNK_ROWS = 256
# One [rows, V] fp32 buffer; CUDA: not measured. V = 2048, D = 128, AMD EPYC, 2026-11: chunks of 512 rows take 3 %
# longer than chunks of 256, those of 128 rows 6 %.
CHUNK_BYTES = {"cpu": 1 << 21, "cuda": 1 << 26}
ARGMAX_BLOCK = 128  # V = 2048, AMD EPYC, 2026-11: 0.2 us a row against 1.8 for torch.argmax


class _Pair(NamedTuple):
    """Inputs of a loss. It may overwrite log_q, q and scratch, but not log_p and p: the next step reads them.

    For the losses of `_FROM_LOGITS`, log_p and log_q hold logits, and two numbers of each row replace the logarithms:
    sum p log p, and the log-sum-exp of the student.
    """

    target_N: Tensor
    log_p_NV: Tensor
    p_NV: Tensor
    log_q_NV: Tensor
    q_NV: Tensor
    scratch_NV: Tensor
    p_log_p_N: Tensor
    log_sum_q_N: Tensor


class TorchRows:
    """`Rows` for any device and dtype.

    Args:
        weight_VD: frozen lm_head, floating.
        tokens: upper bound on the rows of a chunk.
        divergence: the loss.
        temperature: above 0, of the loss.
    """

    def __init__(self, weight_VD: Tensor, tokens: int, divergence: Divergence, temperature: float) -> None:
        self.weight_VD, self.temperature = _operand(weight_VD), temperature
        self.loss, self.has_logs = _TOKEN_LOSS[divergence], divergence not in _FROM_LOGITS
        vocabulary = len(weight_VD)
        budget = CHUNK_BYTES["cpu" if weight_VD.device.type == "cpu" else "cuda"]
        self.capacity = min(max(MIN_CHUNK_ROWS, budget // (4 * vocabulary)), max(tokens, 1))
        # Touching fresh pages costs a CPU more than the arithmetic done on them.
        dtype = torch.promote_types(weight_VD.dtype, torch.float32)
        log_p, p, log_q, q = (weight_VD.new_empty(self.capacity, vocabulary, dtype=dtype) for _ in range(4))
        scratch = torch.empty_like(q) if self.has_logs else log_p  # which no student reads then
        self.buffers = log_p, p, log_q, q, scratch
        self.plain_p = p if temperature == 1 else torch.empty_like(p)
        self.top_N = weight_VD.new_empty(0, dtype=torch.int64)
        self.p_log_p_N = p.new_empty(0)

    def teacher(self, hidden_ND: Tensor) -> Tensor:
        """Return the entropy [N] at temperature 1."""
        rows = len(hidden_ND)
        log_p_NV, p_NV, scratch_NV, *_ = (buffer[:rows] for buffer in self.buffers)
        plain_p_NV = self.plain_p[:rows]
        matmul(hidden_ND, self.weight_VD.T, out=log_p_NV)
        self.top_N = row_argmax(log_p_NV)
        log_sum_N1 = softmax(log_p_NV, self.top_N, plain_p_NV)
        p_log_p_N = self.p_log_p_N = torch.mul(plain_p_NV, log_p_NV, out=scratch_NV).sum(-1) - log_sum_N1[:, 0]
        if self.temperature != 1:
            log_sum_N1 = softmax(log_p_NV.div_(self.temperature), self.top_N, p_NV)
            self.p_log_p_N = torch.mul(p_NV, log_p_NV, out=scratch_NV).sum(-1) - log_sum_N1[:, 0]
        if self.has_logs:
            log_p_NV.sub_(log_sum_N1)
        return -p_log_p_N

    def student(
        self, hidden_ND: Tensor, target_N: Tensor, needs_grad: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Return loss, alpha and top1_match [N], and the unit gradient [N, D] or None."""
        rows = len(hidden_ND)
        log_p_NV, p_NV, log_q_NV, q_NV, scratch_NV = (buffer[:rows] for buffer in self.buffers)
        matmul(hidden_ND, self.weight_VD.T, out=log_q_NV)
        top_N = row_argmax(log_q_NV)
        log_sum_N1 = softmax(log_q_NV, top_N, q_NV)
        alpha_N = torch.minimum(q_NV, self.plain_p[:rows], out=scratch_NV).sum(-1)
        if self.temperature != 1:
            log_sum_N1 = softmax(log_q_NV.div_(self.temperature), top_N, q_NV)
        if self.has_logs:
            log_q_NV.sub_(log_sum_N1)
        sums = (self.p_log_p_N, log_sum_N1[:, 0])
        loss_N, dlogits_NV = self.loss(_Pair(target_N, log_p_NV, p_NV, log_q_NV, q_NV, scratch_NV, *sums))
        grad_ND = matmul(dlogits_NV, self.weight_VD) if needs_grad else None
        if grad_ND is not None and self.temperature != 1:
            grad_ND.div_(self.temperature)
        return loss_N, alpha_N, top_N == self.top_N, grad_ND


def softmax(x_NV: Tensor, top_N: Tensor, probabilities_NV: Tensor) -> Tensor:
    """Fill in the softmax of logits, and return their log-sum-exp, [N, 1].

    This takes one exponential instead of the two of torch.log_softmax and torch.exp: the log-sum-exp follows from the
    largest entry, whose probability is at least 1 / V.

    Args:
        x_NV: logits.
        top_N: int64, the largest entry of each row.
        probabilities_NV: buffer for the softmax.
    """
    torch.softmax(x_NV, -1, out=probabilities_NV)
    top_N1 = top_N[:, None]
    return x_NV.gather(-1, top_N1) - probabilities_NV.gather(-1, top_N1).log_()


# Every loss returns its value [N] and dloss/dz [N, V]. Comparisons go through float buffers because mixing bool and
# float is five times slower on a CPU.


def _ce(x: _Pair) -> tuple[Tensor, Tensor]:
    target_N1 = x.target_N[:, None]
    loss_N = x.log_sum_q_N - x.log_q_NV.gather(-1, target_N1)[:, 0]
    return loss_N, x.q_NV.scatter_add_(-1, target_N1, x.q_NV.new_full(target_N1.shape, -1))


def _kl(x: _Pair) -> tuple[Tensor, Tensor]:
    p_log_q_N = torch.mul(x.p_NV, x.log_q_NV, out=x.scratch_NV).sum(-1) - x.log_sum_q_N
    return x.p_log_p_N - p_log_q_N, x.q_NV.sub_(x.p_NV)


def _reverse_kl(x: _Pair) -> tuple[Tensor, Tensor]:
    term_NV = x.log_q_NV.sub_(x.log_p_NV).mul_(x.q_NV)
    loss_N = term_NV.sum(-1)
    return loss_N, term_NV.addcmul_(x.q_NV, loss_N[:, None], value=-1)


def _jsd(x: _Pair) -> tuple[Tensor, Tensor]:
    # Where p and q both underflow, their terms are 0 for any finite log m.
    tiny = torch.finfo(x.q_NV.dtype).tiny
    log_m_NV = torch.add(x.p_NV, x.q_NV, out=x.scratch_NV).mul_(0.5).clamp_(min=tiny).log_()
    q_term_NV = x.log_q_NV.sub_(log_m_NV).mul_(x.q_NV)
    q_kl_N = q_term_NV.sum(-1)
    p_kl_N = -log_m_NV.sub_(x.log_p_NV).mul_(x.p_NV).sum(-1)
    return 0.5 * (p_kl_N + q_kl_N), q_term_NV.addcmul_(x.q_NV, q_kl_N[:, None], value=-1).mul_(0.5)


def _tv(x: _Pair) -> tuple[Tensor, Tensor]:
    loss_N = torch.sub(x.p_NV, x.q_NV, out=x.scratch_NV).relu_().sum(-1)
    below_NV = x.scratch_NV.sign_().mul_(x.q_NV)  # q where q < p, else 0
    return loss_N, x.q_NV.mul_(below_NV.sum(-1, keepdim=True)).sub_(below_NV)


def _neg_log_alpha(x: _Pair) -> tuple[Tensor, Tensor]:
    share_NV = torch.minimum(x.log_p_NV, x.log_q_NV, out=x.scratch_NV)
    log_alpha_N = share_NV.logsumexp(-1)
    share_NV.sub_(log_alpha_N[:, None]).exp_().mul_(x.log_q_NV.lt_(x.log_p_NV))
    return -log_alpha_N, x.q_NV.mul_(share_NV.sum(-1, keepdim=True)).sub_(share_NV)


def _hybrid(x: _Pair) -> tuple[Tensor, Tensor]:
    kl_N = -x.log_q_NV.sub_(x.log_p_NV).mul_(x.p_NV).sum(-1)
    tv_N, tv_grad_NV = _tv(x._replace(q_NV=x.log_q_NV.copy_(x.q_NV)))
    mix_N = torch.exp(-HYBRID_ETA * (1 - tv_N))
    return tv_N.lerp(kl_N, mix_N), tv_grad_NV.lerp_(x.q_NV.sub_(x.p_NV), mix_N[:, None])


_TOKEN_LOSS: dict[Divergence, Callable[[_Pair], tuple[Tensor, Tensor]]] = {
    Divergence.ce: _ce,
    Divergence.kl: _kl,
    Divergence.reverse_kl: _reverse_kl,
    Divergence.jsd: _jsd,
    Divergence.tv: _tv,
    Divergence.neg_log_alpha: _neg_log_alpha,
    Divergence.hybrid: _hybrid,
}
_FROM_LOGITS = (Divergence.ce, Divergence.kl)  # whole rows of logs would be two more passes


def _operand(weight_VD: Tensor) -> Tensor:
    """Return the weight for matrix products: CUDA accumulates bf16 products in fp32, a CPU needs fp32 operands.

    On CUDA dloss/dz is rounded to bf16 for its product with a bf16 weight.
    """
    if weight_VD.is_cuda:
        return weight_VD
    return weight_VD.to(torch.promote_types(weight_VD.dtype, torch.float32))


def row_argmax(x_NV: Tensor) -> Tensor:
    """Return torch.argmax(x, -1), the first of equals, through the best block: torch does not vectorise it on a CPU."""
    rows, columns = x_NV.shape
    if columns % ARGMAX_BLOCK:
        return x_NV.max(-1).indices
    blocks = x_NV.view(rows, -1, ARGMAX_BLOCK)
    block_N = blocks.amax(-1).max(-1).indices
    best_N1A = blocks.gather(1, block_N.view(-1, 1, 1).expand(-1, 1, ARGMAX_BLOCK))
    inside_N = best_N1A.max(-1).indices[:, 0]
    return block_N * ARGMAX_BLOCK + inside_N

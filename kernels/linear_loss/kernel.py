"""Triton for the rows of a chunk: online softmax, divergence and gradient over the logits of teacher and student.

The matrix products stay with the vendor's library and write fp32 logits. A program takes one row. The teacher's row is
read once for its statistics, whatever the number of draft steps. The student's row is read once for its statistics;
then both are read for the sums of the loss and, for kl and ce in the same pass, for dloss/dz. This gradient replaces
the student's logits (fp32 weights) or goes into a bf16 buffer, the dtype of the next product. The formulas are those
of `chunked.py`.

    log p_v = (z_v - max z) / tau - log sum_u exp((z_u - max z) / tau)

stays split into its two terms, because their sum would be rounded at the magnitude of the logits. Terms of probability
0 contribute 0.

N rows of a chunk, D model width, V vocabulary.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..choices import Divergence
from ..device import on_its_device
from ..launch import MODELS, Launch
from .chunked import matmul
from .reference import HYBRID_ETA

CHUNK_ROWS = 1024  # at V = 129,280 two buffers of 530 MB and one of 265; not measured on a GPU
BLOCK = 2048  # entries of a row at once; not measured on a GPU
OPTIONS = {"num_warps": 8, "enable_fp_fusion": True}
ETA = tl.constexpr(HYBRID_ETA)
TINY = tl.constexpr(torch.finfo(torch.float32).tiny)
ONE_PASS = ("ce", "kl")  # dloss/dz needs no sum over the row beyond that of the softmax


@triton.jit
def _row_statistics(
    logits_ptr,
    vocabulary,
    inverse_temperature,
    TEMPERED: tl.constexpr,  # tau is not 1
    ENTROPY: tl.constexpr,  # it is wanted
    BLOCK: tl.constexpr,
):
    """Return of one row: max, its first id, log-sums at temperature 1 and tau above it, entropy at temperature 1."""
    peak, top = float("-inf"), 0
    total, tempered, weighted = 0.0, 0.0, 0.0  # sums of e^x, e^(x / tau) and x e^x, with x = z - peak
    for start in range(0, vocabulary, BLOCK):
        ids = start + tl.arange(0, BLOCK)
        z = tl.load(logits_ptr + ids, mask=ids < vocabulary, other=float("-inf"))
        block_peak, block_top = tl.max(z, 0, return_indices=True)
        higher = block_peak > peak
        top = tl.where(higher, start + block_top, top)
        new_peak = tl.where(higher, block_peak, peak)
        x = tl.where(z > float("-inf"), z - new_peak, float("-inf"))  # also if every entry so far was -inf
        lift = tl.where(peak > float("-inf"), peak - new_peak, 0.0)  # nothing was summed before the first finite one
        e = tl.exp(x)
        shrink = tl.exp(lift)
        if ENTROPY:
            weighted = shrink * (weighted + lift * total) + tl.sum(tl.where(e > 0, x * e, 0.0))
        total = shrink * total + tl.sum(e)
        if TEMPERED:
            tempered = tl.exp(lift * inverse_temperature) * tempered + tl.sum(tl.exp(x * inverse_temperature))
        peak = new_peak
    log_sum_tau = tl.log(tempered) if TEMPERED else tl.log(total)
    return peak, top, tl.log(total), log_sum_tau, tl.log(total) - weighted / total


@triton.jit
def _teacher_kernel(
    logits_ptr,
    statistics_ptr,  # [3, N]: max, log-sum at temperature 1, log-sum at tau
    top_ptr,
    entropy_ptr,
    rows,
    vocabulary,
    inverse_temperature,
    TEMPERED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    peak, top, log_sum, log_sum_tau, entropy = _row_statistics(
        logits_ptr + row * vocabulary, vocabulary, inverse_temperature, TEMPERED, True, BLOCK
    )
    tl.store(statistics_ptr + row, peak)
    tl.store(statistics_ptr + rows + row, log_sum)
    tl.store(statistics_ptr + 2 * rows + row, log_sum_tau)
    tl.store(top_ptr + row, top)
    tl.store(entropy_ptr + row, entropy)


@triton.jit
def _student_kernel(
    student_ptr,
    teacher_ptr,
    dlogits_ptr,
    statistics_ptr,
    teacher_top_ptr,
    target_ptr,
    loss_ptr,
    alpha_ptr,
    top1_match_ptr,
    rows,
    vocabulary,
    inverse_temperature,
    DIVERGENCE: tl.constexpr,
    TEMPERED: tl.constexpr,
    GRADIENT: tl.constexpr,
    ONE_PASS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    student_ptr += row * vocabulary
    teacher_ptr += row * vocabulary
    dlogits_ptr += row * vocabulary
    p_peak = tl.load(statistics_ptr + row)
    p_log_sum = tl.load(statistics_ptr + rows + row)
    p_log_sum_tau = tl.load(statistics_ptr + 2 * rows + row)
    target = tl.load(target_ptr + row)
    q_peak, top, q_log_sum, q_log_sum_tau, _ = _row_statistics(
        student_ptr, vocabulary, inverse_temperature, TEMPERED, False, BLOCK
    )

    # The divergence decides the meaning of the sums `first`, `second` and `third`.
    alpha, first, second, third = 0.0, 0.0, 0.0, 0.0
    share_peak = float("-inf")
    for start in range(0, vocabulary, BLOCK):
        ids = start + tl.arange(0, BLOCK)
        inside = ids < vocabulary
        q_x = tl.load(student_ptr + ids, mask=inside, other=float("-inf")) - q_peak
        p_x = tl.load(teacher_ptr + ids, mask=inside, other=float("-inf")) - p_peak
        log_q, log_p = q_x - q_log_sum, p_x - p_log_sum
        q, p = tl.exp(log_q), tl.exp(log_p)
        alpha += tl.sum(tl.minimum(q, p))
        if TEMPERED:
            log_q, log_p = q_x * inverse_temperature - q_log_sum_tau, p_x * inverse_temperature - p_log_sum_tau
            q, p = tl.exp(log_q), tl.exp(log_p)
        if DIVERGENCE == "ce":
            first -= tl.sum(tl.where(ids == target, log_q, 0.0))
        if DIVERGENCE == "kl" or DIVERGENCE == "hybrid":
            first += tl.sum(tl.where(p > 0, p * (log_p - log_q), 0.0))
        if DIVERGENCE == "reverse_kl":
            first += tl.sum(tl.where(q > 0, q * (log_q - log_p), 0.0))
        if DIVERGENCE == "jsd":
            log_m = tl.log(tl.maximum(0.5 * (p + q), TINY))
            first += tl.sum(tl.where(p > 0, p * (log_p - log_m), 0.0))
            second += tl.sum(tl.where(q > 0, q * (log_q - log_m), 0.0))
        if DIVERGENCE == "tv" or DIVERGENCE == "hybrid":
            second += tl.sum(tl.maximum(p - q, 0.0))
            third += tl.sum(tl.where(q < p, q, 0.0))
        if DIVERGENCE == "neg_log_alpha":
            share = tl.minimum(log_p, log_q)
            new_peak = tl.maximum(share_peak, tl.max(share, 0))
            x = tl.where(share > float("-inf"), share - new_peak, float("-inf"))
            shrink = tl.where(share_peak > float("-inf"), tl.exp(share_peak - new_peak), 0.0)
            first = first * shrink + tl.sum(tl.exp(x))
            second = second * shrink + tl.sum(tl.where(log_q < log_p, tl.exp(x), 0.0))
            share_peak = new_peak
        if GRADIENT and ONE_PASS:
            goal = tl.where(ids == target, 1.0, 0.0) if DIVERGENCE == "ce" else p
            tl.store(dlogits_ptr + ids, (q - goal).to(dlogits_ptr.dtype.element_ty), mask=inside)

    loss = first
    mix = 1.0
    if DIVERGENCE == "jsd":
        loss = 0.5 * (first + second)
    if DIVERGENCE == "tv":
        loss = second
    if DIVERGENCE == "neg_log_alpha":
        loss = -(share_peak + tl.log(first))
    if DIVERGENCE == "hybrid":
        mix = tl.exp((second - 1) * ETA)
        loss = mix * first + (1 - mix) * second
    tl.store(loss_ptr + row, loss)
    tl.store(alpha_ptr + row, alpha)
    tl.store(top1_match_ptr + row, top == tl.load(teacher_top_ptr + row))

    if GRADIENT and not ONE_PASS:
        for start in range(0, vocabulary, BLOCK):
            ids = start + tl.arange(0, BLOCK)
            inside = ids < vocabulary
            q_x = tl.load(student_ptr + ids, mask=inside, other=float("-inf")) - q_peak
            p_x = tl.load(teacher_ptr + ids, mask=inside, other=float("-inf")) - p_peak
            if TEMPERED:
                q_x, p_x = q_x * inverse_temperature, p_x * inverse_temperature
            log_q, log_p = q_x - q_log_sum_tau, p_x - p_log_sum_tau
            q, p = tl.exp(log_q), tl.exp(log_p)
            if DIVERGENCE == "reverse_kl":
                grad = tl.where(q > 0, q * (log_q - log_p - loss), 0.0)
            if DIVERGENCE == "jsd":
                log_m = tl.log(tl.maximum(0.5 * (p + q), TINY))
                grad = tl.where(q > 0, 0.5 * q * (log_q - log_m - second), 0.0)
            if DIVERGENCE == "tv":
                grad = q * third - tl.where(q < p, q, 0.0)
            if DIVERGENCE == "hybrid":
                grad = mix * (q - p) + (1 - mix) * (q * third - tl.where(q < p, q, 0.0))
            if DIVERGENCE == "neg_log_alpha":
                r = tl.where(log_q < log_p, tl.exp(tl.minimum(log_p, log_q) + loss), 0.0)
                grad = q * (second / first) - r
            tl.store(dlogits_ptr + ids, grad.to(dlogits_ptr.dtype.element_ty), mask=inside)


class TritonRows:
    """`Rows` for fp32 or bf16 on a GPU; see `TorchRows` for the arguments."""

    def __init__(self, weight_VD: Tensor, tokens: int, divergence: Divergence, temperature: float) -> None:
        self.weight_VD, self.divergence, self.temperature = weight_VD, divergence, temperature
        self.capacity = min(CHUNK_ROWS, max(tokens, 1))
        self.student_NV, self.teacher_NV = (
            weight_VD.new_empty(self.capacity, len(weight_VD), dtype=torch.float32) for _ in range(2)
        )
        in_place = weight_VD.dtype is torch.float32
        self.dlogits_NV = self.student_NV if in_place else torch.empty_like(self.student_NV, dtype=weight_VD.dtype)
        self.statistics = self.teacher_NV.new_empty(0)
        self.top_N = self.teacher_NV.new_empty(0, dtype=torch.int64)

    def teacher(self, hidden_ND: Tensor) -> Tensor:
        """Return the entropy [N] at temperature 1."""
        matmul(hidden_ND, self.weight_VD.T, out=self.teacher_NV[: len(hidden_ND)])
        self.statistics, self.top_N, entropy_N = teacher_rows(self.teacher_NV[: len(hidden_ND)], self.temperature)
        return entropy_N

    def student(
        self, hidden_ND: Tensor, target_N: Tensor, needs_grad: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Return loss, alpha and top1_match [N], and the unit gradient [N, D] or None."""
        buffers = self.student_NV, self.teacher_NV, self.dlogits_NV
        student_NV, teacher_NV, dlogits_NV = (buffer[: len(hidden_ND)] for buffer in buffers)
        matmul(hidden_ND, self.weight_VD.T, out=student_NV)
        loss_N, alpha_N, top1_match_N = student_rows(
            student_NV,
            teacher_NV,
            self.statistics,
            self.top_N,
            target_N,
            dlogits_NV if needs_grad else None,
            self.divergence,
            self.temperature,
        )
        grad_ND = matmul(dlogits_NV, self.weight_VD).div_(self.temperature) if needs_grad else None
        return loss_N, alpha_N, top1_match_N, grad_ND


@on_its_device
def teacher_rows(logits_NV: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return the statistics [3, N], first largest entry [N] and entropy [N] of fp32 logits, in one launch."""
    rows, vocabulary = logits_NV.shape
    statistics_3N, entropy_N = logits_NV.new_empty(3, rows), logits_NV.new_empty(rows)
    top_N = logits_NV.new_empty(rows, dtype=torch.int64)
    _teacher_kernel[(rows,)](
        logits_NV,
        statistics_3N,
        top_N,
        entropy_N,
        rows,
        vocabulary,
        1 / temperature,
        TEMPERED=temperature != 1.0,
        BLOCK=BLOCK,
        **OPTIONS,
    )
    return statistics_3N, top_N, entropy_N


@on_its_device
def student_rows(
    student_NV: Tensor,
    teacher_NV: Tensor,
    statistics_3N: Tensor,
    teacher_top_N: Tensor,
    target_N: Tensor,
    dlogits_NV: Tensor | None,
    divergence: Divergence,
    temperature: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return loss, alpha and top-1 match [N] of fp32 logits, in one launch; fill dloss/dz, which may alias the logits.

    Args:
        student_NV: float32 logits of the student, contiguous.
        teacher_NV: float32 logits of the teacher, contiguous.
        statistics_3N: float32, from `teacher_rows`.
        teacher_top_N: int64, the teacher's first largest entries, from `teacher_rows`.
        target_N: int64 data tokens; read by `ce` alone.
        dlogits_NV: buffer for dloss/dz, float32 or bfloat16; None to skip the gradient.
        divergence: the loss.
        temperature: above 0, of the loss.
    """
    rows, vocabulary = student_NV.shape
    loss_N, alpha_N = student_NV.new_empty(rows), student_NV.new_empty(rows)
    top1_match_N = student_NV.new_empty(rows, dtype=torch.bool)
    _student_kernel[(rows,)](
        student_NV,
        teacher_NV,
        student_NV if dlogits_NV is None else dlogits_NV,
        statistics_3N,
        teacher_top_N,
        target_N.contiguous(),
        loss_N,
        alpha_N,
        top1_match_N,
        rows,
        vocabulary,
        1 / temperature,
        DIVERGENCE=divergence.value,
        TEMPERED=temperature != 1,
        GRADIENT=dlogits_NV is not None,
        ONE_PASS=divergence.value in ONE_PASS,
        BLOCK=BLOCK,
        **OPTIONS,
    )
    return loss_N, alpha_N, top1_match_N


def launches() -> list[Launch]:
    """Return the launches to compile ahead of time: every divergence, at the vocabulary shared by the V4 models."""
    (vocabulary,) = {shapes.vocabulary for shapes in MODELS.values()}
    aligned = ":16" if vocabulary % 16 == 0 else ""
    common = {"statistics_ptr": "*fp32:16", "rows": "i32:16", "vocabulary": f"i32{aligned}"}
    common |= {"inverse_temperature": "fp32"}
    pointers = {"logits_ptr": "*fp32:16", "top_ptr": "*i64:16", "entropy_ptr": "*fp32:16"}
    listed = [
        Launch(
            kernel=_teacher_kernel,
            label="tempered" if is_tempered else "",
            arguments=common | pointers,
            constants={"TEMPERED": is_tempered, "BLOCK": BLOCK},
            options=OPTIONS,
        )
        for is_tempered in (False, True)
    ]
    pointers = dict.fromkeys(("student_ptr", "teacher_ptr", "loss_ptr", "alpha_ptr"), "*fp32:16")
    pointers |= {"teacher_top_ptr": "*i64:16", "target_ptr": "*i64:16", "top1_match_ptr": "*i1:16"}
    plain = [(Divergence.ce, False), (Divergence.kl, False)]
    for divergence, is_tempered in plain + [(one, True) for one in Divergence if one is not Divergence.ce]:
        listed.append(
            Launch(
                kernel=_student_kernel,
                label=f"{divergence} bf16{' tempered' if is_tempered else ''}",
                arguments=common | pointers | {"dlogits_ptr": "*bf16:16"},
                constants={
                    "DIVERGENCE": divergence.value,
                    "TEMPERED": is_tempered,
                    "GRADIENT": True,
                    "ONE_PASS": divergence.value in ONE_PASS,
                    "BLOCK": BLOCK,
                },
                options=OPTIONS,
            )
        )
    return listed

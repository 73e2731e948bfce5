"""`linear_loss` beside the full-logits definition, torch.compile of it, Liger and speculators.

K draft steps, T tokens, D model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib.util import find_spec

import torch
from torch import Tensor

from ..bench.case import Case, Outputs
from . import Divergence, linear_loss
from .reference import linear_loss_reference

# Divergence, K, T, D, V. D and V of the CPU's last size are those of the tiny backbone.
SIZES = {
    "cpu": [(Divergence.kl, 1, 512, 1024, 129_280), (Divergence.kl, 3, 1024, 128, 2048)],
    "cuda": [
        (Divergence.kl, 1, 8192, 4096, 129_280),
        (Divergence.kl, 3, 8192, 4096, 129_280),
        (Divergence.ce, 1, 8192, 4096, 129_280),
    ],
}

PIECE = 1024  # tokens


def cases(device: torch.device, sizes: str) -> Iterator[Case]:
    """Yield the comparisons of one list of sizes one at a time, because the inputs of each fill much of its memory."""
    for size in SIZES[sizes]:
        yield _case(device, *size)


def _case(device: torch.device, divergence: Divergence, K: int, T: int, D: int, V: int) -> Case:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    generator = torch.Generator(device).manual_seed(0)
    teacher_TD = torch.randn(T, D, generator=generator, device=device)
    student_KTD = teacher_TD + 0.5 * torch.randn(K, T, D, generator=generator, device=device)
    weight_VD = (2 / D**0.5) * torch.randn(V, D, generator=generator, device=device)
    target_T = torch.randint(V, (T,), generator=generator, device=device)
    student_KTD, teacher_TD, weight_VD = (x.to(dtype) for x in (student_KTD, teacher_TD, weight_VD))
    student_KTD.requires_grad_()

    def with_gradient(op: Callable[..., tuple[Tensor, ...]]) -> Callable[[], Outputs]:
        def run() -> Outputs:
            loss_KT = op(student_KTD, teacher_TD, weight_VD, target_T, divergence=divergence)[0]
            return torch.autograd.grad(loss_KT.sum(), student_KTD)[0], loss_KT.detach()

        return run

    def in_pieces() -> Outputs:
        pieces = []
        for begin in range(0, T, PIECE):
            rows = slice(begin, begin + PIECE)
            part_KTD = student_KTD.detach()[:, rows].requires_grad_()
            teacher_target = teacher_TD[rows], weight_VD, target_T[rows]
            loss_KT = linear_loss_reference(part_KTD, *teacher_target, divergence=divergence)[0]
            pieces.append((torch.autograd.grad(loss_KT.sum(), part_KTD)[0], loss_KT.detach()))
        return tuple(torch.cat(parts, dim=1) for parts in zip(*pieces, strict=True))

    products = (0 if divergence is Divergence.ce else 1) + 2 * K
    peers, missing = _liger(divergence, student_KTD, teacher_TD, weight_VD, target_T)
    if divergence is Divergence.kl and find_spec("speculators") is not None:
        peers["speculators"] = _speculators(student_KTD, teacher_TD, weight_VD)
    else:
        missing["speculators"] = "not installed" if divergence is Divergence.kl else "its CE takes a teacher's logits"
    peers["torch.compile of definition"] = with_gradient(torch.compile(linear_loss_reference, dynamic=False))
    element = student_KTD.element_size()
    return Case(
        label=f"{divergence}, K {K}, {T} tokens, D {D}, V {V}, {dtype}: forward and gradient".replace("torch.", ""),
        ours=with_gradient(linear_loss),
        definition=with_gradient(linear_loss_reference),
        in_pieces=in_pieces,
        peers=peers,
        missing=missing,
        bare=lambda: _bare_products(student_KTD, teacher_TD, weight_VD, divergence),
        bytes=element * ((2 * K + 1) * T * D + V * D),
        flops=products * 2 * T * D * V,
        rtol=1e-4 if dtype is torch.float32 else 2 * 2**-8,
        atol=1e-4 if dtype is torch.float32 else 2**-6,
    )


@torch.no_grad()
def _bare_products(student_KTD: Tensor, teacher_TD: Tensor, weight_VD: Tensor, divergence: Divergence) -> None:
    """Compute the products of a forward and a backward pass on whole logits, and nothing else."""
    if divergence is not Divergence.ce:
        teacher_TD @ weight_VD.T
    for student_TD in student_KTD:
        logits_TV = student_TD @ weight_VD.T
        logits_TV @ weight_VD


def _speculators(student_KTD: Tensor, teacher_TD: Tensor, weight_VD: Tensor) -> Callable[[], Outputs]:
    """Return a run of speculators' forward KL on whole logits, once per step: fused on a GPU, eager elsewhere."""
    if student_KTD.is_cuda:
        from speculators.losses.fused import fused_kl_div_loss as kl_loss
    else:
        from speculators.losses.eager import kl_div_loss as kl_loss

    def run() -> Outputs:
        teacher_1TV = (teacher_TD @ weight_VD.T)[None]
        loss_KT = torch.cat([kl_loss((student_TD @ weight_VD.T)[None], teacher_1TV) for student_TD in student_KTD])
        return torch.autograd.grad(loss_KT.sum(), student_KTD)[0], loss_KT.detach()

    return run


def _liger(
    divergence: Divergence, student_KTD: Tensor, teacher_TD: Tensor, weight_VD: Tensor, target_T: Tensor
) -> tuple[dict[str, Callable[[], Outputs]], dict[str, str]]:
    """Return runs of Liger's losses, once per step, and the losses that cannot run here.

    They return a mean, so their gradient alone is compared, multiplied by the number of tokens.
    """
    if find_spec("liger_kernel") is None:
        return {}, {"Liger": "not installed; pip install -e '.[bench]'"}

    def each_step(loss: Callable[[Tensor], Tensor]) -> Callable[[], Outputs]:
        def run() -> Outputs:
            total = sum((loss(student_TD) for student_TD in student_KTD), student_KTD.new_zeros(()))
            return (torch.autograd.grad(total, student_KTD)[0] * len(target_T),)

        return run

    if divergence is Divergence.ce:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        fused_ce = LigerFusedLinearCrossEntropyLoss()
        return {"Liger fused linear CE": each_step(lambda x_TD: fused_ce(weight_VD, x_TD, target_T))}, {}
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    # beta 0 is KL(teacher || student).
    chunked = LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.0, compiled=student_KTD.is_cuda
    )
    peers = {
        "Liger chunked JSD": each_step(lambda x_TD: chunked(x_TD, weight_VD, teacher_TD, weight_VD, target_T)),
    }
    if not student_KTD.is_cuda:
        return peers, {"Liger fused linear JSD": "runs on a GPU only"}
    from liger_kernel.transformers import LigerFusedLinearJSD

    fused = LigerFusedLinearJSD(jsd_beta=0.0)
    peers["Liger fused linear JSD"] = each_step(lambda x_TD: fused(x_TD, weight_VD, teacher_TD, weight_VD))
    return peers, {}

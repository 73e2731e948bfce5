"""Hidden states of K draft steps and of the teacher go through one frozen lm_head to a divergence for every token."""

import math

import torch
from torch import Tensor

from ..choices import Divergence
from ..dispatch import use_triton
from .chunked import MakeRows, linear_loss_in_chunks
from .reference import LinearLoss
from .rows import TorchRows

__all__ = ["Divergence", "LinearLoss", "linear_loss"]


def linear_loss(
    student_KTD: Tensor,
    teacher_TD: Tensor,
    weight_VD: Tensor,
    target_T: Tensor,
    *,
    divergence: Divergence,
    temperature: float = 1.0,
    mask_KT: Tensor | None = None,
) -> LinearLoss:
    """Return `linear_loss_reference` without ever holding [T, V] logits.

    Args, Returns: see `linear_loss_reference`.

    Raises:
        ValueError: shapes or dtypes disagree, or temperature is not a finite number above 0.

    """
    _check_shapes(student_KTD, teacher_TD, weight_VD, target_T, mask_KT)
    _check_dtypes(student_KTD, teacher_TD, weight_VD, target_T, mask_KT)
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"temperature={temperature} must be finite and above 0; 1 leaves the logits as they are")
    make_rows: MakeRows = TorchRows
    if use_triton("linear_loss", student_KTD, unfit=_unfit(student_KTD.dtype)):
        from .kernel import TritonRows  # needs Triton, which a machine without a GPU may lack

        make_rows = TritonRows
    return linear_loss_in_chunks(
        make_rows,
        student_KTD,
        teacher_TD,
        weight_VD,
        target_T,
        divergence=Divergence(divergence),
        temperature=temperature,
        mask_KT=mask_KT,
    )


def _unfit(dtype: torch.dtype) -> str | None:
    """Return why the kernel cannot take a dtype, or None."""
    return None if dtype in (torch.float32, torch.bfloat16) else f"it takes float32 and bfloat16, not {dtype}"


def _check_shapes(student: Tensor, teacher: Tensor, weight: Tensor, target: Tensor, mask: Tensor | None) -> None:
    if student.ndim != 3 or student.shape[0] == 0:
        raise ValueError(f"student_KTD must be [K, T, D] with at least one step, got {tuple(student.shape)}")
    steps, tokens, width = student.shape
    if teacher.shape != (tokens, width):
        raise ValueError(
            f"teacher_TD is {tuple(teacher.shape)} but the student needs ({tokens}, {width}): align one teacher row"
            " with each token"
        )
    if weight.ndim != 2 or weight.shape[0] == 0 or weight.shape[1] != width:
        raise ValueError(
            f"weight_VD is {tuple(weight.shape)} but must be [V, {width}]: pass lm_head.weight untransposed"
        )
    if target.shape != (tokens,):
        raise ValueError(f"target_T is {tuple(target.shape)} but must be ({tokens},): one token id for each row")
    if mask is not None and mask.shape != (steps, tokens):
        raise ValueError(f"mask_KT is {tuple(mask.shape)} but must be ({steps}, {tokens}): one flag per step and token")


def _check_dtypes(student: Tensor, teacher: Tensor, weight: Tensor, target: Tensor, mask: Tensor | None) -> None:
    if not student.is_floating_point() or not student.dtype == teacher.dtype == weight.dtype:
        raise ValueError(
            f"student_KTD {student.dtype}, teacher_TD {teacher.dtype} and weight_VD {weight.dtype} must share one"
            " floating dtype; cast them before the call"
        )
    if target.dtype != torch.int64:
        raise ValueError(f"target_T is {target.dtype} but must be torch.int64")
    if mask is not None and mask.dtype != torch.bool:
        raise ValueError(f"mask_KT is {mask.dtype} but must be torch.bool")

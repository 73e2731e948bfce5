"""Launches happen on the GPU of their tensors, and their grids fit CUDA."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from triton.runtime import interpreter

from mtptrain.kernels.acceptance import DrawKind, Sampling, Verification
from mtptrain.kernels.acceptance.draws_kernel import uniforms_triton
from mtptrain.kernels.acceptance.kernel import policy_probabilities_triton, top_tokens_triton, verify_logits_triton
from mtptrain.kernels.hyper_connection.expand_kernel import expand_and_mix_triton
from mtptrain.kernels.hyper_connection.kernel import connect_triton
from mtptrain.kernels.linear_loss import Divergence
from mtptrain.kernels.linear_loss.kernel import student_rows, teacher_rows
from mtptrain.kernels.norm_rotate.kernel import norm_and_rotate_triton, rotate_in_place_triton
from mtptrain.kernels.sink_attention import Cached
from mtptrain.kernels.sink_attention.kernel import cached_attention_triton, rollout_attention_triton

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a launch is observed in the interpreter")

LARGEST_GRID = (2**31 - 1, 65_535, 65_535)  # CUDA programming guide, table of compute capabilities
INT_B = torch.ones(2, dtype=torch.int64)
LOGITS_BLV = torch.zeros(2, 2, 8)
TURN_11r = torch.ones(1, 1, 2, dtype=torch.complex64)
KEYS_BSC, QUERY_BHSC = torch.zeros(2, 1, 8), torch.zeros(2, 1, 1, 8)
STREAMS_BSND, WEIGHTS_M = torch.zeros(2, 1, 2, 8), torch.zeros(8)


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[tuple[tuple[int, ...], list[Tensor]]]:
    """Return the grid of every launch, and the tensors whose GPU was made current around it; nothing is computed."""
    seen, current = [], []

    @contextmanager
    def device_of(tensor: Tensor) -> Iterator[None]:
        current.append(tensor)
        yield
        current.pop()

    def launch(executor: Any, *_: Any, **__: Any) -> None:
        seen.append((executor.grid, list(current)))

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    monkeypatch.setattr(interpreter.GridExecutor, "__call__", launch)
    return seen


@pytest.mark.parametrize(
    "op",
    [
        lambda: uniforms_triton(INT_B, INT_B, DrawKind.draft, 3),
        lambda: top_tokens_triton(LOGITS_BLV),
        lambda: policy_probabilities_triton(LOGITS_BLV, Sampling(1.0)),
        lambda: verify_logits_triton(
            INT_B[:, None], INT_B, None, LOGITS_BLV, torch.zeros(2, 2).double(), Sampling(1.0), Verification.token
        ),
        lambda: connect_triton(
            STREAMS_BSND, torch.zeros(8, 16), WEIGHTS_M, torch.ones(3), norm_eps=1e-6, eps=1e-6, iterations=2
        ),
        lambda: expand_and_mix_triton(STREAMS_BSND[..., 0], torch.zeros(2, 1, 2, 2), KEYS_BSC, STREAMS_BSND),
        lambda: teacher_rows(LOGITS_BLV[0], 1.0),
        lambda: student_rows(*LOGITS_BLV, torch.zeros(3, 2), INT_B, INT_B, None, Divergence.kl, 1.0),
        lambda: norm_and_rotate_triton(KEYS_BSC, TURN_11r, eps=1e-6),
        lambda: rotate_in_place_triton(KEYS_BSC.clone(), TURN_11r),
        lambda: rollout_attention_triton(
            QUERY_BHSC, KEYS_BSC, None, torch.zeros(1), INT_B[:, None], TURN_11r, window=2, scale=1.0
        ),
        lambda: cached_attention_triton(
            QUERY_BHSC, Cached(KEYS_BSC, None, None, INT_B), torch.zeros(1), window=2, rate=1, scale=1.0
        ),
    ],
)
def test_an_op_launches_on_the_gpu_of_its_tensors(op: Callable[[], Any], launches: list[Any]) -> None:
    op()
    assert launches
    assert all(len(current) == 1 for _, current in launches)


def test_a_distribution_of_more_rows_than_the_second_dimension_of_a_grid_fits(launches: list[Any]) -> None:
    policy_probabilities_triton(torch.zeros(70_000, 2), Sampling(1.0))
    assert len(launches) == 2
    assert all(size <= most for grid, _ in launches for size, most in zip(grid, LARGEST_GRID, strict=False))

import logging
import subprocess
import sys

import pytest
import torch

from mtptrain.kernels.acceptance import (
    DrawKind,
    Sampling,
    Verification,
    policy_probabilities,
    sample_logits,
    uniforms,
    verify_logits,
)
from mtptrain.kernels.dispatch import Kernels, requested, use_triton
from mtptrain.kernels.linear_loss import Divergence, linear_loss
from tests.command import Refused

ROW_B = torch.arange(3)
POLICY = Sampling(0.8, top_p=0.9)


def test_a_cpu_needs_no_triton() -> None:
    program = (
        "import sys\n"
        "sys.modules['triton'] = None  # importing it fails\n"
        "import torch\n"
        "from mtptrain.kernels.acceptance import DrawKind, uniforms\n"
        "from mtptrain.kernels.linear_loss import linear_loss\n"
        "uniforms(torch.arange(3), torch.arange(3), DrawKind.draft, 2)\n"
        "rows = torch.ones(2, 4)\n"
        "linear_loss(rows[None], rows, torch.ones(8, 4), torch.arange(2), divergence='kl')\n"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="nothing is interpreted on a GPU")
def test_triton_on_a_cpu_means_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MTPTRAIN_KERNELS", "triton")
    assert use_triton("op", ROW_B)
    interpreted = uniforms(ROW_B, ROW_B, DrawKind.draft, 2)
    monkeypatch.setenv("MTPTRAIN_KERNELS", "reference")
    assert not use_triton("op", ROW_B)
    assert torch.equal(uniforms(ROW_B, ROW_B, DrawKind.draft, 2), interpreted)


@pytest.mark.skipif(torch.cuda.is_available(), reason="nothing is interpreted on a GPU")
def test_ops_give_the_same_with_both_implementations(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    rows_KTD, weight_VD = torch.randn(2, 3, 8, generator=generator), torch.randn(17, 8, generator=generator)
    u_BL = uniforms(ROW_B, ROW_B, DrawKind.verify, 2)
    results = {}
    for choice in Kernels:
        monkeypatch.setenv("MTPTRAIN_KERNELS", choice)
        losses = linear_loss(rows_KTD, rows_KTD[0], weight_VD, ROW_B, divergence=Divergence.tv)
        logits_BLV = torch.randn(3, 2, 17, generator=torch.Generator().manual_seed(1))
        p_BLV, drawn_B = policy_probabilities(logits_BLV, POLICY), sample_logits(logits_BLV[:, 0], POLICY, u_BL[:, 0])
        draft = (drawn_B[:, None], torch.ones_like(ROW_B), logits_BLV[:, :1])
        verified = verify_logits(*draft, logits_BLV, u_BL, POLICY, Verification.block)
        results[choice] = (*losses, p_BLV, drawn_B, *verified)
    torch.testing.assert_close(*results.values())


def test_a_path_slower_than_requested_is_logged_once_with_its_reason(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MTPTRAIN_KERNELS", "triton")
    with caplog.at_level(logging.WARNING, "mtptrain.kernels"):
        assert not any(use_triton("some_op", ROW_B, unfit="it has seven corners") for _ in range(3))
    assert caplog.messages == ["some_op: PyTorch instead of Triton, because it has seven corners"]


def test_without_the_variable_nothing_is_requested(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MTPTRAIN_KERNELS", raising=False)
    assert requested() is None
    monkeypatch.setenv("MTPTRAIN_KERNELS", "triton")
    assert requested() is Kernels.triton


def test_a_wrong_value_ends_with_one_line(refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("hydra")  # scripts/measure_gpu.sh runs the other tests of kernels without it
    monkeypatch.setenv("MTPTRAIN_KERNELS", "cuda")
    assert refused() == "MTPTRAIN_KERNELS=cuda is not known; use reference or triton, or leave it out"

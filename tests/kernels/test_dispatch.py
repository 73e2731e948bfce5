import logging
import subprocess
import sys

import pytest
import torch

from mtptrain.kernels.acceptance import Stream, uniforms
from mtptrain.kernels.dispatch import Kernels, requested, use_triton
from tests.command import Refused

ROW_B = torch.arange(3)


def test_a_cpu_needs_no_triton() -> None:
    program = (
        "import sys\n"
        "sys.modules['triton'] = None  # importing it fails\n"
        "import torch\n"
        "from mtptrain.kernels.acceptance import Stream, uniforms\n"
        "from mtptrain.kernels.linear_loss import linear_loss\n"
        "uniforms(torch.arange(3), torch.arange(3), Stream.draft, 2)\n"
        "rows = torch.ones(2, 4)\n"
        "linear_loss(rows[None], rows, torch.ones(8, 4), torch.arange(2), divergence='kl')\n"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="nothing is interpreted where a GPU is")
def test_triton_on_a_cpu_means_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MTPTRAIN_KERNELS", "triton")
    assert use_triton("op", ROW_B)
    interpreted = uniforms(ROW_B, ROW_B, Stream.draft, 2)
    monkeypatch.setenv("MTPTRAIN_KERNELS", "reference")
    assert not use_triton("op", ROW_B)
    assert torch.equal(uniforms(ROW_B, ROW_B, Stream.draft, 2), interpreted)


def test_a_path_slower_than_asked_for_is_logged_once_with_its_reason(
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
    monkeypatch.setenv("MTPTRAIN_KERNELS", "cuda")
    assert refused() == "MTPTRAIN_KERNELS=cuda is not known; use reference or triton, or leave it out"

"""The backbone keeps its own drafts, but for numerical ties that the rounding noise explains."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mtptrain.certificate import controls
from mtptrain.certificate.controls import BackboneProposer, all_accept_control
from mtptrain.decoding.results import Decoded, VerifyPass
from tests.tiny import random_backbone

MODEL = random_backbone()
LENGTH = 3
KEPT, REJECTED = VerifyPass(LENGTH, LENGTH, LENGTH + 1), VerifyPass(LENGTH, 1, 2)


def control(
    monkeypatch: pytest.MonkeyPatch, rejected: list[bool], gap: float, difference: float = 1e-6
) -> tuple[bool, int]:
    """Run the control on a loop whose passes are given; a rejected draft has `gap` at the token that is rejected."""
    row = Decoded([5], [1.0])
    drafted = []
    for is_rejected in rejected:
        one = REJECTED if is_rejected else KEPT
        gaps = [1.0, gap] if is_rejected else [1.0] * one.emitted
        row.tokens += [number % 7 for number in range(one.emitted)]
        row.gaps += gaps
        row.passes.append(one)
        drafted.append([1.0 + difference] * LENGTH)

    def decode(_model: object, proposer: BackboneProposer, *_: object) -> Any:
        proposer.gaps += drafted
        return SimpleNamespace(rows=[row])

    monkeypatch.setattr(controls, "decode_speculative", decode)
    result = all_accept_control(MODEL, list(range(9)), LENGTH)
    return result.passed, result.near_ties


def test_drafts_may_be_rejected_at_a_tie(monkeypatch: pytest.MonkeyPatch) -> None:
    assert control(monkeypatch, [False, True, False, False], gap=0.0) == (True, 1)


def test_drafts_that_are_rejected_far_from_a_tie_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if drafting and verifying differ by much, as with a fault of the cache: noise bounds the differences."""
    assert control(monkeypatch, [False, True, False, False], gap=0.1) == (False, 1)
    assert control(monkeypatch, [False, True, False, False], gap=0.1, difference=5.0) == (False, 1)


def test_more_ties_than_the_differences_explain_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    assert control(monkeypatch, [True] * 8, gap=1e-7, difference=0.0) == (False, 8)


def test_a_text_that_ends_within_a_draft_is_no_rejection(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"{__name__}.REJECTED", VerifyPass(LENGTH, 2, 2))
    passed, ties = control(monkeypatch, [False, True], gap=1.0)
    assert (passed, ties) == (False, 0)  # fewer than K + 1 tokens, and no tie is the reason


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_backbone_keeps_its_own_drafts(dtype: torch.dtype) -> None:
    """On a CPU, the second of these prompts has a tie in bf16."""
    model = random_backbone().to(dtype)
    for seed in range(2):
        prompt = torch.randint(0, 97, (9,), generator=torch.Generator().manual_seed(seed)).tolist()
        assert all_accept_control(model, prompt, 7).passed

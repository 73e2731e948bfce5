"""The frozen forward of whole sequences as a trace: the same values, also for tensors that autograd saves."""

import pytest
import torch

from mtptrain.backbone import streams, traced
from mtptrain.backbone.attention import use_linear_attention
from mtptrain.backbone.streams import run_backbone
from mtptrain.backbone.traced import Recorder, repeated
from tests.tiny import random_backbone


@torch.no_grad()
def test_a_traced_forward_equals_an_eager_one(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens = random_backbone(), torch.arange(140).reshape(2, 70) % 97
    use_linear_attention(model)
    expected = [streams._forward(model, rows) for rows in (tokens, tokens.flip(1))]
    with repeated(traced.BREAK_EVEN):
        run_backbone(model, tokens)
        monkeypatch.setattr(streams, "_forward", lambda *_: pytest.fail("the trace runs no Python code"))
        results = [run_backbone(model, rows) for rows in (tokens, tokens.flip(1))]
    for result, wanted in zip(results, expected, strict=True):
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(result, wanted, strict=True))
        assert not any(value.is_inference() for value in result)


@torch.no_grad()
def test_a_large_forward_is_not_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens = random_backbone(), torch.arange(140).reshape(2, 70) % 97
    use_linear_attention(model)
    monkeypatch.setattr(streams, "MOST_TRACED", tokens.numel() * sum(p.numel() for p in model.parameters()) - 1)
    monkeypatch.setattr(streams, "Traced", lambda *_, **__: pytest.fail("it would hold every tensor of the forward"))
    with repeated(traced.BREAK_EVEN):
        assert run_backbone(model, tokens)[0].shape[:2] == tokens.shape


def test_a_value_of_a_constant_is_no_obstacle_and_one_of_an_input_is() -> None:
    given = torch.ones(3)
    with torch.inference_mode(), Recorder([given]) as recorder:
        assert (torch.arange(3) < 4).all()
        assert recorder.obstacle is None
        copied = torch.zeros(3)
        copied[1:].copy_(given[1:])
        assert (copied < 2).all()
        assert recorder.obstacle is not None

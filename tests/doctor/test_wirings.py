"""Each wrong wiring changes its own input, and a head trained under one is recognised."""

from dataclasses import replace

import pytest
import torch

from mtptrain.backbone.streams import run_backbone
from mtptrain.certificate.controls import all_accept_control
from mtptrain.certificate.shifted_target import not_tested
from mtptrain.decoding.results import Limits
from mtptrain.decoding.speculative import decode_plain
from mtptrain.doctor.diagnosis import diagnose, measure_wirings
from mtptrain.doctor.result import DoctorControls
from mtptrain.doctor.tensors import examine_tensors
from mtptrain.doctor.wirings import RIGHT, WIRINGS, Wiring
from mtptrain.evaluation.certificate_result import AllAcceptControl, Outcome
from mtptrain.mtp.rollout import rollout
from mtptrain.mtp.stack import MtpStack
from mtptrain.traces.file import Trace
from mtptrain.traces.prompts import Prompt
from tests.tiny import random_backbone, random_batch, random_stack

MODEL = random_backbone()
BY_NAME = {wiring.name: wiring for wiring in WIRINGS}


def traces(count: int) -> list[Trace]:
    prompts = torch.randint(97, (count, 5), generator=torch.Generator().manual_seed(0))
    texts = decode_plain(MODEL, prompts.tolist(), Limits(24)).rows
    return [
        Trace(Prompt(row, "text", number), one.tokens, one.gaps, [1.0] * len(one.tokens))
        for number, (row, one) in enumerate(zip(prompts.tolist(), texts, strict=True))
    ]


def states(wiring: Wiring, stack: MtpStack, steps: int = 3) -> list[torch.Tensor]:
    batch = random_batch(97, [[21]], 21)
    with torch.inference_mode():
        streams, _ = run_backbone(MODEL, batch.tokens_BS)
        return wiring.build(MODEL, 7)(stack, MODEL.model.embed_tokens, streams, batch, steps)


@pytest.mark.parametrize("depth", [1, 2])
def test_the_right_wiring_is_the_rollout(depth: int) -> None:
    stack, batch = random_stack(MODEL, depth), random_batch(97, [[21]], 21)
    with torch.inference_mode():
        streams, _ = run_backbone(MODEL, batch.tokens_BS)
        expected = rollout(stack, MODEL.model.embed_tokens, streams, batch, 3)
    assert all(torch.equal(a, b) for a, b in zip(states(BY_NAME[RIGHT], stack), expected, strict=True))


@pytest.mark.parametrize("name", [name for name in BY_NAME if name != RIGHT])
def test_each_wrong_wiring_changes_the_drafts(name: str) -> None:
    stack = random_stack(MODEL)
    right, wrong = states(BY_NAME[RIGHT], stack), states(BY_NAME[name], stack)
    assert any(not torch.equal(a, b) for a, b in zip(right, wrong, strict=True))


@pytest.mark.parametrize("name", ["own_keys", "still_position"])
def test_wirings_of_later_steps_leave_the_first_alone(name: str) -> None:
    stack = random_stack(MODEL)
    right, wrong = states(BY_NAME[RIGHT], stack), states(BY_NAME[name], stack)
    assert torch.equal(right[0], wrong[0])
    assert not torch.equal(right[1], wrong[1])


def test_without_prefill_a_draft_does_not_depend_on_the_prompts_keys() -> None:
    """The prompt has 7 tokens: slots 0 to 5 are hidden from the drafts, slot 6 starts the first of them."""
    stack, batch = random_stack(MODEL), random_batch(97, [[21]], 21)
    with torch.inference_mode():
        streams, _ = run_backbone(MODEL, batch.tokens_BS)
        other = streams.clone()
        other[:, :6] += 1
        for name, is_same in (("no_prefill", True), (RIGHT, False)):
            drafts = [
                BY_NAME[name].build(MODEL, 7)(stack, MODEL.model.embed_tokens, s, batch, 2)[1][:, 6:9]
                for s in (streams, other)
            ]
            # fp32 rounding: the experts' products hold other rows beside these.
            assert torch.allclose(*drafts, atol=1e-4, rtol=1e-4) == is_same


@pytest.mark.parametrize("name", [RIGHT, "embedding_late"])
def test_a_head_that_learned_one_wiring_is_recognised(name: str) -> None:
    """The head learns the measured texts by heart, so only its inputs matter."""
    texts = traces(8)
    stack = random_stack(MODEL)
    tokens = torch.tensor([trace.prompt.tokens + trace.tokens for trace in texts])
    batch = random_batch(97, [[tokens.shape[1]]] * 8, tokens.shape[1])
    batch = type(batch)(tokens, batch.segment_BS, batch.position_BS)
    streams, _ = run_backbone(MODEL, tokens)
    optimizer = torch.optim.AdamW(stack.parameters(), lr=1e-2)
    draft = BY_NAME[name].build(MODEL, 5)
    for _ in range(30):
        (hidden,) = draft(stack, MODEL.model.embed_tokens, streams, batch, 1)
        mask = batch.target_mask(1)
        loss = torch.nn.functional.cross_entropy(MODEL.lm_head(hidden[mask]), tokens.roll(-2, dims=1)[mask])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    tensors = examine_tensors(stack.state_dict(), MODEL.config, 1)
    result = diagnose(tensors, measure_wirings(MODEL, stack.eval(), texts, 1), None)
    assert result.best == name
    assert result.healthy == (name == RIGHT)


@pytest.mark.parametrize("outcome", list(Outcome))
def test_a_head_is_unhealthy_if_its_control_failed_and_not_if_it_could_not_be_tested(outcome: Outcome) -> None:
    tensors = examine_tensors(random_stack(MODEL).state_dict(), MODEL.config, 1)
    controls = DoctorControls(replace(not_tested(1), outcome=outcome), AllAcceptControl(2.0, 2, passed=True))
    diagnosis = diagnose(tensors, None, controls)
    assert diagnosis.healthy == (outcome is not Outcome.failed)


@pytest.mark.parametrize("draft_length", [1, 3])
def test_the_backbone_as_its_own_draft_reaches_the_ceiling(draft_length: int) -> None:
    result = all_accept_control(MODEL, list(range(9)), draft_length)
    assert result.acceptance_length == draft_length + 1
    assert result.passed


def test_a_sound_head_has_no_error() -> None:
    report = examine_tensors(random_stack(MODEL, 2).state_dict(), MODEL.config, 2, None)
    assert report.errors == 0


@pytest.mark.parametrize("kind", ["missing", "unexpected", "misshaped", "non_finite", "zero"])
def test_each_fault_of_a_tensor_is_named(kind: str) -> None:
    name = "mtp.0.e_proj.weight"
    tensors = {key: tensor.clone() for key, tensor in random_stack(MODEL).state_dict().items()}
    if kind == "missing":
        del tensors[name]
    elif kind == "unexpected":
        name = "mtp.0.unknown.weight"
        tensors[name] = torch.ones(2)
    elif kind == "misshaped":
        tensors[name] = tensors[name][:-1]
    elif kind == "non_finite":
        tensors[name][0, 0] = float("nan")
    else:
        tensors[name].zero_()
    report = examine_tensors(tensors, MODEL.config, 1, None)
    (line,) = getattr(report, kind)
    assert line.split()[0] == name
    assert report.errors == 1
    assert not diagnose(report, None, None).healthy


def test_untrained_tensors_are_reported_as_equal_to_the_stock_heads() -> None:
    stock = random_stack(MODEL).state_dict()
    report = examine_tensors({**stock, "mtp.0.norm.weight": stock["mtp.0.norm.weight"] + 1}, MODEL.config, 1, stock)
    assert set(report.same_as_stock) == set(stock) - {"mtp.0.norm.weight"}
    assert "nothing was trained" in diagnose(examine_tensors(stock, MODEL.config, 1, stock), None, None).findings[0]

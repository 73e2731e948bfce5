"""What a CUDA graph asks of a step, as far as it can be checked without a GPU: recording itself is not."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from transformers import DeepseekV4ForCausalLM

from mtptrain.backbone.cache import BackboneCache
from mtptrain.backbone.decode import decode_step
from mtptrain.certificate.controls import BackboneProposer
from mtptrain.decoding.captured import captured_verify, why_not_recorded
from mtptrain.decoding.draft import MtpProposer
from mtptrain.decoding.policy import GREEDY, Policy
from mtptrain.decoding.results import Limits
from mtptrain.decoding.speculative import allocate_cache, decode_speculative
from mtptrain.decoding.texts import Draft, Texts
from mtptrain.mtp.stack import MtpStack
from tests.tiny import random_backbone, random_stack

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # where a GPU is, passes and drafts are really recorded
PROMPTS = [[5, 17, 3, 88, 41, 9, 12], [2, 71, 30, 6, 6, 55, 90, 14, 8, 33, 61]]


def without_values(work: Callable[[], object]) -> None:
    """Run on tensors that have shapes and no values: whatever must know a value, and so wait for the device, fails."""
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        work()


def bfloat16_model() -> DeepseekV4ForCausalLM:
    """Without values, PyTorch knows its grouped products of experts in bfloat16 only, as on a GPU."""
    model = random_backbone()
    return torch.nn.Module.to(model, torch.bfloat16)


def placed(depth: int) -> tuple[DeepseekV4ForCausalLM, MtpStack]:
    """A backbone and a head: in bfloat16 on the GPU, where there is one."""
    model = random_backbone()
    stack = random_stack(model, depth)
    if DEVICE == "cuda":
        for module in (model, stack):
            for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
                is_strict = any(part in name for part in ("hc", "norm", "sinks", "bias", "inv_freq", "tid2eid"))
                tensor.data = tensor.data.to(DEVICE, None if is_strict else torch.bfloat16)
    return model, stack


def filled_cache(model: DeepseekV4ForCausalLM, max_step: int) -> BackboneCache:
    """A cache that holds 23 positions of two rows."""
    cache = allocate_cache(model, 2, 64, max_step)
    tokens_BS = torch.randint(97, (2, 23), generator=torch.Generator().manual_seed(0))
    decode_step(model, cache, tokens_BS.to(cache.length_B.device))
    return cache


def test_a_verify_pass_waits_for_nothing() -> None:
    model = bfloat16_model()
    verify = captured_verify(model, filled_cache(model, 4))
    without_values(lambda: verify(torch.zeros(2, 4, dtype=torch.int64)))


def test_a_step_that_looks_at_a_value_is_caught() -> None:
    model = bfloat16_model()
    cache = filled_cache(model, 4)
    with pytest.raises(DataDependentOutputException):  # it compares the lengths with the room
        without_values(lambda: decode_step(model, cache, torch.zeros(2, 4, dtype=torch.int64)))


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("policy", [GREEDY, Policy(temperature=0.7, top_k=20, top_p=0.9), Policy(min_confidence=0.3)])
def test_a_draft_waits_for_nothing(depth: int, policy: Policy) -> None:
    model = bfloat16_model()
    proposer = MtpProposer(model, random_stack(model, depth).to(torch.bfloat16))
    texts = Texts(PROMPTS, Limits(9), 3, torch.device("cpu"))
    proposer.start(texts, 3, policy)
    going_B = torch.ones(2, dtype=torch.bool)
    draws = () if policy.is_greedy else (torch.rand(2, 3, dtype=torch.float64),)
    without_values(lambda: proposer.propose(texts.length_B, going_B, *draws))


def test_experts_that_make_torch_wait_are_not_recorded() -> None:
    model = bfloat16_model()
    assert why_not_recorded(model, (9, 0)) is None
    assert "compute capability 8.0" in str(why_not_recorded(model, (8, 0)))
    assert "torch.float32" in str(why_not_recorded(random_backbone(), (9, 0)))


class TwiceDrafter(MtpProposer):
    """Is asked for each draft twice, as the first one is where steps are recorded."""

    def draft(self, u_BK: Tensor | None) -> Draft:
        super().draft(u_BK)
        return super().draft(u_BK)


class TwiceBackbone(BackboneProposer):
    """The same of the control."""

    def draft(self, u_BK: Tensor | None) -> Draft:
        super().draft(u_BK)
        return super().draft(u_BK)


@pytest.mark.parametrize("policy", [GREEDY, Policy(temperature=0.9)])
def test_a_draft_made_twice_changes_nothing(policy: Policy) -> None:
    model = random_backbone()
    stack = random_stack(model, 2)
    found, expected = (
        decode_speculative(model, kind(model, stack), PROMPTS, 3, Limits(14), policy).rows
        for kind in (TwiceDrafter, MtpProposer)
    )
    assert [(row.tokens, row.passes) for row in found] == [(row.tokens, row.passes) for row in expected]


def test_the_backbone_as_its_own_draft_may_be_asked_twice() -> None:
    model = random_backbone()
    (row,) = decode_speculative(model, TwiceBackbone(model), PROMPTS[:1], 3, Limits(13)).rows
    assert [one.accepted for one in row.passes] == [3, 3, 3]


class FullDrafter(MtpProposer):
    """Drafts as it is recorded: over as many anchors as there may be."""

    def draft(self, u_BK: Tensor | None) -> Draft:
        going_B = torch.tensor(self.texts.is_open, device=DEVICE)
        return self.propose(self.texts.length_B, going_B, *(() if u_BK is None else (u_BK,)))


@pytest.mark.parametrize("policy", [GREEDY, Policy(temperature=0.9), Policy(min_confidence=0.2)])
@pytest.mark.parametrize(("depth", "drafted"), [(1, 1), (1, 4), (3, 3)])
def test_drafting_from_all_anchors_gives_the_same_text_in_the_same_passes(
    depth: int, drafted: int, policy: Policy
) -> None:
    model, stack = placed(depth)
    limits = Limits(14)
    expected, found = (
        decode_speculative(model, proposer, PROMPTS, drafted, limits, policy).rows
        for proposer in (MtpProposer(model, stack), FullDrafter(model, stack))
    )
    assert [(row.tokens, row.passes) for row in found] == [(row.tokens, row.passes) for row in expected]


def test_runs_that_only_warm_up_leave_no_trace() -> None:
    model, _ = placed(1)
    left, right = filled_cache(model, 4), filled_cache(model, 4)
    tokens_BL = torch.tensor([[7, 8, 9, 10], [1, 2, 3, 4]], device=DEVICE)
    disturbed, plain = captured_verify(model, left), captured_verify(model, right)
    with torch.no_grad():
        for _ in range(3):
            for length in (4, 1, 4):
                disturbed.warm_up(tokens_BL[:, :length] + 50)
            found, expected = disturbed(tokens_BL), plain(tokens_BL)
            assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))
            assert torch.equal(left.length_B, right.length_B)
            assert torch.equal(left.written_B, right.written_B)
            for cache in (left, right):
                cache.rewind(cache.length_B - torch.tensor([3, 1], device=DEVICE))


@pytest.mark.skipif(DEVICE == "cpu", reason="nothing is recorded without a GPU")
def test_a_recorded_pass_is_the_function_that_was_recorded() -> None:
    model, _ = placed(1)
    recorded, plain = (captured_verify(model, filled_cache(model, 4)) for _ in range(2))
    assert recorded.records
    with torch.inference_mode():
        for first in range(1, 60, 7):
            tokens_BL = torch.arange(first, first + 8, device=DEVICE).view(2, 4)
            found, expected = recorded(tokens_BL), plain.function(tokens_BL)
            torch.testing.assert_close(found, expected, rtol=0, atol=0)
            for counters in (recorded.counters, plain.counters):
                counters[0].sub_(torch.tensor([3, 1], device=DEVICE))

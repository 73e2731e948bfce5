"""The requirements of CUDA graphs on a decoding step. Recording itself is only tested on a GPU."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from transformers import DeepseekV4ForCausalLM

from mtptrain.backbone.cache import BackboneCache
from mtptrain.backbone.decode import decode_step
from mtptrain.certificate.controls import BackboneProposer
from mtptrain.decoding.captured import Captured, recording_obstacle
from mtptrain.decoding.draft import MtpProposer
from mtptrain.decoding.penalties import Penalties
from mtptrain.decoding.policy import GREEDY, Policy
from mtptrain.decoding.results import Limits
from mtptrain.decoding.speculative import allocate_cache, decode_speculative
from mtptrain.decoding.steps import verify_step
from mtptrain.decoding.texts import Draft, Texts
from mtptrain.mtp.stack import MtpStack
from tests.tiny import random_backbone, random_stack

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # on a GPU, passes and drafts are really recorded
PROMPTS = [[5, 17, 3, 88, 41, 9, 12], [2, 71, 30, 6, 6, 55, 90, 14, 8, 33, 61]]
PENALISED = Policy(temperature=0.7, min_p=0.1, penalties=Penalties(1.2, 0.1, 0.1))


def without_values(work: Callable[[], object]) -> None:
    """Run on tensors with shapes but no values: code that reads a value, and so waits for the device, fails."""
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        work()


def bfloat16_model() -> DeepseekV4ForCausalLM:
    """A backbone in bfloat16: without values, as on a GPU, PyTorch has grouped expert products in no other dtype."""
    model = random_backbone()
    return torch.nn.Module.to(model, torch.bfloat16)


def backbone_and_stack(depth: int) -> tuple[DeepseekV4ForCausalLM, MtpStack]:
    """A backbone and a head, in bfloat16 on the GPU if the machine has one."""
    model = random_backbone()
    stack = random_stack(model, depth)
    if DEVICE == "cuda":
        for module in (model, stack):
            for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
                is_strict = any(part in name for part in ("hc", "norm", "sinks", "bias", "inv_freq", "tid2eid"))
                tensor.data = tensor.data.to(DEVICE, None if is_strict else torch.bfloat16)
    return model, stack


def filled_cache(model: DeepseekV4ForCausalLM, max_step: int) -> BackboneCache:
    """A cache with 23 positions of two rows."""
    cache = allocate_cache(model, 2, 64, max_step)
    tokens_BS = torch.randint(97, (2, 23), generator=torch.Generator().manual_seed(0))
    decode_step(model, cache, tokens_BS.to(cache.length_B.device))
    return cache


def test_a_verify_pass_waits_for_nothing() -> None:
    model = bfloat16_model()
    verify = verify_step(model, filled_cache(model, 4)).function
    without_values(lambda: verify(torch.zeros(2, 4, dtype=torch.int64)))


def test_a_step_that_looks_at_a_value_is_caught() -> None:
    model = bfloat16_model()
    cache = filled_cache(model, 4)
    with pytest.raises(DataDependentOutputException):  # it compares the lengths with the room
        without_values(lambda: decode_step(model, cache, torch.zeros(2, 4, dtype=torch.int64)))


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize(
    "policy", [GREEDY, Policy(temperature=0.7, top_k=20, top_p=0.9), Policy(min_confidence=0.3), PENALISED]
)
def test_a_draft_waits_for_nothing(depth: int, policy: Policy) -> None:
    model = bfloat16_model()
    proposer = MtpProposer(model, random_stack(model, depth).to(torch.bfloat16))
    texts = Texts(PROMPTS, Limits(9), 3, torch.device("cpu"))
    proposer.start(texts, 3, policy)
    active_B = torch.ones(2, dtype=torch.bool)
    draws = () if policy.is_greedy else (torch.rand(2, 3, dtype=torch.float64),)
    without_values(lambda: proposer.propose(texts.length_B, active_B, *draws))


def test_experts_that_make_torch_wait_are_not_recorded() -> None:
    model = bfloat16_model()
    assert recording_obstacle(model, (9, 0)) is None
    assert "compute capability 8.0" in str(recording_obstacle(model, (8, 0)))
    assert "torch.float32" in str(recording_obstacle(random_backbone(), (9, 0)))


class RepeatingProposer(MtpProposer):
    """Makes each draft twice, as recording does with the first one."""

    def draft(self, u_BK: Tensor | None) -> Draft:
        super().draft(u_BK)
        return super().draft(u_BK)


class RepeatingBackboneProposer(BackboneProposer):
    """Makes each draft of the control twice."""

    def draft(self, u_BK: Tensor | None) -> Draft:
        super().draft(u_BK)
        return super().draft(u_BK)


@pytest.mark.parametrize("policy", [GREEDY, Policy(temperature=0.9)])
def test_a_draft_made_twice_changes_nothing(policy: Policy) -> None:
    model = random_backbone()
    stack = random_stack(model, 2)
    repeated, expected = (
        decode_speculative(model, kind(model, stack), PROMPTS, 3, Limits(14), policy).rows
        for kind in (RepeatingProposer, MtpProposer)
    )
    assert [(row.tokens, row.passes) for row in repeated] == [(row.tokens, row.passes) for row in expected]


def test_the_backbone_as_its_own_proposer_may_draft_twice() -> None:
    model = random_backbone()
    (row,) = decode_speculative(model, RepeatingBackboneProposer(model), PROMPTS[:1], 3, Limits(13)).rows
    assert [verify_pass.accepted for verify_pass in row.passes] == [3, 3, 3]


class AllAnchorsProposer(MtpProposer):
    """Drafts as in a recording: over the largest possible number of anchors."""

    def draft(self, u_BK: Tensor | None) -> Draft:
        active_B = torch.tensor(self.texts.is_open, device=DEVICE)
        return self.propose(self.texts.length_B, active_B, *(() if u_BK is None else (u_BK,)))


@pytest.mark.parametrize("policy", [GREEDY, Policy(temperature=0.9), Policy(min_confidence=0.2)])
@pytest.mark.parametrize(("depth", "drafted"), [(1, 1), (1, 4), (3, 3)])
def test_drafting_from_all_anchors_gives_the_same_text_in_the_same_passes(
    depth: int, drafted: int, policy: Policy
) -> None:
    model, stack = backbone_and_stack(depth)
    limits = Limits(14)
    expected, drafted_from_all = (
        decode_speculative(model, proposer, PROMPTS, drafted, limits, policy).rows
        for proposer in (MtpProposer(model, stack), AllAnchorsProposer(model, stack))
    )
    assert [(row.tokens, row.passes) for row in drafted_from_all] == [(row.tokens, row.passes) for row in expected]


def test_runs_that_only_warm_up_leave_no_trace() -> None:
    model, _ = backbone_and_stack(1)
    disturbed_cache, plain_cache = filled_cache(model, 4), filled_cache(model, 4)
    tokens_BL = torch.tensor([[7, 8, 9, 10], [1, 2, 3, 4]], device=DEVICE)
    plain = verify_step(model, plain_cache).function
    counters = (disturbed_cache.length_B, disturbed_cache.written_B)
    disturbed = Captured(verify_step(model, disturbed_cache).function, counters)
    with torch.no_grad():
        for _ in range(3):
            for length in (4, 1, 4):
                disturbed.warm_up(tokens_BL[:, :length] + 50)
            outputs, expected = disturbed.function(tokens_BL), plain(tokens_BL)
            assert all(torch.equal(left, right) for left, right in zip(outputs, expected, strict=True))
            assert torch.equal(disturbed_cache.length_B, plain_cache.length_B)
            assert torch.equal(disturbed_cache.written_B, plain_cache.written_B)
            for cache in (disturbed_cache, plain_cache):
                cache.rewind(cache.length_B - torch.tensor([3, 1], device=DEVICE))


@pytest.mark.skipif(DEVICE == "cpu", reason="nothing is recorded without a GPU")
def test_a_recorded_pass_equals_the_function() -> None:
    model, _ = backbone_and_stack(1)
    caches = [filled_cache(model, 4) for _ in range(2)]
    recorded, plain = (verify_step(model, cache) for cache in caches)
    assert isinstance(recorded, Captured)
    with torch.inference_mode():
        for first in range(1, 60, 7):
            tokens_BL = torch.arange(first, first + 8, device=DEVICE).view(2, 4)
            outputs, expected = recorded(tokens_BL), plain.function(tokens_BL)
            torch.testing.assert_close(outputs, expected, rtol=0, atol=0)
            for cache in caches:
                cache.length_B.sub_(torch.tensor([3, 1], device=DEVICE))

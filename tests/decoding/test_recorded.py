"""Decoding with recorded steps, replayed op by op on a CPU: static shapes, no Python code, reused output tensors."""

import pytest
import torch

from mtptrain.backbone.decode import decode_step
from mtptrain.decoding.draft import MtpProposer
from mtptrain.decoding.penalties import Penalties
from mtptrain.decoding.policy import GREEDY, Policy
from mtptrain.decoding.results import Limits
from mtptrain.decoding.speculative import allocate_cache, decode_speculative
from mtptrain.decoding.steps import verify_step
from mtptrain.kernels.acceptance import Verification
from tests.decoding.recorded_ops import RecordedOps, record_on_cpu
from tests.tiny import random_stack, three_layers

PROMPTS = [[5, 17, 3, 88, 41, 9, 12], [2, 71, 30, 6, 6, 55, 90, 14, 8, 33, 61]]
POLICIES = [
    GREEDY,
    Policy(temperature=0.9),
    Policy(temperature=0.8, top_k=20, top_p=0.9, verification=Verification.block),
    Policy(min_confidence=0.02),
    Policy(temperature=0.9, min_p=0.1, penalties=Penalties(1.2, 0.3, 0.1)),
]


@pytest.mark.parametrize("policy", POLICIES, ids=["greedy", "sampled", "cut_block", "stopped", "penalised"])
@pytest.mark.parametrize(("depth", "drafted"), [(1, 3), (2, 2)])
def test_recorded_steps_give_the_same_texts_in_the_same_passes(
    depth: int, drafted: int, policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = three_layers()
    stack, limits = random_stack(model, depth), Limits(14)
    expected = decode_speculative(model, MtpProposer(model, stack), PROMPTS, drafted, limits, policy).rows
    recordings = record_on_cpu(monkeypatch)
    recorded = decode_speculative(model, MtpProposer(model, stack), PROMPTS, drafted, limits, policy).rows
    assert [(row.tokens, row.passes) for row in recorded] == [(row.tokens, row.passes) for row in expected]
    assert len(recordings) == 2  # the verify pass and the draft, each once


def test_a_recorded_pass_reads_the_current_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    """At every offset in the compression windows and in the ring, over more positions than the window holds."""
    model = three_layers()
    record_on_cpu(monkeypatch)
    generator = torch.Generator().manual_seed(0)
    recorded, plain = (allocate_cache(model, 2, 96, 3) for _ in range(2))
    verify = verify_step(model, recorded)
    with torch.inference_mode():
        for _ in range(24):
            tokens_BL = torch.randint(97, (2, 3), generator=generator)
            outputs = verify(tokens_BL)
            streams_BLND, hidden_BLD = decode_step(model, plain, tokens_BL)
            expected = (streams_BLND, model.lm_head(hidden_BLD))
            for output, reference in zip(outputs, expected, strict=True):
                torch.testing.assert_close(output, reference, rtol=0, atol=0)
            kept_B = plain.length_B - torch.randint(0, 3, (2,), generator=generator)
            for cache in (recorded, plain):
                cache.rewind(kept_B)


def test_replaying_recorded_ops_runs_no_python() -> None:
    offset, counter = 1, torch.zeros(3)
    inputs = torch.zeros(3)
    with RecordedOps() as ops:
        result = (inputs + offset).view(3, 1)
        counter.add_(1)
    offset = 5
    inputs.fill_(7)
    ops.replay()
    assert result.flatten().tolist() == [8, 8, 8]
    assert counter.tolist() == [2, 2, 2]
    with pytest.raises(RuntimeError, match="waits for the device"), RecordedOps():
        inputs.sum().item()

"""Decoding with traced steps on a CPU: bit for bit the eager steps, with the current weights, and only if it pays."""

import logging
from collections.abc import Iterator
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn
from transformers import DeepseekV4ForCausalLM

from mtptrain.backbone import traced
from mtptrain.backbone.traced import BREAK_EVEN, Traced, repeated
from mtptrain.decoding.draft import MtpProposer
from mtptrain.decoding.penalties import Penalties
from mtptrain.decoding.policy import GREEDY, Policy
from mtptrain.decoding.results import DecodedBatch, Limits
from mtptrain.decoding.speculative import allocate_cache, decode_plain, decode_speculative
from mtptrain.decoding.steps import Eager, verify_step
from mtptrain.kernels.acceptance import Verification
from mtptrain.mtp.stack import MtpStack
from tests.tiny import random_stack, three_layers

PROMPTS = [[5, 17, 3, 88, 41, 9, 12], [2, 71, 30, 6, 6, 55, 90, 14, 8, 33, 61]]
POLICIES = {
    "greedy": GREEDY,
    "sampled": Policy(temperature=0.9),
    "block": Policy(temperature=0.8, top_k=20, top_p=0.9, verification=Verification.block),
    "stopped": Policy(min_confidence=0.02),
    "penalised": Policy(temperature=0.9, min_p=0.05, penalties=Penalties(1.4, 0.6, 0.3)),
}


@pytest.fixture
def no_obstacle(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Fail if a step could not be traced."""
    traced.log_once.cache_clear()
    with caplog.at_level(logging.WARNING, "mtptrain.decoding"):
        yield
    assert caplog.messages == []


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Run every step eagerly, until undone."""
    monkeypatch.setattr(traced, "BREAK_EVEN", 10**9)
    return monkeypatch


def unreachable(*_: Tensor) -> tuple[Tensor, ...]:
    raise AssertionError("an eager step ran")


def decode(model: DeepseekV4ForCausalLM, stack: MtpStack | None, drafted: int, policy: Policy = GREEDY) -> DecodedBatch:
    """Fourteen tokens after each prompt, by steps that are traced in their first call."""
    proposer = None if stack is None else MtpProposer(model, stack)
    with repeated(BREAK_EVEN):
        return decode_speculative(model, proposer, PROMPTS, drafted, Limits(14), policy)


@pytest.mark.usefixtures("no_obstacle")
@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
@pytest.mark.parametrize(("depth", "drafted"), [(0, 0), (1, 3), (2, 3)])
def test_traced_steps_give_the_same_texts_in_the_same_passes(
    depth: int, drafted: int, policy: Policy, eager: pytest.MonkeyPatch
) -> None:
    model = three_layers()
    stack = random_stack(model, depth) if depth else None
    expected = decode(model, stack, drafted, policy)
    eager.undo()
    first, second = (decode(model, stack, drafted, policy) for _ in range(2))
    assert expected.seconds.record == 0
    assert first.seconds.record > 0
    assert second.seconds.record == 0  # the traces of the first run serve the second
    for run in (first, second):
        assert [(row.tokens, row.passes) for row in run.rows] == [(row.tokens, row.passes) for row in expected.rows]


@pytest.mark.usefixtures("no_obstacle")
def test_traces_end_with_their_backbone() -> None:
    """A process that evaluates many runs, such as a sweep, must not keep the traces of each."""
    kept = len(torch.jit._state._python_cu.get_functions())
    model = three_layers()
    assert decode(model, None, 0).seconds.record > 0
    assert len(torch.jit._state._python_cu.get_functions()) == kept  # these live as long as the process


@pytest.mark.usefixtures("no_obstacle")
def test_a_trace_counts_the_output_of_prompts_of_other_lengths(eager: pytest.MonkeyPatch) -> None:
    model, policy, limits = three_layers(), Policy(penalties=Penalties(frequency=3.0)), Limits(14)
    proposer = MtpProposer(model, random_stack(model))
    expected = decode_speculative(model, proposer, PROMPTS[::-1], 3, limits, policy).rows
    eager.undo()
    with repeated(BREAK_EVEN):
        decode_speculative(model, proposer, PROMPTS, 3, limits, policy)
        rows = decode_speculative(model, proposer, PROMPTS[::-1], 3, limits, policy).rows
    assert [(row.tokens, row.passes) for row in rows] == [(row.tokens, row.passes) for row in expected]


@pytest.mark.usefixtures("no_obstacle")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_traced_pass_equals_the_eager_one_bit_by_bit(dtype: torch.dtype) -> None:
    """At every offset in the compression windows and in the ring, over more positions than the window holds."""
    model = nn.Module.to(three_layers(), dtype)
    generator = torch.Generator().manual_seed(0)
    caches = [allocate_cache(model, 2, 96, 3) for _ in range(2)]
    verify, eager = verify_step(model, caches[0], BREAK_EVEN), verify_step(model, caches[1]).function
    assert isinstance(verify, Traced)
    with torch.inference_mode():
        for _ in range(24):
            tokens_BL = torch.randint(97, (2, 3), generator=generator)
            outputs = verify(tokens_BL)
            verify.function = unreachable  # the trace needs no Python code
            assert all(map(torch.equal, outputs, eager(tokens_BL)))
            assert all(map(torch.equal, caches[0].tensors(), caches[1].tensors()))
            kept_B = caches[1].length_B - torch.randint(0, 3, (2,), generator=generator)
            for cache in caches:
                cache.rewind(kept_B)


@pytest.mark.usefixtures("no_obstacle")
@pytest.mark.parametrize("depth", [1, 2])
def test_a_traced_draft_equals_the_eager_one_bit_by_bit(depth: int, monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[Tensor] = []
    call = Traced.__call__

    def both(self: Traced, *inputs: Tensor) -> tuple[Tensor, ...]:
        before = [tensor.clone() for tensor in self.tensors]
        expected = self.function(*inputs)
        written = [tensor.clone() for tensor in self.tensors]
        for tensor, value in zip(self.tensors, before, strict=True):
            tensor.copy_(value)
        outputs = call(self, *inputs)
        assert all(map(torch.equal, outputs, expected))
        assert all(map(torch.equal, self.tensors, written))
        compared.extend(outputs)
        return outputs

    monkeypatch.setattr(Traced, "__call__", both)
    model = three_layers()
    decode(model, random_stack(model, depth), 3, Policy(temperature=0.9))
    assert len(compared) > 20


def test_a_trace_sees_the_weights_of_a_head_that_trains(eager: pytest.MonkeyPatch) -> None:
    model = three_layers()
    stack = random_stack(model).requires_grad_(True)
    optimizer = torch.optim.SGD(stack.parameters(), lr=3.0)
    expected, texts = [], []
    for run in (expected, texts):
        stack.load_state_dict(random_stack(model).state_dict())
        for _ in range(3):
            run.append([row.passes for row in decode(model, stack, 3).rows])
            optimizer.zero_grad()
            sum(weight.square().sum() for weight in stack.parameters()).backward()
            optimizer.step()
        eager.undo()
    assert texts == expected
    assert len({str(passes) for passes in texts}) > 1


def test_a_trace_is_not_used_for_another_dtype() -> None:
    model = three_layers()
    with repeated(BREAK_EVEN):
        first = decode_plain(model, PROMPTS, Limits(6))
        again = decode_plain(model, PROMPTS, Limits(6))
        nn.Module.to(model, torch.bfloat16)
        other = decode_plain(model, PROMPTS, Limits(6))
    assert [run.seconds.record > 0 for run in (first, again, other)] == [True, False, True]


def test_a_step_is_traced_once_its_calls_pay() -> None:
    model = three_layers()
    runs = [decode_plain(model, PROMPTS, Limits(BREAK_EVEN // 4 + 1)) for _ in range(5)]
    recorded = [run.seconds.record > 0 for run in runs]
    assert recorded == [False, False, False, True, False]
    assert all(before.rows == after.rows for before, after in pairwise(runs))
    assert all(run.seconds.total > 0 for run in runs)


def with_hook(model: nn.Module) -> None:
    model.get_submodule("lm_head").register_forward_hook(lambda *_: None)


def with_forward(model: nn.Module) -> None:
    model.get_submodule("lm_head").forward = model.get_submodule("lm_head").forward


@pytest.mark.parametrize("change", [with_hook, with_forward])
def test_modules_that_run_other_code_stay_eager(change, caplog: pytest.LogCaptureFixture) -> None:  # noqa: ANN001
    model = three_layers()
    change(model)
    traced.log_once.cache_clear()
    assert isinstance(verify_step(model, allocate_cache(model, 1, 8, 1), BREAK_EVEN), Eager)
    assert "running without traces, because" in caplog.text


def test_a_shared_backbone_stays_eager() -> None:
    model = three_layers()
    model._is_shared_by_processes = True
    assert isinstance(verify_step(model, allocate_cache(model, 1, 8, 1), BREAK_EVEN), Eager)


SEED = torch.tensor([3.0])


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda x: (x * float(x.sum()),), "reads a value"),
        (lambda x: (x[x > 0],), "more than the shapes"),
        (lambda x: (x + torch.rand(3),), "more than the shapes"),
        (lambda x: (x * SEED,), "not among the inputs"),
    ],
    ids=["value", "shape", "random", "hidden"],
)
def test_a_function_that_needs_python_again_is_never_traced(function, reason: str) -> None:  # noqa: ANN001
    step = Traced(function, [nn.Identity()], [], "test", BREAK_EVEN)
    with torch.inference_mode():
        for value in (1.0, 2.0, 3.0):
            inputs = torch.tensor([value, -value, value])
            torch.manual_seed(0)
            expected = function(inputs)
            torch.manual_seed(0)
            assert torch.equal(step(inputs)[0], expected[0])
    (known,) = step.steps.values()
    assert known.trace is None
    assert reason in str(known.obstacle)

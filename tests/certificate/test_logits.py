"""Sound decoding and drafting stay within the rounding noise of transformers' forward; planted faults do not."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import numpy as np
import pytest
import torch
from transformers import DeepseekV4ForCausalLM

from mtptrain.backbone import decode
from mtptrain.backbone.attention import use_linear_attention
from mtptrain.backbone.modules import FrozenHyperConnection, replace_connections
from mtptrain.backbone.upstream import upstream_modules
from mtptrain.certificate.differences import Differences, judge, most_by_chance
from mtptrain.certificate.drafts import against_rollout
from mtptrain.certificate.greedy import LoopRun
from mtptrain.certificate.logits import against_plain, against_upstream, distinct_prompts, judge_all
from mtptrain.certificate.rounding import disturbed, upstream_logits
from mtptrain.decoding.draft import MtpProposer
from mtptrain.decoding.results import Limits
from mtptrain.decoding.speculative import decode_plain, decode_speculative
from mtptrain.doctor.wirings import RIGHT, WIRINGS
from mtptrain.evaluation.certificate_result import NoiseLevel, Outcome, Quantity, RoundingNoise, SizeLevel
from mtptrain.traces.file import Trace
from mtptrain.traces.prompts import Prompt
from tests.tiny import random_backbone, random_stack

# B rows, N tokens

MODEL = random_backbone()
STACK = random_stack(MODEL)
PROMPTS = torch.randint(97, (4, 7), generator=torch.Generator().manual_seed(0)).tolist()
LIMITS = Limits(20)


@contextmanager
def stale_entries() -> Iterator[DeepseekV4ForCausalLM]:
    """A compressor that is not rewound: the entry of a window that a rejected draft closed stays.

    Yields a backbone equal to `MODEL`, because the traces that `MODEL` keeps are those of sound steps.
    """
    compress = decode._compress

    def keep_first(module, state, windows, inputs_BSD) -> None:  # noqa: ANN001
        before = state.entries_BWC.clone()
        compress(module, state, windows, inputs_BSD)
        was_written = (before != 0).any(-1, keepdim=True)
        was_written[:, -1] = False  # scratch space
        state.entries_BWC.copy_(torch.where(was_written, before, state.entries_BWC))

    decode._compress = keep_first
    try:
        yield random_backbone()
    finally:
        decode._compress = compress


def test_decoding_equals_transformers_forward_up_to_the_noise() -> None:
    differences, noise = against_upstream(MODEL, {"head": STACK}, PROMPTS, LIMITS, 3)
    test = judge_all(differences, noise, {})
    assert [one.outcome for one in test.comparisons] == [Outcome.passed] * 4
    assert {(one.of, one.quantity) for one in test.comparisons} == {
        (name, quantity) for name in ("plain decoding", "head head, K=3") for quantity in Quantity
    }
    assert all(0 < one.typical.median < one.typical.bound for one in test.comparisons)


def test_a_compressor_that_is_not_rewound_is_found_in_every_quantity() -> None:
    with stale_entries() as model:
        differences, noise = against_upstream(model, {"head": STACK}, PROMPTS, LIMITS, 3)
    outcomes = {(one.of, one.quantity): one.outcome for one in judge_all(differences, noise, {}).comparisons}
    for quantity in Quantity:
        assert outcomes["head head, K=3", quantity] is Outcome.failed
        assert outcomes["plain decoding", quantity] is Outcome.passed


def greedy_run(model: DeepseekV4ForCausalLM, prompt: int) -> LoopRun:
    tokens = [PROMPTS[prompt]]
    loop = decode_speculative(model, MtpProposer(model, STACK), tokens, 3, LIMITS).rows[0]
    return LoopRun("head", prompt, 3, 1, decode_plain(model, tokens, LIMITS).rows[0], loop, None)


@pytest.mark.parametrize(("is_stale", "outcome"), [(False, Outcome.passed), (True, Outcome.failed)])
def test_gaps_of_a_loop_are_held_against_plain_decoding(is_stale: bool, outcome: Outcome) -> None:
    level = NoiseLevel(SizeLevel(5e-6, 2e-5, 0), SizeLevel(1.5e-5, 6e-5, 0), extreme=1e-4)  # of fp32 logits of order 10
    noise = RoundingNoise(48, level, level)
    with stale_entries() if is_stale else nullcontext(MODEL) as model:
        runs = [greedy_run(model, prompt) for prompt in range(4)]
    (comparison,) = judge_all(against_plain(runs, noise), noise, {}).comparisons
    assert comparison.outcome is outcome
    assert (comparison.of, comparison.texts) == ("head head, K=3, batch 1", 4)


@pytest.mark.parametrize("wiring", WIRINGS, ids=[wiring.name for wiring in WIRINGS])
def test_every_wrong_wiring_of_the_rollout_is_found(wiring) -> None:  # noqa: ANN001
    prompts = [prompt[:5] for prompt in PROMPTS]
    differences, noise = against_rollout(MODEL, "head", STACK, prompts, 3, wiring.build(MODEL, 5))
    test = judge_all(differences, noise, {"head": noise})
    assert test.passed == (wiring.name == RIGHT), test.comparisons
    assert {one.outcome for one in test.comparisons} == {Outcome.passed if wiring.name == RIGHT else Outcome.failed}


def test_transformers_own_modules_come_back_after_the_block() -> None:
    model = random_backbone()
    replace_connections(model, FrozenHyperConnection)
    use_linear_attention(model)
    kinds = [type(child) for child in model.modules()]
    with upstream_modules(model):
        inside = {type(child).__module__.partition(".")[0] for child in model.modules() if hasattr(child, "compressor")}
        assert inside == {"transformers"}
        assert FrozenHyperConnection not in {type(child) for child in model.modules()}
        (logits,) = upstream_logits(model, PROMPTS[:1], [[3, 5, 8]])
    assert [type(child) for child in model.modules()] == kinds
    tokens = torch.tensor([PROMPTS[0] + [3, 5, 8]])
    with torch.inference_mode():
        own_BNV = model(input_ids=tokens, use_cache=False).logits[:, 6:-1].log_softmax(-1)
    np.testing.assert_allclose(own_BNV[0].gather(1, tokens[0, 7:, None])[:, 0], logits.log_p_N, atol=1e-4)


def test_disturbed_modules_round_differently_and_recover() -> None:
    def logits() -> torch.Tensor:
        with torch.inference_mode():
            return MODEL(input_ids=torch.tensor(PROMPTS)).logits

    exact = logits()
    with disturbed([MODEL.model], torch.float32, seed=1):
        first = logits()
    assert 0 < float((first - exact).abs().max()) < 1e-3
    assert torch.equal(logits(), exact)


@pytest.mark.parametrize(
    ("chance", "count", "level", "most"),
    [(0.01, 3, 1e-5, 2), (0.01, 10, 1e-5, 3), (0.5, 4, 1e-5, 4), (1e-9, 4, 1e-5, 0)],
)
def test_the_budget_is_the_tail_of_a_binomial(chance: float, count: int, level: float, most: int) -> None:
    assert most_by_chance(chance, count, level) == most


@pytest.mark.parametrize(("begin", "end"), [([], [1] * 9), ([1] * 9, []), ([], [])])
def test_prompts_that_begin_or_end_alike_are_cut_where_they_differ(begin: list[int], end: list[int]) -> None:
    prompts = [[*begin, number, number + 1, *end] for number in (3, 4, 5, 3, 6, 7)]
    found = distinct_prompts([Trace(Prompt(prompt, "text", 0), [1], [1.0], [1.0]) for prompt in prompts], 2)
    assert found == [[3, 4], [4, 5], [5, 6], [6, 7]]


def test_too_few_texts_are_not_tested() -> None:
    noise = NoiseLevel(SizeLevel(1e-6, 4e-6, 0), SizeLevel(3e-6, 1.2e-5, 0), extreme=1e-5)
    found = judge(Differences("a", "b", Quantity.gap, [np.ones(5)], noise, 48), 1e-5)
    assert (found.outcome, found.typical.beyond, found.largest.beyond) == (Outcome.not_tested, 1, 1)

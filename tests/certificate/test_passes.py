"""The passes of loop and replay may part at ties that the rounding of drafts explains, and nowhere else."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial

import numpy as np
import pytest
import torch

from mtptrain.backbone.load import load_backbone
from mtptrain.certificate import loop
from mtptrain.certificate.greedy import LoopRun
from mtptrain.certificate.logits import certify_logits
from mtptrain.certificate.loop import loop_runs
from mtptrain.certificate.passes import DraftNoise, certify_passes
from mtptrain.config import BackboneConfig, DraftChoice, PastDepth
from mtptrain.decoding.policy import GREEDY, Policy
from mtptrain.decoding.results import Decoded, Limits, VerifyPass
from mtptrain.doctor.wirings import WIRINGS
from mtptrain.evaluation.certificate_result import NoiseLevel, PassDifference, ReplayEqualsLoop, SizeLevel
from mtptrain.evaluation.speedup import BatchRuns, run_interleaved
from mtptrain.kernels.choices import Verification
from mtptrain.mtp.stack import stack_from_tensors
from mtptrain.mtp.start import place, stock_tensors
from mtptrain.replay.drafts import draft_traces
from mtptrain.replay.margin import stop_margin, token_margin
from mtptrain.traces.file import Trace
from mtptrain.traces.prompts import Prompt

NOISE = NoiseLevel(SizeLevel(1e-5, 4e-5, 0), SizeLevel(3e-5, 1.2e-4, 0), extreme=1e-4)
DRAFTS = {"h": DraftNoise(NOISE, np.array([1e-5] * 50 + [4e-5]))}  # a tie lies within 8e-5
AT_ANCHORS = [VerifyPass(2, 2, 3), *[VerifyPass(2, 0, 1)] * 2, VerifyPass(2, 0, 1), VerifyPass(2, 1, 2)]
AT_ANCHORS += [VerifyPass(2, 2, 3)] * 2 + [VerifyPass(1, 1, 1)]
REPLAYED = [AT_ANCHORS[0], AT_ANCHORS[3], AT_ANCHORS[4], AT_ANCHORS[6]]  # emit 3 + 1 + 2 + 2 tokens
AT_ANCHORS[6] = REPLAYED[3] = VerifyPass(2, 1, 2)


def run(
    passes: list[VerifyPass],
    margin: float = 1.0,
    free_margin: float | None = None,
    prompt: int = 0,
    draft_length: int = 2,
    is_walked: bool = False,
) -> LoopRun:
    """A loop over nine tokens, with the margins of the second pass, from anchor 3 on."""
    text = Decoded([7] * 9, [1.0] * 9, passes=passes)
    margin_KN = np.ones((draft_length, 8))
    margin_KN[0, 3] = margin
    free_KN = None
    if free_margin is not None:
        free_KN = np.ones((draft_length, 8))
        free_KN[0, 3] = free_margin
    return LoopRun("h", prompt, draft_length, 1, text, text, AT_ANCHORS, margin_KN, free_KN, is_walked)


# The second pass keeps two drafted tokens instead of none.
KEPT = [REPLAYED[0], VerifyPass(2, 2, 3), AT_ANCHORS[6]]


def test_equal_passes_are_no_ties() -> None:
    result = certify_passes([run(REPLAYED, margin=0.0)], DRAFTS)
    assert (result.passed, result.compared, result.equal, result.near_ties, result.differences) == (True, 1, 1, [], [])


def test_a_loop_without_a_replay_is_not_compared() -> None:
    result = certify_passes([replace(run(KEPT), at_anchors=None)], {})
    assert result == ReplayEqualsLoop(passed=True, compared=0, equal=0, differences=[])


def test_a_draft_may_part_from_replay_at_a_tie_of_the_heads_logits() -> None:
    result = certify_passes([run(KEPT, margin=5e-5)], DRAFTS)
    assert result.passed
    assert (result.compared, result.equal, result.ties, result.differences) == (1, 0, 1, [])
    assert result.near_ties == [PassDifference("h", 0, 2, loop_passes=3, replay_passes=4, margin=5e-5)]
    assert result.tie_bounds == {"h": pytest.approx(8e-5)}


@pytest.mark.parametrize(
    ("one", "drafts", "margin"),
    [
        pytest.param(run(KEPT, margin=1e-3), DRAFTS, 1e-3, id="far from a tie"),
        pytest.param(run(KEPT, margin=0.0), {}, 0.0, id="unknown noise"),
        pytest.param(replace(run(KEPT), margin_KN=None), DRAFTS, None, id="unknown margin"),
        pytest.param(run([REPLAYED[0], VerifyPass(1, 0, 1), *REPLAYED[2:]]), DRAFTS, None, id="drafts less"),
        pytest.param(run([REPLAYED[0], VerifyPass(2, 0, 2), VerifyPass(2, 2, 3)], 0.0), DRAFTS, None, id="emits more"),
        pytest.param(run(REPLAYED[:-1]), DRAFTS, None, id="ends before the text"),
        pytest.param(run([*REPLAYED, VerifyPass(1, 0, 1)]), DRAFTS, None, id="ends after the text"),
    ],
)
def test_any_other_parting_is_a_difference(one: LoopRun, drafts: dict[str, DraftNoise], margin: float | None) -> None:
    result = certify_passes([one], drafts)
    assert not result.passed
    assert ([one.margin for one in result.differences], result.near_ties, result.ties) == ([margin], [], 0)


def test_a_fault_behind_a_tie_is_found() -> None:
    result = certify_passes([run([*KEPT[:-1], VerifyPass(2, 0, 1), AT_ANCHORS[7]], margin=5e-5)], DRAFTS)
    assert not result.passed
    assert [one.margin for one in result.differences] == [1.0]


def test_passes_that_replay_did_not_walk_are_not_compared() -> None:
    passes = [*KEPT[:-1], VerifyPass(2, 0, 1), AT_ANCHORS[7]]
    assert certify_passes([run(passes, margin=5e-5, is_walked=True)], DRAFTS).passed
    assert not certify_passes([run(passes, margin=1e-3, is_walked=True)], DRAFTS).passed


@pytest.mark.parametrize(("free_margin", "is_tie"), [(5e-5, True), (1e-3, False)])
def test_a_draft_that_stops_elsewhere_parts_at_its_smallest_margin(free_margin: float, is_tie: bool) -> None:
    """Another token of its own may make it stop at a later step."""
    stopped = [REPLAYED[0], VerifyPass(1, 0, 1), *REPLAYED[2:]]
    result = certify_passes([run(stopped, free_margin=free_margin)], DRAFTS)
    assert result.passed == is_tie
    assert [one.margin for one in (result.near_ties if is_tie else result.differences)] == [free_margin]


def test_more_ties_than_the_rounding_explains_fail() -> None:
    """Loop and rollout differ by 1e-5 almost always, and by 4e-5 once in 51."""
    result = certify_passes([run(KEPT, margin=3e-5, prompt=prompt) for prompt in range(30)], DRAFTS)
    assert result.differences == []
    assert result.ties == 30 > result.tie_budget
    assert not result.passed


def test_the_same_tie_of_a_draft_counts_once() -> None:
    result = certify_passes([run(KEPT, margin=3e-5, draft_length=k) for k in range(2, 32)], DRAFTS)
    assert (len(result.near_ties), result.ties) == (30, 1)
    assert result.passed


def test_a_margin_is_the_distance_to_another_outcome() -> None:
    logits_RV = torch.tensor([[1.0, 3.0, 2.5], [1.0, 3.0, 2.5], [4.0, 4.0, 0.0]])
    assert token_margin(logits_RV, torch.tensor([1, 0, 1])).tolist() == [0.5, 2.0, 0.0]
    confidence_R = torch.tensor([0.5, 0.25], dtype=torch.float64)
    assert stop_margin(confidence_R, 0.5).tolist() == [0.0, pytest.approx(np.log(2))]
    assert stop_margin(confidence_R, 0.0).tolist() == [np.inf, np.inf]


TEXTS = [
    "def mean(values):\n",
    "class Node:\n    def",
    "import os\nimport",
    "The file is",
    "for name in",
    "    return [",
]


class Loops:
    """Certifies bf16 loops of the stock head; at depth 2 it is stacked with a copy of itself.

    Args:
        depth: number of modules.
    """

    def __init__(self, depth: int) -> None:
        backbone = load_backbone(BackboneConfig(), torch.device("cpu"), torch.bfloat16)
        self.model, self.limits = backbone.model, Limits(24)
        stack = place(stack_from_tensors(backbone.config, depth, stock_tensors(backbone), "stock"), backbone)
        self.stacks = {"h": stack.eval()}
        prompts = [Prompt(backbone.source.tokenizer.encode(text).ids, "", 0) for text in TEXTS]
        self.traces = [Trace(prompt, [], [], []) for prompt in prompts]
        _, self.drafts = certify_logits(self.model, self.stacks, self.traces, self.limits, 3, [])
        self.runs = cache(self._run)

    def _run(self, policy: Policy) -> list[BatchRuns]:
        batches = [[trace] for trace in self.traces]
        return run_interleaved(self.model, self.stacks, batches, [1, 3], self.limits, policy, 0, lambda *_: None)

    def certify(self, policy: Policy) -> ReplayEqualsLoop:
        return certify_passes(loop_runs(self.model, self.stacks, self.runs(policy), policy), self.drafts)


@pytest.fixture(scope="module")
def of_depth() -> Callable[[int], Loops]:
    return cache(Loops)


@pytest.mark.parametrize(
    ("policy", "depth"),
    [
        (GREEDY, 1),
        (Policy(min_confidence=0.3), 1),
        (Policy(past_depth=PastDepth.wrap_around), 2),
        (Policy(1.0, draft=DraftChoice.greedy), 1),
        (Policy(1.0, draft=DraftChoice.greedy, verification=Verification.block), 1),
    ],
    ids=["plain", "confidence threshold", "wraps around", "sampled texts", "block verification"],
)
def test_loops_of_a_sound_head_pass_in_bf16(policy: Policy, depth: int, of_depth: Callable[[int], Loops]) -> None:
    result = of_depth(depth).certify(policy)
    assert result.passed, result
    assert result.compared == 2 * len(TEXTS)


@pytest.mark.parametrize("name", ["embedding_late", "embedding_early"])
def test_a_wrong_wiring_of_the_replay_is_found_in_bf16(
    name: str, of_depth: Callable[[int], Loops], monkeypatch: pytest.MonkeyPatch
) -> None:
    loops = of_depth(1)
    wiring = next(one for one in WIRINGS if one.name == name)
    monkeypatch.setattr(loop, "draft_traces", partial(draft_traces, draft=wiring.build(loops.model, 6)))
    assert not loops.certify(GREEDY).passed

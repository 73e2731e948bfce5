"""Drafts that do not know a token agree with it by chance alone; drafts that read it are found."""

import numpy as np
import pytest
import torch

from mtptrain.certificate import shifted_target
from mtptrain.certificate.shifted_target import (
    LEVEL,
    Matches,
    derangements,
    draft_splice,
    is_tested,
    p_value,
    plan_splices,
    shifted_target_control,
)
from mtptrain.decoding.results import Limits
from mtptrain.decoding.speculative import decode_plain
from mtptrain.doctor.wirings import WIRINGS
from mtptrain.evaluation.certificate_result import Outcome
from mtptrain.mtp.rollout import rollout
from mtptrain.replay.drafts import Rollout
from mtptrain.traces.file import Trace
from mtptrain.traces.prompts import Prompt
from tests.tiny import random_backbone, random_stack

# R texts, V vocabulary

MODEL = random_backbone()
STEPS = 3


def traces(count: int, new: int = 16, seed: int = 0, prompt: int = 5) -> list[Trace]:
    prompts = torch.randint(97, (count, prompt), generator=torch.Generator().manual_seed(seed)).tolist()
    rows = decode_plain(MODEL, prompts, Limits(new)).rows
    return [
        Trace(Prompt(tokens, "text", number), row.tokens, row.gaps, row.probabilities)
        for number, (tokens, row) in enumerate(zip(prompts, rows, strict=True))
    ]


def reading_its_target(steps_ahead: int) -> Rollout:
    """A rollout with a leak: the draft of step k is the token that stands `steps_ahead` after the tokens that it knows.

    Its state is a row of the lm_head that points at that token more than at any other.
    """

    def leak(stack, embed, streams_BSND, batch, steps):  # noqa: ANN001, ANN202
        weight_VD = MODEL.lm_head.weight
        points_VD = torch.linalg.pinv(weight_VD).T * 1e3
        return [points_VD[batch.tokens_BS.roll(-(k + steps_ahead), dims=1)] for k in range(1, steps + 1)]

    return leak


@pytest.mark.parametrize("count", [4, 8, 40])
def test_a_sound_head_passes(count: int) -> None:
    control = shifted_target_control(MODEL, {"head": random_stack(MODEL)}, traces(count), STEPS)["head"]
    assert control.outcome is Outcome.passed
    assert control.p_value is not None
    assert control.p_value > LEVEL
    assert control.texts == min(count, 32)
    assert len(control.positions) == {4: 15, 8: 8, 40: 2}[count]


@pytest.mark.parametrize("count", [4, 8, 40])
def test_drafts_that_read_their_target_fail(count: int) -> None:
    control = shifted_target_control(MODEL, {"head": random_stack(MODEL)}, traces(count), STEPS, reading_its_target(1))[
        "head"
    ]
    assert control.outcome is Outcome.failed
    assert control.shifted == 1
    assert control.p_value is not None
    assert control.p_value <= LEVEL


def test_a_head_that_learned_to_read_its_target_fails() -> None:
    """The doctor's `embedding_early`: the module gets the very token that it must predict."""
    texts, stack = traces(8), random_stack(MODEL)
    wiring = next(wiring for wiring in WIRINGS if wiring.name == "embedding_early").build(MODEL, 5)
    _learn(stack, texts, wiring)
    leaking = shifted_target_control(MODEL, {"head": stack}, texts, 1, wiring)["head"]
    assert leaking.outcome is Outcome.failed
    assert shifted_target_control(MODEL, {"head": stack}, texts, 1)["head"].outcome is Outcome.passed


def _learn(stack: torch.nn.Module, texts: list[Trace], draft: Rollout) -> None:
    from mtptrain.backbone.streams import run_backbone
    from mtptrain.replay.drafts import trace_batch

    batch = trace_batch(texts, torch.device("cpu"))
    streams, _ = run_backbone(MODEL, batch.tokens_BS)
    optimizer = torch.optim.AdamW(stack.parameters(), lr=1e-2)
    mask = batch.target_mask(1)
    for _ in range(40):
        (hidden,) = draft(stack, MODEL.model.embed_tokens, streams, batch, 1)
        loss = torch.nn.functional.cross_entropy(MODEL.lm_head(hidden[mask]), batch.tokens_BS.roll(-2, dims=1)[mask])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    stack.eval()


@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_texts_that_are_all_alike_are_not_tested(count: int) -> None:
    control = shifted_target_control(MODEL, {"head": random_stack(MODEL)}, traces(1) * count, STEPS)["head"]
    assert control.outcome is Outcome.not_tested
    assert control.p_value is control.agreement is control.shifted is control.chance is None


@pytest.mark.parametrize("count", [1, 2])
def test_one_or_two_texts_are_not_tested(count: int) -> None:
    control = shifted_target_control(MODEL, {"head": random_stack(MODEL)}, traces(count), STEPS)["head"]
    assert control.outcome is Outcome.not_tested


def test_texts_of_one_token_are_not_tested() -> None:
    control = shifted_target_control(MODEL, {"head": random_stack(MODEL)}, traces(8, new=1), STEPS)["head"]
    assert control.outcome is Outcome.not_tested


def test_answers_that_begin_alike_are_compared_where_they_differ() -> None:
    """A pre-filled answer: the same four tokens begin every text."""
    texts = [[5, 6, 7, 8, *trace.tokens] for trace in traces(8)]
    splices = plan_splices(texts, np.random.default_rng(0))
    assert is_tested(texts, splices)
    assert min(one.position for one in splices) >= 4


def test_every_text_goes_on_as_another_one() -> None:
    for splice in plan_splices([trace.tokens for trace in traces(8)], np.random.default_rng(0)):
        assert sorted(splice.futures.tolist()) == list(range(len(splice.rows)))
        assert (splice.futures != np.arange(len(splice.rows))).all()


def test_drafts_do_not_depend_on_the_text_after_the_splice() -> None:
    """The false-alarm table takes the drafts from the unspliced text."""
    texts, stack = traces(8), random_stack(MODEL)
    for splice in plan_splices([trace.tokens for trace in texts], np.random.default_rng(0))[:3]:
        spliced = draft_splice(MODEL, {"head": stack}, texts, splice, STEPS, rollout)["head"]
        itself = shifted_target.Splice(splice.position, splice.rows, np.arange(len(splice.rows)))
        assert (spliced == draft_splice(MODEL, {"head": stack}, texts, itself, STEPS, rollout)["head"]).all()


def test_random_permutations_without_fixed_points_are_equally_likely() -> None:
    drawn = derangements(np.random.default_rng(0), 9_000, 4)
    kinds, counts = np.unique(drawn, axis=0, return_counts=True)
    assert len(kinds) == 9
    assert np.abs(counts - 1_000).max() < 5 * 1_000**0.5  # five standard errors


def test_the_p_value_is_the_share_of_dealings_that_agree_as_much() -> None:
    """Three texts have two dealings; the drafts agree with one of them only, or with both."""
    one_way = np.array([[0, 1, 0], [0, 0, 1], [1, 0, 0]])
    futures, generator = np.array([1, 2, 0]), np.random.default_rng(0)
    assert p_value([Matches(one_way, futures, 3)], generator) == pytest.approx(0.5, abs=0.1)
    assert p_value([Matches(1 - np.eye(3, dtype=int), futures, 3)], generator) == 1
    assert p_value([Matches(one_way, futures, 3)] * 4, generator) == pytest.approx(1 / 16, abs=0.03)

"""The numerics of servers: each difference does what it says, can be turned off, and is the same in loop and replay."""

import pytest
import torch
from torch import Tensor

from mtptrain.backbone.modules import Experts
from mtptrain.backbone.streams import run_backbone
from mtptrain.batch import Batch
from mtptrain.config import DraftChoice, PastDepth, ServedAs
from mtptrain.decoding.policy import Policy
from mtptrain.decoding.results import Limits
from mtptrain.decoding.speculative import decode_speculative
from mtptrain.decoding.wrapped import head_proposer
from mtptrain.errors import UserError
from mtptrain.mtp import numerics as numerics_module
from mtptrain.mtp.numerics import AS_TRAINED, SERVED, Fp8Experts, Numerics, round_fp8, served_numerics
from mtptrain.mtp.rollout import rollout
from mtptrain.mtp.stack import MtpStack
from mtptrain.replay.replay import count_passes, replay_lengths
from tests.replay.plain_loop import decode_plainly, single_row
from tests.tiny import random_backbone, random_stack

# R = 1 row, S slots, D model width
MODEL = random_backbone()
SMALL = random_backbone(vocab_size=7)
TOKENS = torch.randint(97, (20,), generator=torch.Generator().manual_seed(5)).tolist()
WINDOW = MODEL.config.sliding_window
SWITCHES = {
    "zero_first": Numerics(zero_first=True),
    "fp8_keys": Numerics(fp8_keys=True),
    "fp8_activations": Numerics(fp8_activations=True),
    "extra_key": Numerics(extra_key=True),
}


@torch.inference_mode()
def states(stack: MtpStack, numerics: Numerics, steps: int = 2, batch: Batch | None = None) -> list[Tensor]:
    stack.compute_as(numerics)
    batch = batch or single_row(TOKENS)
    streams_RSND, _ = run_backbone(MODEL, batch.tokens_BS)
    return rollout(stack, MODEL.model.embed_tokens, streams_RSND, batch, steps)


def changed_slots(stack: MtpStack, numerics: Numerics, step: int) -> list[int]:
    before, after = states(stack, AS_TRAINED)[step - 1][0], states(stack, numerics)[step - 1][0]
    return [slot for slot in range(len(TOKENS) - 2) if not torch.allclose(before[slot], after[slot], atol=1e-5)]


def test_a_zeroed_embedding_changes_the_anchors_that_see_the_first_key() -> None:
    assert changed_slots(random_stack(MODEL), SWITCHES["zero_first"], step=1) == list(range(WINDOW))


def test_every_stacked_module_zeroes_the_embedding_of_the_first_anchor() -> None:
    stack = random_stack(MODEL, 2)
    with torch.inference_mode():
        batch = single_row(TOKENS)
        streams_RSND, _ = run_backbone(MODEL, batch.tokens_BS)
        stack.compute_as(SWITCHES["zero_first"])
        zeroed = rollout(stack, MODEL.model.embed_tokens, streams_RSND, batch, 2)
        stack.compute_as(AS_TRAINED)

        def embed(tokens_BS: Tensor) -> Tensor:
            embedding_BSD = MODEL.model.embed_tokens(tokens_BS)
            embedding_BSD[:, 0] = 0
            return embedding_BSD

        by_hand = rollout(stack, embed, streams_RSND, batch, 2)
    torch.testing.assert_close(zeroed, by_hand)


def test_the_extra_key_changes_the_anchors_whose_window_holds_it() -> None:
    assert changed_slots(random_stack(MODEL), SWITCHES["extra_key"], step=1) == list(range(WINDOW - 1))


@pytest.mark.parametrize("name", ["fp8_keys", "fp8_activations"])
def test_fp8_moves_every_anchor_a_little(name: str) -> None:
    stack = random_stack(MODEL)
    before, after = states(stack, AS_TRAINED)[0][0, 1:-1], states(stack, SWITCHES[name])[0][0, 1:-1]
    error_S = (after - before).norm(dim=-1) / before.norm(dim=-1)
    assert float(error_S.min()) > 0
    assert float(error_S.median()) < 0.1  # e4m3 has three bits after the point: 6 % a value at most


@pytest.mark.parametrize("name", SWITCHES)
def test_every_difference_can_be_turned_off(name: str) -> None:
    stack = random_stack(MODEL, 2 if name == "zero_first" else 1)
    before, between, after = (states(stack, one) for one in (AS_TRAINED, SWITCHES[name], AS_TRAINED))
    assert not torch.equal(before[0], between[0])
    assert torch.equal(before[0], after[0])
    assert torch.equal(before[1], after[1])


def test_fp8_rounds_to_a_grid_with_a_power_of_two_for_each_block() -> None:
    grid = torch.tensor([0.0, 1.0, -1.125, 240.0, 448.0, 2.0**-9])
    assert torch.equal(round_fp8(grid, 6), grid)
    assert torch.equal(round_fp8(grid * 2**-12, 6), grid * 2**-12)
    assert round_fp8(torch.tensor([1.0, 1.06, 449.0, 1.06]), 2).tolist() == [1.0, 1.0, 448.0, 1.0]
    assert round_fp8(torch.tensor([1.0, 1.07]), 2).tolist() == [1.0, 1.125]
    values = torch.randn(3, 70, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert round_fp8(values, 64).dtype is torch.float64
    assert torch.equal(round_fp8(values, 64)[:, 64:], round_fp8(values[:, 64:], 64))


def test_experts_that_round_nothing_are_transformers_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numerics_module, "round_fp8", lambda x, block: x)
    experts = random_stack(MODEL).block(1).layer.mlp.experts
    assert type(experts) is Experts
    hidden_TD = torch.randn(9, MODEL.config.hidden_size, generator=torch.Generator().manual_seed(1))
    index_Tk = torch.rand(9, 4, generator=torch.Generator().manual_seed(2)).topk(2).indices
    weights_Tk = torch.rand(9, 2, generator=torch.Generator().manual_seed(3))
    with torch.inference_mode():
        expected = experts(hidden_TD, index_Tk, weights_Tk)
        experts.__class__ = Fp8Experts
        torch.testing.assert_close(experts(hidden_TD, index_Tk, weights_Tk), expected)


POLICIES = {"greedy": Policy(), "greedy drafts": Policy(temperature=1.5, draft=DraftChoice.greedy)}
CASES = [(server, 1) for server in SERVED] + [(ServedAs.vllm, 2)]


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
@pytest.mark.parametrize(("server", "depth"), CASES)
def test_loop_cacheless_loop_and_replay_agree(server: ServedAs, depth: int, policy: Policy) -> None:
    stack, prompt, length = random_stack(SMALL, depth), [5, 1, 4, 3, 2], 3
    stack.compute_as(SERVED[server])
    trace, passes = decode_plainly(SMALL, stack, prompt, length, policy, new=9, seed=11)
    proposer = head_proposer(SMALL, stack, policy, length)
    (row,) = decode_speculative(SMALL, proposer, [prompt], length, Limits(9), policy, [11]).rows
    assert (row.tokens, row.passes) == (trace.tokens, passes)
    _, counts = replay_lengths(SMALL, stack, [trace], length, policy)
    assert counts[length][0].accepted_K.tolist() == pytest.approx(count_passes(passes, length).accepted_K.tolist())


@pytest.mark.parametrize("depth", [1, 2])
def test_drafts_of_the_loop_have_the_logits_of_the_rollout(depth: int) -> None:
    """Equal tokens alone would miss a key that is off by a little."""
    policy, prompts = Policy(temperature=1.0), [TOKENS[:3], TOKENS[:1]]
    for numerics in [SERVED[ServedAs.vllm], *([SERVED[ServedAs.llama_cpp]] if depth == 1 else [])]:
        stack = random_stack(MODEL, depth)
        stack.compute_as(numerics)
        proposer = Recording(head_proposer(MODEL, stack, policy, 3))
        decode_speculative(MODEL, proposer, prompts, 3, Limits(8), policy)
        for text, logits_KV in proposer.drafts:
            hidden = states(stack, numerics, 3, single_row(text))
            anchor = len(text) - 5
            expected_KV = torch.stack([MODEL.lm_head(state[0, anchor]) for state in hidden])
            torch.testing.assert_close(logits_KV, expected_KV, atol=2e-3, rtol=2e-3)


class Recording:
    """A proposer that keeps every text with its draft, and the draft's logits."""

    def __init__(self, proposer: object) -> None:
        self.proposer, self.drafts = proposer, []
        self.read, self.keep = proposer.read, proposer.keep

    def start(self, texts: object, draft_length: int, policy: Policy) -> None:
        self.texts = texts
        self.proposer.start(texts, draft_length, policy)

    def draft(self, u_BK: Tensor | None) -> object:
        draft = self.proposer.draft(u_BK)
        for row, length in enumerate(self.texts.length_B.tolist()):
            if self.texts.is_open[row]:
                text = self.texts.tokens_BT[row, :length].tolist() + draft.tokens_BK[row].tolist()
                self.drafts.append((text, draft.logits_BKV[row].clone()))
        return draft


def test_wrapping_modules_zero_the_embedding_too() -> None:
    policy = Policy(past_depth=PastDepth.wrap_around)
    stack, text = random_stack(SMALL, 2), [5, 1, 4]
    passes = []
    for numerics in (AS_TRAINED, Numerics(zero_first=True)):
        stack.compute_as(numerics)
        proposer = head_proposer(SMALL, stack, policy, 4)
        decode_speculative(SMALL, proposer, [text], 4, Limits(2), policy)
        passes.append(proposer.raw_BKV.clone())
    assert not torch.equal(*passes)


def test_a_server_that_runs_one_module_refuses_stacked_heads() -> None:
    assert served_numerics(ServedAs.exact, True, 2) == Numerics(zero_first=True)
    assert served_numerics(ServedAs.sglang, True, 1) == SERVED[ServedAs.sglang]  # SGLang does not zero it
    assert served_numerics(ServedAs.vllm, False, 2).zero_first
    with pytest.raises(UserError, match=r"decoding.served_as=llama_cpp: runs exactly one MTP module .* has 2"):
        served_numerics(ServedAs.llama_cpp, False, 2)

"""The rollout that trains the heads equals the computation that serves them."""

from itertools import accumulate

import pytest
import torch
from torch import Tensor
from transformers import DeepseekV4ForCausalLM

from mtptrain.backbone.decode import PrefilledPart
from mtptrain.backbone.streams import backbone_streams, run_backbone
from mtptrain.batch import Batch
from mtptrain.decoding.draft import MtpProposer
from mtptrain.decoding.policy import Policy
from mtptrain.decoding.results import Limits
from mtptrain.decoding.texts import Texts
from mtptrain.mtp.rollout import rollout
from mtptrain.mtp.stack import MtpStack
from tests.tiny import random_backbone, random_batch, random_stack

# fp32 rounding through a layer whose activations are of order 10.
TOLERANCE = 2e-4


def single_row(tokens: list[int]) -> Batch:
    row = torch.tensor([tokens])
    return Batch(row, torch.ones_like(row), torch.arange(len(tokens)).unsqueeze(0))


@pytest.mark.parametrize(("depth", "steps"), [(1, 1), (1, 4), (2, 2), (3, 3), (2, 5)])
def test_rollout_equals_incremental_drafting(depth: int, steps: int) -> None:
    """Every anchor's teacher-forced states equal those of a draft whose tokens are those of the text."""
    model = random_backbone()
    stack = random_stack(model, depth)
    tokens = torch.randint(97, (29,), generator=torch.Generator().manual_seed(0)).tolist()
    with torch.inference_mode():
        streams, _ = run_backbone(model, torch.tensor([tokens]))
        expected = rollout(stack, model.model.embed_tokens, streams, single_row(tokens), steps)
        texts = Texts([tokens[:7]], Limits(len(tokens)), steps, torch.device("cpu"))
        proposer = RecordingProposer(model, stack, tokens)
        proposer.start(texts, steps, Policy())
        proposer.read(PrefilledPart(slice(0, 1), 0, streams[:, :7], streams[:, :7, 0]))
        known = 7
        # Irregular advances, like those of accepted drafts of different lengths: at most K + 1.
        for anchor in accumulate((min(advance, steps + 1) for advance in (1, 2, 3, 1, 4, 1, 1, 3)), initial=6):
            proposer.keep(torch.tensor([known - 1]), streams[:, known - 1 : anchor + 1])
            texts.newest, known = anchor + 2 - known, anchor + 2
            texts.tokens_BT[0, :known] = torch.tensor(tokens[:known])
            texts.length_B = torch.tensor([known])
            proposer.states = []
            proposer.propose(texts.length_B, torch.tensor([True]), None, texts.newest)
            for step in range(1, steps + 1):
                hidden_D = stack.block(step).hidden(proposer.states[step - 1])[0, 0]
                torch.testing.assert_close(hidden_D, expected[step - 1][0, anchor], atol=TOLERANCE, rtol=TOLERANCE)


class RecordingProposer(MtpProposer):
    """Keeps the last anchor's state of each step, and drafts the tokens of the text instead of the likeliest ones."""

    def __init__(self, model: DeepseekV4ForCausalLM, stack: MtpStack, text: list[int]) -> None:
        super().__init__(model, stack)
        self.text = text
        self.states: list[Tensor] = []

    def logits(self, step: int, state_BAND: Tensor) -> Tensor:
        self.states.append(state_BAND[:, -1:])
        position = int(self.texts.length_B) + step - 1
        return torch.nn.functional.one_hot(torch.tensor([self.text[position]]), 97).float()


@pytest.mark.parametrize("depth", [1, 3])
def test_packed_documents_do_not_touch_each_other(depth: int) -> None:
    """Rollout states and their gradients of a document stay the same when its neighbour changes."""
    model = random_backbone()
    stack = random_stack(model, depth)
    first = random_batch(97, [[13, 16]], 32, seed=3)
    other = random_batch(97, [[13, 16]], 32, seed=4)
    tokens = other.tokens_BS.clone()
    tokens[:, :13] = first.tokens_BS[:, :13]
    second = Batch(tokens, first.segment_BS, first.position_BS)

    def gradients(batch: Batch) -> list[Tensor]:
        stack.zero_grad()
        streams = backbone_streams(model, batch)[0].requires_grad_()
        states = rollout(stack, model.model.embed_tokens, streams, batch, 4)
        loss = torch.zeros(())
        for step, state in enumerate(states, start=1):
            mask = batch.target_mask(step) & (batch.segment_BS == 1)
            loss = loss + state[mask].sin().sum()
        loss.backward()
        assert not streams.grad[:, 13:].any(), "the neighbour's streams must get no gradient at all"
        return [p.grad.clone() for p in stack.parameters() if p.grad is not None]

    for ours, theirs in zip(gradients(first), gradients(second), strict=True):
        # The experts' matrix products also contain the neighbour's rows, so sums may round differently: 64 ulps.
        atol = 64 * torch.finfo(torch.float32).eps * ours.abs().max().item()
        torch.testing.assert_close(ours, theirs, atol=atol, rtol=0)


def test_a_packed_document_equals_the_same_document_alone() -> None:
    model = random_backbone()
    stack = random_stack(model)
    packed = random_batch(97, [[11, 18, 3]], 32)
    alone = single_row(packed.tokens_BS[0, 11:29].tolist())
    with torch.inference_mode():
        packed_streams, _ = backbone_streams(model, packed)
        alone_streams, _ = backbone_streams(model, alone)
        torch.testing.assert_close(packed_streams[:, 11:29], alone_streams, atol=TOLERANCE, rtol=TOLERANCE)
        together = rollout(stack, model.model.embed_tokens, packed_streams, packed, 3)
        apart = rollout(stack, model.model.embed_tokens, alone_streams, alone, 3)
        for step in range(1, 4):
            valid = alone.target_mask(step)[0]
            torch.testing.assert_close(
                together[step - 1][0, 11:29][valid], apart[step - 1][0][valid], atol=TOLERANCE, rtol=TOLERANCE
            )


@pytest.mark.parametrize(("depth", "steps"), [(1, 4), (2, 3)])
def test_recomputed_steps_have_the_same_states_and_gradients(depth: int, steps: int) -> None:
    model = random_backbone()
    stack, batch = random_stack(model, depth), random_batch(97, [[13, 16], [29]], 32, seed=3)
    with torch.no_grad():
        streams, _ = backbone_streams(model, batch)
    results = []
    for recompute in (False, True):
        stack.zero_grad()
        states = rollout(stack, model.model.embed_tokens, streams, batch, steps, recompute=recompute)
        torch.stack(states).square().sum().backward()
        results.append([*(state.detach() for state in states), *(p.grad for p in stack.parameters())])
    assert all(torch.equal(left, right) for left, right in zip(*results, strict=True))


def test_a_rollout_through_triton_has_the_same_states_and_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_backbone()
    stack, batch = random_stack(model), random_batch(97, [[3, 2]], 6)
    with torch.no_grad():
        streams, _ = backbone_streams(model, batch)
    results = []
    for kernels in ("triton", "reference"):
        monkeypatch.setenv("MTPTRAIN_KERNELS", kernels)
        stack.zero_grad()
        states = torch.stack(rollout(stack, model.model.embed_tokens, streams, batch, 2))
        states.sin().sum().backward()
        results.append([states.detach(), *(p.grad for p in stack.parameters() if p.grad is not None)])
    for ours, theirs in zip(*results, strict=True):
        # Through two layers in fp32, relative to the largest value.
        torch.testing.assert_close(ours, theirs, atol=TOLERANCE * max(1.0, theirs.abs().max().item()), rtol=0)

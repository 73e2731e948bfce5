"""Speculative decoding without a cache, a batch or a shortcut: the reference for replay and every faster loop."""

from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import DeepseekV4ForCausalLM

from mtptrain.backbone.streams import run_backbone
from mtptrain.batch import Batch
from mtptrain.config import PastDepth
from mtptrain.decoding.penalties import Context, count_context
from mtptrain.decoding.policy import Policy
from mtptrain.decoding.results import VerifyPass
from mtptrain.kernels.acceptance import DrawKind, uniforms
from mtptrain.kernels.acceptance.reference import sample_tokens_reference, verify_draft_reference
from mtptrain.kernels.sink_attention.reference import rotate_back
from mtptrain.mtp.block import MtpBlock
from mtptrain.mtp.rollout import rollout
from mtptrain.mtp.stack import MtpStack
from mtptrain.traces.file import Trace
from mtptrain.traces.prompts import Prompt

# R = 1 row, S slots, N streams, D model width, K drafted tokens, V vocabulary, r rotated channel pairs


def single_row(tokens: list[int]) -> Batch:
    row_RS = torch.tensor([tokens])
    return Batch(row_RS, torch.ones_like(row_RS), torch.arange(len(tokens)).unsqueeze(0))


def draft_logits(
    model: DeepseekV4ForCausalLM, stack: MtpStack, tokens: list[int], steps: int, streams_RSND: Tensor
) -> Tensor:
    """Return the logits [K, S, V] of steps 1 to `steps` at every slot, from a fresh rollout over the tokens.

    Args:
        model: the backbone.
        stack: the modules.
        tokens: the text and the newest draft so far.
        steps: K.
        streams_RSND: of the first slots. A step reads those up to its anchor, so those of a draft may be missing.
    """
    padded_RSND = pad(streams_RSND, (0, 0, 0, 0, 0, len(tokens) - streams_RSND.shape[1]))
    states = rollout(stack, model.model.embed_tokens, padded_RSND, single_row(tokens), steps)
    return model.lm_head(torch.cat(states))


def attend_to_table(
    block: MtpBlock, table: dict[int, Tensor], slots: list[int], query_RHSC: Tensor, key_RSC: Tensor, turn_RSr: Tensor
) -> Tensor:
    """Return attention over the table's keys of earlier slots, rotated back, after putting those of `slots` into it."""
    table.update(zip(slots, key_RSC[0], strict=True))
    attention, out = block.layer.self_attn, []
    for at, slot in enumerate(slots):
        keys_XC = torch.stack([table[j] for j in range(max(0, slot - block.window + 1), slot + 1)])
        scores_HX = query_RHSC[0, :, at] @ keys_XC.T * attention.scaling
        weights_HX = torch.cat([scores_HX, attention.sinks[:, None]], dim=1).softmax(-1)[:, :-1]
        out.append(weights_HX @ keys_XC)
    return rotate_back(torch.stack(out, dim=1)[None], turn_RSr)


def wrapped_logits(
    model: DeepseekV4ForCausalLM,
    stack: MtpStack,
    tokens: list[int],
    anchors: list[int],
    length: int,
    steps: int,
    streams_RSND: Tensor,
) -> Tensor:
    """Return the logits [V] of step `steps` at the last of `anchors`, with keys as vLLM leaves them past the depth.

    All passes of a text run again, from its first one, with a table of keys for each module.

    Args:
        model: the backbone.
        stack: the modules.
        tokens: the text and the newest draft so far.
        anchors: of all passes, the newest last.
        length: K of all passes.
        steps: steps of the newest pass.
        streams_RSND: of the slots up to the newest anchor, or more.
    """
    tables: list[dict[int, Tensor]] = [{} for _ in stack.mtp]
    padded = tokens + [0] * length
    for number, anchor in enumerate(anchors):
        first = 0
        if number > 0:
            accepted = anchor - anchors[number - 1] - 1
            again = max(0, length - accepted - 1)  # earlier anchors, in the room of the rejected drafts but one
            first = max(0, anchor - accepted - again)
        slots = list(range(first, anchor + 1))
        state_RAND = streams_RSND[:, first : anchor + 1]
        for step in range(1, (steps if anchor == anchors[-1] else length) + 1):
            block, table = stack.mtp[(step - 1) % stack.depth], tables[(step - 1) % stack.depth]

            embedded_RAD = model.model.embed_tokens(torch.tensor([[padded[slot + step] for slot in slots]]))
            attend = partial(attend_to_table, block, table, slots)
            state_RAND = block(embedded_RAD, state_RAND, torch.tensor([slots]), attend)
    return model.lm_head(block.hidden(state_RAND)[0, -1])


@torch.inference_mode()
def decode_plainly(
    model: DeepseekV4ForCausalLM, stack: MtpStack, prompt: list[int], length: int, policy: Policy, new: int, seed: int
) -> tuple[Trace, list[VerifyPass]]:
    """Return a text of `new` tokens and its passes; a draft has `length` tokens unless the confidence is low."""
    seed_R = torch.tensor([seed])

    def draws(stream: DrawKind, count: int) -> Tensor:
        return uniforms(seed_R, torch.tensor([len(tokens) - 1]), stream, count)

    def context(tokens: list[int]) -> Context:
        length_R = torch.tensor([len(tokens)])
        return count_context(torch.tensor([tokens]), torch.tensor([len(prompt)]), length_R, model.config.vocab_size)

    tokens, passes, probabilities = list(prompt), [], []
    first_RV = policy.target(model.lm_head(run_backbone(model, torch.tensor([tokens]))[1][:, -1]), context(tokens))
    token = int(sample_tokens_reference(first_RV, draws(DrawKind.verify, length + 1)[:, -1]))
    tokens, probabilities = [*tokens, token], [float(first_RV[0, token])]
    anchors = []
    drafted = min(stack.depth, length) if policy.past_depth is PastDepth.stop and stack.depth > 1 else length
    wraps = policy.past_depth is PastDepth.wrap_around and 1 < stack.depth < length
    while len(tokens) - len(prompt) < new:
        anchor, draft, q = len(tokens) - 2, [], []
        anchors.append(anchor)
        streams_RSND, _ = run_backbone(model, torch.tensor([tokens]))
        for step in range(1, drafted + 1):
            if wraps:
                logits_V = wrapped_logits(model, stack, tokens + draft, anchors, length, step, streams_RSND)
            else:
                logits_V = draft_logits(model, stack, tokens + draft, step, streams_RSND)[-1, anchor]
            if float(logits_V.softmax(-1).max()) < policy.min_confidence:
                break
            q.append(policy.proposal(logits_V[None], context(tokens + draft))[0])
            draft.append(int(sample_tokens_reference(q[-1][None], draws(DrawKind.draft, step)[:, -1])))
        _, hidden_RSD = run_backbone(model, torch.tensor([tokens + draft]))
        logits_LV = model.lm_head(hidden_RSD[0, len(tokens) - 1 :])
        p_LV = [policy.target(row_V[None], context(tokens + draft[:k]))[0] for k, row_V in enumerate(logits_LV)]
        p_RLV = torch.stack(p_LV)[None]
        q_RKV = torch.stack(q)[None] if q else p_RLV[:, :0]
        u_RL = draws(DrawKind.verify, length + 1)
        u_RL = torch.cat([u_RL[:, : len(draft)], u_RL[:, -1:]], dim=1)
        ended = verify_draft_reference(
            torch.tensor([draft], dtype=torch.int64), q_RKV, p_RLV, u_RL, policy.verification
        )
        accepted = int(ended.accepted_B)
        emitted = [*draft[:accepted], int(ended.token_B)]
        room = new - (len(tokens) - len(prompt))
        probabilities += [float(p_RLV[0, position, token]) for position, token in enumerate(emitted)][:room]
        passes.append(VerifyPass(min(len(draft), room), min(accepted, room), min(accepted + 1, room)))
        tokens += emitted[:room]
    new_tokens = tokens[len(prompt) :]
    return Trace(Prompt(prompt, "text", seed), new_tokens, [1.0] * new, probabilities), passes

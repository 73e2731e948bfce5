"""The right wiring of a head, and the usual wrong ones: rollouts that change one input of the module.

A head works best with the inputs of its training. So the wiring under which an unknown head accepts most is a hint, not
a proof, at how training made its inputs, or which of them its server mixes up.
"""

# B rows, S slots, N residual streams, D model width, K draft steps

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from transformers import DeepseekV4ForCausalLM

from mtptrain.batch import Batch
from mtptrain.mtp.block import MtpBlock
from mtptrain.mtp.rollout import Embed, Step, StepAttention, rollout
from mtptrain.mtp.stack import MtpStack
from mtptrain.replay.drafts import Rollout

RIGHT = "right"


@dataclass(frozen=True, slots=True)
class Wiring:
    """One way of feeding a head.

    Attributes:
        name: short, for tables and doctor.json.
        feeds: inputs of the module, in words that complete "the head fits best with ...".
        remedy: remedy if training feeds a head like this, in words that follow a colon.
        build: returns the rollout of this wiring, for a backbone and the common length of the prompts, in tokens.
    """

    name: str
    feeds: str
    remedy: str
    build: Callable[[DeepseekV4ForCausalLM, int], Rollout]


def _stepwise(run_step: Step) -> Callable[[DeepseekV4ForCausalLM, int], Rollout]:
    """Return the builder of a wiring that changes the inputs of each step."""
    return lambda model, prompt_length: partial(rollout, run_step=run_step)


def _shifted_embedding(offset: int) -> Callable[[DeepseekV4ForCausalLM, int], Rollout]:
    """Return the builder of a wiring where step k at anchor i gets token t_{i+k+offset} instead of t_{i+k}."""

    def shifted(stack: MtpStack, embed: Embed, streams_BSND: Tensor, batch: Batch, steps: int) -> list[Tensor]:
        return rollout(stack, lambda token_BS: embed(token_BS.roll(-offset, dims=1)), streams_BSND, batch, steps)

    return lambda model, prompt_length: shifted


def _post_norm(model: DeepseekV4ForCausalLM, prompt_length: int) -> Rollout:
    """Return a rollout where each step gets norm(hc_head(state)) of the step before, repeated over the streams."""

    def post_norm(stack: MtpStack, embed: Embed, streams_BSND: Tensor, batch: Batch, steps: int) -> list[Tensor]:
        def run_step(
            block: MtpBlock, step: int, embedding: Tensor, state: Tensor, position: Tensor, attend: StepAttention
        ) -> Tensor:
            backbone = model.model
            hidden_BSD = backbone.norm(backbone.hc_head(state)) if step == 1 else stack.block(step - 1).hidden(state)
            return block(embedding, _repeated(hidden_BSD, state), position, attend)

        return rollout(stack, embed, streams_BSND, batch, steps, run_step=run_step)

    return post_norm


def _mean_stream(
    block: MtpBlock, step: int, embedding: Tensor, state: Tensor, position: Tensor, attend: StepAttention
) -> Tensor:
    return block(embedding, _repeated(state.mean(2), state), position, attend)


def _first_stream(
    block: MtpBlock, step: int, embedding: Tensor, state: Tensor, position: Tensor, attend: StepAttention
) -> Tensor:
    return block(embedding, _repeated(state[:, :, 0], state), position, attend)


def _repeated(hidden_BSD: Tensor, state_BSND: Tensor) -> Tensor:
    return hidden_BSD.unsqueeze(2).expand_as(state_BSND)


def _own_keys(
    block: MtpBlock, step: int, embedding: Tensor, state: Tensor, position: Tensor, attend: StepAttention
) -> Tensor:
    step_attention = StepAttention(block, attend.segment_BS, [])
    state = block(embedding, state, position, step_attention)
    attend.key_BSC = step_attention.key_BSC
    return state


def _still_position(
    block: MtpBlock, step: int, embedding: Tensor, state: Tensor, position: Tensor, attend: StepAttention
) -> Tensor:
    return block(embedding, state, position - (step - 1), attend)


def _zeroed_start(
    block: MtpBlock, step: int, embedding: Tensor, state: Tensor, position: Tensor, attend: StepAttention
) -> Tensor:
    return block(embedding.masked_fill((position == 0).unsqueeze(-1), 0), state, position, attend)


def _no_prefill(model: DeepseekV4ForCausalLM, prompt_length: int) -> Rollout:
    """Return a rollout whose drafts do not see the prompt: its slots before the first anchor are another document."""

    def no_prefill(stack: MtpStack, embed: Embed, streams_BSND: Tensor, batch: Batch, steps: int) -> list[Tensor]:
        slot_S = torch.arange(batch.tokens_BS.shape[1], device=batch.tokens_BS.device)
        is_late_BS = (slot_S >= prompt_length - 1) & (batch.segment_BS > 0)
        return rollout(stack, embed, streams_BSND, replace(batch, segment_BS=batch.segment_BS + is_late_BS), steps)

    return no_prefill


WIRINGS = (
    Wiring(RIGHT, "the inputs that servers give it", "nothing.", lambda model, prompt_length: rollout),
    Wiring(
        "embedding_late",
        "the embedding of the token before: t_{i+k-1} at step k of anchor i instead of t_{i+k}",
        "shift the token ids of the MTP input by one more to the left and train again.",
        _shifted_embedding(-1),
    ),
    Wiring(
        "embedding_early",
        "the embedding of the very token it must predict: t_{i+k+1} at step k of anchor i instead of t_{i+k}",
        "it leaks the target, so loss and accuracy mean nothing; shift the token ids of the MTP input by one less to "
        "the left and train again.",
        _shifted_embedding(1),
    ),
    Wiring(
        "post_norm_state",
        "the backbone's final hidden state (after hc_head and norm), repeated over the streams, instead of the streams",
        "take the output of the backbone's last layer, before hc_head and the final norm (a forward hook; the last "
        "entry of hidden_states is the normed one), and train again.",
        _post_norm,
    ),
    Wiring(
        "mean_stream",
        "the mean of the residual streams, repeated, instead of the streams themselves",
        "hand on all streams [N, D] of the backbone and of every step, and train again.",
        _stepwise(_mean_stream),
    ),
    Wiring(
        "first_stream",
        "the first residual stream, repeated, instead of all streams",
        "hand on all streams [N, D] of the backbone and of every step, and train again.",
        _stepwise(_first_stream),
    ),
    Wiring(
        "no_prefill",
        "no keys of the prompt, only of the tokens after its last one",
        "train on whole documents, and run the module over the prompt before the first draft.",
        _no_prefill,
    ),
    Wiring(
        "zeroed_start",
        "a zeroed embedding at position 0, an option of vLLM",
        "nothing if vLLM serves it; other servers do not zero the embedding, so train without.",
        _stepwise(_zeroed_start),
    ),
    Wiring(
        "own_keys",
        "keys of step k at every slot, which no server computes: context keys come from step 1",
        "train on a rollout whose later steps attend step-1 keys up to the anchor (docs/rollout.md).",
        _stepwise(_own_keys),
    ),
    Wiring(
        "still_position",
        "one RoPE position for every step: i instead of i + k - 1",
        "advance the position by one a step and train again.",
        _stepwise(_still_position),
    ),
)

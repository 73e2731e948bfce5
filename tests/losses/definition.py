"""The training objective of a head, from its definition: one document, one anchor, one draft step, one token at a time.

Nothing is packed, masked, batched or shared between steps, and everything after the backbone is float64. Sources:
docs/rollout.md (keys and positions), docs/training.md (losses and weights), docs/data.md (targets).
"""

# N residual streams, D model width, V vocabulary, K draft steps, H heads, C head width

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from transformers import DeepseekV4ForCausalLM

from mtptrain.mtp.block import MtpBlock
from mtptrain.mtp.stack import MtpStack
from tests.mtp.plain_block import attend, collapse, project, queries_and_keys, run_layer

Drafts = dict[tuple[int, int], Tensor]  # (step k, anchor i) -> logits [V] of token t_{i+k+1}
# (divergence, temperature, piece, anchor, step) -> the result of `token_figures`
Known = dict[tuple[str, float, int, int, int], tuple[Tensor, float, float]]


@dataclass(frozen=True)
class Piece:
    """A document, or a part of one that is longer than a row.

    Attributes:
        tokens: t_0, t_1, ...
        allowed: for each token, whether it may be a target.
        streams: h_i [N, D] of every slot.
        teacher: the backbone's logits [V] of t_{i+1} for every slot i.
    """

    tokens: list[int]
    allowed: list[bool]
    streams: Tensor
    teacher: Tensor


@dataclass(frozen=True)
class Settings:
    """Settings of the objective, as a user gives them."""

    divergence: str
    temperature: float = 1.0
    step_decay: float = 1.0
    scale: float = 1.0


@dataclass(frozen=True)
class Expected:
    """Loss of an optimiser step, and count and metric sums of each draft step."""

    loss: Tensor
    counts: list[int]
    sums: dict[str, list[float]]


def cut(document: Sequence[int], row_length: int) -> list[Sequence[int]]:
    """Parts of at most `row_length` tokens; each begins with the last token of the part before."""
    parts = [document[:row_length]]
    end = row_length
    while end < len(document):
        parts.append(document[end - 1 : end - 1 + row_length])
        end += row_length - 1
    return parts


@torch.no_grad()
def read(model: DeepseekV4ForCausalLM, tokens: list[int], allowed: list[bool] | None = None) -> Piece:
    """Run transformers' forward on one text alone; `allowed` defaults to all tokens."""
    captured: list[Tensor] = []
    handle = model.model.layers[-1].register_forward_hook(lambda _module, _args, output: captured.append(output))
    hidden = model.model(input_ids=torch.tensor([tokens]), use_cache=False).last_hidden_state[0]
    handle.remove()
    teacher = hidden.double() @ model.lm_head.weight.double().T
    return Piece(tokens, [True] * len(tokens) if allowed is None else allowed, captured[0][0].double(), teacher)


def in_float64(stack: MtpStack) -> MtpStack:
    """A copy whose tensors are float64."""
    return copy.deepcopy(stack).double()


def draft(model: DeepseekV4ForCausalLM, stack: MtpStack, piece: Piece, steps: int) -> Drafts:
    """Draft logits of every step at every anchor whose target lies in the piece, differentiable in the stack."""
    embedding, lm_head = model.model.embed_tokens.weight.double(), model.lm_head.weight.double()
    depth = len(stack.mtp)
    drafts: Drafts = {}
    base_keys: list[list[Tensor]] = [
        [] for _ in range(depth)
    ]  # of each module: its base step's key at anchors 0, 1, ...
    for anchor in range(len(piece.tokens) - 2):
        state = piece.streams[anchor][None]
        chain: list[Tensor] = []
        for step in range(1, min(steps, len(piece.tokens) - 2 - anchor) + 1):
            module = min(step, depth) - 1
            block, own = stack.mtp[module], base_keys[module] if step <= depth else chain
            position = torch.tensor([anchor + step - 1])
            attention = partial(attend_after, block, [*base_keys[module], *chain], own, position)
            state = run_layer(block, embedding[piece.tokens[anchor + step]][None], state, attention)
            drafts[step, anchor] = lm_head @ collapse(block, state)[0]
    return drafts


def attend_after(block: MtpBlock, earlier: list[Tensor], own: list[Tensor], position: Tensor, x: Tensor) -> Tensor:
    """Attention of one query over the window that ends with its own key, which is added to `own`."""
    query, key = queries_and_keys(block, x, position)
    own.append(key[0])
    keys = [*earlier, key[0]][-block.layer.self_attn.config.sliding_window :]
    return project(block, attend(block, query[0], torch.stack(keys))[None], position)


def token_loss(settings: Settings, student: Tensor, teacher: Tensor, target: int) -> Tensor:
    """Loss of one draft distribution q against the backbone's p, from logits [V]."""
    if settings.divergence == "ce":
        return -torch.softmax(student, 0)[target].log()
    q, p = torch.softmax(student / settings.temperature, 0), torch.softmax(teacher / settings.temperature, 0)
    overlap = torch.minimum(p, q).sum()
    kl = (p * torch.log(p / q)).sum()
    middle = (p + q) / 2
    trust = torch.exp(-3 * overlap.detach())
    return {
        "kl": kl,
        "reverse_kl": (q * torch.log(q / p)).sum(),
        "jsd": ((p * torch.log(p / middle)).sum() + (q * torch.log(q / middle)).sum()) / 2,
        "tv": 1 - overlap,
        "chain": 1 - overlap,
        "neg_log_alpha": -torch.log(overlap),
        "hybrid": trust * kl + (1 - trust) * (1 - overlap),
    }[settings.divergence]


def is_target(piece: Piece, step: int, anchor: int) -> bool:
    """Whether step k counts at an anchor: every token that it drafts, t_{i+2} to t_{i+k+1}, exists and is allowed."""
    last = anchor + step + 1
    return last < len(piece.tokens) and all(piece.allowed[anchor + 2 : last + 1])


def token_figures(settings: Settings, student: Tensor, teacher: Tensor, target: int) -> tuple[Tensor, float, float]:
    """Loss of one draft distribution, its overlap with the backbone's, and whether the likeliest tokens are one."""
    overlap = torch.minimum(student.softmax(0), teacher.softmax(0)).sum().item()
    return token_loss(settings, student, teacher, target), overlap, float(student.argmax() == teacher.argmax())


def objective(
    pieces: list[Piece], drafts: list[Drafts], steps: int, settings: Settings, known: Known | None = None
) -> Expected:
    """Loss, counts and metric sums of an optimiser step on all these pieces.

    Args:
        pieces: of all documents.
        drafts: of every piece.
        steps: K.
        settings: of the objective.
        known: figures of tokens under other settings, to which those that differ are added; None keeps none.
    """
    known = {} if known is None else known
    counts = [0] * steps
    sums = {name: [0.0] * steps for name in ("loss", "alpha", "top1_match")}
    losses: list[list[Tensor]] = [[] for _ in range(steps)]
    shortfalls: list[Tensor] = []
    for number, (piece, logits) in enumerate(zip(pieces, drafts, strict=True)):
        for anchor in range(len(piece.tokens)):
            accepted = torch.ones((), dtype=torch.float64)
            for step in range(1, steps + 1):
                if not is_target(piece, step, anchor):
                    continue
                key = (settings.divergence, settings.temperature, number, anchor, step)
                if key not in known:
                    target = piece.tokens[anchor + step + 1]
                    known[key] = token_figures(settings, logits[step, anchor], piece.teacher[anchor + step], target)
                loss, overlap, is_match = known[key]
                losses[step - 1].append(loss)
                accepted = accepted * (1 - loss)
                shortfalls.append(1 - accepted)
                counts[step - 1] += 1
                sums["loss"][step - 1] += loss.item()
                sums["alpha"][step - 1] += overlap
                sums["top1_match"][step - 1] += is_match
    if settings.divergence == "chain":
        mean = sum(shortfalls, torch.zeros(())) / counts[0]
    else:
        weights = [settings.step_decay ** (step - 1) for step in range(1, steps + 1)]
        means = [sum(of_step) / len(of_step) if of_step else torch.zeros(()) for of_step in losses]
        mean = sum(weight * mean for weight, mean in zip(weights, means, strict=True)) / sum(weights)
    return Expected(settings.scale * mean, counts, sums)

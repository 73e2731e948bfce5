"""A head's drafts at every anchor of a trace, from one rollout: the only input that replay needs from the head."""

# B traces, S slots, D model width, V vocabulary, R rows of the lm_head, K draft steps, N anchors of a trace

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from transformers import DeepseekV4ForCausalLM

from mtptrain.backbone.streams import run_backbone
from mtptrain.batch import Batch
from mtptrain.decoding.penalties import Context, count_context
from mtptrain.decoding.policy import Policy
from mtptrain.kernels.acceptance import DrawKind, sample_logits, uniforms
from mtptrain.mtp.rollout import rollout
from mtptrain.mtp.stack import MtpStack
from mtptrain.replay.margin import stop_margin, token_margin
from mtptrain.replay.walk import walk
from mtptrain.run.progress import counted
from mtptrain.traces.file import Trace

TRACES_A_BATCH = 16
LOGITS_A_CHUNK = 2**24  # 64 MiB of float32, so that logits of a large vocabulary never fill the memory

Rollout = Callable[[MtpStack, nn.Module, Tensor, Batch, int], list[Tensor]]  # `mtp.rollout.rollout`, teacher-forced


@dataclass(frozen=True, slots=True)
class ReplayDrafts:
    """A head's drafts on one trace. Column n is the anchor whose pass first emits token n + 1 of the trace.

    Entries (k - 1, n) past the end of the text are 0.

    Attributes:
        p_N: float64, probability of each token that passes emit under the policy, as the trace stores it; 1 in a
            greedy text.
        q_KN: float64, probability that step k, conditioned on the text up to it, gives the text's token; 0 or 1 for
            greedy drafts.
        confidence_KN: float64, largest probability of step k at temperature 1, conditioned on the text.
        free_confidence_KN: the same, conditioned on the head's own drafts; None for stacked modules, and without
            `free_running`.
        entropy_N: float64, entropy of the backbone's distribution of each token at temperature 1, in nats.
        other_q_KN: `q_KN` under the policy's `with_other_drafts`; None without one.
        margin_KN: float64, how far the logits of step k, conditioned on the text, must move before a greedy draft has
            the text's token or ceases to have it, as another token or by its confidence. None for sampled drafts.
        free_margin_KN: the same for step k of the head's own draft, to be another token or to stop elsewhere; None
            for sampled drafts and where `free_confidence_KN` is.
        drafted_steps: steps that the head drafts at most; later entries are 0. None: all of them.
    """

    p_N: np.ndarray
    q_KN: np.ndarray
    confidence_KN: np.ndarray
    free_confidence_KN: np.ndarray | None
    entropy_N: np.ndarray
    other_q_KN: np.ndarray | None = None
    margin_KN: np.ndarray | None = None
    free_margin_KN: np.ndarray | None = None
    drafted_steps: int | None = None

    @property
    def with_other_drafts(self) -> ReplayDrafts | None:
        """The drafts under the policy's `with_other_drafts`; None without one."""
        if self.other_q_KN is None:
            return None
        known = replace(self, q_KN=self.other_q_KN, other_q_KN=None, free_confidence_KN=None)
        return replace(known, margin_KN=None, free_margin_KN=None)


def trace_batch(traces: list[Trace], device: torch.device) -> Batch:
    """Return a batch with the prompt and the continuation of each trace as a row, padded at the end."""
    texts = [trace.prompt.tokens + trace.tokens for trace in traces]
    length = max(len(text) for text in texts)
    tokens_BS = torch.tensor([text + [0] * (length - len(text)) for text in texts], device=device)
    segment_BS = torch.tensor([[1] * len(text) + [0] * (length - len(text)) for text in texts], device=device)
    position_BS = torch.arange(length, device=device).expand_as(tokens_BS)
    return Batch(tokens_BS, segment_BS, position_BS)


@torch.inference_mode()
def draft_traces(
    model: DeepseekV4ForCausalLM,
    stack: MtpStack,
    traces: list[Trace],
    steps: int,
    policy: Policy,
    draft: Rollout = rollout,
    free_running: bool = False,
) -> list[ReplayDrafts]:
    """Return a head's drafts on every trace, in their order; texts of similar length run in one batch.

    Args:
        model: the backbone.
        stack: the modules.
        traces: texts that the backbone emitted under the policy.
        steps: draft steps K.
        policy: its temperature, top-k, top-p and kind of draft are used.
        draft: the rollout, or a variant that feeds the head differently (`doctor.wirings`).
        free_running: also follow the head's own drafts, which a confidence threshold needs; ignored for stacked
            modules.
    """
    order = sorted(range(len(traces)), key=lambda i: len(traces[i].prompt.tokens) + len(traces[i].tokens))
    drafts: dict[int, ReplayDrafts] = {}
    for start in counted(f"replaying a head on {len(traces)} texts", range(0, len(order), TRACES_A_BATCH)):
        numbers = order[start : start + TRACES_A_BATCH]
        batch = _TraceBatch(model, [traces[i] for i in numbers], numbers, steps, policy)
        forced = batch.walked(stack) if policy.wraps(stack.depth, steps) else batch.forced(stack, draft)
        q_BKN, *other = forced.q
        free = batch.free(stack) if free_running and stack.depth == 1 else None
        entropy_BN = batch.entropy()
        for row, number in enumerate(numbers):
            size = max(len(traces[number].tokens) - 1, 0)
            p_N = np.ones(size) if policy.is_greedy else np.array(traces[number].probabilities[1:], dtype=np.float64)
            drafts[number] = ReplayDrafts(
                p_N=p_N,
                q_KN=q_BKN[row, :, :size],
                confidence_KN=forced.confidence_BKN[row, :, :size],
                free_confidence_KN=None if free is None else free[0][row, :, :size],
                entropy_N=entropy_BN[row, :size],
                other_q_KN=other[0][row, :, :size] if other else None,
                margin_KN=forced.margin_BKN[row, :, :size] if policy.draws_greedily else None,
                free_margin_KN=free[1][row, :, :size] if policy.draws_greedily and free is not None else None,
                drafted_steps=policy.drafted_steps(stack.depth, steps),
            )
    return [drafts[number] for number in range(len(traces))]


class _Forced(NamedTuple):
    """Every step conditioned on the text, [B, K, N] each.

    Of `q`, the probability of the text's token, there is one entry for the policy and, at a temperature above 0, one
    for its other kind of draft. Margins are of greedy drafts, and zeros of others.
    """

    q: list[np.ndarray]
    confidence_BKN: np.ndarray
    margin_BKN: np.ndarray


class _TraceBatch:
    """Some traces on the device, their backbone streams, and the anchors of each step that lie in the continuation.

    The lm_head runs on the slots of these anchors only.
    """

    def __init__(
        self, model: DeepseekV4ForCausalLM, traces: list[Trace], numbers: list[int], steps: int, policy: Policy
    ) -> None:
        self.model, self.traces, self.steps, self.policy = model, traces, steps, policy
        self.device = model.lm_head.weight.device
        self.batch = trace_batch(traces, self.device)
        self.streams_BSND, self.hidden_BSD = run_backbone(model, self.batch.tokens_BS)
        self.first_B = torch.tensor([len(trace.prompt.tokens) - 1 for trace in traces], device=self.device)
        self.size_B = torch.tensor([len(trace.tokens) - 1 for trace in traces], device=self.device)
        self.seed_B = torch.tensor(numbers, device=self.device)
        self.width = int(self.size_B.max())

    def anchors(self, step: int) -> tuple[Tensor, Tensor]:
        """Return row and column n of every anchor whose step `step` drafts a token of the text, int64 [R] each."""
        column_N = torch.arange(self.width, device=self.device)
        row_R, column_R = (column_N + step <= self.size_B.unsqueeze(1)).nonzero().unbind(1)
        return row_R, column_R

    def forced(self, stack: MtpStack, draft: Rollout) -> _Forced:
        """Return every step of a rollout, conditioned on the text."""
        policies = [one for one in (self.policy, self.policy.with_other_drafts) if one is not None]
        steps = self.policy.drafted_steps(stack.depth, self.steps)
        states = draft(stack, self.model.model.embed_tokens, self.streams_BSND, self.batch, steps)
        q = [self._zeros(self.steps) for _ in policies]
        confidence_BKN, margin_BKN = self._zeros(self.steps), self._zeros(self.steps)
        for step, hidden_BSD in enumerate(states, start=1):
            row_R, column_R = self.anchors(step)
            slot_R = self.first_B[row_R] + column_R
            target_R = self.batch.tokens_BS[row_R, slot_R + step + 1]
            for part, logits_RV in self._logits(hidden_BSD[row_R, slot_R]):
                entries = (row_R[part], step - 1, column_R[part])
                context = self._context(row_R[part], slot_R[part] + step + 1)
                for policy, q_BKN in zip(policies, q, strict=True):
                    q_R1 = policy.proposal(logits_RV, context).gather(1, target_R[part].unsqueeze(1))
                    q_BKN[entries] = q_R1.squeeze(1).double()
                confidence_BKN[entries] = _confidence(logits_RV)
                if self.policy.draws_greedily:
                    adjusted_RV = self.policy.adjust(logits_RV, context)
                    margin_BKN[entries] = self._margin(adjusted_RV, target_R[part], confidence_BKN[entries])
        return _Forced([q_BKN.cpu().numpy() for q_BKN in q], confidence_BKN.cpu().numpy(), margin_BKN.cpu().numpy())

    def walked(self, stack: MtpStack) -> _Forced:
        """Return the result of `forced` where drafts depend on the passes before them; see `replay.walk`."""
        of_batch = np.zeros((3, len(self.traces), self.steps, self.width))
        for row, trace in enumerate(self.traces):
            streams_BSND = self.streams_BSND[row : row + 1]
            of_trace = walk(self.model, stack, trace, streams_BSND, self.steps, self.policy)
            for values_BKN, values_KN in zip(of_batch, of_trace, strict=True):
                values_BKN[row, :, : values_KN.shape[1]] = values_KN
        q_BKN, confidence_BKN, margin_BKN = of_batch
        return _Forced([q_BKN], confidence_BKN, margin_BKN)

    def free(self, stack: MtpStack) -> tuple[np.ndarray, np.ndarray]:
        """Return confidence and margin of every step conditioned on the head's own draft so far, [B, K, N] each.

        Margins are of greedy drafts, and zeros of others.
        """
        confidence_BKN, margin_BKN = self._zeros(self.steps), self._zeros(self.steps)
        drafted: list[Tensor] = []

        def choose(step: int, hidden_BSD: Tensor) -> Tensor:
            token_BS = torch.zeros_like(self.batch.tokens_BS)
            row_R, column_R = self.anchors(1)
            slot_R = self.first_B[row_R] + column_R
            u_R = uniforms(self.seed_B[row_R], slot_R, DrawKind.draft, self.steps)[:, step - 1]
            for part, raw_RV in self._logits(hidden_BSD[row_R, slot_R]):
                entries = (row_R[part], step - 1, column_R[part])
                confidence_BKN[entries] = _confidence(raw_RV)
                context = self._context(
                    row_R[part], slot_R[part] + 2, [token_BS[row_R[part], slot_R[part]] for token_BS in drafted]
                )
                logits_RV = self.policy.adjust(raw_RV, context)
                if self.policy.draws_greedily:
                    token_R = logits_RV.argmax(-1)
                    margin_BKN[entries] = self._margin(logits_RV, token_R, confidence_BKN[entries])
                else:
                    token_R = sample_logits(logits_RV, self.policy.sampling, u_R[part])
                token_BS[row_R[part], slot_R[part]] = token_R
            drafted.append(token_BS)
            return token_BS

        embed = self.model.model.embed_tokens
        states = rollout(stack, embed, self.streams_BSND, self.batch, self.steps, choose)
        choose(self.steps, states[-1])  # the last step's confidence; its token is not fed to any step
        return confidence_BKN.cpu().numpy(), margin_BKN.cpu().numpy()

    def _margin(self, logits_RV: Tensor, token_R: Tensor, confidence_R: Tensor) -> Tensor:
        """Return how far logits under the policy must move before a draft differs in a token or stops elsewhere."""
        return token_margin(logits_RV, token_R).minimum(stop_margin(confidence_R, self.policy.min_confidence))

    def _context(self, row_R: Tensor, length_R: Tensor, drafted: Sequence[Tensor] = ()) -> Context | None:
        """Return the context after the first `length_R` tokens of each row and a draft; None without penalties."""
        if not self.policy.penalties.are_on:
            return None
        vocab_size = len(self.model.lm_head.weight)
        context = count_context(self.batch.tokens_BS[row_R], self.first_B[row_R] + 1, length_R, vocab_size)
        for token_R in drafted:
            context = context.after(token_R)
        return context

    def entropy(self) -> np.ndarray:
        """Return the entropy of the backbone's distribution of every token that passes emit, nats [B, N]."""
        entropy_BN = self._zeros(1)[:, 0]
        row_R, column_R = self.anchors(1)
        # Token n + 1 of the continuation is predicted one slot past the anchor of column n.
        for part, logits_RV in self._logits(self.hidden_BSD[row_R, self.first_B[row_R] + column_R + 1]):
            log_p_RV = logits_RV.float().log_softmax(-1)
            entropy_BN[row_R[part], column_R[part]] = -(log_p_RV.exp() * log_p_RV).sum(-1).double()
        return entropy_BN.cpu().numpy()

    def _zeros(self, steps: int) -> Tensor:
        return torch.zeros(len(self.size_B), steps, self.width, dtype=torch.float64, device=self.device)

    def _logits(self, hidden_RD: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Yield logits chunk by chunk, each with the slice of its rows."""
        weight_VD = self.model.lm_head.weight
        size = max(1, LOGITS_A_CHUNK // len(weight_VD))
        for start in range(0, len(hidden_RD), size):
            part = slice(start, start + size)
            yield part, self.model.lm_head(hidden_RD[part].to(weight_VD.dtype))


def _confidence(logits_RV: Tensor) -> Tensor:
    """Return the largest probability at temperature 1, float64 [R]."""
    return (logits_RV.float().amax(-1) - logits_RV.float().logsumexp(-1)).exp().double()

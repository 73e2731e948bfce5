"""The texts of a batch while they grow: the tokens on the device, the records on the host, and verified drafts."""

# B rows, T slots per row, K drafted tokens, L = K + 1 verified positions, V vocabulary

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mtptrain.decoding.penalties import count_context
from mtptrain.decoding.policy import Policy
from mtptrain.decoding.results import Decoded, Limits, NewTokens, settle_passes
from mtptrain.kernels.acceptance import Emission, verify_logits

SLOTS = 64  # the number of slots of a row is a multiple of it


@dataclass(frozen=True, slots=True)
class Draft:
    """Drafted tokens of a batch.

    Attributes:
        tokens_BK: int64; K may be smaller than the draft length if every row stopped earlier.
        logits_BKV: logits that the tokens were drawn from under the policy; None if each token was certain (a greedy
            draft).
        drafted_B: int64 in [0, K], valid tokens of each row; the values after them are arbitrary.
    """

    tokens_BK: Tensor
    logits_BKV: Tensor | None
    drafted_B: Tensor

    @classmethod
    def nothing(cls, drafted_B: Tensor) -> Draft:
        """Return a draft without tokens in any row; drafted_B is 0 throughout."""
        return cls(drafted_B.new_empty(len(drafted_B), 0), None, drafted_B)


def verify(policy: Policy, draft: Draft, logits_BLV: Tensor, u_BL: Tensor | None) -> Emission:
    """Return the accepted tokens of a draft and the verifier's next token.

    Args:
        policy: decoding policy of the run.
        draft: K = L - 1 tokens per row.
        logits_BLV: the backbone's, at the last known token and at each drafted one, after `Texts.adjust`.
        u_BL: float64 draws, see `Draws.verify`; None for a greedy policy.
    """
    return verify_logits(
        draft.tokens_BK, draft.drafted_B, draft.logits_BKV, logits_BLV, u_BL, policy.sampling, policy.verification
    )


class Texts:
    """Prompts and the tokens emitted after them.

    Args:
        prompts: token ids, at least one each; lengths may differ.
        limits: the end of each text.
        draft_length: most tokens of a draft, K; 0 for plain decoding.
        device: device of the run.

    Attributes:
        records: tokens, gaps and probabilities of each row so far.
        tokens_BT: int64, known tokens by slot; the values after a row's length are arbitrary.
        length_B: int64, known tokens of each row.
        is_open: for each row, whether it continues.
        newest: most tokens that a row gained in the last pass.
        news: the tokens of each row in the last pass; None in a row that had ended before.
        num_passes: passes of a text without a stop token, at least.
    """

    def __init__(self, prompts: list[list[int]], limits: Limits, draft_length: int, device: torch.device) -> None:
        self.lengths, self.limits = [len(prompt) for prompt in prompts], limits
        # Rounded up, so that texts of similar lengths share the traces of their steps.
        self.max_length = -(-(max(self.lengths) + limits.max_new_tokens + draft_length + 1) // SLOTS) * SLOTS
        self.num_passes = (limits.max_new_tokens - 1) // (draft_length + 1)
        rows = [prompt + [0] * (self.max_length - len(prompt)) for prompt in prompts]
        self.tokens_BT = torch.tensor(rows, device=device)
        self.prompt_B = torch.tensor(self.lengths, device=device)
        self.length_B = self.prompt_B.clone()  # a recorded step tells tensors apart by identity
        self.records = [Decoded() for _ in prompts]
        self.is_open = [True] * len(prompts)
        self.newest = 0
        self.news: list[NewTokens | None] = [None] * len(prompts)
        self._accepted: list[list[int]] = [[] for _ in prompts]
        self._drafted: list[list[int]] = [[] for _ in prompts]
        self._offset_L = torch.arange(draft_length + 1, device=device)

    @property
    def emitted_B(self) -> Tensor:
        """Tokens emitted so far, int64."""
        return self.length_B - self.prompt_B

    @property
    def last_B1(self) -> Tensor:
        """The last known token of each row, int64."""
        return self.tokens_BT.gather(1, self.length_B.unsqueeze(1) - 1)

    def adjust(self, policy: Policy, draft: Draft, logits_BLV: Tensor) -> Tensor:
        """Return the backbone's logits after the policy's penalties and min-p; a drafted token is context of the next.

        Args:
            policy: of the run.
            draft: K = L - 1 tokens per row.
            logits_BLV: at the last known token and at each drafted one.
        """
        if not policy.penalties.are_on:
            return policy.adjust(logits_BLV, None)
        context = count_context(self.tokens_BT, self.prompt_B, self.length_B, logits_BLV.shape[-1])
        adjusted = [policy.adjust(logits_BLV[:, 0], context)]
        for k, token_B in enumerate(draft.tokens_BK.unbind(1), start=1):
            context = context.after(token_B)
            adjusted.append(policy.adjust(logits_BLV[:, k], context))
        return torch.stack(adjusted, dim=1)

    def emit(self, emission: Emission, draft: Draft | None) -> None:
        """Append the tokens of a pass, up to the end of each text.

        Args:
            emission: accepted tokens and the verifier's own.
            draft: the verified draft; None for the prefill, which is no verify pass, and for plain decoding.
        """
        slot_BL = self.length_B.unsqueeze(1) + self._offset_L[: emission.tokens_BL.shape[1]]
        self.tokens_BT.scatter_(1, slot_BL, emission.tokens_BL)
        accepted, tokens = emission.accepted_B.tolist(), emission.tokens_BL.tolist()
        gaps, probabilities = emission.gap_BL.tolist(), emission.probability_BL.tolist()
        drafted, proposed = (None, None) if draft is None else (draft.drafted_B.tolist(), draft.tokens_BK.tolist())
        self.newest = 0
        self.news = [None] * len(self.records)
        for row in [row for row, is_open in enumerate(self.is_open) if is_open]:
            new = self._cut(row, tokens[row][: accepted[row] + 1])
            record, count = self.records[row], len(new)
            record.tokens += new
            record.gaps += gaps[row][:count]
            record.probabilities += probabilities[row][:count]
            self.newest = max(self.newest, count)
            self.news[row] = NewTokens([], new, [])
            if drafted is not None and proposed is not None:
                kept = accepted[row]
                self._accepted[row].append(kept)
                self._drafted[row].append(drafted[row])
                record.rejected.append(proposed[row][kept] if kept < drafted[row] else None)
                rest = proposed[row][kept : drafted[row]] if count > kept else []
                self.news[row] = NewTokens(new[:kept], new[kept:], rest)
        lengths = [prompt + len(record.tokens) for prompt, record in zip(self.lengths, self.records, strict=True)]
        self.length_B = torch.tensor(lengths, device=self.tokens_BT.device)

    def _cut(self, row: int, new: list[int]) -> list[int]:
        """Return `new` up to the end of the text, and close the row if the text ends there."""
        room = self.limits.max_new_tokens - len(self.records[row].tokens)
        ends = [index + 1 for index, token in enumerate(new) if token in self.limits.stop]
        if self.limits.strings is not None:
            completed = self.limits.strings.end(self.records[row].tokens, new)
            ends += [] if completed is None else [completed]
        end = min([room, *ends])
        self.is_open[row] = len(new) < end
        return new[:end]

    def finish(self) -> list[Decoded]:
        """Return the records with their passes."""
        for record, accepted, drafted in zip(self.records, self._accepted, self._drafted, strict=True):
            record.passes = settle_passes(accepted, drafted, len(record.tokens))
        return self.records

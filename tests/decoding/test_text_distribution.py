"""Whole texts of the decoding engine follow the backbone's own distribution, computed by enumeration."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from mtptrain.certificate.sampler import chi_square
from mtptrain.config import DraftChoice
from mtptrain.decoding.draft import MtpProposer, Proposer
from mtptrain.decoding.penalties import Context, Penalties
from mtptrain.decoding.policy import Policy
from mtptrain.decoding.results import Limits
from mtptrain.decoding.speculative import decode_speculative
from mtptrain.decoding.texts import Draft
from mtptrain.kernels.acceptance import Verification, reference
from mtptrain.kernels.acceptance.reference import Verified, sample_tokens_reference, verify_draft_reference
from tests.tiny import random_backbone, random_stack

# R decoded texts, V vocabulary, E tokens of a text, K drafted tokens

VOCABULARY, TEXT_LENGTH, DRAFT_LENGTH = 4, 4, 2  # 256 texts; a token from the prefill, then passes that emit 1 to 3
ROWS = 2048
MODEL = random_backbone(vocab_size=VOCABULARY)
STACK = random_stack(MODEL)
PROMPT = [1, 3, 0, 2, 2]  # with the text it crosses a sliding window and compression windows

TOKEN = Policy(temperature=2.0)
BLOCK = Policy(temperature=2.0, verification=Verification.block)
POLICIES = {
    "token": TOKEN,
    "block": BLOCK,
    "token, top-k and top-p, greedy drafts": Policy(temperature=3.0, top_k=3, top_p=0.9, draft=DraftChoice.greedy),
    "block, drafts that stop": Policy(temperature=2.0, verification=Verification.block, min_confidence=0.5),
    "token, penalties and min-p": Policy(temperature=2.0, min_p=0.05, penalties=Penalties(1.4, 0.3, -0.4)),
    "block, penalties": replace(BLOCK, penalties=Penalties(0.8, -0.3, 0.9)),
}


def text_probabilities(policy: Policy) -> Tensor:
    """Probability of every text, float64 [V^E] in lexicographic order, from transformers' own forward over each."""
    texts_RE = torch.cartesian_prod(*[torch.arange(VOCABULARY)] * TEXT_LENGTH)
    prompts_RP = torch.tensor(PROMPT).expand(len(texts_RE), -1)
    with torch.inference_mode():
        logits_RSV = MODEL(input_ids=torch.cat([prompts_RP, texts_RE], 1), use_cache=False).logits
    p_REV = torch.stack(
        [_target(policy, logits_RSV, prompts_RP, texts_RE, emitted) for emitted in range(TEXT_LENGTH)], 1
    )
    return p_REV.gather(2, texts_RE.unsqueeze(2)).double().prod(1).squeeze(1)


def _target(policy: Policy, logits_RSV: Tensor, prompts_RP: Tensor, texts_RE: Tensor, emitted: int) -> Tensor:
    """Return the distribution of the token after `emitted` tokens of every text, with counts made one by one."""
    output_RV, text_RV = torch.zeros(2, len(texts_RE), VOCABULARY)
    for token in range(VOCABULARY):
        output_RV[:, token] = (texts_RE[:, :emitted] == token).sum(1)
        text_RV[:, token] = output_RV[:, token] + (prompts_RP == token).sum(1)
    return policy.target(logits_RSV[:, len(PROMPT) - 1 + emitted], Context(text_RV, output_RV))


def decoded(policy: Policy, proposer: Proposer) -> tuple[Tensor, float]:
    """Return how often each text was decoded, int64 [V^E], and the mean number of kept drafts per pass."""
    limits, seeds = Limits(TEXT_LENGTH), list(range(ROWS))
    rows = decode_speculative(MODEL, proposer, [PROMPT] * ROWS, DRAFT_LENGTH, limits, policy, seeds).rows
    place_value_E = VOCABULARY ** torch.arange(TEXT_LENGTH - 1, -1, -1)
    texts_R = (torch.tensor([row.tokens for row in rows]) * place_value_E).sum(1)
    passes = [verify_pass for row in rows for verify_pass in row.passes]
    kept = sum(verify_pass.accepted for verify_pass in passes) / len(passes)
    return texts_R.bincount(minlength=VOCABULARY**TEXT_LENGTH), kept


def follows_the_backbone(policy: Policy, proposer: Proposer) -> bool:
    """Return whether the chi-square test of all texts passes; the draws are fixed, so the result is too."""
    counts, kept = decoded(policy, proposer)
    assert 0.1 < kept < DRAFT_LENGTH, "drafts must be kept and rejected, or nothing is tested"
    result = chi_square(counts, text_probabilities(policy))
    assert result.dof > 50
    return result.passed


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES.keys())
def test_decoded_texts_follow_the_distribution_of_the_backbone(policy: Policy) -> None:
    assert follows_the_backbone(policy, MtpProposer(MODEL, STACK))


class ForgetfulProposer(MtpProposer):
    """Draws from the penalised logits and reports those without penalties."""

    def draft(self, u_BK: Tensor | None) -> Draft:
        """See `Proposer`."""
        policy = self.policy
        drawn = super().draft(u_BK)
        self.policy = replace(policy, penalties=Penalties())
        reported = super().draft(u_BK)
        self.policy = policy
        return Draft(drawn.tokens_BK, reported.logits_BKV, drawn.drafted_B)


class MisreportingProposer(MtpProposer):
    """Reports a flatter distribution of its drafts than their true one."""

    def draft(self, u_BK: Tensor | None) -> Draft:
        """See `Proposer`."""
        draft = super().draft(u_BK)
        assert draft.logits_BKV is not None
        return Draft(draft.tokens_BK, draft.logits_BKV / 2, draft.drafted_B)


def no_residual(draft: Tensor, q: Tensor, p: Tensor, u: Tensor, way: Verification) -> Verified:
    """After a rejection, draw the token from p instead of max(p - q, 0)."""
    kept, _ = verify_draft_reference(draft, q, p, u, way)
    return Verified(kept, sample_tokens_reference(p[torch.arange(len(kept)), kept], u[:, -1]))


def test_a_draft_that_misreports_its_distribution_is_noticed() -> None:
    assert not follows_the_backbone(TOKEN, MisreportingProposer(MODEL, STACK))


def test_a_draft_without_the_penalties_of_its_distribution_is_noticed() -> None:
    policy = replace(TOKEN, penalties=Penalties(frequency=2.5))
    assert not follows_the_backbone(policy, ForgetfulProposer(MODEL, STACK))


def test_a_wrong_token_after_a_rejection_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "verify_draft_reference", no_residual)
    assert not follows_the_backbone(BLOCK, MtpProposer(MODEL, STACK))

"""An exact test of the sampler: texts decoded with the real verification, counted against the computed distribution.

The world is a Markov chain over a handful of tokens, so the chance of every text is a product of table entries, and
the chance of every number of kept drafts is a sum over all drafts. Neither uses the code under test.
"""

# R decoded texts, V vocabulary, K drafted tokens, L = K + 1 verified positions, E tokens of a text, C counted classes

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import torch
from torch import Tensor

from mtptrain.evaluation.sampler_result import ChiSquare, KeptTest, SamplerTest, VerificationTest
from mtptrain.kernels.acceptance import DrawKind, Sampling, Verification, sample_logits, uniforms, verify_logits
from mtptrain.kernels.acceptance.reference import Verified
from mtptrain.run.progress import counted

VOCABULARY, DRAFT_LENGTH, TEXT_LENGTH = 5, 2, 3
DRAWS = 20_000  # texts for each verification
LEAST_EXPECTED = 5.0  # rarer classes are pooled, or the statistic is not distributed as chi-square
REJECT_BELOW = 1e-3  # the draws are fixed, so a sound sampler that passes once always passes
FIRST_TOKEN = 0
TABLES_SEED = 45  # of the seeds tried, the largest lead of block over token-wise verification: 0.72 against 0.58 kept
PLAIN = Sampling(temperature=1.0)
CPU = torch.device("cpu")

Sampler = Callable[[Tensor, Tensor], Tensor]
Verifier = Callable[[Tensor, Tensor, Tensor, Tensor, Verification], Verified]


def sample_as_decoding(q_RV: Tensor, u_R: Tensor) -> Tensor:
    """Return drafted tokens [R], drawn by decoding's sampler from the logarithms of their distributions."""
    return sample_logits(q_RV.log(), PLAIN, u_R)


def verify_as_decoding(
    draft_RK: Tensor, q_RKV: Tensor, p_RLV: Tensor, u_RL: Tensor, verification: Verification
) -> Verified:
    """Return kept drafts and next tokens by decoding's verifier, also from logarithms."""
    drafted_R = torch.full_like(draft_RK[:, 0], draft_RK.shape[1])
    emission = verify_logits(draft_RK, drafted_R, q_RKV.log(), p_RLV.log(), u_RL, PLAIN, verification)
    token_R1 = emission.tokens_BL.gather(1, emission.accepted_B.unsqueeze(1))
    return Verified(emission.accepted_B, token_R1.squeeze(1))


def random_tables(seed: int = TABLES_SEED) -> tuple[Tensor, Tensor]:
    """Return target p [V, V] and draft q [K, V, V] by last token, float32; each excludes some tokens of the other."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(1 + DRAFT_LENGTH, VOCABULARY, VOCABULARY, generator=generator).mul(1.5).exp()
    last_V = torch.arange(VOCABULARY)
    weight[0, last_V, (last_V + 1) % VOCABULARY] = 0  # never in the text, though drafted
    weight[1:, last_V, (last_V + 3) % VOCABULARY] = 0  # in the text, though never drafted
    tables = weight / weight.sum(-1, keepdim=True)
    return tables[0], tables[1:]


def text_probabilities(p_VV: Tensor) -> Tensor:
    """Return the chance of every text of E tokens after the first one, float64 [V^E], in lexicographic order."""
    chance = p_VV[FIRST_TOKEN].double()
    for _ in range(TEXT_LENGTH - 1):
        last = torch.arange(len(chance)) % VOCABULARY
        chance = (chance.unsqueeze(-1) * p_VV.double()[last]).flatten()
    return chance


def kept_probabilities(p_VV: Tensor, q_KVV: Tensor, verification: Verification) -> Tensor:
    """Return the chance that the first draft keeps exactly 0..K tokens, float64 [L], by enumeration of every draft.

    At least a tokens are kept with probability min(q, p) multiplied along the draft (token by token), or q w with
    w_a = min(1, w_{a-1} p / q) (block).

    Source: arXiv:2211.17192, section 3; arXiv:2403.10444, section 3.
    """
    p, q = p_VV.double().tolist(), q_KVV.double().tolist()
    reach_L = [1.0] + [0.0] * DRAFT_LENGTH
    for length in range(1, DRAFT_LENGTH + 1):
        for draft in product(range(VOCABULARY), repeat=length):
            drawn, weight, last = 1.0, 1.0, FIRST_TOKEN
            for step, token in enumerate(draft):
                q_token, p_token = q[step][last][token], p[last][token]
                ratio = p_token / q_token if q_token else 0.0
                weight = weight * min(1.0, ratio) if verification is Verification.token else min(1.0, weight * ratio)
                drawn, last = drawn * q_token, token
            reach_L[length] += drawn * weight
    return torch.tensor([here - later for here, later in zip(reach_L, [*reach_L[1:], 0.0], strict=True)]).double()


def decode_texts(
    p_VV: Tensor, q_KVV: Tensor, verification: Verification, draws: int, sample: Sampler, verify: Verifier
) -> tuple[Tensor, Tensor]:
    """Decode `draws` texts by drafting and verifying: int64 texts [R, E], and drafts kept in the first pass [R].

    The work is done on the device of the tables.
    """
    seed_R = torch.arange(draws, device=p_VV.device)
    known_RE = torch.full((draws, 1 + TEXT_LENGTH + DRAFT_LENGTH), FIRST_TOKEN, device=p_VV.device)
    length_R = torch.ones_like(seed_R)  # known tokens, the first one included
    first_kept_R: Tensor | None = None
    while bool((length_R <= TEXT_LENGTH).any()):
        position_R = length_R - 1
        last_R = known_RE.gather(1, position_R.unsqueeze(1)).squeeze(1)
        draft_RK, q_RKV, p_RLV = _draft(
            p_VV, q_KVV, last_R, uniforms(seed_R, position_R, DrawKind.draft, DRAFT_LENGTH), sample
        )
        u_RL = uniforms(seed_R, position_R, DrawKind.verify, DRAFT_LENGTH + 1)
        kept_R, token_R = verify(draft_RK, q_RKV, p_RLV, u_RL, verification)
        first_kept_R = kept_R if first_kept_R is None else first_kept_R
        emitted_RL = torch.cat([draft_RK, token_R.unsqueeze(1)], dim=1).scatter(
            1, kept_R.unsqueeze(1), token_R[:, None]
        )
        is_open_R = length_R <= TEXT_LENGTH
        slot_RL = length_R.unsqueeze(1) + torch.arange(DRAFT_LENGTH + 1, device=p_VV.device)
        known_RE[is_open_R] = known_RE[is_open_R].scatter(1, slot_RL[is_open_R], emitted_RL[is_open_R])
        length_R = torch.where(is_open_R, length_R + kept_R + 1, length_R)
    assert first_kept_R is not None
    return known_RE[:, 1 : 1 + TEXT_LENGTH], first_kept_R


def _draft(p_VV: Tensor, q_KVV: Tensor, last_R: Tensor, u_RN: Tensor, sample: Sampler) -> tuple[Tensor, Tensor, Tensor]:
    """Return a draft after each last token, with its distributions under draft and target."""
    drafts, q_rows, p_rows = [], [], [p_VV[last_R]]
    for step in range(DRAFT_LENGTH):
        q_rows.append(q_KVV[step, last_R])
        last_R = sample(q_rows[-1], u_RN[:, step])
        drafts.append(last_R)
        p_rows.append(p_VV[last_R])
    return torch.stack(drafts, dim=1), torch.stack(q_rows, dim=1), torch.stack(p_rows, dim=1)


def chi_square(observed_C: Tensor, chance_C: Tensor) -> ChiSquare:
    """Return Pearson's test of counts against computed chances.

    Args:
        observed_C: int64 counts.
        chance_C: float64 chances, summing to 1. The test fails if a class of chance 0 was observed at all.
    """
    expected_C = chance_C * observed_C.sum()
    is_rare_C = expected_C < LEAST_EXPECTED
    pairs = torch.stack([observed_C.double(), expected_C], dim=1)
    rare_2 = pairs[is_rare_C].sum(0)
    classes = torch.cat([pairs[~is_rare_C], rare_2[None]]) if rare_2[1] > 0 else pairs[~is_rare_C]
    statistic = ((classes[:, 0] - classes[:, 1]) ** 2 / classes[:, 1]).sum()
    dof = len(classes) - 1
    p_value = float(torch.special.gammaincc(torch.tensor(dof / 2).double(), statistic / 2))
    is_impossible = bool(observed_C[chance_C == 0].any())
    return ChiSquare(
        observed=observed_C.tolist(),
        expected=expected_C.tolist(),
        statistic=float(statistic),
        dof=dof,
        p_value=p_value,
        passed=not is_impossible and p_value >= REJECT_BELOW,
    )


def sampler_certificate(
    sample: Sampler = sample_as_decoding,
    verify: Verifier = verify_as_decoding,
    device: torch.device = CPU,
) -> SamplerTest:
    """Test whether sampled speculative decoding emits the target's distribution, for token and block verification.

    The draws are counter-based and fixed, so the result is always the same. A long test says what it does, and from
    the first verification on also what is left.

    Args:
        sample: draws drafted tokens.
        verify: verifies them.
        device: where the texts are decoded; that of the backbone, because a GPU has kernels of its own.
    """
    kinds = counted("certificate: testing the sampler", (Verification.token, Verification.block))
    token, block = [_test_verification(kind, sample, verify, device) for kind in kinds]
    return SamplerTest(
        draws=DRAWS,
        vocabulary=VOCABULARY,
        draft_length=DRAFT_LENGTH,
        text_length=TEXT_LENGTH,
        token=token,
        block=block,
        passed=token.passed and block.passed,
    )


def _test_verification(
    verification: Verification, sample: Sampler, verify: Verifier, device: torch.device
) -> VerificationTest:
    """Test the texts that a verification emits, and the number of drafts that it keeps."""
    p_VV, q_KVV = random_tables()
    decoded = decode_texts(p_VV.to(device), q_KVV.to(device), verification, DRAWS, sample, verify)
    text_RE, kept_R = (one.cpu() for one in decoded)
    digit_E = VOCABULARY ** torch.arange(TEXT_LENGTH - 1, -1, -1)
    counts = (text_RE * digit_E).sum(1).bincount(minlength=VOCABULARY**TEXT_LENGTH)
    texts = chi_square(counts, text_probabilities(p_VV))
    kept = _test_kept(kept_R, kept_probabilities(p_VV, q_KVV, verification))
    return VerificationTest(
        observed=texts.observed,
        expected=texts.expected,
        statistic=texts.statistic,
        dof=texts.dof,
        p_value=texts.p_value,
        passed=texts.passed and kept.passed,
        kept=kept,
    )


def _test_kept(kept_R: Tensor, chance_L: Tensor) -> KeptTest:
    kept = chi_square(kept_R.bincount(minlength=DRAFT_LENGTH + 1), chance_L)
    return KeptTest(
        observed=kept.observed,
        expected=kept.expected,
        statistic=kept.statistic,
        dof=kept.dof,
        p_value=kept.p_value,
        passed=kept.passed,
        mean=float(kept_R.double().mean()),
        expected_mean=float((chance_L * torch.arange(DRAFT_LENGTH + 1)).sum()),
    )

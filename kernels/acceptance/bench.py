"""`acceptance` beside its definition: verification of drafts from the logits of draft and target.

B rows, K drafted tokens, L = K + 1 verified positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from ..bench.case import Case, Outputs
from . import Emission, Sampling, Verification, policy_probabilities, verify_logits
from .reference import sample_tokens_reference, verify_logits_reference

ROWS = {"cpu": 2, "cuda": 64}
POLICIES = [
    (Verification.token, Sampling(1.0)),
    (Verification.block, Sampling(1.0)),
    (Verification.token, Sampling(0.7, 50, 0.9)),
]


def cases(device: torch.device, sizes: str) -> Iterator[Case]:
    """Yield cases of four drafted tokens over the vocabulary of DeepSeek-V4, with and without top-k and top-p."""
    for verification, sampling in POLICIES:
        yield _case(device, ROWS[sizes], 4, 129_280, verification, sampling)


def _case(device: torch.device, B: int, K: int, V: int, verification: Verification, sampling: Sampling) -> Case:
    generator = torch.Generator(device).manual_seed(0)
    logits_BLV = 3 * torch.randn(B, K + 1, V, generator=generator, device=device)
    draft_logits_BKV = logits_BLV[:, :K] + 0.5 * torch.randn(B, K, V, generator=generator, device=device)
    u_BL = torch.rand(B, K + 1, generator=generator, device=device, dtype=torch.float64)
    q_BKV = policy_probabilities(draft_logits_BKV, sampling)
    draft_BK = sample_tokens_reference(q_BKV.flatten(0, 1), u_BL[:, :K].flip(0).flatten()).view(B, K)
    drafted_B = torch.full_like(draft_BK[:, 0], K)

    def run_of(verify: Callable[..., Emission]) -> Callable[[], Outputs]:
        def run() -> Outputs:
            emission = verify(draft_BK, drafted_B, draft_logits_BKV, logits_BLV, u_BL, sampling, verification)
            accepted_B1 = emission.accepted_B.unsqueeze(1)
            return accepted_B1, emission.tokens_BL.gather(1, accepted_B1), emission.gap_BL

        return run

    settings = ", ".join(f"{name} {value}" for name, value in sampling._asdict().items())
    return Case(
        label=f"{B} rows, K {K}, V {V}, fp32 logits, {settings}, {verification} verification",
        ours=run_of(verify_logits),
        definition=run_of(verify_logits_reference),
        missing={"servers' samplers": "they cannot be called without the server"},
        bytes=4 * (logits_BLV.numel() + draft_logits_BKV.numel()),
        off=0.02,  # a draw may lie on the border of two of 129,280 tokens, to the last bits of a softmax
    )

"""`acceptance` beside its definition: both distributions from logits, then what is kept and the token after it.

B rows, K drafted tokens, L = K + 1 verified positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from ..bench.case import Case, Outputs
from . import Verification, policy_probabilities, sample_tokens, verify_draft
from .reference import policy_probabilities_reference, verify_draft_reference

ROWS = {"cpu": 2, "cuda": 64}
POLICIES: list[tuple[Verification, dict[str, Any]]] = [
    (Verification.token, {"temperature": 1.0}),
    (Verification.block, {"temperature": 1.0}),
    (Verification.token, {"temperature": 0.7, "top_k": 50, "top_p": 0.9}),
]


def cases(device: torch.device) -> Iterator[Case]:
    """Four drafted tokens over the vocabulary of DeepSeek-V4, by plain softmax and cut."""
    for verification, policy in POLICIES:
        yield _case(device, ROWS[device.type], 4, 129_280, verification, policy)


def _case(device: torch.device, B: int, K: int, V: int, verification: Verification, policy: dict[str, Any]) -> Case:
    generator = torch.Generator(device).manual_seed(0)
    logits_BLV = 3 * torch.randn(B, K + 1, V, generator=generator, device=device)
    draft_logits_BKV = logits_BLV[:, :K] + 0.5 * torch.randn(B, K, V, generator=generator, device=device)
    u_BL = torch.rand(B, K + 1, generator=generator, device=device, dtype=torch.float64)
    q_BKV = policy_probabilities(draft_logits_BKV, **policy)
    draft_BK = sample_tokens(q_BKV.flatten(0, 1), u_BL[:, :K].flip(0).flatten()).view(B, K)

    def chain(probabilities: Callable[..., Any], verify: Callable[..., Any]) -> Callable[[], Outputs]:
        def run() -> Outputs:
            q_BKV, p_BLV = (probabilities(x, **policy) for x in (draft_logits_BKV, logits_BLV))
            return tuple(verify(draft_BK, q_BKV, p_BLV, u_BL, verification))

        return run

    settings = ", ".join(f"{name} {value}" for name, value in policy.items())
    return Case(
        label=f"{B} rows, K {K}, V {V}, fp32 logits, {settings}, {verification} verification",
        ours=chain(policy_probabilities, verify_draft),
        definition=chain(policy_probabilities_reference, verify_draft_reference),
        missing={"servers' samplers": "they cannot be called without the server"},
        bytes=4 * (logits_BLV.numel() + draft_logits_BKV.numel()),
    )

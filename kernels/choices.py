"""Enums that ops and settings share; this module imports no torch."""

from enum import StrEnum


class Divergence(StrEnum):
    """Measure of the distance from the draft distribution q to the teacher's p; formulas in `linear_loss/reference.py`.

    Source: ce is DeepSeek-V3 section 2.2 (arXiv:2412.19437); neg_log_alpha and hybrid are arXiv:2602.23881.
    """

    ce = "ce"  # -log q of the data token; the only member that ignores the teacher and the temperature
    kl = "kl"  # forward, KL(p || q)
    reverse_kl = "reverse_kl"  # KL(q || p)
    jsd = "jsd"  # half of KL(p || m) + KL(q || m), with m = (p + q) / 2
    tv = "tv"  # 1 - sum_v min(p, q): the chance that a drafted token is rejected
    neg_log_alpha = "neg_log_alpha"  # -log sum_v min(p, q)
    hybrid = "hybrid"  # lambda * kl + (1 - lambda) * tv, leaning towards tv as acceptance grows


class Verification(StrEnum):
    """Verification of a draft; with both, the output has the target's distribution."""

    token = "token"  # token by token, as servers do: arXiv:2211.17192, Algorithm 1
    block = "block"  # arXiv:2403.10444, Algorithm 2: never fewer tokens in expectation; the same at K = 1

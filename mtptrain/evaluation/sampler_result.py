"""The certificate of the sampler as types: counts of decoded texts against their distribution."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ChiSquare:
    """Pearson's test of counts against computed expectations."""

    observed: list[int]
    expected: list[float]
    statistic: float
    dof: int
    p_value: float
    passed: bool


@dataclass(frozen=True, slots=True)
class KeptTest(ChiSquare):
    """Test of the number of kept drafts, and its means."""

    mean: float
    expected_mean: float


@dataclass(frozen=True, slots=True)
class VerificationTest(ChiSquare):
    """Test of the texts that one verification emits; `passed` covers `kept`, the test of its kept drafts, too."""

    kept: KeptTest


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplerTest:
    """Texts decoded with the real verification against their enumerated distribution.

    Attributes:
        draws: texts of each verification.
        vocabulary: number of tokens.
        draft_length: K.
        text_length: tokens of a text.
        token, block: the two verifications.
        passed: both passed.
    """

    draws: int
    vocabulary: int
    draft_length: int
    text_length: int
    token: VerificationTest
    block: VerificationTest
    passed: bool

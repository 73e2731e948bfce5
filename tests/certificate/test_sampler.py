"""The exact test of the sampler passes for the real one and fails for every usual mistake."""

import json
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from mtptrain.certificate import sampler
from mtptrain.certificate.sampler import (
    chi_square,
    decode_texts,
    kept_probabilities,
    random_tables,
    sampler_certificate,
)
from mtptrain.evaluation.sampler_result import SamplerTest
from mtptrain.kernels.acceptance import Verification
from mtptrain.kernels.acceptance.reference import Verified, sample_tokens_reference, verify_draft_reference
from mtptrain.run import progress
from mtptrain.run.typed_json import from_json, to_json


def test_the_real_sampler_passes() -> None:
    result = sampler_certificate()
    assert result.passed
    for way in (result.token, result.block):
        assert sum(way.observed) == result.draws
        assert sum(way.expected) == pytest.approx(result.draws)
        # Five standard errors of a mean of draws that lie between 0 and K.
        spread = 5 * result.draft_length / 2 / result.draws**0.5
        assert way.kept.mean == pytest.approx(way.kept.expected_mean, abs=spread)


def test_the_texts_are_decoded_on_the_device_of_the_backbone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels of a GPU take tensors on it; a CPU's would be verified by the definitions."""
    devices = set()

    def decode(p_VV: Tensor, q_KVV: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
        devices.update({p_VV.device.type, q_KVV.device.type})
        return decode_texts(*random_tables(), *others)

    monkeypatch.setattr(sampler, "decode_texts", decode)
    assert sampler_certificate(device=torch.device("meta")).passed
    assert devices == {"meta"}


def test_the_certificate_is_deterministic_and_json_and_estimates_what_is_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "QUIET_SECONDS", 0.001)
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_SIGNS", 0.001)
    stored = json.loads(json.dumps(to_json(sampler_certificate())))
    assert from_json(SamplerTest, stored) == sampler_certificate()
    assert re.search(
        r"certificate: testing the sampler, for \d:\d\d so far, about \d:\d\d left", capsys.readouterr().err
    )


def test_block_verification_keeps_more_than_token_verification() -> None:
    tables = random_tables()
    token, block = (kept_probabilities(*tables, way) for way in (Verification.token, Verification.block))
    steps = torch.arange(len(token))
    assert float((block * steps).sum()) > float((token * steps).sum()) + 0.1
    torch.testing.assert_close(token.sum(), torch.ones_like(token.sum()))


def accept_without_residual(draft: Tensor, q: Tensor, p: Tensor, u: Tensor, way: Verification) -> Verified:
    """After a rejection the token is drawn from p instead of max(p - q, 0)."""
    kept, _ = verify_draft_reference(draft, q, p, u, way)
    return Verified(kept, sample_tokens_reference(p[torch.arange(len(kept)), kept], u[:, -1]))


def residual_not_renormalised(draft: Tensor, q: Tensor, p: Tensor, u: Tensor, way: Verification) -> Verified:
    """The residual is cumulated without dividing by its mass, so that the last token takes the missing mass."""
    kept, _ = verify_draft_reference(draft, q, p, u, way)
    rows = torch.arange(len(kept))
    left = (p[rows, kept] - torch.nn.functional.pad(q, (0, 0, 0, 1))[rows, kept]).clamp(min=0).double()
    token = (left.cumsum(-1) <= u[:, -1:]).sum(-1).clamp(max=p.shape[-1] - 1)
    return Verified(kept, token)


def always_accept(draft: Tensor, q: Tensor, p: Tensor, u: Tensor, way: Verification) -> Verified:
    """The whole draft is kept."""
    kept = torch.full_like(draft[:, 0], draft.shape[1])
    return Verified(kept, sample_tokens_reference(p[:, -1], u[:, -1]))


def accept_by_target_alone(draft: Tensor, q: Tensor, p: Tensor, u: Tensor, way: Verification) -> Verified:
    """A draft is kept with probability p instead of min(1, p / q)."""
    return verify_draft_reference(draft, torch.ones_like(q), p, u, way)


def one_draw_for_everything(draft: Tensor, q: Tensor, p: Tensor, u: Tensor, way: Verification) -> Verified:
    """The draw that rejected a draft also chooses the token after it."""
    return verify_draft_reference(draft, q, p, u[:, :1].expand_as(u), way)


def reject_too_often(draft: Tensor, q: Tensor, p: Tensor, u: Tensor, way: Verification) -> Verified:
    """Lossless, because nothing is ever kept and the token comes from p, but no faster than plain decoding."""
    kept = torch.zeros_like(draft[:, 0])
    return Verified(kept, sample_tokens_reference(p[:, 0], u[:, -1]))


@pytest.mark.parametrize(
    "broken",
    [
        accept_without_residual,
        residual_not_renormalised,
        always_accept,
        accept_by_target_alone,
        one_draw_for_everything,
        reject_too_often,
    ],
)
def test_a_broken_verification_fails(broken: Callable[..., Verified]) -> None:
    result = sampler_certificate(verify=broken)
    assert not result.token.passed
    assert not result.passed


def test_greedy_drafts_verified_against_the_heads_softmax_fail() -> None:
    result = sampler_certificate(sample=lambda weight, u: weight.argmax(-1))
    assert not result.token.passed
    assert not result.block.passed


def test_only_the_number_of_kept_drafts_betrays_a_sampler_that_rejects_too_often() -> None:
    result = sampler_certificate(verify=reject_too_often)
    assert result.token.p_value > 1e-3
    assert not result.token.kept.passed


def test_a_token_of_probability_zero_fails_however_rare() -> None:
    chance = torch.tensor([0.5, 0.5, 0.0]).double()
    assert chi_square(torch.tensor([500, 500, 0]), chance).passed
    assert not chi_square(torch.tensor([500, 499, 1]), chance).passed


def test_chi_square_equals_a_tabulated_value() -> None:
    """The 5 % point of one degree of freedom is 3.841."""
    observed = torch.tensor([5310, 4690])
    result = chi_square(observed, torch.tensor([0.5, 0.5]).double())
    assert result.dof == 1
    assert result.statistic == pytest.approx(38.44)
    near = chi_square(torch.tensor([5098, 4902]), torch.tensor([0.5, 0.5]).double())
    assert near.statistic == pytest.approx(3.8416)
    assert near.p_value == pytest.approx(0.05, abs=1e-4)

import pytest
import torch
from torch import Tensor

from mtptrain.kernels.acceptance import (
    DrawKind,
    Sampling,
    Verification,
    policy_probabilities,
    sample_logits,
    uniforms,
)
from mtptrain.kernels.acceptance.draws import philox
from mtptrain.kernels.acceptance.reference import sample_tokens_reference, verify_draft_reference
from tests.kernels.enumerable import World, decoded_texts, pass_outcomes, random_world

# B rows, K drafted tokens, L = K + 1 verified positions, V vocabulary, N draws.
VERIFICATIONS = list(Verification)
SIZES = [(3, 1), (5, 1), (5, 2), (3, 3), (4, 3)]  # V, K


def int64(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)


def random_case(rows: int, steps: int, vocabulary: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """Return draft, q, p and draws of rows with their numbers as seeds; drafts are sampled from q."""
    generator = torch.Generator().manual_seed(rows + steps + vocabulary)
    q_BKV, p_BLV = (
        policy_probabilities(
            torch.randn(rows, k, vocabulary, generator=generator, dtype=dtype), Sampling(0.7, top_k=50)
        )
        for k in (steps, steps + 1)
    )
    seed_B, position_B = torch.arange(rows), torch.arange(rows) + 7
    u_BK = uniforms(seed_B, position_B, DrawKind.draft, steps)
    draft_BK = sample_tokens_reference(q_BKV.flatten(0, 1), u_BK.flatten()).view(rows, steps)
    return draft_BK, q_BKV, p_BLV, uniforms(seed_B, position_B, DrawKind.verify, steps + 1)


def chi_square_p_value(observed: Tensor, expected: Tensor) -> float:
    likely = expected > 0
    assert observed[~likely].sum() == 0
    statistic = ((observed - expected)[likely] ** 2 / expected[likely]).sum()
    half_freedom = (likely.sum() - 1).double() / 2
    return float(torch.special.gammaincc(half_freedom, statistic.double() / 2))


class TestPolicy:
    logits_V = torch.tensor([1.0, 3.0, 2.0, 3.0, -1.0])

    def test_temperature_alone_is_a_softmax(self) -> None:
        logits_BKV = torch.randn(2, 3, 129, generator=torch.Generator().manual_seed(0))
        expected = (logits_BKV / 0.6).softmax(-1)
        # The shift by the largest logit rounds it at about 10 eps.
        torch.testing.assert_close(policy_probabilities(logits_BKV, Sampling(0.6)), expected, rtol=2e-6, atol=1e-8)

    def test_temperature_0_takes_the_lowest_of_equals(self) -> None:
        assert policy_probabilities(self.logits_V, Sampling(0)).tolist() == [0, 1, 0, 0, 0]

    @pytest.mark.parametrize("temperature", [1e-6, 1e-40])
    def test_a_tiny_temperature_shares_among_equals(self, temperature: float) -> None:
        assert policy_probabilities(self.logits_V, Sampling(temperature)).tolist() == [0, 0.5, 0, 0.5, 0]

    @pytest.mark.parametrize(
        ("top_k", "kept"), [(1, [1]), (2, [1, 3]), (3, [1, 2, 3]), (5, [0, 1, 2, 3, 4]), (9, None)]
    )
    def test_top_k_keeps_k_tokens_lower_ids_first(self, top_k: int, kept: list[int] | None) -> None:
        p_V = policy_probabilities(self.logits_V, Sampling(1.3, top_k=top_k))
        whole_V = policy_probabilities(self.logits_V, Sampling(1.3))
        kept_V = torch.zeros(5).index_fill(0, torch.tensor(kept or range(5)), 1)
        torch.testing.assert_close(p_V, whole_V * kept_V / (whole_V * kept_V).sum())

    @pytest.mark.parametrize(
        ("top_p", "expected"),
        [
            (1e-9, [0, 0, 1, 0]),
            (0.49, [0, 0, 1, 0]),
            (0.51, [1 / 3, 0, 2 / 3, 0]),
            (0.74, [1 / 3, 0, 2 / 3, 0]),
            (0.76, [2 / 7, 1 / 7, 4 / 7, 0]),
            (1.0, [0.25, 0.125, 0.5, 0.125]),
        ],
    )
    def test_top_p_keeps_the_fewest_tokens_that_reach_it(self, top_p: float, expected: list[float]) -> None:
        logits_V = torch.tensor([0.25, 0.125, 0.5, 0.125], dtype=torch.float64).log()
        p_V = policy_probabilities(logits_V, Sampling(1.0, top_p=top_p))
        torch.testing.assert_close(p_V, torch.tensor(expected).double())

    def test_reaching_top_p_exactly_is_enough(self) -> None:
        assert policy_probabilities(torch.zeros(8), Sampling(1.0, top_p=0.25)).tolist() == [0.5, 0.5, 0, 0, 0, 0, 0, 0]

    @pytest.mark.parametrize("setting", [{"top_k": 7}, {"top_p": 6.5 / 1031}])
    def test_of_many_equals_the_lowest_ids_are_kept(self, setting: dict[str, float]) -> None:
        p_V = policy_probabilities(torch.zeros(1031), Sampling(1.0, **setting))  # type: ignore[arg-type]
        assert p_V.nonzero()[:, 0].tolist() == list(range(7))

    def test_top_p_applies_to_the_result_of_top_k(self) -> None:
        logits_V = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
        p_V = policy_probabilities(logits_V, Sampling(1.0, top_k=2, top_p=0.55))  # 0.4 of 0.7 reaches it
        assert p_V.tolist() == [1, 0, 0, 0]

    def test_impossible_tokens_stay_impossible(self) -> None:
        logits_V = torch.tensor([-torch.inf, 0.0, -torch.inf])
        assert policy_probabilities(logits_V, Sampling(0.5, top_k=3, top_p=0.9)).tolist() == [0, 1, 0]

    def test_half_precision_logits_give_float32(self) -> None:
        assert policy_probabilities(self.logits_V.bfloat16(), Sampling(1.0)).dtype == torch.float32

    @pytest.mark.parametrize(
        ("setting", "message"),
        [
            ({"temperature": -0.1}, "temperature=-0.1"),
            ({"temperature": float("nan")}, "temperature=nan"),
            ({"temperature": 1.0, "top_k": 0}, "top_k=0"),
            ({"temperature": 1.0, "top_p": 0.0}, "top_p=0.0"),
            ({"temperature": 1.0, "top_p": 1.1}, "top_p=1.1"),
        ],
    )
    def test_a_setting_out_of_range_is_named(self, setting: dict[str, float], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            policy_probabilities(self.logits_V, Sampling(**setting))  # type: ignore[arg-type]

    def test_integer_logits_are_refused(self) -> None:
        with pytest.raises(ValueError, match="must be floating"):
            policy_probabilities(torch.tensor([1, 2]), Sampling(1.0))


class TestDraws:
    @pytest.mark.parametrize(
        ("counter", "key", "words"),
        [  # known answers published with Random123
            ([0] * 4, [0] * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
            ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
            (
                [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
                [0xA4093822, 0x299F31D0],
                "d16cfe09 94fdcceb 5001e420 24126ea1",
            ),
        ],
    )
    def test_philox_gives_its_known_answers(self, counter: list[int], key: list[int], words: str) -> None:
        result = philox(tuple(int64(x) for x in counter), tuple(int64(x) for x in key))
        assert " ".join(f"{int(word):08x}" for word in result) == words

    def test_a_draw_joins_the_53_highest_bits_of_two_words(self) -> None:
        """With seed, position, kind and index 0, they are the words of the first known answer."""
        draw = uniforms(int64(0), int64(0), DrawKind.draft, 1).item()
        assert draw == (0x6627E8D5 >> 5) / 2**27 + (0xE169C58D >> 6) / 2**53

    def test_a_draw_depends_only_on_its_row_and_index(self) -> None:
        seed_B, position_B = int64(5, -1, 2**62, 5), int64(0, 9, 2**33, 1)
        together_BN = uniforms(seed_B, position_B, DrawKind.verify, 9)
        for row in range(4):
            alone_1N = uniforms(seed_B[row : row + 1], position_B[row : row + 1], DrawKind.verify, 4)
            assert torch.equal(alone_1N[0], together_BN[row, :4])

    def test_every_part_of_the_counter_changes_the_draw(self) -> None:
        cases = [(0, 0, DrawKind.verify), (0, 0, DrawKind.draft), (0, 1, DrawKind.draft), (0, 2**32, DrawKind.draft)]
        cases += [(1, 0, DrawKind.draft), (2**32, 0, DrawKind.draft), (-1, 0, DrawKind.draft)]
        draws = [u for seed, slot, kind in cases for u in uniforms(int64(seed), int64(slot), kind, 5)[0].tolist()]
        assert len(set(draws)) == 5 * len(cases)

    @pytest.mark.parametrize("shape", [(1, 1, 40_000), (40_000, 1, 1), (1, 40_000, 1), (20, 500, 4)])
    def test_draws_are_uniform_and_uncorrelated(self, shape: tuple[int, int, int]) -> None:
        """True whether seed, position or index counts up."""
        seeds, positions, num_draws = shape
        seed_B = torch.arange(seeds).repeat_interleave(positions)
        u = uniforms(seed_B, torch.arange(positions).repeat(seeds), DrawKind.draft, num_draws).flatten()
        count = u.numel()
        assert count == 40_000
        assert ((u >= 0) & (u < 1)).all()
        assert abs(u.mean() - 0.5) < 4 / (12 * count) ** 0.5  # four standard errors
        bins = torch.histc(u, 64, 0, 1)
        assert chi_square_p_value(bins, torch.full_like(bins, count / 64)) > 1e-4
        centred = u - u.mean()
        for lag in (1, 2, 4):
            correlation = (centred[lag:] * centred[:-lag]).mean() / centred.square().mean()
            assert abs(correlation) < 4 / count**0.5

    @pytest.mark.parametrize(
        ("seed_B", "position_B", "num_draws", "message"),
        [
            (int64(1, 2), int64(1), 1, "one for each row"),
            (torch.tensor([1.0]), int64(1), 1, "torch.int64"),
            (int64(1), int64(1), -1, "num_draws=-1"),
        ],
    )
    def test_unfit_counters_are_refused(self, seed_B: Tensor, position_B: Tensor, num_draws: int, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            uniforms(seed_B, position_B, DrawKind.draft, num_draws)


class TestSampling:
    def test_each_token_gets_its_share_of_the_unit_interval(self) -> None:
        weight_V = torch.tensor([0.0, 2.0, 0.0, 1.0, 1.0, 0.0])
        u_B = torch.tensor([0.0, 0.499, 0.5, 0.749, 0.75, 1 - 2**-53], dtype=torch.float64)
        assert sample_tokens_reference(weight_V.expand(6, 6), u_B).tolist() == [1, 1, 3, 3, 4, 4]

    @pytest.mark.parametrize("sampling", [Sampling(1.3), Sampling(0.7, 4), Sampling(0.9, None, 0.8), Sampling(0)])
    def test_a_policy_samples_from_its_distribution(self, sampling: Sampling) -> None:
        logits_BV = torch.randn(63, 17, generator=torch.Generator().manual_seed(0))
        u_B = uniforms(torch.arange(63), torch.arange(63), DrawKind.draft, 1)[:, 0]
        expected_B = sample_tokens_reference(policy_probabilities(logits_BV, sampling), u_B)
        assert torch.equal(sample_logits(logits_BV, sampling, u_B), expected_B)

    def test_draws_in_single_precision_are_refused(self) -> None:
        with pytest.raises(ValueError, match=r"must be torch\.float64"):
            sample_logits(torch.ones(2, 3), Sampling(1.0), torch.rand(2))


@pytest.mark.parametrize("greedy", [False, True])
@pytest.mark.parametrize(("vocabulary", "steps"), SIZES)
@pytest.mark.parametrize("verification", VERIFICATIONS)
def test_decoded_texts_are_distributed_as_the_target(
    verification: Verification, vocabulary: int, steps: int, greedy: bool
) -> None:
    world = random_world(vocabulary, steps, greedy)
    length = steps + 2 if vocabulary == 3 else steps + 1
    chance, _ = decoded_texts(world, steps, verification, length)
    torch.testing.assert_close(torch.from_numpy(chance), world.text_probability(length), rtol=0, atol=1e-12)


def mean_accepted(world: World, steps: int, state: int, verification: Verification) -> float:
    outcomes = pass_outcomes(world, state, steps, verification)
    return sum(accepted * float(joint.sum()) for accepted, joint in enumerate(outcomes))


@pytest.mark.parametrize(("vocabulary", "steps"), SIZES)
def test_block_verification_accepts_no_fewer_tokens(vocabulary: int, steps: int) -> None:
    world = random_world(vocabulary, steps, seed=1)
    gains = [
        mean_accepted(world, steps, state, Verification.block) - mean_accepted(world, steps, state, Verification.token)
        for state in range(40)
    ]
    assert min(gains) > -1e-12
    assert (max(gains) > 0.01) == (steps > 1)


def test_the_example_of_the_paper_accepts_10_and_11_ninths() -> None:
    """Two tokens without context: target 1/3 and 2/3, draft the other way round, two steps."""
    p_V = torch.tensor([1.0, 2.0], dtype=torch.float64) / 3
    world = World(p_V.expand(1009, 2), p_V.flip(0).expand(2, 1009, 2))
    assert mean_accepted(world, 2, 0, Verification.token) == pytest.approx(10 / 9)
    assert mean_accepted(world, 2, 0, Verification.block) == pytest.approx(11 / 9)


@pytest.mark.parametrize("greedy", [False, True])
@pytest.mark.parametrize("verification", VERIFICATIONS)
def test_sampled_texts_pass_a_chi_square_test(verification: Verification, greedy: bool) -> None:
    rows, length, steps = 20_000, 3, 2
    world = random_world(4, steps, greedy, seed=2)
    seed_B, state_B = torch.arange(rows), torch.zeros(rows, dtype=torch.int64)
    text_BE, emitted_B = torch.zeros(rows, length + steps + 1, dtype=torch.int64), torch.zeros_like(state_B)
    every_row_B = torch.arange(rows)
    while int(emitted_B.min()) < length:
        live_B = emitted_B < length
        u_BK = uniforms(seed_B, emitted_B, DrawKind.draft, steps)
        states, drafts, q_rows = [state_B], [], []
        for k in range(steps):
            q_rows.append(policy_probabilities(world.q_KSV[k, states[-1]].log(), Sampling(1.0)))
            drafts.append(sample_tokens_reference(q_rows[-1], u_BK[:, k]))
            states.append(world.follow(states[-1], drafts[-1]))
        draft_BK, q_BKV = torch.stack(drafts, 1), torch.stack(q_rows, 1)
        p_BLV = policy_probabilities(world.p_SV[torch.stack(states, 1)].log(), Sampling(1.0))
        u_BL = uniforms(seed_B, emitted_B, DrawKind.verify, steps + 1)
        accepted_B, token_B = verify_draft_reference(draft_BK, q_BKV, p_BLV, u_BL, verification)
        new_BL = torch.cat([draft_BK, token_B[:, None]], 1)
        new_BL[every_row_B, accepted_B] = token_B
        for k in range(steps + 1):
            moved_B = live_B & (k <= accepted_B)
            text_BE[every_row_B[moved_B], emitted_B[moved_B]] = new_BL[moved_B, k]
            state_B = torch.where(moved_B, world.follow(state_B, new_BL[:, k]), state_B)
            emitted_B = emitted_B + moved_B
    number_B = (text_BE[:, :length] * torch.tensor([16, 4, 1])).sum(-1)
    observed = torch.bincount(number_B, minlength=64).double()
    assert chi_square_p_value(observed, rows * world.text_probability(length)) > 1e-4


@pytest.mark.parametrize(("steps", "vocabulary"), [(0, 5), (1, 2), (3, 129), (8, 63)])
@pytest.mark.parametrize("verification", VERIFICATIONS)
def test_rows_are_verified_as_they_are_alone(verification: Verification, steps: int, vocabulary: int) -> None:
    case = random_case(9, steps, vocabulary)
    together = verify_draft_reference(*case, verification)
    for row in range(9):
        alone = verify_draft_reference(*(x[row : row + 1] for x in case), verification)
        assert alone.accepted_B.item() == together.accepted_B[row].item()
        assert alone.token_B.item() == together.token_B[row].item()


@pytest.mark.parametrize("verification", VERIFICATIONS)
def test_a_shorter_draft_is_verified_as_if_it_stood_alone(verification: Verification) -> None:
    draft_BK, q_BKV, p_BLV, u_BL = random_case(63, 4, 17)
    used = 2
    padded = verify_draft_reference(draft_BK, q_BKV.clone().index_fill_(1, int64(2, 3), 0), p_BLV, u_BL, verification)
    u_short_BL = torch.cat([u_BL[:, :used], u_BL[:, -1:]], dim=1)
    short = verify_draft_reference(draft_BK[:, :used], q_BKV[:, :used], p_BLV[:, : used + 1], u_short_BL, verification)
    assert torch.equal(padded.accepted_B, short.accepted_B)
    assert torch.equal(padded.token_B, short.token_B)


@pytest.mark.parametrize("verification", VERIFICATIONS)
def test_the_target_as_its_own_draft_is_kept_whole(verification: Verification) -> None:
    draft_BK, q_BKV, p_BLV, u_BL = random_case(129, 5, 31)
    p_BLV = torch.cat([q_BKV, p_BLV[:, -1:]], dim=1)
    accepted_B, token_B = verify_draft_reference(draft_BK, q_BKV, p_BLV, u_BL, verification)
    assert (accepted_B == 5).all()
    assert torch.equal(token_B, sample_tokens_reference(p_BLV[:, -1], u_BL[:, -1]))


@pytest.mark.parametrize("verification", VERIFICATIONS)
def test_greedy_decoding_keeps_the_choices_of_the_target(verification: Verification) -> None:
    """Draft and target at temperature 0: the accepted prefix and the target's token, for any draws."""
    generator = torch.Generator().manual_seed(4)
    p_BLV = policy_probabilities(torch.randn(63, 4, 3, generator=generator), Sampling(0))
    q_BKV = policy_probabilities(torch.randn(63, 3, 3, generator=generator), Sampling(0))
    draft_BK, chosen_BL = q_BKV.argmax(-1), p_BLV.argmax(-1)
    u_BL = torch.rand(63, 4, generator=generator, dtype=torch.float64)
    accepted_B, token_B = verify_draft_reference(draft_BK, q_BKV, p_BLV, u_BL, verification)
    expected_B = (draft_BK == chosen_BL[:, :-1]).long().cumprod(-1).sum(-1)
    assert set(expected_B.tolist()) >= {0, 1, 2}
    assert torch.equal(accepted_B, expected_B)
    assert torch.equal(token_B, chosen_BL.gather(-1, expected_B[:, None])[:, 0])


@pytest.mark.parametrize("verification", VERIFICATIONS)
def test_a_token_that_the_target_forbids_is_never_emitted(verification: Verification) -> None:
    draft_BK, q_BKV, p_BLV, u_BL = random_case(1031, 3, 129)  # top-k leaves 79 tokens of 129 at 0
    accepted_B, token_B = verify_draft_reference(draft_BK, q_BKV, p_BLV, u_BL, verification)
    p_next_BV = p_BLV[torch.arange(1031), accepted_B]
    assert (p_next_BV.gather(-1, token_B[:, None]) > 0).all()
    kept_BK = torch.arange(3) < accepted_B[:, None]
    assert (p_BLV[:, :-1].gather(-1, draft_BK[..., None])[..., 0][kept_BK] > 0).all()

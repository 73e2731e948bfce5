import torch

from mtptrain.decoding.draws import Draws, row_seed


def test_every_prompt_of_every_run_has_a_seed_of_its_own() -> None:
    assert len({row_seed(seed, number) for seed in range(8) for number in (0, 1, 2, 2**31, 2**32 - 1)}) == 40


def test_passes_of_a_row_and_rows_of_a_batch_draw_independently() -> None:
    seeds = [row_seed(0, number) for number in range(3)]
    draws = Draws(seeds, [4, 4, 7], max_new_tokens=5, draft_length=2, device=torch.device("cpu"))
    all_draws = [
        draw
        for emitted in range(5)
        for uses in (draws.draft(torch.full((3,), emitted)), draws.verify(torch.full((3,), emitted), 2))
        for draw in uses.flatten().tolist()
    ]
    assert len(set(all_draws)) == len(all_draws) == 5 * 3 * (2 + 3)


def test_the_verifiers_own_token_has_the_last_draw_however_long_the_draft() -> None:
    draws = Draws([row_seed(0, 0)], [4], max_new_tokens=5, draft_length=3, device=torch.device("cpu"))
    whole = draws.verify(torch.tensor([1]), 3)
    for drafted in range(3):
        assert torch.equal(draws.verify(torch.tensor([1]), drafted), whole[:, [*range(drafted), 3]])

import numpy as np
import pytest
import torch

from mtptrain.batch import Batch
from mtptrain.data.batches import PackedBatches
from mtptrain.data.tokens import TokenizedCorpus
from mtptrain.errors import UserError
from mtptrain.run import distributed

# S tokens per row

S = 16


def same(left: Batch, right: Batch) -> bool:
    return (
        torch.equal(left.tokens_BS, right.tokens_BS)
        and torch.equal(left.segment_BS, right.segment_BS)
        and torch.equal(left.position_BS, right.position_BS)
    )


def packed_batches(seed: int = 0, batch_size: int = 3, num_documents: int = 29) -> PackedBatches:
    """Return batches of rows with one document each, so that the first token of a row identifies it."""
    corpus = TokenizedCorpus(
        np.arange(num_documents * S, dtype=np.int32), np.arange(num_documents + 1, dtype=np.int64) * S, 1
    )
    return PackedBatches(corpus, S, batch_size, seed)


def test_a_batch_is_a_function_of_seed_and_number_alone() -> None:
    in_order, single = packed_batches(), packed_batches()
    forward = [in_order.batch(index) for index in range(25)]
    for index in (24, 3, 11, 0):
        assert same(single.batch(index), forward[index])


def test_every_epoch_is_a_permutation_of_all_rows() -> None:
    batches = packed_batches()
    first_tokens = torch.cat([batches.batch(index).tokens_BS[:, 0] for index in range(29)]).tolist()
    epochs = [first_tokens[start : start + 29] for start in (0, 29, 58)]
    assert all(sorted(epoch) == list(range(0, 29 * S, S)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_another_seed_gives_another_order() -> None:
    assert not same(packed_batches(seed=0).batch(0), packed_batches(seed=1).batch(0))


def test_a_batch_may_be_larger_than_the_corpus() -> None:
    batch = packed_batches(batch_size=7, num_documents=3).batch(0)
    assert batch.tokens_BS.shape == (7, S)


@pytest.mark.parametrize("lengths", [[], [1, 1]])
def test_a_corpus_without_targets_is_refused(lengths: list[int]) -> None:
    corpus = TokenizedCorpus(np.zeros(sum(lengths), np.int32), np.cumsum([0, *lengths], dtype=np.int64), 1)
    with pytest.raises(UserError, match=r"data\.path"):
        PackedBatches(corpus, S, 1, 0)


def test_documents_are_cut_at_the_context_in_rows_that_are_longer() -> None:
    """Every target occurs once, at a position within the backbone's context."""
    lengths, context = [200, 23, 24, 7, 61], 23
    offsets = np.cumsum([0, *lengths], dtype=np.int64)
    corpus = TokenizedCorpus(np.arange(sum(lengths), dtype=np.int32), offsets, 1)
    batches = PackedBatches(corpus, 61, 1, 0, context)
    targets, sizes = [], []
    for index in range(len(batches.order.rows)):
        batch = batches.batch(index)
        assert int(batch.position_BS.max()) < context
        sizes.append(int((batch.segment_BS > 0).sum()))
        targets += batch.tokens_BS.roll(-1, dims=1)[batch.target_mask(0)].tolist()
    assert sorted(targets) == sorted(set(range(sum(lengths))) - set(offsets.tolist()))
    assert max(sizes) > 2 * context


def test_rows_are_packed_by_rank_0_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 1 has another corpus here, so rows that it packed itself would differ."""
    sent, side = packed_batches(num_documents=5).order.rows, object()

    def receive(box: list[object], src: int, group: object) -> None:
        assert (src, group) == (0, side)
        box[:] = [(sent, None)]

    monkeypatch.setattr(torch.distributed, "broadcast_object_list", receive)
    monkeypatch.setattr(distributed, "_joined", [distributed._Group(None, 1, 2, side)])
    assert packed_batches(batch_size=4).order.rows is sent

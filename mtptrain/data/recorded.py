"""Batches that keep the passages of the text that they are made of, for the checkpoints of the head."""

from __future__ import annotations

from collections.abc import Callable

from mtptrain.batch import Batch
from mtptrain.data.batches import BatchSource
from mtptrain.data.files import Position
from mtptrain.data.passages import PassageHasher, Passages, join_passages
from mtptrain.run.distributed import gather_objects


class RecordedBatches(BatchSource):
    """Another source's batches, and the passages of the training text: of all of it, or of a stream's batches so far.

    Args:
        batches: the batches.
        hasher: hashes their text.
        before: of earlier training of the same head.
    """

    def __init__(self, batches: BatchSource, hasher: PassageHasher, before: Passages) -> None:
        self.batches, self.hasher, self.names = batches, hasher, batches.names
        documents = batches.documents()
        self.is_stream = documents is None
        self._passages = before if documents is None else before.join(hasher.documents(*documents))

    def batch(self, index: int) -> Batch:
        """See `BatchSource`."""
        batch = self.batches.batch(index)
        if self.is_stream:
            inside_BS = batch.segment_BS > 0
            is_start = batch.position_BS[inside_BS] == 0
            tokens = batch.tokens_BS[inside_BS].numpy()
            read = self.hasher.documents(tokens, is_start.nonzero().squeeze(1).numpy())
            self._passages = self._passages.join(read)
        return batch

    def await_batches(self, end: int, is_stopped: Callable[[], bool]) -> bool:
        """See `BatchSource`."""
        return self.batches.await_batches(end, is_stopped)

    def saved(self) -> None:
        """See `BatchSource`."""
        self.batches.saved()

    def passages(self) -> Passages:
        """See `BatchSource`."""
        return join_passages(gather_objects(self._passages)) if self.is_stream else self._passages

    def position(self) -> Position:
        """See `BatchSource`."""
        return self.batches.position()

    def close(self) -> None:
        """See `BatchSource`."""
        self.batches.close()

    def restart(self, index: int, passages: Passages | None = None) -> None:
        """See `BatchSource`."""
        self.batches.restart(index)
        self._passages = self._passages.join(passages or Passages.none())

    def seek(self, index: int, positions: list[Position], passages: Passages | None = None) -> None:
        """See `BatchSource`."""
        self.batches.seek(index, positions)
        self._passages = self._passages.join(passages or Passages.none())

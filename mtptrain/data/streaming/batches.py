"""`data.streaming=true` and `data.mixture`: training rows of text that is read and tokenised during training."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice

import numpy as np
import torch

from mtptrain.batch import Batch
from mtptrain.data.batches import BatchSource
from mtptrain.data.files import Position
from mtptrain.data.packing import fill_rows
from mtptrain.data.passages import Passages
from mtptrain.data.streaming.dataset import StreamingPlan, check_position, join_positions, source_of
from mtptrain.data.streaming.row_stream import Row
from mtptrain.data.streaming.sharding import DocumentShardReader
from mtptrain.data.streaming.workers import Items, start_loaders
from mtptrain.errors import UserError
from mtptrain.run.distributed import rank_rows


class StreamingBatches(BatchSource):
    """Micro-batches of documents that are read lazily; neither the text nor its tokens are ever held whole.

    Args:
        plan: the data.
        workers: processes that read and tokenise for this one; 0 = this process does it itself.

    Raises:
        UserError: a source cannot be read, or has fewer training documents than a micro-batch has rows.
    """

    def __init__(self, plan: StreamingPlan, workers: int) -> None:
        self.plan, self.workers = plan, workers
        self.names = list(plan.sources) if len(plan.sources) > 1 else []
        for config in plan.sources.values():
            reader = DocumentShardReader(config, range(plan.num_rows), plan.num_rows)
            first = [reader.next(number)[1] for number in range(plan.num_rows)]
            next(plan.encoder.encode(document for document in first if document is not None), None)
        self.row_numbers = list(rank_rows(plan.num_rows))
        self.seek(0, [])

    def seek(self, index: int, positions: list[Position], passages: Passages | None = None) -> None:
        """Resume at micro-batch `index` from the positions of all processes of an earlier run.

        Raises:
            UserError: the positions belong to other data.
        """
        if index > 0 and not positions:
            raise UserError(
                "data.streaming=true: the interrupted run did not read its data as a stream; set data.streaming and "
                "data.mixture as they were, or start in another output_dir"
            )
        self.index, self._position = index, join_positions(positions) if positions else {}
        if positions:
            check_position(self.plan, self._position)
        self._loaders: list[Items] | None = None

    def restart(self, index: int, passages: Passages | None = None) -> None:
        """Begin the data at micro-batch `index`, whose predecessors were of other data."""
        self.close()
        self.index, self._position = index, {}

    def batch(self, index: int) -> Batch:
        """Return this process's rows of micro-batch `index`; micro-batches must be requested in order.

        Raises:
            UserError: the data cannot be read, or a worker was killed.
        """
        assert index == self.index, f"micro-batch {index} was requested and {self.index} is next"
        if self._loaders is None:
            self._loaders = start_loaders(self.plan, self.row_numbers, self.workers, index, self._position)
        try:
            parts = [next(loader) for loader in self._loaders]
        except UserError:
            self.close()  # the other workers too
            raise
        self.index, self._position = index + 1, join_positions([position for _, position in parts])
        return self._fill([row for rows, _ in parts for row in rows], index)

    def position(self) -> Position:
        """Return the position of this process's row streams after the last micro-batch."""
        return self._position

    def close(self) -> None:
        """End the worker processes."""
        for loader in self._loaders or ():
            loader.close()
        self._loaders = None

    def _fill(self, rows: list[Row], index: int) -> Batch:
        pieces = [piece for row in rows for piece in row]
        sizes = [len(tokens) for tokens, _ in pieces]
        spans = zip(np.cumsum([0, *sizes]).tolist(), sizes, strict=False)
        masks = [np.ones(len(tokens), bool) if loss_mask is None else loss_mask for tokens, loss_mask in pieces]
        loss_mask = None if all(one is None for _, one in pieces) else np.concatenate(masks)
        tokens = np.concatenate([tokens for tokens, _ in pieces])
        batch = fill_rows(
            tokens, [list(islice(spans, len(row))) for row in rows], self.plan.shape.row_length, loss_mask
        )
        if not self.names:
            return batch
        first = index * self.plan.num_rows
        sources = [source_of(first + number, self.plan.weights) for number in self.row_numbers]
        return replace(batch, source_B=torch.tensor(sources))

"""Rows of a streamed training: an endless dataset with a position to resume from after every micro-batch."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass
from itertools import accumulate, count

from torch.utils.data import IterableDataset

from mtptrain.config import DataConfig
from mtptrain.data.files import Position
from mtptrain.data.streaming.row_stream import Row, RowShape, RowStream, RowStreamPosition
from mtptrain.data.streaming.sharding import DocumentShardReader
from mtptrain.data.tokens import Encoder
from mtptrain.errors import UserError


@dataclass(frozen=True, slots=True)
class StreamingPlan:
    """The data of a streamed training.

    Attributes:
        sources: settings of each source, by name.
        weights: of the sources, in the same order.
        encoder: the backbone's.
        shape: size of rows and pieces.
        num_rows: rows of a micro-batch, over all processes; each is a row stream with documents of its own.
        seed: seed of the row order.
    """

    sources: dict[str, DataConfig]
    weights: list[float]
    encoder: Encoder
    shape: RowShape
    num_rows: int
    seed: int


@dataclass(frozen=True, slots=True)
class _OpenSource:
    """A source that is being read: its reader, and a row stream for each row number."""

    reader: DocumentShardReader
    row_streams: dict[int, RowStream]

    def position(self) -> Position:
        """Return the position after the last row, as plain values."""
        positions = {number: stream.position for number, stream in self.row_streams.items()}
        earliest = min((one.epoch, one.number) for one in positions.values())
        return {
            "reader": self.reader.position(earliest),
            "row_streams": {str(number): list(astuple(one)) for number, one in positions.items()},
        }


class StreamingDataset(IterableDataset[tuple[list[Row], Position] | UserError]):
    """Endless micro-batches: for each, some of its rows, and the position after them.

    The rows of a row stream do not depend on the other readers: any partition of the row numbers over datasets gives
    the same batches.

    Args:
        plan: the data.
        row_numbers: rows of the micro-batch to read.
        first: number of the first micro-batch.
        position: position before that micro-batch.
    """

    def __init__(
        self, plan: StreamingPlan, row_numbers: list[int], first: int = 0, position: Position | None = None
    ) -> None:
        super().__init__()
        self.plan, self.row_numbers, self.first, self.position = plan, row_numbers, first, position or {}

    def __iter__(self) -> Iterator[tuple[list[Row], Position] | UserError]:
        """Yield a user's mistake as the last item: an exception raised in a worker would lose its text."""
        try:
            yield from self._batches()
        except UserError as error:
            yield error

    def _batches(self) -> Iterator[tuple[list[Row], Position]]:
        plan = self.plan
        sources = {name: self._open(name) for name in plan.sources}
        names = list(sources)
        for index in count(self.first):
            rows = []
            for number in self.row_numbers:
                name = names[source_of(index * plan.num_rows + number, plan.weights)]
                rows.append(sources[name].row_streams[number].next())
            positions = {name: source.position() for name, source in sources.items()}
            yield rows, {"num_rows": plan.num_rows, "sources": positions}

    def _open(self, name: str) -> _OpenSource:
        """Open a source at its position."""
        plan, stored = self.plan, self.position.get("sources", {}).get(name)
        positions = {
            number: RowStreamPosition(*stored["row_streams"][str(number)]) if stored else RowStreamPosition()
            for number in self.row_numbers
        }
        starts = {number: (one.epoch, one.number) for number, one in positions.items()}
        reader_position = stored["reader"] if stored else None
        reader = DocumentShardReader(plan.sources[name], self.row_numbers, plan.num_rows, reader_position, starts)
        row_streams = {
            number: RowStream(number, reader, plan.encoder, plan.shape, plan.seed, one)
            for number, one in positions.items()
        }
        return _OpenSource(reader, row_streams)


def join_positions(parts: list[Position]) -> Position:
    """Return the position of all row streams together, from the positions of datasets that share them."""
    joined: Position = {"num_rows": parts[0]["num_rows"], "sources": {}}
    for name in parts[0]["sources"]:
        sources = [part["sources"][name] for part in parts]
        earliest = min((one["reader"] for one in sources), key=lambda reader: (reader["epoch"], reader["number"]))
        row_streams = {number: values for one in sources for number, values in one["row_streams"].items()}
        joined["sources"][name] = {"reader": earliest, "row_streams": row_streams}
    return joined


def check_position(plan: StreamingPlan, position: Position) -> None:
    """Raise a `UserError` unless a position has the number of rows and the source names of `plan`."""
    stored = {"train.batch_size": position.get("num_rows"), "data.mixture": sorted(position.get("sources", {}))}
    current = {"train.batch_size": plan.num_rows, "data.mixture": sorted(plan.sources)}
    for setting, value in current.items():
        if stored[setting] != value:
            raise UserError(
                f"{setting}={value}: the interrupted run read its data as a stream with {stored[setting]}, and its "
                "position in the data is valid only for that value; set it as it was, or start in another output_dir"
            )


GOLDEN, RANGE = 2654435769, 2**32  # the odd number next to the golden section of the range


def source_of(row: int, weights: Sequence[float]) -> int:
    """Return the index of the source of row `row` of the whole training, counted from 0.

    Multiples of the golden section fill [0, 1) evenly, and so do those of every n-th row: after N rows the count of a
    source differs from its share of N by a few rows at most, both over all rows and for each row of the micro-batch.
    Nothing is drawn or remembered.

    Args:
        row: row number over all processes and micro-batches.
        weights: above 0; a source's share is its weight over their sum.

    Source: Kronecker sequence; Niederreiter 1992, section 3.1.
    """
    limits = list(accumulate(weights))
    point = row * GOLDEN % RANGE / RANGE * limits[-1]
    return min(bisect_right(limits, point), len(weights) - 1)

"""The rows of some places in the batch, batch after batch, and where to go on after each."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass
from itertools import accumulate, count
from typing import Any

from torch.utils.data import IterableDataset

from mtptrain.config import DataConfig
from mtptrain.data.streaming.row_stream import Row, RowShape, RowStream, RowStreamPosition
from mtptrain.data.streaming.sharding import DocumentShardReader
from mtptrain.data.tokens import Encoder
from mtptrain.errors import UserError

Position = dict[str, Any]  # plain values, for a checkpoint; {} = the beginning


@dataclass(frozen=True, slots=True)
class StreamingPlan:
    """What a training reads as a stream.

    Attributes:
        sources: by name.
        weights: of the sources, in their order.
        encoder: the backbone's.
        shape: of the rows.
        num_rows: rows a micro-batch, of all processes together; each is a lane with documents of its own.
        seed: of the order.
    """

    sources: dict[str, DataConfig]
    weights: list[float]
    encoder: Encoder
    shape: RowShape
    num_rows: int
    seed: int


class StreamingDataset(IterableDataset[tuple[list[Row], Position] | UserError]):
    """Endless: of each micro-batch the rows of some lanes, with the position after them.

    A lane's rows do not depend on who else reads: any partition of the lanes gives the same batches.

    Args:
        plan: what is read.
        lanes: places in the batch.
        first: number of the first micro-batch.
        position: before it.
    """

    def __init__(self, plan: StreamingPlan, lanes: list[int], first: int = 0, position: Position | None = None) -> None:
        super().__init__()
        self.plan, self.lanes, self.first, self.position = plan, lanes, first, position or {}

    def __iter__(self) -> Iterator[tuple[list[Row], Position] | UserError]:
        """A user's mistake is the last thing that is given out: raised in another process it would lose its text."""
        try:
            yield from self._batches()
        except UserError as error:
            yield error

    def _batches(self) -> Iterator[tuple[list[Row], Position]]:
        plan = self.plan
        sources = [self._open(name) for name in plan.sources]
        for index in count(self.first):
            rows = []
            for lane in self.lanes:
                chosen = source_of(index * plan.num_rows + lane, plan.weights)
                rows.append(sources[chosen][1][lane].row())
            yield (
                rows,
                {"num_rows": plan.num_rows, "sources": dict(zip(plan.sources, map(_place, sources), strict=True))},
            )

    def _open(self, name: str) -> tuple[DocumentShardReader, dict[int, RowStream]]:
        """A source at its position."""
        plan, found = self.plan, self.position.get("sources", {}).get(name, {})
        places = {
            lane: RowStreamPosition(*found["lanes"][str(lane)]) if found else RowStreamPosition() for lane in self.lanes
        }
        starts = {lane: (place.epoch, place.number) for lane, place in places.items()}
        dealer = DocumentShardReader(plan.sources[name], self.lanes, plan.num_rows, found.get("place"), starts)
        return dealer, {
            lane: RowStream(lane, dealer, plan.encoder, plan.shape, plan.seed, place) for lane, place in places.items()
        }


def _place(source: tuple[DocumentShardReader, dict[int, RowStream]]) -> dict[str, Any]:
    dealer, lanes = source
    earliest = min((lane.place.epoch, lane.place.number) for lane in lanes.values())
    return {
        "place": dealer.place(earliest),
        "lanes": {str(number): list(astuple(lane.place)) for number, lane in lanes.items()},
    }


def join_positions(parts: list[Position]) -> Position:
    """The position of all lanes together, from those of feeds that share them."""
    joined: Position = {"num_rows": parts[0]["num_rows"], "sources": {}}
    for name in parts[0]["sources"]:
        found = [part["sources"][name] for part in parts]
        place = min((one["place"] for one in found), key=lambda place: (place["epoch"], place["number"]))
        lanes = {lane: values for one in found for lane, values in one["lanes"].items()}
        joined["sources"][name] = {"place": place, "lanes": lanes}
    return joined


def check_position(plan: StreamingPlan, position: Position) -> None:
    """Raise a `UserError` unless a position belongs to a training that reads as this one does."""
    was = {"train.batch_size": position.get("num_rows"), "data.mixture": sorted(position.get("sources", {}))}
    now = {"train.batch_size": plan.num_rows, "data.mixture": sorted(plan.sources)}
    for setting, value in now.items():
        if was[setting] != value:
            raise UserError(
                f"{setting}={value}: the interrupted run read its data as a stream with {was[setting]}, and the "
                "position in it has no other meaning; set it as it was, or start in another output_dir"
            )


GOLDEN, RANGE = 2654435769, 2**32  # the odd number next to the golden section of the range


def source_of(row: int, weights: Sequence[float]) -> int:
    """Index of the source that row `row` of the whole training, from 0, comes from.

    Multiples of the golden section fill [0, 1) evenly, and so do those of every n-th row: after N rows the count of a
    source is its share of N but for a few, in the whole and in each place of the batch. Nothing is drawn or remembered.

    Args:
        row: of all processes together.
        weights: above 0; a source's share is its weight over their sum.

    Source: Kronecker sequence; Niederreiter 1992, section 3.1.
    """
    limits = list(accumulate(weights))
    place = row * GOLDEN % RANGE / RANGE * limits[-1]
    return min(bisect_right(limits, place), len(weights) - 1)

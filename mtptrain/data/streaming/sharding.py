"""The training documents of a source, dealt out to the rows of a batch."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

from mtptrain.config import DataConfig, DataSource
from mtptrain.data.documents import Document, Split, split_of
from mtptrain.data.text import TextReader, training_documents
from mtptrain.errors import UserError

PLACE_EVERY = 64  # documents between the places that reading can be continued from

Order = tuple[int, int]  # epoch, and number of a document among the training documents of the source


class DocumentShardReader:
    """Reads a source over and over; document d of every epoch belongs to lane d mod `num_rows`, and to no other.

    Lanes ask at their own pace: what belongs to one that has not asked yet waits for it.

    Args:
        config: of the source.
        lanes: those that are dealt to; documents of others are passed over without being tokenised.
        num_rows: of all processes together.
        place: of an earlier dealer, at or before every start; None = the beginning.
        starts: the first document that a lane wants.
    """

    def __init__(
        self,
        config: DataConfig,
        lanes: Iterable[int],
        num_rows: int,
        place: dict[str, Any] | None = None,
        starts: dict[int, Order] | None = None,
    ) -> None:
        self.config, self.num_rows = config, num_rows
        self.starts = starts or {}
        self.waiting: dict[int, deque[tuple[Order, Document | None]]] = {lane: deque() for lane in lanes}
        place = place or {"epoch": 0, "number": 0, "text": None}
        self.places: deque[dict[str, Any]] = deque()
        self._begin(place["epoch"], place["number"], place["text"])

    def next(self, lane: int) -> tuple[Order, Document | None]:
        """The next document of a lane; None stands for the end of an epoch.

        Raises:
            UserError: the source cannot be read, or holds fewer training documents than there are lanes.
        """
        while not self.waiting[lane]:
            self._read()
        return self.waiting[lane].popleft()

    def place(self, earliest: Order) -> dict[str, Any]:
        """Where a dealer has to begin that shall reach document `earliest` and those after it."""
        while len(self.places) > 1 and (self.places[1]["epoch"], self.places[1]["number"]) <= earliest:
            self.places.popleft()
        return self.places[0]

    def _begin(self, epoch: int, number: int, text: dict[str, Any] | None) -> None:
        self.epoch, self.number = epoch, number
        self.reader = TextReader(self.config, text) if self.config.source is DataSource.text else None
        self.documents = self._training_documents()
        self._note_place()

    def _training_documents(self) -> Iterator[Document]:
        if self.reader is None:
            yield from islice(training_documents(self.config), self.number, None)
            return
        for document in self.reader:
            if split_of(document.name, self.config.heldout_every) is Split.train:
                yield document

    def _note_place(self) -> None:
        text = self.reader.place() if self.reader else None
        self.places.append({"epoch": self.epoch, "number": self.number, "text": text})

    def _read(self) -> None:
        """Read one more document, or meet the end."""
        document = next(self.documents, None)
        if document is None:
            check_enough(self.config, self.number, self.num_rows)
            for lane in self.waiting:
                self._deal(lane, None)
            self._begin(self.epoch + 1, 0, None)
            return
        lane = self.number % self.num_rows
        if lane in self.waiting:
            self._deal(lane, document)
        self.number += 1
        if self.number % PLACE_EVERY == 0:
            self._note_place()

    def _deal(self, lane: int, document: Document | None) -> None:
        if (self.epoch, self.number) >= self.starts.get(lane, (0, 0)):
            self.waiting[lane].append(((self.epoch, self.number), document))


def check_enough(config: DataConfig, found: int, num_rows: int) -> None:
    """Raise a `UserError` where a source has fewer training documents than a batch has rows."""
    if found == 0:
        raise UserError(
            f"data.path={config.path}: no training document with two tokens or more; one in data.heldout_every="
            f"{config.heldout_every} is held out by hash of its name, so give more documents or change that number"
        )
    if found < num_rows:
        raise UserError(
            f"data.path={config.path}: has {found} training documents, and read as a stream each of "
            f"train.batch_size={num_rows} rows needs documents of its own; lower train.batch_size, or leave "
            "data.streaming false"
        )

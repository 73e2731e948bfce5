"""Distribute the training documents of a source over the rows of a micro-batch."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from itertools import islice

from mtptrain.config import DataConfig, DataSource
from mtptrain.data.bad_rows import BadRows
from mtptrain.data.documents import Document, Split, split_of
from mtptrain.data.files import Position
from mtptrain.data.notes import note
from mtptrain.data.text import TextReader, training_documents
from mtptrain.errors import UserError

POSITION_EVERY = 64  # documents between the positions that reading can resume from

DocumentIndex = tuple[int, int]  # epoch, and number of a document among the training documents of the source
ReaderPosition = Position  # `epoch`, `number` and, for local text, `text`: the position of the TextReader


class DocumentShardReader:
    """Read a source over and over; document d of every epoch goes to row d mod `num_rows`, and to no other.

    Rows consume documents at their own pace: documents of a row are queued until it requests them.

    Args:
        config: settings of the source.
        row_numbers: rows to serve; documents of other rows are skipped without being tokenised.
        num_rows: rows of a micro-batch, over all processes.
        position: position of an earlier reader, at or before every start; None = the beginning.
        starts: first document of each row; (0, 0) for a row that is not listed.
    """

    def __init__(
        self,
        config: DataConfig,
        row_numbers: Iterable[int],
        num_rows: int,
        position: ReaderPosition | None = None,
        starts: dict[int, DocumentIndex] | None = None,
    ) -> None:
        self.config, self.num_rows = config, num_rows
        self.starts = starts or {}
        self.bad_rows = BadRows(config.on_bad_row)  # conversations that the template rejects
        self.queues: dict[int, deque[tuple[DocumentIndex, Document | None]]] = {row: deque() for row in row_numbers}
        self.positions: deque[ReaderPosition] = deque()
        position = position or {"epoch": 0, "number": 0, "text": None}
        self._begin(position["epoch"], position["number"], position["text"])

    def next(self, row_number: int) -> tuple[DocumentIndex, Document | None]:
        """Return the next document of a row; None marks the end of an epoch.

        Raises:
            UserError: the source cannot be read, or holds fewer training documents than a micro-batch has rows.
        """
        while not self.queues[row_number]:
            self._read()
        return self.queues[row_number].popleft()

    def position(self, earliest: DocumentIndex) -> ReaderPosition:
        """Return the latest position from which a new reader still reaches document `earliest`; forget earlier ones."""
        while len(self.positions) > 1 and (self.positions[1]["epoch"], self.positions[1]["number"]) <= earliest:
            self.positions.popleft()
        return self.positions[0]

    def _begin(self, epoch: int, number: int, text: Position | None) -> None:
        self.epoch, self.number = epoch, number
        self.reader = TextReader(self.config, text) if self.config.source is DataSource.text else None
        self.documents = self._training_documents()
        self._record_position()

    def _training_documents(self) -> Iterator[Document]:
        if self.reader is None:
            yield from islice(training_documents(self.config), self.number, None)
            return
        of_split = (one for one in self.reader if split_of(one.name, self.config.heldout_every) is Split.train)
        limit = self.config.max_documents
        yield from of_split if limit is None else islice(of_split, max(0, limit - self.number))

    def _record_position(self) -> None:
        text = self.reader.position() if self.reader else None
        self.positions.append({"epoch": self.epoch, "number": self.number, "text": text})

    def _read(self) -> None:
        """Queue one more document, or the end of the epoch for every row."""
        document = next(self.documents, None)
        if document is None:
            self._report()
            check_enough(self.config, self.number, self.num_rows)
            for row_number in self.queues:
                self._queue(row_number, None)
            self._begin(self.epoch + 1, 0, None)
            return
        row_number = self.number % self.num_rows
        if row_number in self.queues:
            self._queue(row_number, document)
        self.number += 1
        if self.number % POSITION_EVERY == 0:
            self._record_position()

    def _report(self) -> None:
        """Note the rows that were left out in the first epoch, and the conversations that the template rejected."""
        if self.reader is None or self.epoch:
            return
        self.reader.report()
        if self.bad_rows.count:
            note(f"data.path={self.config.path}: {self.bad_rows.summary()}")

    def _queue(self, row_number: int, document: Document | None) -> None:
        if (self.epoch, self.number) >= self.starts.get(row_number, (0, 0)):
            self.queues[row_number].append(((self.epoch, self.number), document))


def check_enough(config: DataConfig, num_documents: int, num_rows: int) -> None:
    """Raise a `UserError` if a source has fewer training documents than a micro-batch has rows."""
    if num_documents == 0:
        raise UserError(
            f"data.path={config.path}: no training document with two tokens or more; one in data.heldout_every="
            f"{config.heldout_every} is held out by hash of its name, so give more documents or change that number"
        )
    if num_documents < num_rows:
        raise UserError(
            f"data.path={config.path}: has {num_documents} training documents, and read as a stream each of "
            f"train.batch_size={num_rows} rows needs documents of its own; lower train.batch_size, or leave "
            "data.streaming false"
        )

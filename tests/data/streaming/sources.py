"""Sources of streamed documents, and their batches."""

import json
from collections.abc import Iterator
from pathlib import Path

from mtptrain.config import DataConfig, DataSource, MixtureConfig
from mtptrain.data.chat import ChatTemplate
from mtptrain.data.streaming.dataset import Position, StreamingDataset, StreamingPlan, join_positions
from mtptrain.data.streaming.row_stream import Row, RowShape
from mtptrain.data.tokenizer import BOS, train_tokenizer
from mtptrain.data.tokens import Encoder
from mtptrain.errors import UserError
from tests.conftest import CHAT_TEMPLATE

S = 9  # tokens a row: a buffer holds some forty documents
TOKENIZER = train_tokenizer(["0 1 2 3 4 5 6 7 8 9 one two"], 280)
ENCODER = Encoder(
    TOKENIZER, ([0], [1]), ChatTemplate(CHAT_TEMPLATE, Path("chat.jinja"), {"bos_token": BOS}, TOKENIZER, [0])
)


def write_lines(path: Path, rows: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def text_config(folder: Path) -> DataConfig:
    return DataConfig(
        source=DataSource.text, path=str(folder / "text"), streaming=True, sequence_length=S, heldout_every=8
    )


def mixed_config(folder: Path) -> DataConfig:
    talk = MixtureConfig(path=str(folder / "talk.jsonl"), field_name="messages", weight=1)
    text = MixtureConfig(path=str(folder / "text"), weight=2.5)
    return DataConfig(mixture=[text, talk], sequence_length=S, heldout_every=8)


def plan_of(config: DataConfig, num_rows: int, seed: int = 0) -> StreamingPlan:
    return StreamingPlan(config.sources(), config.weights(), ENCODER, RowShape(S, S), num_rows, seed)


def plain(row: Row) -> list[tuple[list[int], list[bool] | None]]:
    """Return a row as values that can be compared."""
    return [(tokens.tolist(), None if loss_mask is None else loss_mask.tolist()) for tokens, loss_mask in row]


def micro_batches(
    plan: StreamingPlan, parts: list[list[int]], first: int = 0, position: Position | None = None
) -> Iterator[tuple[list[object], Position]]:
    """Yield all rows of each micro-batch, read by one dataset per part, and the position after them."""
    datasets = [iter(StreamingDataset(plan, part, first, position)) for part in parts]
    while True:
        items = [next(dataset) for dataset in datasets]
        for item in items:
            if isinstance(item, UserError):
                raise item
        rows = [plain(row) for rows, _ in items for row in rows]
        yield rows, join_positions([position for _, position in items])

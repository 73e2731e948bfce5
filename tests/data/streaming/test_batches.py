"""Streamed documents: none repeated, none lost, for any division of the rows and after any interruption."""

import json
import os
import signal
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice, pairwise
from math import log2
from pathlib import Path

import psutil
import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from mtptrain.batch import Batch
from mtptrain.config import DataConfig, DataSource, MixtureConfig
from mtptrain.data.chat import ChatTemplate
from mtptrain.data.documents import Split, split_of
from mtptrain.data.streaming.batches import StreamingBatches
from mtptrain.data.streaming.dataset import Position, StreamingDataset, StreamingPlan, join_positions, source_of
from mtptrain.data.streaming.row_stream import BUFFER_ROWS, Row, RowShape, RowStream, RowStreamPosition
from mtptrain.data.streaming.sharding import DocumentShardReader
from mtptrain.data.text import text_documents
from mtptrain.data.tokenizer import BOS, train_tokenizer
from mtptrain.data.tokens import Encoder, tokenize_corpus
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


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source in files of every kind, and one of conversations; every text names its document."""
    root = tmp_path_factory.mktemp("sources")
    texts = [f"{number} " + "x" * (number * 7 % 31) for number in range(230)]
    (root / "text").mkdir()
    write_lines(root / "text" / "a.jsonl", [{"text": text} for text in texts[:90]])
    Dataset.from_dict({"text": texts[90:200]}).to_parquet(root / "text" / "b.parquet")
    for number in range(200, 230):
        (root / "text" / f"c{number}.txt").write_text(texts[number], encoding="utf-8")
    turns = [("user", "one"), ("assistant", "two")]
    talk = [[{"role": role, "content": f"{text} {number}"} for role, text in turns] for number in range(40)]
    write_lines(root / "talk.jsonl", [{"messages": messages} for messages in talk])
    return root


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


def cut(num_rows: int, borders: list[int]) -> list[list[int]]:
    """Return the row numbers in consecutive parts, cut before each border."""
    limits = sorted({0, num_rows, *(border % num_rows for border in borders)})
    return [list(range(begin, end)) for begin, end in pairwise(limits)]


@settings(max_examples=12, deadline=None)
@given(
    num_rows=st.integers(1, 7),
    borders=st.lists(st.integers(0, 6), max_size=6),
    mixed=st.booleans(),
    seed=st.integers(0),
)
def test_any_division_of_the_rows_gives_the_same_batches(
    folder: Path, num_rows: int, borders: list[int], mixed: bool, seed: int
) -> None:
    """Ranks and workers are such a division."""
    plan = plan_of(mixed_config(folder) if mixed else text_config(folder), num_rows, seed)
    together, divided = (micro_batches(plan, parts) for parts in ([list(range(num_rows))], cut(num_rows, borders)))
    for (left, _), (right, _) in islice(zip(together, divided, strict=True), 90):
        assert left == right


@settings(max_examples=12, deadline=None)
@given(
    num_rows=st.integers(1, 7),
    borders=st.lists(st.integers(0, 6), max_size=6),
    mixed=st.booleans(),
    done=st.integers(1, 200),
)
def test_a_position_continues_with_the_batches_that_reading_on_gives(
    folder: Path, num_rows: int, borders: list[int], mixed: bool, done: int
) -> None:
    """Also under another division of the rows, and through the JSON of a checkpoint."""
    plan = plan_of(mixed_config(folder) if mixed else text_config(folder), num_rows)
    whole = micro_batches(plan, cut(num_rows, borders))
    *_, (_, position) = islice(whole, done)
    resumed = micro_batches(plan, [list(range(num_rows))], done, json.loads(json.dumps(position)))
    for (left, _), (right, _) in islice(zip(whole, resumed, strict=True), 40):
        assert left == right


def epoch_rows(plan: StreamingPlan, epoch: int) -> list[Row]:
    """Return all rows that the row streams of a single source have in an epoch."""
    (config,) = plan.sources.values()
    rows = []
    for number in range(plan.num_rows):
        row_stream = RowStream(
            number,
            DocumentShardReader(config, [number], plan.num_rows),
            ENCODER,
            plan.shape,
            plan.seed,
            RowStreamPosition(),
        )
        row = row_stream.next()
        while row_stream.position.epoch <= epoch:
            if row_stream.position.epoch == epoch:
                rows.append(row)
            row = row_stream.next()
    return rows


def pairs(rows: list[Row]) -> Counter[tuple[int, int]]:
    """Count the targets, each with the token before it."""
    return Counter(pair for row in rows for tokens, _ in row for pair in pairwise(tokens.tolist()))


@pytest.mark.parametrize("num_rows", [1, 3, 8])
def test_an_epoch_gives_every_target_of_the_training_split_once(folder: Path, num_rows: int, tmp_path: Path) -> None:
    config = text_config(folder)
    corpus = tokenize_corpus(text_documents(config, Split.train), ENCODER, tmp_path)
    documents = [corpus.document(number).tolist() for number in range(len(corpus.offsets) - 1)]
    expected = Counter(pair for tokens in documents for pair in pairwise(tokens))
    first, second = (epoch_rows(plan_of(config, num_rows), epoch) for epoch in (0, 1))
    assert pairs(first) == pairs(second) == expected
    assert list(map(plain, first)) != list(map(plain, second))
    assert all(sum(len(tokens) for tokens, _ in row) <= S for row in first)


def test_rows_are_full_but_for_a_few(folder: Path) -> None:
    rows = epoch_rows(plan_of(text_config(folder), 1), 0)
    assert len(rows) > 3 * BUFFER_ROWS
    assert sum(len(tokens) for row in rows for tokens, _ in row) > 0.97 * S * len(rows)


def test_pieces_may_be_shorter_than_rows(folder: Path) -> None:
    plan = replace(plan_of(text_config(folder), 1), shape=RowShape(3 * S, 5))
    rows = epoch_rows(plan, 0)
    assert {len(tokens) for row in rows for tokens, _ in row} == {2, 3, 4, 5}
    assert pairs(rows) == pairs(epoch_rows(plan_of(text_config(folder), 1), 0))


@settings(max_examples=50, deadline=None)
@given(
    weights=st.lists(st.floats(0.05, 1), min_size=1, max_size=5),
    num_rows=st.integers(1, 3000),
    every=st.integers(1, 12),
    number=st.integers(0, 11),
)
def test_a_source_has_its_share_of_the_rows_everywhere_in_the_batch(
    weights: list[float], num_rows: int, every: int, number: int
) -> None:
    """Within a few rows, over all rows and over row `number` of each batch of `every` rows."""
    for rows, slack in ((range(num_rows), 2.0), (range(number % every, num_rows * every, every), 2.0 * every)):
        counts = Counter(source_of(row, weights) for row in rows)
        for source, weight in enumerate(weights):
            # the discrepancy of a Kronecker sequence grows with the logarithm of its length
            assert abs(counts[source] - num_rows * weight / sum(weights)) <= slack * (1 + log2(num_rows))


def test_a_source_that_ends_starts_over_while_the_other_goes_on(folder: Path) -> None:
    """With three rows of talk to one of text, talk is read many times before text ends; it keeps its loss mask."""
    config = mixed_config(folder)
    config.mixture[1].weight = 7.5
    rows = [row for batch, _ in islice(micro_batches(plan_of(config, 2), [[0, 1]]), 200) for row in batch]
    talk = [row for row in rows if any(loss_mask is not None for _, loss_mask in row)]
    assert 0.7 < len(talk) / len(rows) < 0.8
    begun = Counter(TOKENIZER.decode(tokens) for row in talk for tokens, _ in row if tokens[0] == 0)
    assert min(begun.values()) >= 2
    for tokens, loss_mask in (piece for row in talk for piece in row):
        targets = TOKENIZER.decode([token for token, is_target in zip(tokens, loss_mask, strict=True) if is_target])
        assert "one" not in targets
        assert "user" not in targets


def test_files_are_not_read_before_they_are_needed(tmp_path: Path) -> None:
    write_lines(tmp_path / "a.jsonl", [{"text": "many words that fill rows " * 9}] * 600)
    (tmp_path / "b.jsonl").write_text('{"text": "cut', encoding="utf-8")
    config = replace(text_config(tmp_path), path=str(tmp_path))
    batches = micro_batches(plan_of(config, 2), [[0, 1]])
    assert len(next(batches)[0]) == 2
    with pytest.raises(UserError, match=r"b\.jsonl: line 1 is not JSON"):
        *_, _ = islice(batches, 60_000)


def test_a_source_of_fewer_documents_than_rows_is_refused(folder: Path) -> None:
    with pytest.raises(UserError, match=r"has \d+ training documents.*train\.batch_size=300 rows.*lower train"):
        StreamingBatches(plan_of(text_config(folder), 300), 0)


def test_data_without_a_training_document_is_refused(tmp_path: Path) -> None:
    name = next(f"{n}.txt" for n in range(999) if split_of(f"{n}.txt", 2) is Split.heldout)
    (tmp_path / name).write_text("held out", encoding="utf-8")
    config = replace(text_config(tmp_path), path=str(tmp_path), heldout_every=2)
    with pytest.raises(UserError, match=r"data\.path=.*data\.heldout_every=2"):
        StreamingBatches(plan_of(config, 2), 0)


def test_documents_of_one_token_are_no_data(tmp_path: Path) -> None:
    write_lines(tmp_path / "a.jsonl", [{"text": "0"}] * 50)
    encoder = replace(ENCODER, bos_eos=([], []))
    plan = replace(plan_of(replace(text_config(tmp_path), path=str(tmp_path)), 2), encoder=encoder)
    with pytest.raises(UserError, match="no training document with two tokens or more"):
        next(micro_batches(plan, [[0, 1]]))


@pytest.mark.parametrize("change", ["grown", "gone"])
def test_a_position_in_other_files_is_refused(change: str, tmp_path: Path) -> None:
    for name in "ab":
        write_lines(tmp_path / f"{name}.jsonl", [{"text": f"{name} {number}"} for number in range(40)])
    plan = plan_of(replace(text_config(tmp_path), path=str(tmp_path)), 2)
    _, position = next(micro_batches(plan, [[0, 1]]))
    path = tmp_path / "b.jsonl"
    path.unlink() if change == "gone" else path.write_text(path.read_text(encoding="utf-8") + "{}\n", encoding="utf-8")
    with pytest.raises(UserError, match="is not what the interrupted run read"):
        next(micro_batches(plan, [[0, 1]], 1, position))


def same(left: Batch, right: Batch) -> bool:
    values = [(getattr(left, name), getattr(right, name)) for name in Batch.__slots__]
    return all(one is other if one is None or other is None else torch.equal(one, other) for one, other in values)


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_workers_give_the_batches_of_this_process(folder: Path, workers: int) -> None:
    plan = plan_of(mixed_config(folder), 3)
    here, there = StreamingBatches(plan, 0), StreamingBatches(plan, workers)
    state = torch.get_rng_state()
    for index in range(30):
        left, right = here.batch(index), there.batch(index)
        assert same(left, right)
        assert left.source_B is not None
    assert torch.equal(torch.get_rng_state(), state)  # workers leave the generator of training alone
    assert here.position() == there.position()
    resumed = StreamingBatches(plan, 1)
    resumed.seek(30, [json.loads(json.dumps(there.position()))])
    assert same(resumed.batch(30), here.batch(30))


def test_workers_encode_special_tokens_spelt_out_in_a_text_as_characters(tmp_path: Path) -> None:
    """A pickled tokenizer loses `encode_special_tokens`; a forked worker must not."""
    write_lines(tmp_path / "a.jsonl", [{"text": f"{number} {BOS}"} for number in range(40)])
    plan = plan_of(replace(text_config(tmp_path), path=str(tmp_path)), 2)
    assert same(StreamingBatches(plan, 1).batch(0), StreamingBatches(plan, 0).batch(0))


def test_a_mistake_in_the_data_keeps_its_line_number_across_processes(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", [{"text": f"{number} words"} for number in range(600)])
    path.write_text(path.read_text(encoding="utf-8") + '{"text": 3}\n', encoding="utf-8")
    batches = StreamingBatches(plan_of(replace(text_config(tmp_path), path=str(path)), 2), 1)
    with pytest.raises(UserError, match=r"^data\.field_name=text: .*row 601 has no text of that name"):
        read_on(batches, 600)


def background_process(batches: StreamingBatches) -> psutil.Process:
    """Return the worker of `batches`, after a first batch."""
    before = set(psutil.Process().children())
    batches.batch(0)
    (worker,) = set(psutil.Process().children()) - before
    return worker


def read_on(batches: StreamingBatches, count: int) -> None:
    for index in range(batches.index, batches.index + count):
        batches.batch(index)


def test_a_killed_worker_ends_the_run_with_one_line(folder: Path) -> None:
    handler = signal.getsignal(signal.SIGCHLD)
    batches = StreamingBatches(plan_of(text_config(folder), 2), 1)
    background_process(batches).send_signal(signal.SIGKILL)
    with pytest.raises(
        UserError, match=r"^data\.workers=1: a process that reads and tokenises was killed.*resume=auto"
    ):
        read_on(batches, 10**6)  # a few batches were prepared before
    assert signal.getsignal(signal.SIGCHLD) == handler


def test_a_worker_ends_when_closed_but_not_by_the_signals_that_end_a_run(folder: Path) -> None:
    batches = StreamingBatches(plan_of(text_config(folder), 2), 1)
    worker = background_process(batches)
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        worker.send_signal(number)
    read_on(batches, 30)
    assert worker.is_running()
    batches.close()
    assert worker not in psutil.Process().children()


def test_no_worker_outlives_a_killed_run(tmp_path: Path) -> None:
    """Even if the rows that it has prepared are larger than a pipe's buffer and are never fetched."""
    write_lines(tmp_path / "a.jsonl", [{"text": f"{number}" * 20_000} for number in range(20)])
    plan = plan_of(replace(text_config(tmp_path), path=str(tmp_path)), 2)
    plan = replace(plan, shape=RowShape(2**16, 2**16))
    reading, writing = os.pipe()
    run = os.fork()
    if run == 0:
        batches = StreamingBatches(plan, 1)
        os.write(writing, str(background_process(batches).pid).encode())
        os.kill(os.getpid(), signal.SIGKILL)
    worker = psutil.Process(int(os.read(reading, 99)))
    os.waitpid(run, 0)
    deadline = time.monotonic() + 60
    while psutil.pid_exists(worker.pid) and worker.status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.05)

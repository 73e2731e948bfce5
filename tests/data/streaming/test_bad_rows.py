"""Rows that a stream leaves out, and conversations that become several documents."""

from collections import Counter
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from mtptrain.config import DataConfig, DataSource, OnBadRow, Turns
from mtptrain.data import notes
from mtptrain.data.streaming.batches import StreamingBatches
from mtptrain.data.streaming.dataset import StreamingPlan
from mtptrain.data.streaming.row_stream import RowShape
from tests.data.streaming.sources import ENCODER, TOKENIZER, micro_batches, write_lines

S = 40


def plan_of(path: Path, num_rows: int, **settings: Any) -> StreamingPlan:
    config = DataConfig(
        source=DataSource.text, path=str(path), streaming=True, sequence_length=S, heldout_every=10**9, **settings
    )
    encoder = replace(ENCODER, on_bad_row=config.on_bad_row, chat=replace(ENCODER.chat, turns=config.turns))
    return StreamingPlan({"data": config}, [1.0], encoder, RowShape(S, S), num_rows, 0)


def test_a_stream_leaves_out_bad_rows_and_counts_them_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(notes, "_shown", set())
    rows: list[dict[str, Any]] = [{"text": f"{number}"} for number in range(40)]
    rows[7]["text"] = rows[20]["text"] = None
    plan = plan_of(write_lines(tmp_path / "a.jsonl", rows), 2, on_bad_row=OnBadRow.skip)
    batches = micro_batches(plan, [[0], [1]])
    texts = [TOKENIZER.decode(tokens) for batch, _ in islice(batches, 20) for row in batch for tokens, _ in row]
    assert set(texts) == {row["text"] for row in rows} - {None}
    (line,) = (line for line in capsys.readouterr().err.splitlines() if "bad row" in line)
    assert "2 bad rows left out: " in line
    assert "row 8: `text` is null" in line


def test_a_stream_resumes_behind_a_bad_row(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"text": f"{number}" if number % 5 else None} for number in range(700)]
    plan = plan_of(write_lines(tmp_path / "a.jsonl", rows), 2, on_bad_row=OnBadRow.skip)
    whole = list(islice(micro_batches(plan, [[0, 1]]), 60))
    rest = islice(micro_batches(plan, [[0, 1]], 30, whole[29][1]), 30)
    assert [batch for batch, _ in rest] == [batch for batch, _ in whole[30:]]


@pytest.mark.parametrize(
    ("turns", "answers"), [("all", ["two", "four"]), ("last", ["four"]), ("each", ["two", "four"])]
)
def test_the_answers_chosen_are_the_targets_of_a_stream(turns: str, answers: list[str], tmp_path: Path) -> None:
    words = [("user", "one"), ("assistant", "two"), ("user", "three"), ("assistant", "four")]
    talk = {"messages": [{"role": role, "content": text} for role, text in words]}
    plan = plan_of(write_lines(tmp_path / "a.jsonl", [talk] * 4), 1, field_name="messages", turns=Turns(turns))
    plan = replace(plan, shape=RowShape(200, 200))
    batch = StreamingBatches(plan, 0).batch(0)
    assert batch.loss_mask_BS is not None
    targets = TOKENIZER.decode(batch.tokens_BS[batch.loss_mask_BS].tolist())
    counts = Counter(word for word in targets.replace("</assistant>", " ").split())
    assert sorted(counts) == sorted(answers)

"""A folder of sources."""

from pathlib import Path

import pytest
from datasets import Dataset

from tests.data.streaming.sources import write_lines


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

"""Rows of prompt files."""

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from mtptrain.config import DataConfig
from mtptrain.data.chat import open_chat_template
from mtptrain.data.tokenizer import save_tokenizer, train_tokenizer
from mtptrain.data.tokens import TokenizedCorpus
from mtptrain.errors import UserError
from mtptrain.run.storage import sha256_file
from mtptrain.traces.prompts import (
    PromptRow,
    encode_prompt_row,
    even_shares,
    independent_groups,
    read_dataset,
    read_prompt_rows,
    slice_prompts,
    spread_prompt_rows,
)


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def rows_of(path: Path) -> list[PromptRow]:
    return [row for source in read_prompt_rows([str(path)]) for row in source.prompt_rows]


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


@pytest.mark.parametrize(
    ("row", "text", "messages", "turns"),
    [
        ({"prompt": " def f("}, " def f(", [], []),
        ({"turns": ["a"]}, "", [user("a")], []),
        ({"turns": ["a", "b", "c"]}, "", [user("a")], ["b", "c"]),
        ({"messages": [user("a"), assistant("b"), user("c")]}, "", [user("a"), assistant("b"), user("c")], []),
        ({"messages": [user("a"), assistant("b")]}, "", [user("a")], []),
        ({"prompt": "x", "turns": ["a"], "messages": None}, "", [user("a")], []),
    ],
)
def test_a_row_is_parsed_by_its_key(
    row: dict[str, Any], text: str, messages: list[dict[str, str]], turns: list[str], tmp_path: Path
) -> None:
    (parsed,) = rows_of(write(tmp_path / "a.jsonl", row))
    assert (parsed.text, parsed.messages, parsed.turns) == (text, messages, turns)


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [user("a"), assistant("b")]},
        {"messages": json.dumps([user("a")])},
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
        {"prompt": [user("a")], "completion": [assistant("b")]},
        {"instruction": "a", "input": "", "output": "b"},
    ],
)
def test_a_conversation_is_asked_for_its_last_answer_in_every_form(row: dict[str, Any], tmp_path: Path) -> None:
    (parsed,) = rows_of(write(tmp_path / "a.jsonl", {**row, "tools": [{"name": "f"}]}))
    assert (parsed.text, parsed.messages, parsed.turns) == ("", [user("a")], [])
    assert parsed.tools == [{"type": "function", "function": {"name": "f"}}]


def test_tools_and_thoughts_reach_the_template_of_a_prompt(tmp_path: Path) -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": "{}"}}
    messages = [
        user("a"),
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "r"},
    ]
    (parsed,) = rows_of(write(tmp_path / "a.jsonl", {"messages": messages, "tools": [{"name": "f"}]}))
    tokenizer = train_tokenizer(["a few words"], 300)
    save_tokenizer(tokenizer, tmp_path)
    config = DataConfig(chat_template="builtin", chat_template_kwargs={"enable_thinking": True})
    chat = open_chat_template(config, tmp_path, tokenizer, [0])
    conversation = encode_prompt_row(parsed, 0, tokenizer, [0], chat)
    text = tokenizer.decode(conversation.prompt.tokens)
    assert text.startswith('<tools>\n{"type": "function", "function": {"name": "f"}}\n</tools>\n<user>')
    assert '<call>{"name": "f", "arguments": {}}</call>' in text
    assert text.endswith("<tool>\nr\n</tool>\n<assistant>\n<think>\n")
    assert conversation.tools == parsed.tools


@pytest.mark.parametrize("suffix", [".json", ".csv", ".jsonl.gz"])
def test_prompts_are_read_from_files_of_every_kind(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"code{suffix}"
    content = {
        ".json": json.dumps([{"prompt": "a, b"}, {"prompt": "c"}]).encode(),
        ".csv": b'prompt\n"a, b"\nc\n',
        ".jsonl.gz": gzip.compress(b'{"prompt": "a, b"}\n{"prompt": "c"}\n'),
    }
    path.write_bytes(content[suffix])
    assert [(row.text, row.domain) for row in rows_of(path)] == [("a, b", "code"), ("c", "code")]


def test_the_domain_is_the_rows_own_or_the_files_name(tmp_path: Path) -> None:
    path = write(tmp_path / "code.jsonl", {"prompt": "a"}, {"prompt": "b", "domain": "prose"})
    assert [row.domain for row in rows_of(path)] == ["code", "prose"]


def test_a_folder_is_a_source_a_file(tmp_path: Path) -> None:
    first = write(tmp_path / "a.jsonl", {"prompt": "a"})
    Dataset.from_dict({"prompt": ["b", "c"], "turns": [None, None]}).to_parquet(tmp_path / "b.parquet")
    sources = read_prompt_rows([str(tmp_path)])
    assert [[row.text for row in source.prompt_rows] for source in sources] == [["a"], ["b", "c"]]
    assert [source.prompt_rows[0].domain for source in sources] == ["a", "b"]
    assert (sources[0].name, sources[0].sha256) == (str(first), sha256_file(first))


@given(st.lists(st.integers(1, 30), min_size=1, max_size=6), st.integers(1, 100))
def test_shares_are_as_even_as_the_sizes_allow(sizes: list[int], count: int) -> None:
    shares = even_shares(sizes, count)
    assert sum(shares) == min(count, sum(sizes))
    assert all(0 <= share <= size for share, size in zip(shares, sizes, strict=True))
    short = [share for share, size in zip(shares, sizes, strict=True) if share < size]
    assert all(max(shares) - share <= 1 for share in short)


def test_prompts_are_spread_over_the_rows_of_every_file(tmp_path: Path) -> None:
    for name, size in [("a", 9), ("b", 2)]:
        write(tmp_path / f"{name}.jsonl", *({"prompt": f"{name}{number}"} for number in range(size)))
    chosen = spread_prompt_rows(read_prompt_rows([str(tmp_path)]), 7)
    assert [[row.text for row in rows] for rows in chosen] == [
        ["a0", "a2", "a4", "a6", "a8"],
        ["b0", "b1"],
    ]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"question": "a"}, r"has none of turns, messages, prompt; it has \['question'\]; rename"),
        ({"prompt": ""}, "`prompt` is empty; write a text or drop"),
        ({"prompt": [1]}, "`prompt` must hold text, not list"),
        ({"turns": []}, "`turns` must be a list that is not empty"),
        ({"turns": "a"}, "`turns` must be a list that is not empty"),
        ({"turns": ["a", " \n"]}, "`turns` is empty"),
        ({"messages": ["a"]}, "each of `messages` must have a role and a content"),
        ({"messages": [assistant("a")]}, "`messages` asks nothing; it needs"),
        ({"messages": [{"role": "user", "content": None}]}, "`messages` must hold text, not NoneType"),
    ],
)
def test_a_row_without_a_prompt_is_named_with_its_line(row: dict[str, Any], reason: str, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {"prompt": "whole"}, row)
    with pytest.raises(UserError, match=rf"^prompts={path}: line 2:? {reason}"):
        rows_of(path)


@pytest.mark.parametrize(("files", "text"), [(["train", "test"], "test"), (["train"], "train")])
def test_the_test_split_of_a_data_set_is_read_if_there_is_one(files: list[str], text: str, tmp_path: Path) -> None:
    for name in files:
        write(tmp_path / f"{name}.jsonl", {"prompt": name})
    source = read_dataset(str(tmp_path))  # `datasets` loads a folder like a name
    assert [row.text for row in source.prompt_rows] == [text]
    assert source.prompt_rows[0].domain == tmp_path.name
    assert len(source.sha256) == 64


@pytest.mark.parametrize(
    ("chosen", "split", "text"),
    [
        (":one:train", None, "one train"),
        (":one:test", "train", "one test"),
        (":two", None, "two test"),
        (":two", "train", "two train"),
        (":two:train[:1]", None, "two train"),
    ],
)
def test_a_name_chooses_subset_and_split(chosen: str, split: str | None, text: str, tmp_path: Path) -> None:
    subsets = []
    for subset in ("one", "two"):
        parts = [{"split": one, "path": f"{subset}-{one}.jsonl"} for one in ("train", "test")]
        subsets.append({"config_name": subset, "data_files": parts})
        for part in parts:
            write(tmp_path / part["path"], {"prompt": f"{subset} {part['split']}"})
    header = json.dumps({"configs": subsets})  # JSON is YAML
    (tmp_path / "README.md").write_text(f"---\n{header}\n---\n", encoding="utf-8")
    [source] = read_prompt_rows([f"{tmp_path}{chosen}"], split=split)
    assert [row.text for row in source.prompt_rows] == [text]
    assert source.name == f"{tmp_path}{chosen}"
    assert source.prompt_rows[0].domain == tmp_path.name


def test_a_subset_needs_the_name_of_its_data_set() -> None:
    with pytest.raises(UserError, match=r"^prompts=:main: has no name before the colon; give NAME:SUBSET:SPLIT$"):
        read_prompt_rows([":main"])


def test_a_file_has_no_subset(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {"prompt": "whole"})
    with pytest.raises(
        UserError, match=rf"^prompts={path}:main: is a file, of which :main chooses nothing; give {path}"
    ):
        read_prompt_rows([f"{path}:main"])


def test_a_split_alone_follows_two_colons(tmp_path: Path) -> None:
    for name in ("train", "test"):
        write(tmp_path / f"{name}.jsonl", {"prompt": name})
    assert [row.text for row in read_dataset(f"{tmp_path}::train").prompt_rows] == ["train"]


def test_slices_of_a_document_share_a_group() -> None:
    corpus = TokenizedCorpus(np.arange(30, dtype=np.int32), np.array([0, 9, 9, 12, 30]), 0)
    prompts = slice_prompts(corpus, 4, 6)
    assert [(prompt.tokens[0], prompt.group) for prompt in prompts] == [(0, 0), (12, 3), (18, 3), (24, 3)]


@pytest.mark.parametrize(
    ("groups", "keys", "joined"),
    [
        ([0, 1, 2], "abc", [0, 1, 2]),
        ([0, 1, 2, 3], "abab", [0, 1, 0, 1]),
        ([0, 1, 1, 2], "aabb", [0, 0, 0, 0]),
        ([3, 2, 1, 0], "abcb", [3, 0, 1, 0]),
        ([2, 1, 1, 0, 2], "axyxz", [2, 0, 0, 0, 2]),
    ],
)
def test_copies_join_their_groups(groups: list[int], keys: str, joined: list[int]) -> None:
    assert independent_groups(groups, [key.encode() for key in keys]) == joined

"""Traces on disk."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from mtptrain.decoding.policy import Policy
from mtptrain.decoding.results import Limits
from mtptrain.decoding.speculative import decode_plain
from mtptrain.errors import UserError
from mtptrain.traces.file import (
    BINDING,
    Trace,
    TraceHeader,
    TraceSet,
    check_trace_set,
    read_trace_set,
    record_traces,
    write_trace_set,
)
from mtptrain.traces.prompts import Prompt, Source
from tests.tiny import random_backbone

MODEL = random_backbone()
HEADER = TraceHeader(
    backbone="aa" * 32,
    dtype="float32",
    temperature=0.0,
    top_k=None,
    top_p=1.0,
    max_new_tokens=7,
    stop=[1, 5],
    seed=0,
    chat_template=None,
    sources=[Source("a.jsonl", "bb" * 32, 9, 2)],
    dropped=1,
)
PROMPTS = [Prompt(list(range(2, 2 + length)), f"domain {length}", number) for number, length in enumerate([7, 1, 4, 7])]


def recorded() -> list[Trace]:
    return record_traces(MODEL, PROMPTS, Limits(7), Policy(), seed=0)


def test_prompts_of_any_lengths_are_continued_in_their_order() -> None:
    for prompt, trace in zip(PROMPTS, recorded(), strict=True):
        assert trace.prompt == prompt
        assert trace.tokens == decode_plain(MODEL, [prompt.tokens], Limits(7)).rows[0].tokens


def test_a_trace_set_reads_back_as_it_was_written(tmp_path: Path) -> None:
    written = TraceSet(HEADER, recorded())
    write_trace_set(tmp_path / "traces.jsonl", written)
    assert read_trace_set(tmp_path / "traces.jsonl") == written


OTHER = {
    "backbone": "cc" * 32,
    "dtype": "bfloat16",
    "temperature": 1.0,
    "top_k": 5,
    "top_p": 0.9,
    "max_new_tokens": 8,
    "stop": [1],
    "min_p": 0.1,
    "repetition_penalty": 1.1,
    "frequency_penalty": 0.5,
    "presence_penalty": -0.5,
    "stop_strings": ["a"],
}


@pytest.mark.parametrize("name", BINDING)
def test_traces_that_this_run_would_not_record_are_refused_by_name(name: str) -> None:
    with pytest.raises(
        UserError, match=rf"^evaluation.traces=x: holds {name}=.*; set .*{BINDING[name]} to match, or record"
    ):
        check_trace_set(Path("x"), HEADER, replace(HEADER, **{name: OTHER[name]}))


def test_traces_may_have_another_seed_and_other_prompts() -> None:
    check_trace_set(Path("x"), HEADER, replace(HEADER, seed=3, sources=[], dropped=0, chat_template="dd"))


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda lines: lines[:-1], "holds 3 traces of 4; record it anew"),
        (lambda lines: lines[1:], "is no trace set of schema 1; give"),
        (lambda lines: [], "is no trace set of schema 1; give"),
        (lambda lines: [*lines[:-1], lines[-1][:20]], "line 5 is not JSON"),
        (lambda lines: [*lines[:-1], json.dumps({"prompt": [1]})], r"is damaged \('domain'\); record"),
    ],
)
def test_a_damaged_trace_set_is_named(damage, reason: str, tmp_path: Path) -> None:  # noqa: ANN001
    path = tmp_path / "traces.jsonl"
    write_trace_set(path, TraceSet(HEADER, recorded()))
    path.write_text("\n".join(damage(path.read_text(encoding="utf-8").splitlines())), encoding="utf-8")
    with pytest.raises(UserError, match=rf"^evaluation.traces={path}: {reason}"):
        read_trace_set(path)


def test_a_folder_of_traces_is_answered_with_its_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"^evaluation.traces={tmp_path}: is a folder; give .*{tmp_path}/traces.jsonl"):
        read_trace_set(tmp_path)

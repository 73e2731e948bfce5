"""Prompts and trace sets through the command line: measured texts and refused ones."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mtptrain.data.tokenizer import load_tokenizer
from mtptrain.recipes.traces import describe_work
from mtptrain.traces.file import TraceSet, read_trace_set
from mtptrain.traces.prompts import Conversation, Prompt, Source
from tests.command import Refused, read_json, read_metrics, run_main
from tests.conftest import CHAT_TEMPLATE, VOCAB_SIZE, save_backbone
from tests.light import certified
from tests.recipes.recorded import recorded

ROWS = {
    "talk.jsonl": [{"turns": ["Why?", "And then?"]}, {"turns": ["Who?"]}],
    "code.jsonl": [{"prompt": f"def rule_{number}("} for number in range(5)],
}


@pytest.fixture(scope="module")
def prompt_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two prompt files and a chat template; do not write into the folder."""
    folder = tmp_path_factory.mktemp("prompts")
    for name, rows in ROWS.items():
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (folder / "template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    return folder


def evaluate(light: list[str], folder: Path, *arguments: str, recipe: str = "evaluate") -> TraceSet:
    heads = "checkpoints=[stock,stock]" if recipe == "compare" else "checkpoint=stock"
    assert run_main(f"+recipe={recipe}", *light, heads, f"output_dir={folder}", *arguments) == 0
    return read_trace_set(folder / "traces.jsonl")


def result_of(folder: Path, name: str = "evaluation.json") -> dict[str, Any]:
    return read_json(folder / name)


@pytest.fixture(scope="module")
def measured(light: list[str], prompt_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an evaluation on five rows of two files; do not write into it."""
    folder = tmp_path_factory.mktemp("measured") / "run"
    files = f"prompts=[{prompt_folder}/talk.jsonl,{prompt_folder}/code.jsonl]"
    evaluate(light, folder, files, f"data.chat_template={prompt_folder}/template.jinja", "evaluation.num_prompts=5")
    return folder


def test_prompt_files_are_measured_turn_by_turn_and_by_domain(measured: Path) -> None:
    traces = read_trace_set(measured / "traces.jsonl")
    assert [(trace.prompt.domain, trace.prompt.group) for trace in traces.traces] == [
        ("talk", 0),
        ("talk", 0),
        ("talk", 1),
        ("code", 2),
        ("code", 3),
        ("code", 4),
    ]
    evaluation = result_of(measured)
    assert evaluation["certificate"]["passed"]
    prompts = evaluation["prompts"]
    assert [(source["rows"], source["used"]) for source in prompts["sources"]] == [(2, 2), (5, 3)]
    assert (prompts["count"], prompts["conversations"], prompts["dropped_turns"]) == (6, 5, 0)


def test_later_turns_are_announced_as_prompts_of_their_own() -> None:
    first = Conversation(Prompt([7], "talk", 0), turns=["And then?", "Who?"])
    source = Source("talk.jsonl", "", 9, 1)
    line = "continuing 1 prompts with the backbone (1 of 9 in talk.jsonl)"
    assert describe_work([first], [source]) == f"{line}, then 2 later turns of theirs, each a prompt of its own"
    assert describe_work([replace(first, turns=[])], [source]) == line


def test_a_text_begins_with_the_mark_that_documents_begin_with(measured: Path) -> None:
    traces = read_trace_set(measured / "traces.jsonl").traces
    assert [trace.prompt.tokens.count(0) for trace in traces] == [1] * 6
    assert [trace.prompt.tokens[0] for trace in traces] == [0] * 6


@pytest.mark.parametrize(("recipe", "name"), [("evaluate", "evaluation.json"), ("compare", "comparison.json")])
def test_a_trace_set_measures_the_same_again(
    recipe: str, name: str, measured: Path, light: list[str], tmp_path: Path
) -> None:
    traces = f"evaluation.traces={measured}/traces.jsonl"
    with certified():
        evaluate(light, tmp_path, traces, "seed=3", recipe=recipe)
    assert (tmp_path / "traces.jsonl").read_bytes() == (measured / "traces.jsonl").read_bytes()
    again, first = result_of(tmp_path, name), result_of(measured)
    assert again["heads"][0]["replay"] == first["heads"][0]["replay"]
    assert again["prompts"] == first["prompts"]


def test_a_template_in_the_backbones_folder_is_found(
    backbone_folder: Path, prompt_folder: Path, light: list[str], tmp_path: Path
) -> None:
    folder = tmp_path / "backbone"
    shutil.copytree(backbone_folder, folder)
    shutil.copy(prompt_folder / "template.jinja", folder / "chat_template.jinja")
    traces = recorded(light, f"prompts={prompt_folder}/talk.jsonl", f"backbone.path={folder}")
    assert traces.header.chat_template is not None
    assert len(traces.traces) == 3


def test_stop_tokens_given_as_text_and_as_id_end_texts_early(
    measured: Path, backbone_folder: Path, prompt_folder: Path, light: list[str], tmp_path: Path
) -> None:
    stops = [trace.tokens[1] for trace in read_trace_set(measured / "traces.jsonl").traces[-2:]]
    vocabulary = result_of(backbone_folder, "tokenizer.json")["model"]["vocab"]
    text = next(name for name, number in vocabulary.items() if number == stops[0])
    files = [f"prompts={prompt_folder}/code.jsonl", "evaluation.num_prompts=5"]
    traces = evaluate(light, tmp_path, *files, f"decoding.stop=['{text}',{stops[1]}]")
    assert traces.header.stop == sorted([1, *stops])
    assert all(set(stops).isdisjoint(trace.tokens[:-1]) for trace in traces.traces)
    for stop in stops:
        assert any(trace.tokens[-1] == stop and len(trace.tokens) < 6 for trace in traces.traces)
    assert result_of(tmp_path)["certificate"]["passed"]


def test_training_logs_every_position_of_every_draft_length(
    prompt_folder: Path, light: list[str], tmp_path: Path
) -> None:
    arguments = [f"prompts={prompt_folder}/code.jsonl", "evaluation.every=2", "evaluate_at_end=false"]
    assert run_main("+recipe=distill", *light, *arguments, f"output_dir={tmp_path}") == 0
    (figures,) = [row for row in read_metrics(tmp_path) if "replay/acceptance_length_1" in row]
    names = {"acceptance_length_1", "acceptance_length_2", "accepted_1_of_1", "accepted_1_of_2"}
    assert {f"replay/{name}" for name in names} <= figures.keys()
    assert figures["replay/acceptance_length_1"] >= 1


def test_the_best_checkpoint_is_that_of_the_best_measurement(measured: Path, light: list[str], tmp_path: Path) -> None:
    arguments = ["train.steps=6", "train.optimizer=adamw", "mtp.steps=3"]  # whose measurements differ
    arguments += ["evaluation.every=2", f"evaluation.traces={measured}/traces.jsonl"]
    assert run_main("+recipe=distill", *light, *arguments, "evaluate_at_end=false", f"output_dir={tmp_path}") == 0
    score = "replay/expected_length_2"
    scores = {row["step"]: row[score] for row in read_metrics(tmp_path) if score in row}
    assert list(scores) == [2, 4, 6]
    assert result_of(tmp_path / "checkpoints" / "best", "checkpoint.json")["content"]["step"] == max(
        scores, key=scores.__getitem__
    )


# What is refused

PROMPT_MISTAKES: list[tuple[str, str]] = [
    ('{"prompt": ""}\n', "line 1: `prompt` is empty; write a text or drop the line"),
    ('{"prompt": "a"}\n{"turns": []}\n', "line 2: `turns` must be a list that is not empty"),
    ('{"text": "a"}\n', "line 1 has none of turns, messages, prompt; it has ['text']; rename"),
    ('{"prompt": "a"}\n{"prompt": \n', "line 2 is not JSON"),
    ("\n", "holds no prompt; write a row with"),
    ('{"turns": ["a"]}\n', "line 1 is a conversation and the backbone's tokenizer has no chat template; set data.chat"),
    ('{"messages": [{"role": "user", "content": "a"}]}\n', "line 1 is a conversation"),
    (json.dumps({"prompt": "word " * 5000}) + "\n", "line 1: the prompt has "),
]


@pytest.mark.parametrize(("content", "line"), PROMPT_MISTAKES, ids=[line[:24] for _, line in PROMPT_MISTAKES])
def test_a_prompt_file_that_is_wrong_is_named_with_its_line(
    content: str, line: str, tmp_path: Path, refused: Refused
) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text(content, encoding="utf-8")
    message = refused(f"prompts={path}", "checkpoint=stock", recipe="evaluate")
    assert message.startswith(f"prompts={path}: {line}")


def test_a_wrong_prompt_is_said_before_any_training(tmp_path: Path, refused: Refused) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text('{"prompt": ""}\n', encoding="utf-8")
    assert refused(f"prompts={path}").startswith(f"prompts={path}: line 1: `prompt` is empty")


SETTINGS: list[tuple[list[str], str]] = [
    (["prompts=[]"], "prompts=[]: must be heldout, or"),
    (["prompts=3"], "prompts=3: must be heldout, or"),
    (["prompts=[heldout,a.jsonl]"], "prompts=[heldout,a.jsonl]: heldout cannot be combined with others"),
    (["prompts=absent.jsonl"], "prompts=absent.jsonl: cannot be read"),
    (["prompts=absent"], "prompts=absent: datasets cannot load it"),
    (["prompts=a.jsonl", "evaluation.traces=b"], "prompts=[a.jsonl]: evaluation.traces brings its own prompts"),
    (["decoding.stop=[nowhere]"], "decoding.stop=nowhere: is not one token of the backbone's 300; give"),
    (["decoding.stop=[300]"], "decoding.stop=300: is not one token"),
    (["decoding.stop=[-1]"], "decoding.stop=-1: is not one token"),
    (["decoding.stop=[1.5]"], "decoding.stop=[1.5]: must be a list of token texts or ids"),
    (["decoding.max_new_tokens=1"], "decoding.max_new_tokens=1: must be at least 2"),
    (["decoding.draft_length=0"], "decoding.draft_length=0: must lie between 1 and 8"),
    (["decoding.temperature=-1"], "decoding.temperature=-1.0: must be 0 (greedy) or above"),
    (["decoding.top_p=0"], "decoding.top_p=0.0: must lie in (0, 1]"),
    (["decoding.top_p=1.1"], "decoding.top_p=1.1: must lie in (0, 1]"),
    (["decoding.repetition_penalty=0"], "decoding.repetition_penalty=0.0: must be above 0"),
    (["decoding.frequency_penalty=3"], "decoding.frequency_penalty=3.0: must lie in [-2, 2]"),
    (["decoding.max_new_tokens=4096"], "decoding.max_new_tokens=4096: leaves no room for a prompt"),
    (["evaluation.prompt_tokens=30", "decoding.max_new_tokens=4090"], "evaluation.prompt_tokens=30: the prompt has 30"),
    (["evaluation.traces=absent"], "evaluation.traces=absent: cannot be read"),
]


@pytest.mark.parametrize(("arguments", "line"), SETTINGS, ids=[" ".join(arguments) for arguments, _ in SETTINGS])
def test_a_setting_of_what_is_measured_is_refused_by_name(arguments: list[str], line: str, refused: Refused) -> None:
    assert refused("checkpoint=stock", *arguments, recipe="evaluate").startswith(line)


def test_a_chat_template_that_is_not_there_is_named(prompt_folder: Path, refused: Refused) -> None:
    line = refused(
        f"prompts={prompt_folder}/talk.jsonl", "data.chat_template=absent", "checkpoint=stock", recipe="evaluate"
    )
    assert line.startswith("data.chat_template=absent: cannot be read")


@pytest.fixture(scope="module")
def other_backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A backbone that differs from the shared one in its config."""
    folder = tmp_path_factory.mktemp("other")
    save_backbone(folder, index_topk=2)
    return folder


REUSE: list[tuple[Callable[[Path], str], str]] = [
    (lambda other: f"backbone.path={other}", "set backbone or backbone.path to match, or record"),
    (lambda _: "decoding.max_new_tokens=5", "max_new_tokens=6 and this run has max_new_tokens=5"),
    (lambda _: "decoding.top_p=0.5 decoding.temperature=1", "top_p=1.0 and this run has temperature=1.0, top_p=0.5"),
    (lambda _: "decoding.temperature=1", "temperature=0.0 and this run has temperature=1.0"),
    (lambda _: "decoding.stop=[7]", "stop=[1] and this run has stop=[1, 7]"),
    (lambda _: "decoding.presence_penalty=0.5", "presence_penalty=0.0 and this run has presence_penalty=0.5"),
    (lambda _: "decoding.stop_strings=[road]", "stop_strings=[] and this run has stop_strings=['road']"),
    (lambda _: "precision=bf16", "dtype=float32 and this run has dtype=bfloat16"),
]


@pytest.mark.parametrize(("change", "line"), REUSE, ids=[line[:20] for _, line in REUSE])
def test_traces_of_another_backbone_or_policy_are_refused(
    change: Callable[[Path], str], line: str, measured: Path, other_backbone: Path, refused: Refused
) -> None:
    traces = f"evaluation.traces={measured}/traces.jsonl"
    message = refused(traces, *change(other_backbone).split(), "checkpoint=stock", recipe="evaluate")
    assert message.startswith(f"{traces}: holds ")
    assert line in message


@pytest.mark.parametrize("sampled", [[], ["decoding.temperature=1", "decoding.min_p=0.01"]], ids=["greedy", "sampled"])
def test_a_penalised_text_that_ends_with_a_string_is_certified(
    sampled: list[str], light: list[str], tmp_path: Path
) -> None:
    penalties = {"repetition_penalty": 1.4, "frequency_penalty": 0.5, "presence_penalty": -0.2}
    settings = [f"decoding.{name}={value}" for name, value in penalties.items()]
    length = ["decoding.max_new_tokens=12", "evaluation.timed_prompts=2"]
    whole = recorded(light, *settings, *sampled, *length)
    end = load_tokenizer(Path(light[0].partition("=")[2]), VOCAB_SIZE).decode(whole.traces[0].tokens[3:5])
    traces = evaluate(light, tmp_path, *settings, *sampled, *length, f'decoding.stop_strings=["{end}"]')
    assert traces.traces[0].tokens == whole.traces[0].tokens[: len(traces.traces[0].tokens)]
    assert len(traces.traces[0].tokens) <= 5
    assert traces.header.stop_strings == [end]
    result = result_of(tmp_path)
    assert result["certificate"]["passed"]
    assert result["policy"] | penalties == result["policy"]


def test_copies_of_a_prompt_are_one_group(light: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    rows = [{"prompt": text} for text in ("The river is", "the  RIVER\nis", "Our teacher", "The river is")]
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    with certified():
        traces = evaluate(light, tmp_path / "run", f"prompts={file}", "evaluation.num_prompts=4")
    assert [trace.prompt.group for trace in traces.traces] == [0, 0, 2, 0]
    prompts = result_of(tmp_path / "run")["prompts"]
    assert (prompts["count"], prompts["conversations"]) == (4, 2)
    output, errors = capfd.readouterr()
    assert "the 4 prompts are 2 independent groups: copies" in errors
    assert "interval over 2 groups of 4 prompts" in " ".join(output.split())


def test_prompts_that_are_trained_on_are_counted_before_and_after_training_and_with_the_checkpoint(
    light: list[str], corpus_file: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    texts = [json.loads(line)["text"] for line in corpus_file.read_text(encoding="utf-8").splitlines()]
    rows = [{"prompt": "  ".join(text.upper().split())} for text in texts[:8]]
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    measured = (f"prompts={file}", "evaluation.num_prompts=8")
    run = tmp_path / "run"
    with certified():
        assert run_main("+recipe=distill", *light, *measured, f"output_dir={run}") == 0
    output, errors = capfd.readouterr()
    stock, trained = result_of(run)["heads"]
    seen = trained["seen_prompts"]
    assert stock["seen_prompts"] is None
    assert seen["prompts"] == seen["checked"] == 8
    assert 4 <= seen["seen"] < 8  # those of the training side of the hold-out
    assert f"{seen['seen']} of 8 prompts are trained on" in errors.partition("continuing 8 prompts")[0]
    assert f"the trained head saw {seen['seen']} of 8 prompts in training" in " ".join(output.split())
    evaluate(light, tmp_path / "again", *measured, f"checkpoint={run}", "evaluation.include_stock=false")
    (alone,) = result_of(tmp_path / "again")["heads"]
    assert (alone["name"], alone["seen_prompts"]) == ("trained", seen)
    assert result_of(tmp_path / "again")["certificate"]["passed"]

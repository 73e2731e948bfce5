"""Benchmarks by name, read from small copies with the files, subsets, splits and columns of the published sets."""

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from mtptrain.errors import UserError
from mtptrain.traces.benchmarks import BENCHMARKS
from mtptrain.traces.prompts import PromptSource, read_prompt_rows

GSM8K = {"question": "Weng earns $12 an hour. How much in 50 minutes?", "answer": "12/60*50 = 10\n#### 10"}
MATH500 = {
    "problem": "Convert $(0,3)$ to polar coordinates.",
    "solution": "We have $r = 3$.",
    "answer": "\\left( 3, \\frac{\\pi}{2} \\right)",
    "subject": "Precalculus",
    "level": 2,
    "unique_id": "test/precalculus/807.json",
}
MBPP = {
    "source_file": "Benchmark Questions Verification V2.ipynb",
    "task_id": 2,
    "prompt": "Write a function to find the shared elements from the given two lists.",
    "code": "def similar_elements(a, b):\n  return tuple(set(a) & set(b))\n",
    "test_imports": [],
    "test_list": ["assert set(similar_elements((3, 4), (4, 7))) == set((4,))"],
}
HUMANEVAL = {
    "task_id": "HumanEval/0",
    "prompt": 'def largest(numbers):\n    """ Return the largest number. """\n',
    "canonical_solution": "    return max(numbers)\n",
    "test": "def check(candidate):\n    assert candidate([1, 2]) == 2\n",
    "entry_point": "largest",
}
MT_BENCH = {
    "category": "writing",
    "prompt": ["Write about a trip to Hawaii.", "Now begin every sentence with A."],
    "reference": [],
    "prompt_id": 81,
}
SOCRATIC = {**GSM8K, "question": "of another subset"}

# Of each repository: subset, split and row of every file. MATH-500 declares no subsets.
FILES: dict[str, list[tuple[str, str, dict[str, Any]]]] = {
    "openai/gsm8k": [
        ("socratic", "test", SOCRATIC),
        ("main", "train", {**GSM8K, "question": "to train on"}),
        ("main", "test", GSM8K),
    ],
    "HuggingFaceH4/MATH-500": [("", "test", MATH500)],
    "google-research-datasets/mbpp": [
        ("full", "test", {"text": "of another subset"}),
        ("sanitized", "prompt", {**MBPP, "prompt": "of another split"}),
        ("sanitized", "train", {**MBPP, "prompt": "to train on"}),
        ("sanitized", "test", MBPP),
    ],
    "openai/openai_humaneval": [("openai_humaneval", "test", HUMANEVAL)],
    "HuggingFaceH4/mt_bench_prompts": [("default", "train", MT_BENCH)],
}
FIRST = {
    "gsm8k": GSM8K["question"],
    "math500": MATH500["problem"],
    "mbpp": MBPP["prompt"],
    "mt_bench": MT_BENCH["prompt"][0],
}


def write_copy(folder: Path, files: list[tuple[str, str, dict[str, Any]]]) -> None:
    """Write the folder that `hf download` would leave: parquet files by subset and split, which README.md lists."""
    configs: dict[str, list[dict[str, str]]] = {}
    for subset, split, row in files:
        (folder / subset).mkdir(parents=True, exist_ok=True)
        if not subset:
            (folder / f"{split}.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
            continue
        path = f"{subset}/{split}-00000-of-00001.parquet"
        Dataset.from_list([row]).to_parquet(folder / path)
        configs.setdefault(subset, []).append({"split": split, "path": path})
    header = {"configs": [{"config_name": subset, "data_files": parts} for subset, parts in configs.items()]}
    if configs:
        (folder / "README.md").write_text(f"---\n{json.dumps(header)}\n---\n", encoding="utf-8")  # JSON is YAML


@pytest.fixture(scope="module")
def copies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory with a copy of every repository; do not write into it."""
    folder = tmp_path_factory.mktemp("copies")
    for repository, files in FILES.items():
        write_copy(folder / repository, files)
    return folder


@pytest.fixture
def beside_copies(copies: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(copies)


def read(name: str, setting: str = "prompts", split: str | None = None) -> PromptSource:
    [source] = read_prompt_rows([name], setting, split)
    return source


@pytest.mark.usefixtures("beside_copies")
@pytest.mark.parametrize("name", FIRST)
def test_questions_are_asked_through_the_chat_template(name: str) -> None:
    [row] = read(name).prompt_rows
    assert (row.domain, row.text) == (name, "")
    assert row.messages == [{"role": "user", "content": FIRST[name]}]
    assert row.turns == (MT_BENCH["prompt"][1:] if name == "mt_bench" else [])


@pytest.mark.usefixtures("beside_copies")
def test_a_completion_is_continued_as_it_is() -> None:
    [row] = read("humaneval").prompt_rows
    assert (row.domain, row.text, row.messages) == ("humaneval", HUMANEVAL["prompt"], [])


@pytest.mark.usefixtures("beside_copies")
def test_several_benchmarks_are_as_many_domains_and_record_their_full_names() -> None:
    sources = read_prompt_rows(list(BENCHMARKS))
    assert [source.prompt_rows[0].domain for source in sources] == list(BENCHMARKS)
    assert [source.name for source in sources] == [
        "openai/gsm8k:main:test",
        "HuggingFaceH4/MATH-500::test",
        "google-research-datasets/mbpp:sanitized:test",
        "openai/openai_humaneval::test",
        "HuggingFaceH4/mt_bench_prompts::train",
    ]


@pytest.mark.usefixtures("beside_copies")
@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("openai/gsm8k", GSM8K["question"]),
        ("openai/gsm8k:main:train", "to train on"),
        ("gsm8k::train", "to train on"),
        ("gsm8k:socratic", "of another subset"),
        ("mbpp:sanitized:prompt", "of another split"),
    ],
)
def test_a_repository_subset_and_split_can_be_given(name: str, text: str) -> None:
    source = read(name)
    assert source.prompt_rows[0].messages[0]["content"] == text
    assert source.prompt_rows[0].domain == name.partition(":")[0].rpartition("/")[2]


@pytest.mark.usefixtures("beside_copies")
@pytest.mark.parametrize("name", ["gsm8k", "mbpp"])
def test_training_texts_begin_with_questions_that_do_not_measure(name: str) -> None:
    assert read(name, "on_policy.prompts", "train").prompt_rows[0].messages[0]["content"] == "to train on"


@pytest.mark.parametrize("name", ["math500", "humaneval", "mt_bench"])
def test_a_benchmark_without_other_questions_is_not_trained_on(name: str) -> None:
    with pytest.raises(UserError, match=rf"^on_policy\.prompts={name}: {name} has no questions but those that heads"):
        read(name, "on_policy.prompts", "train")


@pytest.mark.usefixtures("beside_copies")
def test_another_column_is_named_with_the_existing_ones() -> None:
    with pytest.raises(
        UserError, match=r"^prompts=mbpp:full: line 1 has no `prompt`, .*; it has \['text'\]; give subs"
    ):
        read("mbpp:full")


@pytest.mark.parametrize("name", ["gsm8k", "gsm8k:main"])
@pytest.mark.parametrize("is_folder", [True, False])
def test_a_file_or_folder_of_the_same_name_is_ambiguous(
    is_folder: bool, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "gsm8k"
    path.mkdir() if is_folder else path.touch()
    with pytest.raises(UserError, match=rf"^prompts={name}: names a benchmark and a file or folder here; give ./gsm8k"):
        read(name)


def test_a_local_folder_is_given_with_its_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gsm8k").mkdir()
    (tmp_path / "gsm8k" / "mine.jsonl").write_text('{"prompt": "mine"}\n', encoding="utf-8")
    assert [row.text for row in read("./gsm8k").prompt_rows] == ["mine"]


@pytest.mark.parametrize("name", BENCHMARKS)
def test_without_a_network_one_line_names_the_ways_out(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as refused:
        read(name)
    line, repository = str(refused.value), BENCHMARKS[name].repository
    assert line.startswith(f"prompts={name}: datasets cannot load it (Couldn't reach '{repository}' on the Hub")
    assert f"`hf download {repository} --repo-type dataset --local-dir {repository}`" in line
    assert line.endswith("or set HF_HOME to a cache that holds the data set, or give a local file")
    assert "\n" not in line


def test_a_mistyped_benchmark_is_answered_with_the_nearest() -> None:
    with pytest.raises(UserError, match=r"^prompts=gsm8: datasets cannot load it .*; did you mean gsm8k\?$"):
        read("gsm8")

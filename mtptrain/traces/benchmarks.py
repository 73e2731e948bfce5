"""Data sets of prompts: NAME:SUBSET:SPLIT, and public benchmarks by a short name that stands for all of it."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from mtptrain.config import did_you_mean
from mtptrain.data.files import ROW_KINDS, Row, kind_of
from mtptrain.data.rows import load_rows
from mtptrain.errors import UserError


@dataclass(frozen=True, slots=True)
class Benchmark:
    """A public set of questions.

    Attributes:
        repository: its name on the hub.
        subset: the subset to read; empty if there is only one.
        split: the split that heads are measured on.
        training_split: a split without these questions, to write training texts from; empty if there is none.
        column: the column of the question; a list holds the turns of a user.
        is_chat: the question is asked through the chat template; otherwise the text is continued as it is.
    """

    repository: str
    subset: str
    split: str
    training_split: str
    column: str
    is_chat: bool


BENCHMARKS = {
    "gsm8k": Benchmark("openai/gsm8k", "main", "test", "train", "question", True),
    "math500": Benchmark("HuggingFaceH4/MATH-500", "", "test", "", "problem", True),
    "mbpp": Benchmark("google-research-datasets/mbpp", "sanitized", "test", "train", "prompt", True),
    "humaneval": Benchmark("openai/openai_humaneval", "", "test", "", "prompt", False),
    "mt_bench": Benchmark("HuggingFaceH4/mt_bench_prompts", "", "train", "", "prompt", True),
}
NAME_OF = {benchmark.repository: name for name, benchmark in BENCHMARKS.items()}


def benchmark_name(given: str) -> str | None:
    """Return the short name of a benchmark that is given by it or by its repository, or None for anything else."""
    return given if given in BENCHMARKS else NAME_OF.get(given)


def check_unambiguous(setting: str, given: str) -> None:
    """Refuse a short name that a file or folder has, too.

    Args:
        setting: `name=value`, for the error.
        given: the name, without subset and split.

    Raises:
        UserError: both exist.
    """
    if given in BENCHMARKS and Path(given).exists():
        raise UserError(
            f"{setting}: names a benchmark and a file or folder here; give ./{given} for these files, or "
            f"{BENCHMARKS[given].repository} for the benchmark"
        )


@dataclass(frozen=True, slots=True)
class DatasetChoice:
    """A data set to read.

    Attributes:
        name: of the data set, with subset and split as far as they are chosen.
        repository: its name on the hub, or a folder.
        subset: empty if there is only one.
        split: empty for `test`, or the first split if there is no `test`.
        domain: of its rows.
        benchmark: a key of `BENCHMARKS`, or None.
    """

    name: str
    repository: str
    subset: str
    split: str
    domain: str
    benchmark: str | None = None


def choose_dataset(setting: str, name: str, split: str | None) -> DatasetChoice:
    """Return the data set of a name.

    Args:
        setting: `name=value`, for the error.
        name: NAME, NAME:SUBSET or NAME:SUBSET:SPLIT, where NAME may be a benchmark.
        split: the split if the name has none; of a benchmark, None measures and a split trains.

    Raises:
        UserError: the name has no repository or is a file, or training is to read the questions of a benchmark.
    """
    repository, subset, own_split = [*name.split(":", 2), "", ""][:3]
    if not repository:
        raise UserError(f"{setting}: has no name before the colon; give NAME:SUBSET:SPLIT")
    if kind_of(Path(repository)) in ROW_KINDS:
        raise UserError(f"{setting}: is a file, of which :{subset} chooses nothing; give {repository}")
    short = benchmark_name(repository)
    if short is None:
        return DatasetChoice(name, repository, subset, own_split or split or "", repository.rsplit("/", 1)[-1])
    known = BENCHMARKS[short]
    subset, split = subset or known.subset, own_split or _split_of(setting, short, split is not None)
    return DatasetChoice(f"{known.repository}:{subset}:{split}", known.repository, subset, split, short, short)


def _split_of(setting: str, short: str, training: bool) -> str:
    known = BENCHMARKS[short]
    if training and not known.training_split:
        raise UserError(f"{setting}: {short} has no questions but those that heads are measured on; name other prompts")
    return known.training_split if training else known.split


def load_questions(setting: str, choice: DatasetChoice) -> tuple[list[Row], str]:
    """Return the rows of a data set, those of a benchmark as rows of a prompt file, and SHA-256 of its rows as JSON.

    Raises:
        UserError: the data set cannot be loaded, or the rows of a benchmark have not its column.
    """
    chosen = {"name": choice.subset, "split": choice.split}
    try:
        rows = list(load_rows(setting, choice.repository, **{key: value for key, value in chosen.items() if value}))
    except UserError as error:
        raise UserError(f"{error}{did_you_mean(choice.repository, list(BENCHMARKS))}") from None
    lines = (json.dumps(row, sort_keys=True, default=str) + "\n" for row in rows)
    sha256 = hashlib.sha256("".join(lines).encode("utf-8", "surrogatepass")).hexdigest()
    if choice.benchmark is not None:
        rows = [_question(f"{setting}: line {n}", choice.benchmark, row) for n, row in enumerate(rows, start=1)]
    return rows, sha256


def _question(where: str, short: str, row: Row) -> Row:
    """Return the question of a benchmark's row as a row of a prompt file, with `turns` or `prompt`."""
    known = BENCHMARKS[short]
    value = row.get(known.column)
    if value is None:
        raise UserError(
            f"{where} has no `{known.column}`, which holds the questions of {short}; it has {sorted(row)}; give subset "
            f"and split of {known.repository} as {short}:SUBSET:SPLIT, or take a fresh copy"
        )
    if not known.is_chat:
        return {"prompt": value}
    return {"turns": value if isinstance(value, list) else [value]}

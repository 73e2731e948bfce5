"""The outcome of a mutant: the test, certificate or control that notices the fault."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.mutants.forked import TIMEOUT, run_module

EVALUATE = [
    "+recipe=evaluate",
    "checkpoint=stock",
    "decoding.temperature=1",
    "decoding.draft_length=3",
    "decoding.max_new_tokens=40",
    "evaluation.num_prompts=8",
    "evaluation.prompt_tokens=32",
    "evaluation.batch_sizes=[2]",
    "evaluation.timed_prompts=4",
    "evaluation.heldout_sequences=2",
]
HYDRA_HINT = "HYDRA_FULL_ERROR"  # in the last line of an exception
FAILED = re.compile(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Outcome:
    """Result of one mutant.

    Attributes:
        name: of the mutant.
        digest: of the mutant when it ran.
        test: the first test that failed; None if all passed.
        certificate: the parts of the certificate that failed, or the evaluation's last line if it ended with an error.
        control: the controls that failed.
        evaluated: whether an evaluation was run.
        seconds: time of tests and evaluation.
    """

    name: str
    digest: str
    test: str | None
    certificate: str | None
    control: str | None
    evaluated: bool
    seconds: float


def run_tests(tree: Path, tests: Sequence[str], log: Path) -> str | None:
    """Return the first test that fails in a tree; None if all pass.

    Raises:
        RuntimeError: the tests could not be run.
    """
    options = ["-q", "-x", "-rfE", "--tb=line", "-p", "no:cacheprovider"]
    ended = run_module(tree, "pytest", [*options, *tests], log)
    if ended.code is None:
        return f"no end within {TIMEOUT} s"
    failed = FAILED.search(ended.output)
    if ended.code == 0 or (ended.code == 1 and failed):
        return failed[1] if failed else None
    raise RuntimeError(f"pytest ended with {ended.code}:\n{ended.output[-3000:]}")


def evaluate(tree: Path, folder: Path, log: Path) -> tuple[str | None, str | None]:
    """Evaluate the shipped backbone's stock head in a tree; return the failed parts of the certificate and controls.

    Args:
        tree: a copy of the checkout.
        folder: the run's folder, which must not exist yet.
        log: file for the output.
    """
    ended = run_module(tree, "mtptrain", [*EVALUATE, f"output_dir={folder}"], log)
    if ended.code is None:
        return f"no end within {TIMEOUT} s", None
    result = folder / "evaluation.json"
    if not result.exists():
        lines = [line for line in ended.output.splitlines() if line.strip() and HYDRA_HINT not in line]
        return "error: " + (lines or ["no message"])[-1][:120], None
    certificate = json.loads(result.read_text(encoding="utf-8"))["certificate"]
    controls = certificate.pop("controls")
    return _failed(certificate), _failed(controls)


def _failed(parts: dict[str, object]) -> str | None:
    """Return the names of the parts that have not passed, or None."""
    names = [name for name, part in parts.items() if _has_failed(part) and name != "passed"]
    return ", ".join(names) or None


def _has_failed(part: object) -> bool:
    if not isinstance(part, dict):
        return False
    return part.get("passed") is False or any(_has_failed(inner) for inner in part.values())

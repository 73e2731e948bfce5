"""A fault of one node ends every process, with one line that says where it is."""

import re
import signal
from pathlib import Path

import pytest

from tests.recipes.other_node import JOBS, KILLED, make_nodes
from tests.warm import run_in_two

LINES = {
    "missing": r"process 1 on \S+: backbone\.path=R: 1 of 7 shards .* are missing: model-00003-of-00007\.safetensors",
    "truncated": r"process 1 on \S+: backbone\.path=R: model-00003-of-00007\.safetensors cannot be read \(",
    "mismatched": r"process 1 on \S+: backbone\.path=R: 1 mismatched keys, e\.g\. .*q_a_proj",
    KILLED: r"distributed_timeout=60: another process is gone or does not answer \(.*; nothing is saved yet",
}


@pytest.fixture(scope="module")
def outputs(release_folder: Path, corpus_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("nodes")
    make_nodes(folder, release_folder)
    ended = run_in_two("tests.recipes.other_node", str(folder), str(corpus_file))
    assert ended.codes == (0, -signal.SIGKILL), ended.errors[-4000:]
    return folder


@pytest.mark.parametrize("job", range(len(JOBS)), ids=[" ".join(job) for job in JOBS])
def test_a_fault_of_one_node_is_one_line_and_ends_all(job: int, outputs: Path) -> None:
    texts = [(outputs / f"{job}.{number}.txt").read_text(encoding="utf-8") for number in range(2)]
    fault = JOBS[job][0]
    assert [text.endswith("exit code 2\n") for text in texts] == [True, fault != KILLED], texts
    (line,) = [line for text in texts for line in text.splitlines() if line.startswith("mtptrain: ")]
    assert re.match(f"mtptrain: {LINES[fault]}", line)
    assert "Traceback" not in "".join(texts)
    assert not (outputs / f"run{job}").exists()

"""Memory of a process: freed tensors stay with it while it trains."""

import subprocess
import sys

import pytest

from tests.command import ROOT

PROGRAM = """
import resource
import sys

import numpy as np

from mtptrain.run.memory import keep_freed_memory


def touch():
    "Return the page faults of 144 MB, 36,864 pages."
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    arrays = [np.ones(3 * 2**20, np.float32) for _ in range(12)]
    del arrays
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


if "keep" in sys.argv:
    keep_freed_memory()
touch()
print(touch())
"""


def faults(*arguments: str) -> int:
    """Return the page faults of the second use of memory, in a process whose heap no other test has shaped."""
    command = [sys.executable, "-c", PROGRAM, *arguments]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return int(ended.stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's malloc")
def test_freed_memory_is_used_again_without_fresh_pages() -> None:
    assert faults("keep") < 1000 < faults()

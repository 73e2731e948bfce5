"""Memory of a process: freed tensors stay with it while it trains."""

import resource
import sys

import pytest
import torch

from mtptrain.run.memory import keep_freed_memory


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's malloc")
def test_freed_tensors_are_used_again_without_fresh_pages() -> None:
    keep_freed_memory()

    def touch() -> int:
        """Return the page faults of 144 MB of tensors, 36,864 pages."""
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        tensors = [torch.ones(3 * 2**20) for _ in range(12)]
        del tensors
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    touch()
    assert touch() < 1000

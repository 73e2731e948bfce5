"""Stream caches that are begun or complete."""

from pathlib import Path

import pytest

from mtptrain.hidden_cache import growing_cache
from tests.hidden_cache.growing import SHARDS, Writer


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(growing_cache, "POLL_SECONDS", 0.001)


@pytest.fixture
def writer(tmp_path: Path) -> Writer:
    """A begun cache without shards."""
    writer = Writer(tmp_path / "cache")
    writer.begin()
    return writer


@pytest.fixture
def whole(writer: Writer) -> Path:
    """A complete cache."""
    writer.write(*range(len(SHARDS)))
    writer.finish()
    return writer.folder

from pathlib import Path

import pytest

from mtptrain.errors import UserError
from mtptrain.run import nodes
from mtptrain.run.nodes import require_shared


def test_a_folder_that_all_processes_see_is_left_as_it_was(tmp_path: Path) -> None:
    require_shared(tmp_path / "run")
    assert list((tmp_path / "run").iterdir()) == []


def test_a_folder_that_a_process_does_not_see_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nodes, "rank", lambda: 3)
    monkeypatch.setattr(nodes, "on_rank0", lambda work: tmp_path / "on another host")
    with pytest.raises(UserError, match=f"output_dir={tmp_path}: process 3 does not see .* that all hosts share"):
        require_shared(tmp_path)

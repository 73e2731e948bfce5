"""Provenance is typed in memory, and a resumed run keeps that of the run before it."""

import json
from pathlib import Path

import pytest

from mtptrain.config import RunConfig
from mtptrain.errors import UserError
from mtptrain.run.folder import PROVENANCE_FILE, RunFolder, open_run_folder
from mtptrain.run.provenance import Provenance
from mtptrain.run.typed_json import from_json


def open_folder(path: Path, seed: int = 0) -> RunFolder:
    config = RunConfig(task="plan", output_dir=str(path), resume="auto", seed=seed)
    return open_run_folder(config, {"seed": seed})


def write_run(path: Path, seed: int, on_policy: dict[str, object] | None = None) -> Provenance:
    folder = open_folder(path, seed)
    folder.on_policy = on_policy
    folder.write()
    folder.lock.close()
    return folder.provenance


def test_a_provenance_survives_its_file(tmp_path: Path) -> None:
    written = write_run(tmp_path, seed=3)
    values = json.loads((tmp_path / PROVENANCE_FILE).read_text(encoding="utf-8"))
    assert from_json(Provenance, values) == written
    assert "continues" not in values
    assert "on_policy" not in values


def test_a_resumed_run_keeps_the_provenance_of_the_run_before_it(tmp_path: Path) -> None:
    first = write_run(tmp_path, seed=3, on_policy={"folder": "texts"})
    assert json.loads((tmp_path / PROVENANCE_FILE).read_text(encoding="utf-8"))["on_policy"] == {"folder": "texts"}
    second = write_run(tmp_path, seed=4)
    assert (second.seed, second.continues) == (4, first)
    assert json.loads((tmp_path / PROVENANCE_FILE).read_text(encoding="utf-8"))["continues"]["seed"] == 3


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff", b'{"seed": 0}'])
def test_a_damaged_provenance_is_refused_before_a_run_is_resumed(content: bytes, tmp_path: Path) -> None:
    (tmp_path / PROVENANCE_FILE).write_bytes(content)
    with pytest.raises(UserError, match=rf"^output_dir={tmp_path}: provenance.json is damaged \(.*\); restore it, or"):
        open_folder(tmp_path)

"""A comparison is refused before anything is made for it."""

import re
from pathlib import Path

from tests.command import Refused, run_main
from tests.conftest import save_backbone


def test_a_head_of_another_backbone_is_refused_before_traces_are_made(
    light: list[str], tmp_path: Path, refused: Refused
) -> None:
    trained, other = tmp_path / "trained", tmp_path / "other"
    training = ["train.steps=1", "evaluate_at_end=false", f"output_dir={trained}"]
    assert run_main("+recipe=distill", *light, *training) == 0
    other.mkdir()
    save_backbone(other, index_topk=2)
    line = refused(f"backbone.path={other}", f"checkpoints=[stock,{trained}]", recipe="compare")
    assert re.match(rf"checkpoint={trained}/.*: holds backbone=.* and this run has .*set backbone.path", line)

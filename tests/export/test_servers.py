from pathlib import Path

import pytest

from mtptrain.config import ExportForm, ExportTarget
from mtptrain.errors import UserError
from mtptrain.export.command import serve_command
from mtptrain.export.servers import check_path

FOLDER, SOURCE = Path("/models/head"), Path("/models/V4")


@pytest.mark.parametrize("name", ["my-eagle3-head", "Eagle-X", "v4-DSpark", "dflash"])
def test_a_path_that_vllm_misreads_is_refused_unless_it_is_forced(name: str, tmp_path: Path) -> None:
    folder = tmp_path / name / "X"
    with pytest.raises(UserError, match=r"^output_dir=.*the path contains `.*choose another name"):
        check_path(ExportTarget.vllm, folder, False)
    warning = check_path(ExportTarget.vllm, folder, True)
    assert warning is not None
    assert warning.endswith("rename it before serving")
    assert check_path(ExportTarget.sglang, folder, False) is None


def test_no_other_path_is_refused() -> None:
    assert check_path(ExportTarget.vllm, FOLDER, False) is None


def test_a_draft_folder_is_served_beside_its_model() -> None:
    command = serve_command(ExportTarget.vllm, ExportForm.draft, FOLDER, SOURCE, 2)
    assert command == (
        'vllm serve /models/V4 --speculative-config \'{"method": "mtp", "model": "/models/head", '
        '"num_speculative_tokens": 2, "draft_sample_method": "probabilistic"}\''
    )


def test_sglang_verifies_one_token_more_than_it_drafts() -> None:
    command = serve_command(ExportTarget.sglang, ExportForm.full, FOLDER, SOURCE, 2)
    assert "--speculative-num-steps 2" in command
    assert "--speculative-num-draft-tokens 3" in command

from dataclasses import replace
from pathlib import Path

import pytest

from mtptrain.config import ExportConfig, ExportForm, ExportTarget
from mtptrain.errors import UserError
from mtptrain.export.card import serving_notes
from mtptrain.export.command import serve_command
from mtptrain.export.servers import SERVERS, check_path
from mtptrain.recipes.export import check_paths

FOLDER, SOURCE = Path("/models/head"), Path("/models/V4")


@pytest.mark.parametrize("name", ["my-eagle3-head", "Eagle-X", "v4-DSpark", "DFLASH"])
@pytest.mark.parametrize("path", ["/models/{}/X", "/models/{}", "someone/{}"])
def test_a_path_that_vllm_misreads_is_refused_unless_it_is_forced(name: str, path: str) -> None:
    path = path.format(name)
    with pytest.raises(UserError, match=f"^output_dir={path}: the path contains `.*choose another name"):
        check_path(ExportTarget.vllm, "output_dir", path, False)
    warning = check_path(ExportTarget.vllm, "output_dir", path, True)
    assert warning is not None
    assert warning.endswith("rename it before serving")
    assert check_path(ExportTarget.sglang, "output_dir", path, False) is None


def test_no_other_path_is_refused() -> None:
    assert check_path(ExportTarget.vllm, "output_dir", str(FOLDER), False) is None


def test_folder_and_hub_name_are_both_checked() -> None:
    export = ExportConfig(push_to_hub="someone/v4-Eagle3")
    with pytest.raises(UserError, match=r"^export\.push_to_hub=someone/v4-Eagle3: the path contains `eagle3`"):
        check_paths(ExportTarget.vllm, FOLDER, export)
    forced = replace(export, force=True)
    assert len(check_paths(ExportTarget.vllm, FOLDER, forced)) == 1
    assert len(check_paths(ExportTarget.vllm, FOLDER / "dspark", forced)) == 2
    assert check_paths(ExportTarget.sglang, FOLDER, export) == []


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


@pytest.mark.parametrize("target", [ExportTarget.vllm, ExportTarget.sglang])
def test_the_command_samples_drafts_unless_they_were_measured_greedy(target: ExportTarget) -> None:
    switch = SERVERS[target].switch
    assert switch in SERVERS[target].sampling
    for samples in (True, False):
        command = serve_command(target, ExportForm.full, FOLDER, SOURCE, 2, samples)
        assert (switch in command) == samples
        assert ("leaves the switch out" in serving_notes(target, samples)[0]) == (not samples)


def test_llama_cpp_has_no_switch_to_leave_out() -> None:
    assert serving_notes(ExportTarget.llama_cpp, False) == serving_notes(ExportTarget.llama_cpp, True)

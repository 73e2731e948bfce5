from pathlib import Path

import pytest
from huggingface_hub import constants

from mtptrain.errors import UserError
from mtptrain.run.hub import check_upload, download_model, is_address, upload_folder
from tests.hub import stand_in

PUSH = "export.push_to_hub"


def test_a_folder_comes_back_from_the_hub_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "X"
    folder.mkdir()
    (folder / "config.json").write_text('{"a": 1}')
    (folder / "model.safetensors").write_bytes(b"weights")
    (folder / "other.bin").write_bytes(b"unwanted")
    with stand_in(monkeypatch, tmp_path / "cache") as hub:
        check_upload("someone/head", PUSH)
        assert upload_folder(folder, "someone/head", PUSH) == f"{constants.ENDPOINT}/someone/head"
        assert hub.models["someone/head"]["model.safetensors"] == b"weights"
        back = download_model(Path("hf://someone/head"), ["config.json", "*.safetensors"], "checkpoint")
    assert sorted(path.name for path in back.iterdir()) == ["config.json", "model.safetensors"]
    assert (back / "model.safetensors").read_bytes() == b"weights"


def test_without_a_network_one_line_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match=r"^export\.push_to_hub=a/b: the hub is switched off by HF_HUB_OFFLINE; unset"):
        check_upload("a/b", PUSH)
    line = r"^checkpoint=hf://a/b: revision main is not in the hub's cache .* off by HF_HUB_OFFLINE; unset it, or give"
    with pytest.raises(UserError, match=line):
        download_model(Path("hf://a/b"), ["*"], "checkpoint")
    with pytest.raises(UserError, match=r"could not be uploaded .*is whole: upload it with `hf upload a/b"):
        upload_folder(tmp_path, "a/b", PUSH)


def test_a_model_that_the_hub_does_not_have_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    line = (
        r"^checkpoint=hf://a/none: could not be downloaded at revision v2 \(.*\); download it on a machine with a net"
    )
    with stand_in(monkeypatch, tmp_path), pytest.raises(UserError, match=line):
        download_model(Path("hf://a/none@v2"), ["*"], "checkpoint")


@pytest.mark.parametrize("address", ["hf://", "hf://head", "hf://a/b/c", "hf://a/b@"])
def test_another_address_is_refused(address: str) -> None:
    assert is_address(Path(address))
    with pytest.raises(UserError, match=f"^checkpoint={address}: must be hf://ORGANISATION/NAME"):
        download_model(Path(address), ["*"], "checkpoint")


def test_a_name_without_an_organisation_and_a_stranger_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with stand_in(monkeypatch, tmp_path):
        with pytest.raises(UserError, match=r"^export\.push_to_hub=head: must be ORGANISATION/NAME"):
            check_upload("head", PUSH)
        monkeypatch.setenv("HF_TOKEN", "")
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
        with pytest.raises(UserError, match=r"the hub does not answer to this user .*hf auth login"):
            check_upload("a/head", PUSH)

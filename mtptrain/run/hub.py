"""The hub of Hugging Face: models there are named ORGANISATION/NAME; `hf://NAME@REVISION` names one in a setting."""

from __future__ import annotations

import re
from pathlib import Path

from huggingface_hub import HfApi, is_offline_mode, snapshot_download

from mtptrain.errors import UserError

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
ADDRESS = re.compile(r"hf://?(?P<name>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?")  # a Path folds the two slashes


def is_address(path: Path) -> bool:
    """Return whether a path of a setting is meant as an address `hf://NAME`."""
    return str(path) == "hf:" or str(path).startswith("hf:/")


def download_model(address: Path, patterns: list[str], setting: str) -> Path:
    """Return the folder of a model's files that match `patterns`, after downloading those that are not in the cache.

    Args:
        address: `hf://NAME` or `hf://NAME@REVISION`.
        patterns: of file names.
        setting: name of the setting, for errors.

    Raises:
        UserError: the address has another form, or the hub does not give the files.
    """
    parts = ADDRESS.fullmatch(str(address))
    if parts is None:
        given = "hf://" + str(address).removeprefix("hf:").lstrip("/")
        raise UserError(f"{setting}={given}: must be hf://ORGANISATION/NAME, with @REVISION for another than main")
    name, revision = parts["name"], parts["revision"] or "main"
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except Exception as error:  # the hub's client raises its own, the network's and the system's types
        if is_offline_mode():
            raise UserError(
                f"{setting}=hf://{name}: revision {revision} is not in the hub's cache of this machine, and the hub is "
                "switched off by HF_HUB_OFFLINE; unset it, or give the folder"
            ) from None
        raise UserError(
            f"{setting}=hf://{name}: could not be downloaded at revision {revision} ({summary(error)}); download it "
            "on a machine with a network and give the folder"
        ) from None


def check_upload(name: str, setting: str) -> None:
    """Refuse an upload before the work for it is done.

    Raises:
        UserError: the name is no model's, the hub is switched off or out of reach, or nobody is logged in.
    """
    if not HUB_ID.fullmatch(name):
        raise UserError(f"{setting}={name}: must be ORGANISATION/NAME of a model on the hub")
    if is_offline_mode():
        raise UserError(
            f"{setting}={name}: the hub is switched off by HF_HUB_OFFLINE; unset it, or leave {setting} out"
        )
    try:
        HfApi().whoami()
    except Exception as error:  # as in download_model
        raise UserError(
            f"{setting}={name}: the hub does not answer to this user ({summary(error)}); log in with `hf auth login`, "
            f"or leave {setting} out"
        ) from None


def upload_folder(folder: Path, name: str, setting: str) -> str:
    """Upload a folder as a model, private if it is new, and return its page.

    Raises:
        UserError: the hub does not take it; the folder stays.
    """
    api = HfApi()
    try:
        api.create_repo(name, exist_ok=True, private=True)
        return str(api.upload_folder(repo_id=name, folder_path=folder, commit_message="Add an exported head").repo_url)
    except Exception as error:  # as in download_model
        raise UserError(
            f"{setting}={name}: could not be uploaded ({summary(error)}); {folder} is whole: upload it with "
            f"`hf upload {name} {folder}`"
        ) from None


def summary(error: Exception) -> str:
    """Return the cause of an error of the hub's client on one line, without the client's remarks on its own cache."""
    first = str(error).strip().split("\n")[0]
    return " ".join(first.removeprefix("Got: ").split())[:200].rstrip(" .")

"""Where a backbone comes from: the package, a folder, or the hub."""

from __future__ import annotations

import re
from pathlib import Path

from huggingface_hub import snapshot_download

from mtptrain.config import BackboneConfig
from mtptrain.errors import UserError

SHIPPED = Path(__file__).parent / "shipped"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
WANTED = ["*.safetensors", "*.json", "*.jinja", "*.txt"]


def backbone_folder(config: BackboneConfig) -> Path:
    """Folder of the configured backbone; a hub id is downloaded to the hub's cache, or found there.

    Raises:
        UserError: it does not exist, or the preset is not shipped and no path was given.
    """
    if config.path is None:
        folder = SHIPPED / config.name
        if not folder.is_dir():
            raise UserError(
                f"backbone={config.name}: is not shipped; train it with `+recipe=backbone backbone={config.name}` and "
                "set backbone.path to the folder that makes"
            )
        return folder
    folder = Path(config.path)
    if not folder.exists() and HUB_ID.fullmatch(config.path):
        folder = _from_hub(config.path, config.revision)
    if not (folder / "config.json").is_file():
        raise UserError(f"backbone.path={folder}: holds no config.json; give the folder of a DeepSeek-V4 checkpoint")
    return folder


def _from_hub(name: str, revision: str) -> Path:
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=WANTED))
    except Exception as error:  # the hub's client raises its own, the network's and the system's types
        summary = " ".join(str(error).split())[:200]
        raise UserError(
            f"backbone.path={name}: is no folder here and cannot be had from the hub at backbone.revision={revision} "
            f"({summary}); download it where there is a network and give the folder"
        ) from None

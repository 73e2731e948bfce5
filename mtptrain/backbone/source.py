"""Where a backbone comes from (the package, a folder or the hub), and its config and tokenizer, before any weight."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from tokenizers import Tokenizer
from transformers import DeepseekV4Config

from mtptrain.config import BackboneConfig
from mtptrain.data.tokenizer import load_tokenizer
from mtptrain.errors import UserError

SHIPPED = Path(__file__).parent / "shipped"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
WANTED = ["*.safetensors", "*.json", "*.jinja", "*.txt"]


@dataclass(frozen=True, slots=True)
class BackboneSource:
    """A backbone's folder with its config and tokenizer; no weight has been read.

    Attributes:
        folder: holds config.json, the tokenizer and the weights.
        config: transformers' config.
        tokenizer: the backbone's own.
    """

    folder: Path
    config: DeepseekV4Config
    tokenizer: Tokenizer

    @property
    def marks(self) -> tuple[list[int], list[int]]:
        """Ids put before and after a document: the config's begin and end tokens that the tokenizer knows."""
        size = self.tokenizer.get_vocab_size()
        begin, end = self.config.bos_token_id, self.config.eos_token_id
        end = end[0] if isinstance(end, list) else end
        return [i for i in [begin] if i is not None and i < size], [i for i in [end] if i is not None and i < size]


def open_source(config: BackboneConfig) -> BackboneSource:
    """Open a backbone's folder without reading its weights.

    Raises:
        UserError: the folder is missing, or its config or tokenizer is missing, damaged or of another model.
    """
    folder = backbone_folder(config)
    model_config = read_model_config(folder)
    return BackboneSource(folder, model_config, load_tokenizer(folder, model_config.vocab_size))


def read_model_config(folder: Path) -> DeepseekV4Config:
    """Read config.json as DeepSeek-V4's.

    Raises:
        UserError: it is damaged or describes another model.
    """
    read_json_config(folder, f"backbone.path={folder}")
    try:
        return DeepseekV4Config.from_pretrained(folder)
    except Exception as error:  # transformers raises many types
        summary = " ".join(str(error).split())[:300]
        raise UserError(f"backbone.path={folder}: config.json is not DeepSeek-V4's ({summary})") from error


def read_json_config(folder: Path, setting: str) -> dict[str, Any]:
    """Read config.json as it is stored; `setting` names the folder in the error.

    Raises:
        UserError: it is missing or damaged.
    """
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError("not an object")
    except (OSError, ValueError) as error:
        raise UserError(f"{setting}: config.json cannot be read ({error}); restore it") from None
    return config


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

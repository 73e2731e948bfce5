"""A frozen backbone from disk: model, tokenizer, and the fingerprint that its heads are tied to."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import DeepseekV4Config, DeepseekV4ForCausalLM
from transformers.utils import logging as transformers_logging

from mtptrain.backbone.decode import make_indexers_causal
from mtptrain.config import BackboneConfig
from mtptrain.data.tokenizer import load_tokenizer
from mtptrain.errors import UserError
from mtptrain.storage import sha256_file

SHIPPED = Path(__file__).parent / "shipped"


@dataclass(frozen=True, slots=True)
class Backbone:
    """A frozen backbone.

    Attributes:
        model: transformers' model, in eval mode, no parameter requires a gradient.
        tokenizer: its tokenizer.
        folder: where it came from.
        fingerprint: SHA-256 over its config and weights; heads trained on it carry it.
    """

    model: DeepseekV4ForCausalLM
    tokenizer: Tokenizer
    folder: Path
    fingerprint: str

    @property
    def config(self) -> DeepseekV4Config:
        """The model's config."""
        return self.model.config

    @property
    def marks(self) -> tuple[list[int], list[int]]:
        """Ids put before and after a document: the config's begin and end tokens that the tokenizer knows."""
        size = self.tokenizer.get_vocab_size()
        begin, end = self.config.bos_token_id, self.config.eos_token_id
        end = end[0] if isinstance(end, list) else end
        return [i for i in [begin] if i is not None and i < size], [i for i in [end] if i is not None and i < size]


def backbone_folder(config: BackboneConfig) -> Path:
    """Folder of the configured backbone.

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
    if not (folder / "config.json").is_file():
        raise UserError(f"backbone.path={folder}: holds no config.json; give the folder of a DeepSeek-V4 checkpoint")
    return folder


def fingerprint_folder(folder: Path) -> str:
    """SHA-256 over the backbone's config and weight files (the heads' own file left out)."""
    digest = hashlib.sha256()
    weights = sorted(path for path in folder.glob("*.safetensors") if not path.name.startswith("mtp"))
    for path in [folder / "config.json", *weights]:
        digest.update(sha256_file(path).encode())
    return digest.hexdigest()


def load_backbone(config: BackboneConfig, device: torch.device, dtype: torch.dtype) -> Backbone:
    """Load a backbone and freeze it.

    Raises:
        UserError: files are missing or damaged, or a tensor has no counterpart on the other side.
    """
    folder = backbone_folder(config)
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        loaded: Any = DeepseekV4ForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            local_files_only=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # so that the report names them, and the check below refuses them
        )
        model, report = loaded
    except Exception as error:  # transformers and safetensors raise many types
        summary = " ".join(str(error).split())[:300]
        raise UserError(f"backbone.path={folder}: cannot be loaded as DeepSeek-V4 ({summary})") from error
    finally:
        transformers_logging.set_verbosity(verbosity)
    for problem in ("mismatched_keys", "missing_keys", "unexpected_keys"):
        names = sorted(str(name) for name in report.get(problem) or [])
        if names:
            raise UserError(
                f"backbone.path={folder}: {len(names)} {problem.replace('_', ' ')}, e.g. {', '.join(names[:3])}; "
                "config.json and the weights do not belong together"
            )
    model.to(device).eval().requires_grad_(False)
    make_indexers_causal(model)
    tokenizer = load_tokenizer(folder, model.config.vocab_size)
    return Backbone(model, tokenizer, folder, fingerprint_folder(folder))

"""What config.json says about how a release is stored, against the tensors themselves."""

from __future__ import annotations

import json
from typing import Any

from mtptrain.backbone.shards import Shards
from mtptrain.errors import UserError

EXPERT = "layers.0.ffn.experts.0.w1.weight"  # tells how the routed experts are stored
PREFIXES = ("", "model.")  # as released, and as transformers saves it
# How a release stores its experts -> what safetensors calls their dtype.
SCHEMES = {"I8": "fp8_fp4", "F8_E4M3": "fp8"}


def read_config(shards: Shards) -> dict[str, Any]:
    """The folder's config.json.

    Raises:
        UserError: it is missing or damaged.
    """
    try:
        config = json.loads((shards.folder / "config.json").read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError("not an object")
    except (OSError, ValueError) as error:
        raise UserError(f"{shards.setting}: config.json cannot be read ({error}); restore it") from None
    return config


def is_release(shards: Shards) -> bool:
    """Whether the folder names its tensors as DeepSeek releases do, which servers ask for."""
    return "embed.weight" in shards and EXPERT in shards


def stored_scheme(shards: Shards) -> str:
    """How the backbone's matrices are stored: `fp8_fp4`, `fp8`, or `bf16` where nothing is quantised."""
    expert = next((shards.entries[prefix + EXPERT] for prefix in PREFIXES if prefix + EXPERT in shards), None)
    return SCHEMES.get(expert.dtype, "bf16") if expert else "bf16"


def check_config(shards: Shards) -> None:
    """Raise a `UserError` where config.json and the stored tensors disagree on the quantisation."""
    config, scheme = read_config(shards), stored_scheme(shards)
    quantization = config.get("quantization_config") or {}
    told = "bf16" if not quantization else "fp8"
    if quantization and "fp4" in (config.get("expert_dtype"), quantization.get("expert_dtype")):
        told = "fp8_fp4"
    if told != scheme:
        raise UserError(
            f"{shards.setting}: config.json says that the experts are stored as {told} and the tensors are {scheme}; "
            "put the release's own config.json there"
        )

"""The storage format of a release: its scheme, and checks of config.json and scales against the stored tensors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

import torch

from mtptrain.errors import UserError
from mtptrain.release.codec import FP4_BLOCK, FP8_BLOCK, scale_shape
from mtptrain.release.shards import HEAD_PREFIX, INDEX, Shards
from mtptrain.run.typed_json import JsonObject

Scheme = Literal["fp8_fp4", "fp8", "bf16"]  # releases, releases named -Base, no quantisation
EXPERT = "layers.0.ffn.experts.0.w1.weight"  # its dtype shows how the routed experts are stored
PREFIXES = ("", "model.")  # as released, and as saved by transformers
# By the safetensors dtype of the experts.
EXPERT_SCHEMES: dict[str, Scheme] = {"I8": "fp8_fp4", "F8_E4M3": "fp8"}
BLOCKS = {"I8": FP4_BLOCK, "F8_E4M3": FP8_BLOCK}
# By the safetensors dtype of the scales; beside FP8 experts, releases hold them as F32.
SCALES = {"F8_E8M0": torch.float8_e8m0fnu, "U8": torch.uint8, "F32": torch.float32}
USUAL_SCALES = {"I8": "F8_E8M0", "F8_E4M3": "F32"}


def read_config_json(folder: Path, setting: str) -> JsonObject:
    """Read config.json unchanged; `setting` names the folder in the error.

    Raises:
        UserError: the file is missing or damaged.
    """
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError("not an object")
    except (OSError, ValueError) as error:
        raise UserError(f"{setting}: config.json cannot be read ({error}); restore it") from None
    return config


def is_release(shards: Shards) -> bool:
    """Return whether the folder has the tensor names of DeepSeek's releases, which servers require."""
    return "embed.weight" in shards and EXPERT in shards


def stored_scheme(shards: Shards) -> Scheme:
    """Return the backbone's scheme: `fp8_fp4`, `fp8`, or `bf16` if its experts are not quantised."""
    expert = next((shards.entries[prefix + EXPERT] for prefix in PREFIXES if prefix + EXPERT in shards), None)
    return EXPERT_SCHEMES.get(expert.dtype, "bf16") if expert else "bf16"


def stored_scales(shards: Shards) -> torch.dtype | None:
    """Return the dtype of the experts' scales, which vLLM reads without a conversion; None if they have none."""
    names = (prefix + EXPERT.removesuffix("weight") + "scale" for prefix in PREFIXES)
    scale = next((shards.entries[name] for name in names if name in shards), None)
    return SCALES.get(scale.dtype) if scale else None


def check_scales(shards: Shards) -> None:
    """Raise a `UserError` unless every quantised weight of the backbone, and no other, has scales of the right shape.

    Without this check, transformers would derive the block size from scales of any shape.
    """
    for name, entry in shards.entries.items():
        if name.startswith(HEAD_PREFIX) or not name.endswith((".weight", ".scale")):
            continue
        weight_name = name.removesuffix(".scale").removesuffix(".weight") + ".weight"
        weight, scale = shards.entries.get(weight_name), shards.entries.get(weight_name[:-6] + "scale")
        block = BLOCKS.get(weight.dtype) if weight else None
        if weight is None or (block is None) != (scale is None):
            actual = f"{weight.dtype} {list(weight.shape)}" if weight else "missing"
            raise UserError(
                f"{shards.setting}: {weight_name} is {actual} and its scale is {'there' if scale else 'missing'}; "
                f"quantised weights, and no others, have scales; restore its file"
            )
        if block is None or scale is None:
            continue
        columns = weight.shape[1] * (2 if weight.dtype == "I8" else 1)
        usual = USUAL_SCALES[weight.dtype] if scale.dtype not in SCALES else scale.dtype
        expected = scale_shape((weight.shape[0], columns), block)
        if scale.shape != expected or scale.dtype not in SCALES:
            raise UserError(
                f"{shards.setting}: the scale of {weight_name} is {scale.dtype} {list(scale.shape)} instead of "
                f"{usual} {list(expected)}; restore {entry.file}"
            )


def check_config(shards: Shards) -> None:
    """Raise a `UserError` if config.json and the stored tensors disagree on the quantisation, or about the index."""
    if shards.index is not None and not shards.has_metadata:
        raise UserError(
            f'{shards.setting}: {INDEX} has no "metadata", which transformers requires; add "metadata": {{}} to it'
        )
    config, scheme = read_config_json(shards.folder, shards.setting), stored_scheme(shards)
    quantization = config.get("quantization_config") or {}
    declared = "bf16" if not quantization else "fp8"
    if quantization and "fp4" in (config.get("expert_dtype"), quantization.get("expert_dtype")):
        declared = "fp8_fp4"
    if declared != scheme:
        raise UserError(
            f"{shards.setting}: config.json says that the experts are stored as {declared} and the tensors are "
            f"{scheme}; put the release's own config.json there"
        )

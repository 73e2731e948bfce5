"""What config.json says about how a release is stored, against the tensors themselves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from mtptrain.errors import UserError
from mtptrain.release.codec import FP4_BLOCK, FP8_BLOCK, scale_shape
from mtptrain.release.shards import Shards

Scheme = Literal["fp8_fp4", "fp8", "bf16"]  # a release, a release named -Base, no quantisation
EXPERT = "layers.0.ffn.experts.0.w1.weight"  # tells how the routed experts are stored
PREFIXES = ("", "model.")  # as released, and as transformers saves it
# How a release stores its experts -> what safetensors calls their dtype.
SCHEMES: dict[str, Scheme] = {"I8": "fp8_fp4", "F8_E4M3": "fp8"}
BLOCKS = {"I8": FP4_BLOCK, "F8_E4M3": FP8_BLOCK}
SCALE_DTYPES = ("F8_E8M0", "U8")


def read_config(folder: Path, setting: str) -> dict[str, Any]:
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


def is_release(shards: Shards) -> bool:
    """Whether the folder names its tensors as DeepSeek releases do, which servers ask for."""
    return "embed.weight" in shards and EXPERT in shards


def stored_scheme(shards: Shards) -> Scheme:
    """How the backbone's matrices are stored: `fp8_fp4`, `fp8`, or `bf16` where nothing is quantised."""
    expert = next((shards.entries[prefix + EXPERT] for prefix in PREFIXES if prefix + EXPERT in shards), None)
    return SCHEMES.get(expert.dtype, "bf16") if expert else "bf16"


def check_scales(shards: Shards) -> None:
    """Raise a `UserError` unless every quantised weight of the backbone has scales of its own shape, and only those.

    transformers would take the size of a block from whatever scales it finds.
    """
    for name, entry in shards.entries.items():
        if name.startswith("mtp.") or not name.endswith((".weight", ".scale")):
            continue
        weight_name = name.removesuffix(".scale").removesuffix(".weight") + ".weight"
        weight, scale = shards.entries.get(weight_name), shards.entries.get(weight_name[:-6] + "scale")
        block = BLOCKS.get(weight.dtype) if weight else None
        if weight is None or (block is None) != (scale is None):
            told = f"{weight.dtype} {list(weight.shape)}" if weight else "missing"
            raise UserError(
                f"{shards.setting}: {weight_name} is {told} and its scale is {'there' if scale else 'missing'}; "
                f"quantised weights, and no others, have scales; restore its file"
            )
        if block is None or scale is None:
            continue
        columns = weight.shape[1] * (2 if weight.dtype == "I8" else 1)
        wanted = scale_shape((weight.shape[0], columns), block)
        if scale.shape != wanted or scale.dtype not in SCALE_DTYPES:
            raise UserError(
                f"{shards.setting}: the scale of {weight_name} is {scale.dtype} {list(scale.shape)} instead of F8_E8M0 "
                f"{list(wanted)}; restore {entry.file}"
            )


def check_config(shards: Shards) -> None:
    """Raise a `UserError` where config.json and the stored tensors disagree on the quantisation."""
    config, scheme = read_config(shards.folder, shards.setting), stored_scheme(shards)
    quantization = config.get("quantization_config") or {}
    told = "bf16" if not quantization else "fp8"
    if quantization and "fp4" in (config.get("expert_dtype"), quantization.get("expert_dtype")):
        told = "fp8_fp4"
    if told != scheme:
        raise UserError(
            f"{shards.setting}: config.json says that the experts are stored as {told} and the tensors are {scheme}; "
            "put the release's own config.json there"
        )

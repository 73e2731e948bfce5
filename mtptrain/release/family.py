"""The model family and the quantisation that a folder's files state, to refuse what this package does not read."""

from __future__ import annotations

from pathlib import Path

from mtptrain.errors import UserError
from mtptrain.run.typed_json import JsonObject

MODEL_TYPE = "deepseek_v4"
LATER_MODELS = {
    "deepseek_v41": "DeepSeek-V4.1, which ships DSpark blocks instead of an MTP module; docs/dspark.md has what is "
    "possible with later releases",
}
OWN = "fp8"  # quant_method of DeepSeek's own storage
# By quant_method: the name of the storage and of the program that writes it.
QUANTISATIONS = {
    "modelopt": "NVFP4 or FP8 by NVIDIA's ModelOpt",
    "modelopt_fp4": "NVFP4 by NVIDIA's ModelOpt",
    "compressed-tensors": "compressed-tensors, by llm-compressor",
    "ascend": "W8A8 for Ascend, by msModelSlim",
    "mxfp4": "MXFP4",
    "quark": "AMD's Quark",
    "awq": "AWQ",
    "gptq": "GPTQ",
    "bitsandbytes": "bitsandbytes",
}
# Files that those programs write beside config.json, which may then state no quantisation.
MARKERS = {"hf_quant_config.json": "modelopt", "quant_model_description*.json": "ascend"}


def check_family(config: JsonObject, folder: Path, setting: str) -> None:
    """Refuse a folder of another model or in a storage that is not read.

    Args:
        config: content of config.json.
        folder: the model folder.
        setting: names the folder, for errors.

    Raises:
        UserError: the model or its quantisation is another.
    """
    model_type = config.get("model_type")
    if model_type != MODEL_TYPE:
        name = LATER_MODELS.get(str(model_type), "another model")
        raise UserError(
            f"{setting}: model_type {model_type} is not {MODEL_TYPE}, but {name}; give a DeepSeek-V4 folder"
        )
    method = quantisation(config, folder)
    if method not in (None, OWN):
        meaning = f", {QUANTISATIONS[method]}," if method in QUANTISATIONS else ""
        raise UserError(
            f"{setting}: quant_method {method}{meaning} is not supported; supported are DeepSeek's own FP8 with FP4 or "
            "FP8 experts and unquantised weights, so give the release that the folder was made from, such as "
            "backbone.path=deepseek-ai/DeepSeek-V4-Flash"
        )


def quantisation(config: JsonObject, folder: Path) -> str | None:
    """Return the quant_method of a folder; None if it is not quantised.

    Ascend's folders state it as `quantize`, old ones of llm-compressor as `compression_config`. Marker files count
    first, since config.json may still be the original's.
    """
    for pattern, method in MARKERS.items():
        if any(folder.glob(pattern)):
            return method
    if config.get("quantize"):
        return "ascend"
    if config.get("compression_config"):
        return "compressed-tensors"
    stored = config.get("quantization_config")
    return str(stored.get("quant_method")) if isinstance(stored, dict) and stored else None

import json
from pathlib import Path
from typing import Any

import pytest

from mtptrain.errors import UserError
from mtptrain.release.family import check_family

FP8 = {"quant_method": "fp8", "scale_fmt": "ue8m0"}


def check(folder: Path, **config: Any) -> None:
    check_family({"model_type": "deepseek_v4", **config}, folder, "backbone.path=F")


def test_the_releases_of_deepseek_and_unquantised_folders_pass(tmp_path: Path) -> None:
    check(tmp_path)
    check(tmp_path, quantization_config=None)
    check(tmp_path, quantization_config=FP8)


@pytest.mark.parametrize(
    ("model_type", "told"),
    [
        ("llama", "is not deepseek_v4, but another model"),
        ("deepseek_v3", "is not deepseek_v4, but another model"),
        ("deepseek_v41", r"is not deepseek_v4, but DeepSeek-V4\.1, which ships DSpark"),
        (None, "is not deepseek_v4"),
    ],
)
def test_a_folder_of_another_model_is_named(model_type: str | None, told: str, tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=rf"^backbone\.path=F: model_type {model_type} {told}.*give a DeepSeek-V4 folder"
    ):
        check(tmp_path, model_type=model_type)


@pytest.mark.parametrize(
    ("config", "marker", "told"),
    [
        ({"quantization_config": {"quant_method": "modelopt"}}, None, "modelopt, NVFP4 or FP8 by NVIDIA"),
        ({"quantization_config": FP8}, "hf_quant_config.json", "modelopt, NVFP4 or FP8 by NVIDIA"),
        (
            {"quantization_config": {"quant_method": "compressed-tensors"}},
            None,
            "compressed-tensors, compressed-tensors",
        ),
        ({"compression_config": {"format": "nvfp4"}}, None, "compressed-tensors, "),
        ({"quantize": "w8a8_dynamic"}, None, "ascend, W8A8 for Ascend"),
        ({}, "quant_model_description_w8a8.json", "ascend, W8A8 for Ascend"),
        ({"quantization_config": {"quant_method": "hqq"}}, None, "hqq"),
        ({"quantization_config": {"bits": 4}}, None, "None"),
    ],
)
def test_another_quantisation_is_named_with_what_is_supported(
    config: dict[str, Any], marker: str | None, told: str, tmp_path: Path
) -> None:
    if marker:
        (tmp_path / marker).write_text(json.dumps({}))
    line = rf"^backbone\.path=F: quant_method {told}.*is not supported; supported are .*backbone\.path=deepseek-ai/"
    with pytest.raises(UserError, match=line):
        check(tmp_path, **config)

"""Damaged release folders through the command line: one line, exit code 2, and the folder as it was."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mtptrain.release.shards import INDEX
from tests.command import edit_json, edit_tensors, run_main, tree

LAST = "model-00007-of-00007.safetensors"


def cut(folder: Path) -> None:
    (folder / LAST).write_bytes((folder / LAST).read_bytes()[:-1])


FIRST_LAYER = "model-00002-of-00007.safetensors"
SCALE, WEIGHT = "layers.0.attn.wq_a.scale", "layers.0.attn.wq_a.weight"
DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing shard": (lambda folder: (folder / LAST).unlink(), "1 of 7 shards named by .* are missing"),
    "truncated shard": (cut, f"{LAST} cannot be read"),
    "index names absent tensors": (
        lambda folder: edit_json(folder / INDEX, lambda index: index["weight_map"].update({"mtp.0.emb.weight": LAST})),
        r"names 1 tensors that its files do not hold, e\.g\. mtp\.0\.emb\.weight",
    ),
    "wrong dtype": (
        edit_tensors(FIRST_LAYER, lambda tensors: tensors.update({WEIGHT: tensors[WEIGHT].bfloat16()})),
        rf"{WEIGHT} is BF16 \[32, 64\] and its scale is there",
    ),
    "wrong dtype of a head": (
        edit_tensors(LAST, lambda tensors: tensors.update({"mtp.0.norm.weight": torch.ones(64)})),
        r"1 of another shape or dtype: mtp\.0\.norm\.weight float32 \[64\] instead of bfloat16 \[64\]",
    ),
    "no scale": (edit_tensors(FIRST_LAYER, lambda tensors: tensors.pop(SCALE)), rf"{WEIGHT} .* its scale is missing"),
    "scale of another shape": (
        edit_tensors(FIRST_LAYER, lambda tensors: tensors.update({SCALE: tensors[SCALE].repeat(2, 1)})),
        rf"the scale of {WEIGHT} is F8_E8M0 \[2, 1\] instead of F8_E8M0 \[1, 1\]",
    ),
    "scale of a head of another shape": (
        edit_tensors(
            LAST, lambda tensors: tensors.update({"mtp.0.e_proj.scale": tensors["mtp.0.e_proj.scale"].repeat(1, 2)})
        ),
        r"mtp\.0\.e_proj\.scale float8_e8m0fnu \[1, 2\] instead of float8_e8m0fnu \[1, 1\]",
    ),
    "config of another size": (
        lambda folder: edit_json(folder / "config.json", lambda config: config.update(q_lora_rank=16)),
        "mismatched keys, e.g. .*do not belong together",
    ),
    "config of another scheme": (
        lambda folder: edit_json(folder / "config.json", lambda config: config.update(expert_dtype="fp8")),
        "experts are stored as fp8 and the tensors are fp8_fp4",
    ),
    "another model": (
        lambda folder: edit_json(folder / "config.json", lambda config: config.update(model_type="llama")),
        "model_type llama is not deepseek_v4",
    ),
    "another quantisation": (
        lambda folder: edit_json(
            folder / "config.json", lambda config: config["quantization_config"].update(quant_method="modelopt")
        ),
        "quant_method modelopt, .* is not supported",
    ),
    "no embedding norm": (
        edit_tensors(LAST, lambda tensors: tensors.pop("mtp.0.enorm.weight")),
        r"\(scheme fp8_fp4\) do not fit this backbone: 1 missing: mtp\.0\.enorm\.weight",
    ),
    "no head": (
        edit_tensors(LAST, lambda tensors: [tensors.pop(name) for name in list(tensors) if name.startswith("mtp.")]),
        r"holds no stock head \(mtp\.\* tensors\); train one with mtp\.init=fresh or mtp\.init=backbone",
    ),
    "half a head": (
        edit_tensors(LAST, lambda tensors: tensors.pop("mtp.0.hc_head_fn")),
        r"1 missing: mtp\.0\.hc_head_fn",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_release_ends_in_one_line_and_stays_unchanged(
    damage: str, release_folder: Path, light: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder, run = shutil.copytree(release_folder, tmp_path / "R"), tmp_path / "run"
    act, line = DAMAGE[damage]
    act(folder)
    before = tree(folder)
    settings = [*light, f"backbone.path={folder}", "checkpoint=stock", f"output_dir={run}"]
    assert run_main("+recipe=evaluate", *settings) == 2
    errors = re.sub(r"(?m)^.*, for \d+:\d\d so far.*\n", "", capfd.readouterr().err)  # progress on a busy machine
    assert re.fullmatch(rf"mtptrain: .*{line}.*\n", errors)
    assert tree(folder) == before
    assert not run.exists()

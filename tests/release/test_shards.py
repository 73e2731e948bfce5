import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mtptrain.backbone.load import load_backbone, read_model_config
from mtptrain.config import BackboneConfig
from mtptrain.errors import UserError
from mtptrain.mtp.start import stock_tensors
from mtptrain.release import fingerprint as fingerprint_module
from mtptrain.release.config import check_config, is_release, stored_scheme
from mtptrain.release.fingerprint import fingerprint, tensor_hash
from mtptrain.release.shards import INDEX, Shards, head_name
from tests.command import edit_json, edit_tensors


def test_a_tensor_is_read_by_name_from_the_file_that_holds_it(release_folder: Path) -> None:
    shards = Shards(release_folder, "here")
    for file in shards.files():
        for name, tensor in load_file(release_folder / file).items():
            assert torch.equal(shards[name].view(torch.uint8), tensor.view(torch.uint8))
    assert len(shards) == sum(len(load_file(release_folder / file)) for file in shards.files())
    assert set(shards.only("mtp.")) == {name for name in shards if name.startswith("mtp.")}


def test_a_head_beside_an_indexed_model_counts(release_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(release_folder, tmp_path / "R")
    save_file({"mtp.1.norm.weight": torch.ones(3)}, folder / "mtp.safetensors")
    assert Shards(folder, "here")["mtp.1.norm.weight"].tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    ("stored", "ours"),
    [
        ("mtp.0.enorm.weight", "mtp.0.enorm.weight"),
        ("mtp.1.layer.mlp.experts.down_proj", "mtp.1.layer.mlp.experts.down_proj"),
        ("model.mtp.0.enorm.weight", "mtp.0.enorm.weight"),
        ("model.language_model.mtp.1.norm.weight", "mtp.1.norm.weight"),
        ("mtp.layers.0.attn.wq_a.scale", "mtp.0.attn.wq_a.scale"),
        ("model.mtp_modules.10.hc_head_fn", "mtp.10.hc_head_fn"),
        ("model.layers.43.enorm.weight", "mtp.0.enorm.weight"),
        ("layers.44.attn.wq_a.weight", "mtp.1.attn.wq_a.weight"),
        ("layers.42.attn.wq_a.weight", None),
        ("embed.weight", None),
        ("model.mtp_norm.weight", None),
    ],
)
def test_a_head_is_recognised_by_its_prefix(stored: str, ours: str | None) -> None:
    assert head_name(stored, 43) == ours


def renamed_head(folder: Path, prefix: str) -> None:
    """Give the head's tensors another prefix, in their file and in the index."""

    def rename(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if name.startswith("mtp.0.")]:
            tensors[prefix + name.removeprefix("mtp.0.")] = tensors.pop(name)

    edit_tensors(LAST, rename)(folder)


@pytest.mark.parametrize("prefix", ["model.mtp.0.", "mtp.layers.0.", "layers.4.", "model.layers.4."])
def test_a_backbone_and_its_head_load_whatever_prefix_the_head_has(
    prefix: str, release_folder: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(release_folder, tmp_path / "R")
    renamed_head(folder, prefix)
    config, cpu = BackboneConfig(path=str(folder)), torch.device("cpu")
    assert read_model_config(folder).num_hidden_layers == 4
    backbone, usual = (
        load_backbone(replace(config, path=str(path)), cpu, torch.float32) for path in (folder, release_folder)
    )
    assert backbone.fingerprint == usual.fingerprint
    expected = stock_tensors(usual)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in stock_tensors(backbone).items())


def test_a_head_in_a_file_that_the_index_does_not_list_is_read(release_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(release_folder, tmp_path / "R")
    (folder / LAST).rename(folder / "nextn.safetensors")
    edit_json(folder / INDEX, lambda index: index.update(weight_map=without_head(index["weight_map"])))
    (folder / "broken.safetensors").write_bytes(b"none of the model's")
    assert set(Shards(folder, "here")) == set(Shards(release_folder, "there"))


def test_a_head_that_is_not_part_of_the_folder_is_named(release_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(release_folder, tmp_path / "R")
    (folder / "mtp").mkdir()
    head = load_file(folder / LAST)
    (folder / LAST).rename(folder / "mtp" / "model.safetensors")
    save_file({**head, "other": torch.ones(1)}, folder / "whole.safetensors")
    edit_json(folder / INDEX, lambda index: index.update(weight_map=without_head(index["weight_map"])))
    shards = Shards(folder, "here")
    assert not shards.only("mtp.")
    name = "mtp.0.attn.attn_sink"
    assert shards.heads_elsewhere() == [f"mtp/model.safetensors ({name})", f"whole.safetensors ({name})"]


def without_head(weight_map: dict[str, str]) -> dict[str, str]:
    return {name: file for name, file in weight_map.items() if file != LAST}


@pytest.mark.parametrize("change", [lambda index: index.pop("metadata"), lambda index: index.update(metadata=None)])
def test_an_index_without_metadata_is_refused_with_the_way_out(
    change: Callable[[dict[str, Any]], object], release_folder: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(release_folder, tmp_path / "R")
    edit_json(folder / INDEX, change)
    with pytest.raises(
        UserError, match=rf'{INDEX} has no "metadata", which transformers requires; add "metadata": {{}}'
    ):
        check_config(Shards(folder, "here"))


LAST = "model-00007-of-00007.safetensors"


def rename_in_index(folder: Path) -> None:
    edit_json(folder / INDEX, lambda index: index["weight_map"].update({"layers.9.attn.attn_sink": LAST}))


def drop_from_index(folder: Path) -> None:
    edit_json(folder / INDEX, lambda index: index["weight_map"].pop("mtp.0.norm.weight"))


def cut(folder: Path) -> None:
    (folder / LAST).write_bytes((folder / LAST).read_bytes()[:-5])


def double(folder: Path) -> None:
    save_file({"embed.weight": torch.ones(3)}, folder / "mtp.safetensors")


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing shard": (lambda folder: (folder / LAST).unlink(), rf"1 of 7 shards named by {INDEX} are missing: {LAST}"),
    "truncated shard": (cut, rf"{LAST} cannot be read .*restore the file"),
    "index names absent": (rename_in_index, r"names 1 tensors that its files do not hold, e\.g\. layers\.9\.attn"),
    "index lacks one": (drop_from_index, r"1 tensors are not in .*, e\.g\. mtp\.0\.norm\.weight"),
    "broken index": (lambda folder: (folder / INDEX).write_text("{"), rf"{INDEX} is damaged"),
    "index of lists": (lambda folder: (folder / INDEX).write_text('{"weight_map": {"a": 1}}'), "must map names to"),
    "twice": (double, r"embed\.weight lies in model-00001-of-00007\.safetensors and in mtp\.safetensors; keep one"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_the_error_names_the_damage_of_a_folder(damage: str, release_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(release_folder, tmp_path / "R")
    act, line = DAMAGE[damage]
    act(folder)
    with pytest.raises(UserError, match=rf"^backbone\.path=R: .*{line}"):
        Shards(folder, "backbone.path=R")


def test_the_fingerprint_ignores_heads_and_the_distribution_over_files(release_folder: Path, tmp_path: Path) -> None:
    expected = fingerprint(Shards(release_folder, "here"))
    folder = shutil.copytree(release_folder, tmp_path / "R")
    (folder / INDEX).unlink()
    for file in sorted(folder.glob("*.safetensors")):
        tensors = load_file(file)
        kept = {name: tensor for name, tensor in tensors.items() if not name.startswith("mtp.")}
        file.unlink()
        half = len(kept) // 2
        for number, names in enumerate((list(kept)[:half], list(kept)[half:])):
            save_file({name: kept[name] for name in names}, folder / f"{file.stem}-{number}.safetensors")
    edit_json(folder / "config.json", lambda config: config.update(num_nextn_predict_layers=3))
    edit_json(folder / "config.json", lambda config: config["compress_ratios"].extend([0, 0]))
    assert fingerprint(Shards(folder, "here")) == expected


@pytest.mark.parametrize("changed", ["byte", "config", "name"])
def test_the_fingerprint_depends_on_everything_else(changed: str, release_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(release_folder, tmp_path / "R")
    if changed == "config":
        edit_json(folder / "config.json", lambda config: config.update(swiglu_limit=9.0))
    else:
        (folder / INDEX).unlink()
        path = folder / "model-00002-of-00007.safetensors"
        tensors = load_file(path)
        if changed == "byte":
            tensors["layers.0.attn.wq_a.weight"].view(torch.uint8)[0, 0] ^= 1
        else:
            tensors["layers.0.attn.wq_c.weight"] = tensors.pop("layers.0.attn.wq_a.weight")
        save_file(tensors, path)
    assert fingerprint(Shards(folder, "here")) != fingerprint(Shards(release_folder, "here"))


@pytest.fixture
def remembering(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The folder of remembered hashes, in which files of any size are remembered at once."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(fingerprint_module, "WORTH_REMEMBERING", 0)
    monkeypatch.setattr(fingerprint_module, "SETTLED_SECONDS", -1)
    return tmp_path / "cache" / "mtptrain" / "hashes"


def test_hashes_of_unchanged_files_are_not_computed_again(
    remembering: Path, release_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = fingerprint(Shards(release_folder, "here"))
    assert len(list(remembering.glob("*.json"))) == len(Shards(release_folder, "here").files())
    monkeypatch.setattr(fingerprint_module, "tensor_hash", None)
    assert fingerprint(Shards(release_folder, "here")) == expected


def test_a_changed_file_or_a_damaged_memory_is_hashed_again(
    remembering: Path, release_folder: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(release_folder, tmp_path / "R")
    expected = fingerprint(Shards(folder, "here"))
    for path in remembering.glob("*.json"):
        path.write_text("{", encoding="utf-8")
    assert fingerprint(Shards(folder, "here")) == expected
    path = folder / "model-00002-of-00007.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert fingerprint(Shards(folder, "here")) != expected


def test_a_file_that_has_just_changed_is_not_remembered(
    remembering: Path, release_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fingerprint_module, "SETTLED_SECONDS", 3600)
    fingerprint(Shards(shutil.copytree(release_folder, tmp_path / "R", copy_function=shutil.copyfile), "here"))
    assert not remembering.exists()


def test_a_tensor_hash_reads_the_bytes_of_that_tensor_only(release_folder: Path, tmp_path: Path) -> None:
    shards = Shards(release_folder, "here")
    name = "layers.0.ffn.experts.0.w1.weight"
    save_file({name: shards[name]}, tmp_path / "alone.safetensors")
    alone = Shards(tmp_path, "there")
    assert tensor_hash(tmp_path, alone.entries[name]) == tensor_hash(release_folder, shards.entries[name])


def test_the_scheme_is_read_from_the_tensors(release_folder: Path, backbone_folder: Path) -> None:
    assert stored_scheme(Shards(release_folder, "here")) == "fp8_fp4"
    assert stored_scheme(Shards(backbone_folder, "here")) == "bf16"
    assert is_release(Shards(release_folder, "here"))
    assert not is_release(Shards(backbone_folder, "here"))


@pytest.mark.parametrize(
    ("key", "value", "declared"), [("expert_dtype", "fp8", "fp8"), ("quantization_config", None, "bf16")]
)
def test_a_config_that_contradicts_the_tensors_is_refused(
    key: str, value: str | None, declared: str, release_folder: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(release_folder, tmp_path / "R")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps({**config, key: value}))
    with pytest.raises(UserError, match=f"experts are stored as {declared} and the tensors are fp8_fp4"):
        check_config(Shards(folder, "here"))

"""Writing a model folder as DeepSeek releases are laid out: shards, their index, config.json and the tokenizer."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from mtptrain.backbone.shards import INDEX
from mtptrain.storage import write_json

COMPANIONS = ("*.json", "*.jinja", "*.txt", "*.model")  # of a model folder, beside its weights
OWN = ("config.json", INDEX)  # written anew


def shard_name(number: int, count: int) -> str:
    """Name of shard `number` of `count`, from 1."""
    return f"model-{number:05d}-of-{count:05d}.safetensors"


def write_index(folder: Path, files: Mapping[str, str], total_bytes: int) -> None:
    """The index of a folder.

    Args:
        folder: to write to.
        files: tensor name -> file.
        total_bytes: of all tensors.
    """
    write_json(folder / INDEX, {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(files.items()))})


def save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write one safetensors file."""
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, {"format": "pt"})


def write_shards(folder: Path, groups: list[dict[str, Tensor]]) -> None:
    """A shard a group, and the index."""
    files: dict[str, str] = {}
    total = 0
    for number, tensors in enumerate(groups, start=1):
        name = shard_name(number, len(groups))
        save_tensors(tensors, folder / name)
        files |= dict.fromkeys(tensors, name)
        total += sum(tensor.nbytes for tensor in tensors.values())
    write_index(folder, files, total)


def copy_companions(source: Path, folder: Path) -> None:
    """Copy the tokenizer and whatever else lies beside the weights; config and index are written anew."""
    for pattern in COMPANIONS:
        for path in sorted(source.glob(pattern)):
            if path.name not in OWN and path.is_file():
                shutil.copyfile(path, folder / path.name)

"""Write a model folder: link or copy the unchanged shards, write the shards with the head, the index and the config."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from mtptrain.config import ShardCopies
from mtptrain.errors import UserError
from mtptrain.release.config import is_release, read_config_json
from mtptrain.release.shards import HEAD_PREFIX, INDEX, Shards
from mtptrain.run.storage import write_json

HEAD_FILE = "mtp.safetensors"  # holds the head beside a model without an index
NEW_SHARD = "model-mtp.safetensors"  # holds the head of an indexed model that had none
SHARED = ("embed.weight", "head.weight")  # of the model; servers take them from its folder
COMPANIONS = ("*.json", "*.jinja", "*.txt", "*.model", "LICENSE*")  # files of a model folder beside its weights
NOT_COPIED = ("config.json", INDEX)  # the export writes its own


@dataclass(frozen=True, slots=True)
class Layout:
    """The plan for every file of the source.

    Attributes:
        untouched: files without head tensors.
        rewritten: for files that mix tensors of the old head with others: file -> names of the other tensors.
        head_file: file of the new head.
        indexed: whether the export has an index.
    """

    untouched: list[str]
    rewritten: dict[str, list[str]]
    head_file: str
    indexed: bool


def plan_layout(shards: Shards) -> Layout:
    """Return the layout of a full export of a backbone's folder."""
    touched = sorted({entry.file for name, entry in shards.entries.items() if name.startswith(HEAD_PREFIX)})
    untouched = [file for file in shards.files() if file not in touched]
    kept: dict[str, list[str]] = {file: [] for file in touched}
    for name, entry in shards.entries.items():
        if entry.file in kept and not name.startswith(HEAD_PREFIX):
            kept[entry.file].append(name)
    indexed = shards.index is not None or is_release(shards)
    head_file = touched[-1] if touched else NEW_SHARD if indexed else HEAD_FILE
    return Layout(untouched, {file: names for file, names in kept.items() if names}, head_file, indexed)


def bytes_needed(shards: Shards, layout: Layout, head_bytes: int, copies: ShardCopies) -> int:
    """Return the number of bytes that a full export writes."""
    kept = [shards.entries[name] for names in layout.rewritten.values() for name in names]
    rewritten = sum(entry.end - entry.begin for entry in kept)
    copied = sum((shards.folder / file).stat().st_size for file in layout.untouched)
    return head_bytes + rewritten + (copied if copies is ShardCopies.copy else 0)


def check_room(folder: Path, needed: int) -> None:
    """Raise a `UserError` if the disk of `folder` has fewer than `needed` bytes free."""
    nearest = next(parent for parent in folder.absolute().parents if parent.exists())
    free = shutil.disk_usage(nearest).free
    if free < needed:
        raise UserError(
            f"output_dir={folder}: the export needs {needed / 1e9:.2f} GB and {nearest} has {free / 1e9:.2f} GB free; "
            "free some room or choose another disk"
        )


def write_full(shards: Shards, layout: Layout, head: Mapping[str, Tensor], folder: Path, copies: ShardCopies) -> None:
    """Write a complete model folder with the new head, except for config.json.

    Args:
        shards: tensors of the source.
        layout: result of `plan_layout`.
        head: released names and tensors.
        folder: an empty folder.
        copies: hard link, symlink or copy the untouched files.

    Raises:
        UserError: hard links are not possible there.
    """
    for file in layout.untouched:
        _put_file(shards.folder / file, folder / file, copies)
    files = {name: entry.file for name, entry in shards.entries.items() if entry.file in layout.untouched}
    for file in sorted({*layout.rewritten, layout.head_file}):
        tensors = {name: shards[name] for name in layout.rewritten.get(file, [])}
        tensors |= head if file == layout.head_file else {}
        save_tensors(tensors, folder / file)
        files |= dict.fromkeys(tensors, file)
    if layout.indexed:
        kept = (entry for name, entry in shards.entries.items() if not name.startswith(HEAD_PREFIX))
        total = sum(entry.end - entry.begin for entry in kept) + sum(tensor.nbytes for tensor in head.values())
        write_index(folder, files, total)
    copy_companions(shards.folder, folder)


def write_draft(shards: Shards, head: Mapping[str, Tensor], folder: Path, has_embeddings: bool) -> None:
    """Write a folder with the head, except for config.json.

    Args:
        shards: tensors of the source.
        head: released names and tensors.
        folder: an empty folder.
        has_embeddings: add the embedding and the lm_head.
    """
    tensors = {name: shards[name] for name in SHARED if has_embeddings} | dict(head)
    file = shard_name(1, 1)
    save_tensors(tensors, folder / file)
    write_index(folder, dict.fromkeys(tensors, file), sum(tensor.nbytes for tensor in tensors.values()))
    copy_companions(shards.folder, folder)


def write_config(shards: Shards, folder: Path, depth: int, facts: Mapping[str, object]) -> None:
    """Write the source's config.json with the new number of modules, and `facts` under the key `mtptrain`."""
    stored = read_config_json(shards.folder, shards.setting)
    config = {key: value for key, value in stored.items() if not key.startswith("dspark_")}
    config["num_nextn_predict_layers"] = depth
    if isinstance(config.get("compress_ratios"), list):
        config["compress_ratios"] = config["compress_ratios"][: config["num_hidden_layers"]] + [0] * depth
    write_json(folder / "config.json", {**config, "mtptrain": facts})


def _put_file(source: Path, target: Path, copies: ShardCopies) -> None:
    real = source.resolve()  # the hub's cache holds symlinks
    if copies is ShardCopies.copy:
        shutil.copyfile(real, target)
    elif copies is ShardCopies.symlink:
        target.symlink_to(real)
    else:
        try:
            os.link(real, target)
        except OSError as error:
            if error.errno not in (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP):
                raise
            raise UserError(
                f"export.shards=hardlink: {source} cannot be linked into the export ({error.strerror}); use "
                "export.shards=symlink or copy"
            ) from None


def shard_name(number: int, count: int) -> str:
    """Return the file name of shard `number` of `count`, counted from 1."""
    return f"model-{number:05d}-of-{count:05d}.safetensors"


def write_index(folder: Path, files: Mapping[str, str], total_bytes: int) -> None:
    """Write the index of a folder.

    Args:
        folder: folder of the shards.
        files: tensor name -> file.
        total_bytes: size of all tensors.
    """
    write_json(folder / INDEX, {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(files.items()))})


def save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write one safetensors file."""
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, {"format": "pt"})


def write_shards(folder: Path, groups: list[dict[str, Tensor]]) -> None:
    """Write each group as a shard, then the index."""
    files: dict[str, str] = {}
    total = 0
    for number, tensors in enumerate(groups, start=1):
        name = shard_name(number, len(groups))
        save_tensors(tensors, folder / name)
        files |= dict.fromkeys(tensors, name)
        total += sum(tensor.nbytes for tensor in tensors.values())
    write_index(folder, files, total)


def copy_companions(source: Path, folder: Path) -> None:
    """Copy the tokenizer and all other files beside the weights, except config.json and the index."""
    for pattern in COMPANIONS:
        for path in sorted(source.glob(pattern)):
            if path.name not in NOT_COPIED and path.is_file():
                shutil.copyfile(path, folder / path.name)

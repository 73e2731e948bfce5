"""The tensors of a model folder, found through its index and file headers and read one at a time."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from mtptrain.errors import UserError
from mtptrain.run.typed_json import JsonObject

INDEX = "model.safetensors.index.json"
HEAD_PREFIX = "mtp."  # of every tensor of an MTP head, in releases and in checkpoints of this package
HEAD_FILES = "mtp*.safetensors"  # heads beside a model, outside its index; must be readable
# Other prefixes of a head's tensors: `model.mtp.0.`, `mtp.layers.0.`, `model.mtp_modules.0.`, and the layer after the
# last one, `model.layers.43.`, as DeepSeek-V3's release names its module.
MODULE = re.compile(r"(?:[\w.]*\.)?mtp(?:[._](?:layers|modules|blocks))?\.(\d+)\.")
LAYER = re.compile(r"(?:model\.)?layers\.(\d+)\.")


def head_name(name: str, num_layers: int | None) -> str | None:
    """Return the name of a head's tensor below `mtp.{d}.`; None if the tensor is none of a head.

    Args:
        name: name in a file, with one of the known prefixes.
        num_layers: number of layers of the backbone; None if it is not known.

    Example: `model.mtp.0.enorm.weight` and, of 43 layers, `model.layers.43.enorm.weight` give `mtp.0.enorm.weight`.
    """
    module = MODULE.match(name)
    if module is not None:
        return f"{HEAD_PREFIX}{module[1]}.{name[module.end() :]}"
    layer = LAYER.match(name)
    if layer is None or num_layers is None or int(layer[1]) < num_layers:
        return None
    return f"{HEAD_PREFIX}{int(layer[1]) - num_layers}.{name[layer.end() :]}"


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Location, dtype and shape of one tensor in a folder.

    Attributes:
        name: name in its file; differs from the name in `Shards` for heads with another prefix.
        file: name of the shard.
        dtype: in the spelling of safetensors, e.g. `F8_E4M3`.
        shape: shape as stored.
        begin, end: byte range in the file, end excluded.
    """

    name: str
    file: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


class Shards(Mapping[str, Tensor]):
    """The tensors of a folder by name; each access reads one tensor from disk.

    A folder with an index holds the files of the index and the heads beside them; a folder without one holds every
    safetensors file. The tensors of a head are named `mtp.{d}.*`, whichever known prefix they have in their file.

    Args:
        folder: folder of the files.
        setting: the setting that names the folder, for errors, e.g. `backbone.path=R`.

    Raises:
        UserError: the index is damaged, a file is missing or truncated, index and files disagree, or two files hold
            the same tensor.
    """

    def __init__(self, folder: Path, setting: str) -> None:
        self.folder, self.setting = folder, setting
        self.index, self.has_metadata = _read_index(folder / INDEX, setting)
        self.num_layers = _num_layers(folder)
        self.entries: dict[str, StoredTensor] = {}
        for file in self._files():
            for entry in _read_header(folder / file, setting):
                self._add(entry)
        if self.index is not None:
            self._compare_index(self.index)

    def _add(self, entry: StoredTensor) -> None:
        name = head_name(entry.name, self.num_layers) or entry.name
        other = self.entries.setdefault(name, entry)
        if other is not entry:
            raise UserError(f"{self.setting}: {name} lies in {other.file} and in {entry.file}; keep one")

    def _files(self) -> list[str]:
        if self.index is None:
            return sorted(path.name for path in self.folder.glob("*.safetensors"))
        listed = sorted(set(self.index.values()))
        missing = [name for name in listed if not (self.folder / name).is_file()]
        if missing:
            raise UserError(
                f"{self.setting}: {len(missing)} of {len(listed)} shards named by {INDEX} are missing: "
                f"{', '.join(missing[:3])}; download them again"
            )
        return listed + sorted(
            path.name
            for path in self.folder.glob("*.safetensors")
            if path.name not in listed and (path.match(HEAD_FILES) or self.is_head(path))
        )

    def is_head(self, path: Path) -> bool:
        """Return whether a file holds tensors of a head and no others; False if it cannot be read."""
        names = _names(path)
        return bool(names) and all(head_name(name, self.num_layers) for name in names)

    def heads_elsewhere(self) -> list[str]:
        """Return `FILE (TENSOR)` for files with tensors of a head in or right below the folder that are not read."""
        own = {self.folder / file for file in self.files()}
        heads = []
        for path in sorted([*self.folder.glob("*.safetensors"), *self.folder.glob("*/*.safetensors")]):
            names = [] if path in own else [name for name in _names(path) if head_name(name, self.num_layers)]
            heads += [f"{path.relative_to(self.folder)} ({names[0]})"] if names else []
        return heads

    def _compare_index(self, index: dict[str, str]) -> None:
        files = {entry.name: entry.file for entry in self.entries.values()}
        wrong = [name for name, file in index.items() if files.get(name) != file]
        if wrong:
            raise UserError(
                f"{self.setting}: {INDEX} names {len(wrong)} tensors that its files do not hold, e.g. {wrong[0]} in "
                f"{index[wrong[0]]}; restore the index"
            )
        listed = set(index.values())
        unlisted = [name for name, file in files.items() if name not in index and file in listed]
        if unlisted:
            raise UserError(
                f"{self.setting}: {len(unlisted)} tensors are not in {INDEX}, e.g. {unlisted[0]} of "
                f"{files[unlisted[0]]}; restore the index"
            )

    def __getitem__(self, name: str) -> Tensor:
        entry = self.entries[name]
        path = self.folder / entry.file
        try:
            with safe_open(path, framework="pt") as file:
                return file.get_tensor(entry.name)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{self.setting}: {name} in {path.name} cannot be read ({error})") from None

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def files(self) -> list[str]:
        """Return the names of all files with tensors, sorted."""
        return sorted({entry.file for entry in self.entries.values()})

    def only(self, prefix: str) -> Mapping[str, Tensor]:
        """Return the tensors whose names start with `prefix`, still read on demand."""
        return _Part(self, [name for name in self.entries if name.startswith(prefix)])


class _Part(Mapping[str, Tensor]):
    """Some tensors of a folder by name."""

    def __init__(self, whole: Shards, names: list[str]) -> None:
        self.whole, self.names = whole, dict.fromkeys(names)

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.names:
            raise KeyError(name)
        return self.whole[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def _read_index(path: Path, setting: str) -> tuple[dict[str, str] | None, bool]:
    """Return the index as name -> file, None if the folder has no index, and whether it has metadata."""
    if not path.exists():
        return None, False
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        index = content["weight_map"]
        if not all(isinstance(part, str) for pair in index.items() for part in pair):
            raise TypeError("weight_map must map names to files")
        return dict(index), isinstance(content.get("metadata"), dict)
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise UserError(f"{setting}: {INDEX} is damaged ({error}); restore it") from None


def _names(path: Path) -> list[str]:
    """Return the names of a file's tensors, sorted; none if it cannot be read."""
    try:
        with safe_open(path, framework="pt") as file:
            return sorted(file.keys())
    except (SafetensorError, OSError):
        return []


def _num_layers(folder: Path) -> int | None:
    """Return the number of layers that config.json states; None if it states none."""
    try:
        number = json.loads((folder / "config.json").read_text(encoding="utf-8"))["num_hidden_layers"]
    except (OSError, ValueError, LookupError, TypeError):  # whoever needs the config reports what is wrong with it
        return None
    return number if isinstance(number, int) else None


def _read_header(path: Path, setting: str) -> list[StoredTensor]:
    """Return the tensors of one file.

    Raises:
        UserError: the file is damaged or incomplete.

    Source: the safetensors format: 8 bytes of header length, the header as JSON, then the data.
    """
    try:
        with safe_open(path, framework="pt"):  # checks offsets, sizes and that the file is complete
            pass
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header: JsonObject = json.loads(file.read(length))
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{setting}: {path.name} cannot be read ({error}); restore the file") from None
    header.pop("__metadata__", None)
    start = 8 + length
    return [
        StoredTensor(name, path.name, info["dtype"], tuple(info["shape"]), *(start + at for at in info["data_offsets"]))
        for name, info in header.items()
    ]

"""The tensors of a model folder, found through its index and file headers and read one at a time."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from mtptrain.errors import UserError

INDEX = "model.safetensors.index.json"
HEAD_PREFIX = "mtp."  # of every tensor of an MTP head, in releases and in checkpoints of this package
HEAD_FILES = "mtp*.safetensors"  # heads beside a model, outside its index


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Location, dtype and shape of one tensor in a folder.

    Attributes:
        file: name of the shard.
        dtype: in the spelling of safetensors, e.g. `F8_E4M3`.
        shape: shape as stored.
        begin, end: byte range in the file, end excluded.
    """

    file: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


class Shards(Mapping[str, Tensor]):
    """The tensors of a folder by name; each access reads one tensor from disk.

    A folder with an index holds the files of the index and the heads beside them; a folder without one holds every
    safetensors file.

    Args:
        folder: folder of the files.
        setting: the setting that names the folder, for errors, e.g. `backbone.path=R`.

    Raises:
        UserError: the index is damaged, a file is missing or truncated, index and files disagree, or two files hold
            the same tensor.
    """

    def __init__(self, folder: Path, setting: str) -> None:
        self.folder, self.setting = folder, setting
        self.index = _read_index(folder / INDEX, setting)
        self.entries: dict[str, StoredTensor] = {}
        for file in self._files():
            entries = _read_header(folder / file, setting)
            twice = sorted(self.entries.keys() & entries.keys())
            if twice:
                raise UserError(f"{setting}: {twice[0]} lies in {self.entries[twice[0]].file} and in {file}; keep one")
            self.entries |= entries
        if self.index is not None:
            self._compare_index(self.index)

    def _files(self) -> list[str]:
        heads = sorted(path.name for path in self.folder.glob(HEAD_FILES))
        if self.index is None:
            return sorted(path.name for path in self.folder.glob("*.safetensors"))
        listed = sorted(set(self.index.values()))
        missing = [name for name in listed if not (self.folder / name).is_file()]
        if missing:
            raise UserError(
                f"{self.setting}: {len(missing)} of {len(listed)} shards named by {INDEX} are missing: "
                f"{', '.join(missing[:3])}; download them again"
            )
        return listed + [name for name in heads if name not in listed]

    def _compare_index(self, index: dict[str, str]) -> None:
        wrong = [name for name, file in index.items() if name not in self.entries or self.entries[name].file != file]
        if wrong:
            raise UserError(
                f"{self.setting}: {INDEX} names {len(wrong)} tensors that its files do not hold, e.g. {wrong[0]} in "
                f"{index[wrong[0]]}; restore the index"
            )
        listed = set(index.values())
        unlisted = [name for name, entry in self.entries.items() if name not in index and entry.file in listed]
        if unlisted:
            raise UserError(
                f"{self.setting}: {len(unlisted)} tensors are not in {INDEX}, e.g. {unlisted[0]} of "
                f"{self.entries[unlisted[0]].file}; restore the index"
            )

    def __getitem__(self, name: str) -> Tensor:
        path = self.folder / self.entries[name].file
        try:
            with safe_open(path, framework="pt") as file:
                return file.get_tensor(name)
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


def _read_index(path: Path, setting: str) -> dict[str, str] | None:
    """Return the index as name -> file; None if the folder has no index."""
    if not path.exists():
        return None
    try:
        index = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        if not all(isinstance(part, str) for pair in index.items() for part in pair):
            raise TypeError("weight_map must map names to files")
        return dict(index)
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise UserError(f"{setting}: {INDEX} is damaged ({error}); restore it") from None


def _read_header(path: Path, setting: str) -> dict[str, StoredTensor]:
    """Return the tensors of one file by name.

    Raises:
        UserError: the file is damaged or incomplete.

    Source: the safetensors format: 8 bytes of header length, the header as JSON, then the data.
    """
    try:
        with safe_open(path, framework="pt"):  # checks offsets, sizes and that the file is complete
            pass
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header: dict[str, Any] = json.loads(file.read(length))
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{setting}: {path.name} cannot be read ({error}); restore the file") from None
    header.pop("__metadata__", None)
    start = 8 + length
    return {
        name: StoredTensor(path.name, info["dtype"], tuple(info["shape"]), *(start + at for at in info["data_offsets"]))
        for name, info in header.items()
    }

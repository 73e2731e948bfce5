"""Tensors that several processes store together: each writes a file with its pieces, and any number of processes reads.

A piece is a run of consecutive values of a flattened tensor. A tensor that one process stores whole keeps its name and
shape in the file; a piece is called `NAME@START`, and the file's metadata holds the shape of the whole tensor.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from mtptrain.errors import UserError
from mtptrain.run.distributed import rank, world_size

SHAPES = "shapes"  # key of the metadata


@dataclass(frozen=True, slots=True)
class Piece:
    """A run of values of a tensor.

    Attributes:
        name: of the tensor.
        shape: of the whole tensor.
        start: position of the first value in the flattened tensor.
        values: one-dimensional.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    values: Tensor


def own_piece(name: str, whole: Tensor) -> Piece:
    """Return the piece that this process stores of a tensor that every process holds: an equal share."""
    flat = whole.detach().flatten()
    start, stop = (len(flat) * number // world_size() for number in (rank(), rank() + 1))
    return Piece(name, tuple(whole.shape), start, flat[start:stop])


def write_pieces(path: Path, pieces: Iterable[Piece]) -> None:
    """Write the pieces of one process as a safetensors file."""
    tensors, shapes = {}, {}
    for piece in pieces:
        values = piece.values.detach().contiguous()
        if values.numel() == torch.Size(piece.shape).numel():
            tensors[piece.name] = values.view(piece.shape)
        elif values.numel():
            tensors[f"{piece.name}@{piece.start}"] = values
            shapes[piece.name] = piece.shape
    save_file(tensors, path, metadata={SHAPES: json.dumps(shapes)})


class StoredTensors(Mapping[str, Tensor]):
    """Whole tensors from the files of all processes, each read from memory maps when it is needed.

    Args:
        where: setting and folder, as error messages begin.
        paths: files of `write_pieces`, of all processes.

    Raises:
        UserError: the pieces of a tensor do not add up to it.
    """

    def __init__(self, where: str, paths: Sequence[Path]) -> None:
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._places: dict[str, list[tuple[int, int, Any, str]]] = {}  # by name: start, stop, file, key
        for path in paths:
            self._index(safe_open(path, framework="pt"))
        for name, places in self._places.items():
            places.sort(key=lambda place: place[:2])
            stops = [0, *(stop for _, stop, _, _ in places)]
            starts = [*(start for start, _, _, _ in places), torch.Size(self.shapes[name]).numel()]
            if starts != stops:
                raise UserError(f"{where}: a part of {name} is missing; use an older checkpoint")

    def _index(self, file: Any) -> None:
        shapes = json.loads((file.metadata() or {}).get(SHAPES, "{}"))
        for key in file.keys():  # noqa: SIM118
            name, _, start = key.partition("@")
            stored = tuple(file.get_slice(key).get_shape())
            first = int(start or 0)
            self.shapes[name] = tuple(shapes.get(name, stored))
            self._places.setdefault(name, []).append((first, first + torch.Size(stored).numel(), file, key))

    def __getitem__(self, name: str) -> Tensor:
        """Return a whole tensor; do not write to it."""
        return self.part(name, 0, torch.Size(self.shapes[name]).numel()).view(self.shapes[name])

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names."""
        return iter(self.shapes)

    def __len__(self) -> int:
        """Return the number of tensors."""
        return len(self.shapes)

    def part(self, name: str, start: int, stop: int) -> Tensor:
        """Return the values `start` to `stop` of a flattened tensor, one-dimensional; do not write to it."""
        parts = [
            file.get_tensor(key).flatten()[max(start - first, 0) : stop - first]
            for first, last, file, key in self._places[name]
            if (first < stop and start < last) or first == last
        ]
        if not parts:
            _, _, file, key = self._places[name][0]
            return file.get_tensor(key).flatten()[:0]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def expert(self, name: str, number: int) -> Tensor:
        """Return one expert of a stack of experts; do not write to it."""
        shape = torch.Size(self.shapes[name][1:])
        return self.part(name, number * shape.numel(), (number + 1) * shape.numel()).view(shape)

    def keys_of(self, name: str) -> list[str]:
        """Return the optimiser's keys of a trained tensor: KEY of each stored `NAME/KEY`."""
        return [stored.rpartition("/")[2] for stored in self.shapes if stored.rpartition("/")[0] == name]

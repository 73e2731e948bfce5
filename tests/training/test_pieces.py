"""Tensors that several processes stored in pieces are whole again, read in any other parts."""

from pathlib import Path

import pytest
import torch

from mtptrain.errors import UserError
from mtptrain.training.pieces import Piece, StoredTensors, write_pieces

WHOLE = {
    "matrix": torch.arange(35.0).view(7, 5),
    "half": torch.arange(9).bfloat16(),
    "count": torch.tensor(3.0),
    "empty": torch.zeros(0, 4),
}


def write(folder: Path, count: int, left_out: int | None = None) -> list[Path]:
    """Write the tensors in unequal pieces by `count` processes; leave one piece of the matrix out."""
    paths = []
    for number in range(count):
        pieces = []
        for name, tensor in WHOLE.items():
            first, last = (tensor.numel() * one**2 // count**2 for one in (number, number + 1))
            if (name, number) != ("matrix", left_out):
                pieces.append(Piece(name, tuple(tensor.shape), first, tensor.flatten()[first:last]))
        paths.append(folder / f"{number}.safetensors")
        write_pieces(paths[-1], pieces)
    return paths


@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_pieces_add_up_to_the_tensors(count: int, tmp_path: Path) -> None:
    stored = StoredTensors("checkpoint=x", write(tmp_path, count))
    torch.testing.assert_close(dict(stored), WHOLE, rtol=0, atol=0)
    assert stored.shapes == {name: tuple(tensor.shape) for name, tensor in WHOLE.items()}


@pytest.mark.parametrize(("start", "stop"), [(0, 35), (0, 0), (3, 4), (8, 31), (34, 35), (35, 35)])
def test_any_part_is_read_across_pieces(start: int, stop: int, tmp_path: Path) -> None:
    stored = StoredTensors("checkpoint=x", write(tmp_path, 3))
    assert torch.equal(stored.part("matrix", start, stop), WHOLE["matrix"].flatten()[start:stop])


def test_an_expert_is_read_across_pieces(tmp_path: Path) -> None:
    stack = torch.arange(42.0).view(7, 2, 3)
    flat, paths = stack.flatten(), [tmp_path / "a", tmp_path / "b"]
    write_pieces(paths[0], [Piece("experts", (7, 2, 3), 0, flat[:20])])
    write_pieces(paths[1], [Piece("experts", (7, 2, 3), 20, flat[20:])])
    stored = StoredTensors("checkpoint=x", paths)
    assert all(torch.equal(stored.expert("experts", number), expert) for number, expert in enumerate(stack))


@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_missing_piece_is_named(number: int, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="checkpoint=x: a part of matrix is missing; use an older checkpoint"):
        StoredTensors("checkpoint=x", write(tmp_path, 3, left_out=number))


def test_one_process_stores_tensors_that_any_reader_opens(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    torch.testing.assert_close(load_file(write(tmp_path, 1)[0]), WHOLE, rtol=0, atol=0)


def test_the_optimisers_keys_of_a_tensor_are_found(tmp_path: Path) -> None:
    names = ("a.weight/step", "a.weight/exp_avg", "a.weights/step")
    write_pieces(tmp_path / "x", [Piece(name, (1,), 0, torch.ones(1)) for name in names])
    assert sorted(StoredTensors("checkpoint=x", [tmp_path / "x"]).keys_of("a.weight")) == ["exp_avg", "step"]

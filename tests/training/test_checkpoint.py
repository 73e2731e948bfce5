import json
import shutil
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from mtptrain.errors import UserError
from mtptrain.run.folder_lock import FolderLock
from mtptrain.training.checkpoint import (
    MANIFEST,
    OPTIMIZER,
    RANDOM,
    TENSORS,
    BackboneIdentity,
    TrainerState,
    checkpoint_folders,
    checkpoint_name,
    find_checkpoint,
    fitting_tensors,
    newest_checkpoint,
    open_checkpoint,
    prune_checkpoints,
    save_checkpoint,
    shard_name,
)
from mtptrain.training.engine import TrainingState
from mtptrain.training.pieces import own_piece
from mtptrain.training.run_checkpoints import digest_of
from tests.command import edit_json

IDENTITY = BackboneIdentity("backbone", "ab" * 32, {"seed": 2})
COUNTERS = {"tokens": 17}
MODULE_FILE, OPTIMIZER_FILE = shard_name(TENSORS, 0, 1), shard_name(OPTIMIZER, 0, 1)


def trained(seed: int = 0, width: int = 5) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A module with a buffer, and an optimiser that has state."""
    torch.manual_seed(seed)
    module = nn.Sequential(nn.Linear(3, width), nn.BatchNorm1d(width))
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1)
    module(torch.randn(7, 3)).square().sum().backward()
    optimizer.step()
    return module, optimizer


def state_of(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    parameters = dict(module.named_parameters())
    return {f"{name}/{key}": value for name, p in parameters.items() for key, value in optimizer.state[p].items()}


def pieces_of(module: nn.Module, optimizer: torch.optim.Optimizer) -> TrainingState:
    parts = (module.state_dict(), state_of(module, optimizer))
    return TrainingState(*([own_piece(name, value) for name, value in part.items()] for part in parts))


def save(root: Path, step: int, seed: int = 0) -> Path:
    module, optimizer = trained(seed)
    folder = root / checkpoint_name(step)
    save_checkpoint(folder, pieces_of(module, optimizer), IDENTITY, TrainerState(step, COUNTERS))
    return folder


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


def test_a_saved_checkpoint_is_read_back(tmp_path: Path) -> None:
    module, optimizer = trained()
    folder = tmp_path / checkpoint_name(30)
    save_checkpoint(folder, pieces_of(module, optimizer), IDENTITY, TrainerState(30, COUNTERS))
    rng = torch.get_rng_state()
    checkpoint = open_checkpoint(folder)
    assert (checkpoint.step, checkpoint.identity, checkpoint.counters) == (30, IDENTITY, COUNTERS)
    torch.testing.assert_close(checkpoint.tensors(), dict(module.state_dict()), rtol=0, atol=0)
    assert torch.equal(checkpoint.random_state()["torch"], rng)
    torch.testing.assert_close(dict(checkpoint.stored(OPTIMIZER)), state_of(module, optimizer), rtol=0, atol=0)


def test_the_digest_of_a_checkpoint_is_that_of_its_tensors(tmp_path: Path) -> None:
    of_seed = [digest_of(save(tmp_path / str(number), 1, seed)) for number, seed in enumerate((0, 0, 1))]
    assert of_seed[0] == of_seed[1] != of_seed[2]


def test_a_loaded_module_has_the_saved_parameters_and_buffers(tmp_path: Path) -> None:
    module, other = trained(0)[0], trained(1)[0]
    other.load_state_dict(dict(fitting_tensors(open_checkpoint(save(tmp_path, 1)), other)))
    torch.testing.assert_close(dict(other.state_dict()), dict(module.state_dict()), rtol=0, atol=0)


def test_a_checkpoint_of_the_same_step_is_replaced(tmp_path: Path) -> None:
    save(tmp_path, 1, seed=0)
    folder = save(tmp_path, 1, seed=1)
    torch.testing.assert_close(open_checkpoint(folder).tensors(), dict(trained(1)[0].state_dict()), rtol=0, atol=0)
    assert list(tmp_path.iterdir()) == [folder]


@pytest.mark.parametrize("name", [MODULE_FILE, OPTIMIZER_FILE, RANDOM])
@pytest.mark.parametrize("damage", [truncate, flip_a_bit, Path.unlink])
def test_a_damaged_file_is_refused_by_name(name: str, damage: Callable[[Path], None], tmp_path: Path) -> None:
    folder = save(tmp_path, 1)
    damage(folder / name)
    with pytest.raises(
        UserError, match=rf"checkpoint={folder}: {name} is missing, truncated or altered .*; use an old"
    ):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"{}", b"\xff\xfe", b'{"schema": 5, "files": 3, "identity": {}, "content": {}}']
)
def test_a_damaged_manifest_is_refused(content: bytes, tmp_path: Path) -> None:
    folder = save(tmp_path, 1)
    (folder / MANIFEST).write_bytes(content)
    with pytest.raises(UserError, match=rf"checkpoint={folder}: {MANIFEST} is damaged"):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("schema", 99, "has schema 99 and .* reads 5"),
        ("files", {}, MODULE_FILE),
        ("kind", "stream cache", "is of the kind .stream cache. and not"),
    ],
)
def test_a_manifest_that_does_not_match_is_refused(key: str, value: object, message: str, tmp_path: Path) -> None:
    folder = save(tmp_path, 1)
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps({**manifest, key: value}))
    with pytest.raises(UserError, match=message):
        open_checkpoint(folder)


def test_a_checkpoint_of_an_older_format_is_refused_by_its_number(tmp_path: Path) -> None:
    folder = save(tmp_path, 1)
    (folder / MANIFEST).write_text(json.dumps({"format": 2, "step": 1, "owner": {}, "counters": {}, "sha256": {}}))
    with pytest.raises(UserError, match="has schema 2 and this version of mtptrain reads 5; use the version that"):
        open_checkpoint(folder)


def test_a_folder_without_a_manifest_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"checkpoint={tmp_path}: holds no {MANIFEST}; give"):
        open_checkpoint(tmp_path)


def test_the_newest_checkpoint_is_that_of_the_highest_step(tmp_path: Path) -> None:
    for step in (9, 100, 20):
        save(tmp_path, step)
    newest = newest_checkpoint(tmp_path)
    assert newest is not None
    assert newest.step == 100


def test_a_damaged_newest_checkpoint_is_named_and_passed_over(tmp_path: Path) -> None:
    for step in (1, 2):
        save(tmp_path, step)
    truncate(tmp_path / checkpoint_name(2) / OPTIMIZER_FILE)
    warnings: list[str] = []
    newest = newest_checkpoint(tmp_path, warnings.append)
    assert newest is not None
    assert newest.step == 1
    assert len(warnings) == 1
    assert checkpoint_name(2) in warnings[0]
    assert OPTIMIZER_FILE in warnings[0]


def test_a_run_whose_checkpoints_are_all_unusable_is_not_started_again(tmp_path: Path) -> None:
    for step in (1, 2):
        edit_json(save(tmp_path, step) / MANIFEST, lambda manifest: manifest.update(schema=2))
    line = rf"resume=auto: none of the 2 checkpoints in {tmp_path} can be used \(.*{checkpoint_name(2)}: has schema 2"
    with pytest.raises(UserError, match=line):
        newest_checkpoint(tmp_path)


@pytest.mark.parametrize("root", [".", "absent"])
def test_a_run_without_checkpoints_has_no_newest_one(root: str, tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path / root) is None


@pytest.mark.parametrize("path", ["run", "run/checkpoints", "run/checkpoints/step_00000002"])
def test_a_users_path_may_be_the_run_its_checkpoints_or_a_step(path: str, tmp_path: Path) -> None:
    for step in (1, 2):
        save(tmp_path / "run" / "checkpoints", step)
    assert find_checkpoint(tmp_path / path).step == 2


def test_a_checkpoint_under_another_name_is_found(tmp_path: Path) -> None:
    save(tmp_path, 7).rename(tmp_path / "best")
    assert find_checkpoint(tmp_path / "best").step == 7


@pytest.mark.parametrize("path", ["absent", "empty", "file", "step_file", "step_absent"])
def test_a_path_without_a_checkpoint_is_refused(path: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "step_file").touch()
    with pytest.raises(UserError, match=rf"checkpoint={tmp_path / path}: .*; give .*step_\*"):
        find_checkpoint(tmp_path / path)


def test_pruning_keeps_the_newest(tmp_path: Path) -> None:
    for step in (9, 100, 20):
        save(tmp_path, step)
    prune_checkpoints(tmp_path, keep=2)
    assert [folder.name for folder in checkpoint_folders(tmp_path)] == [checkpoint_name(20), checkpoint_name(100)]


def test_a_half_written_checkpoint_is_ignored_and_the_next_run_deletes_it(tmp_path: Path) -> None:
    whole = save(tmp_path, 1)
    leftover = tmp_path / f".{checkpoint_name(2)}.0123abcd.tmp"
    shutil.copytree(whole, leftover)
    newest = newest_checkpoint(tmp_path)
    assert newest is not None
    assert newest.folder == whole
    with closing(FolderLock()) as lock:
        lock.take(tmp_path, "output_dir")
    assert list(tmp_path.iterdir()) == [whole]


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (trained(width=6)[0], r"0.bias is \(5,\) there and \(6,\) here"),
        (nn.Sequential(nn.Linear(3, 5)), r"1.bias is \(5,\) there and None here"),
        (nn.Sequential(*trained()[0], nn.Linear(5, 1)), r"2.bias is None there and \(1,\) here"),
    ],
    ids=["shape", "unexpected", "missing"],
)
def test_tensors_that_do_not_fit_are_refused(module: nn.Module, message: str, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(save(tmp_path, 1))
    with pytest.raises(UserError, match=rf"checkpoint={checkpoint.folder}: does not fit .*{message}"):
        fitting_tensors(checkpoint, module)

"""Checkpoints: folders that are whole or absent, with a checksum for every file.

A checkpoint `step_00000200/` holds `module.safetensors` (the trained tensors), `training.pt` (optimiser and
random-number state) and `checkpoint.json` (step, what it belongs to, SHA-256 of the two files).
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mtptrain.engines.engine import OptimizerState
from mtptrain.errors import UserError
from mtptrain.storage import atomic_folder, no_room, sha256_file, write_json

TENSORS, TRAINING, MANIFEST = "module.safetensors", "training.pt", "checkpoint.json"
FORMAT = 2
BEST = "best"  # the checkpoint with the best score of the measurements during training


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint on disk whose files have been checked.

    Attributes:
        folder: where it lies.
        step: optimiser steps done.
        owner: what it belongs to: task, backbone fingerprint, shape of the heads.
        counters: the trainer's own counts.
    """

    folder: Path
    step: int
    owner: dict[str, Any]
    counters: dict[str, Any]

    def tensors(self) -> dict[str, Tensor]:
        """The trained tensors, on the CPU."""
        return load_file(self.folder / TENSORS)

    def training(self) -> dict[str, Any]:
        """Optimiser and random-number state."""
        state: dict[str, Any] = torch.load(self.folder / TRAINING, map_location="cpu", weights_only=True)
        return state


def checkpoint_name(step: int) -> str:
    """Folder name of a step's checkpoint."""
    return f"step_{step:08d}"


def save_checkpoint(
    folder: Path,
    step: int,
    tensors: dict[str, Tensor],
    optimizer: OptimizerState,
    owner: dict[str, Any],
    counters: dict[str, Any],
) -> None:
    """Write the checkpoint of a step; it appears as `folder` only when it is whole.

    Raises:
        UserError: there is no room; the checkpoints before it stay as they are.
    """
    try:
        _write_checkpoint(folder, step, tensors, optimizer, owner, counters)
    except Exception as error:  # each library raises its own
        reason = no_room(error)
        if reason is None:
            raise
        raise UserError(
            f"output_dir={folder.parent.parent}: {reason} (checkpoint of step {step}); the checkpoints before it are "
            "whole: free some room and continue with resume=auto"
        ) from error


def _write_checkpoint(
    folder: Path,
    step: int,
    tensors: dict[str, Tensor],
    optimizer: OptimizerState,
    owner: dict[str, Any],
    counters: dict[str, Any],
) -> None:
    with atomic_folder(folder) as temporary:
        save_file({name: t.detach().contiguous() for name, t in tensors.items()}, temporary / TENSORS)
        training: dict[str, Any] = {"optimizer": optimizer, "torch_rng": torch.get_rng_state()}
        if torch.cuda.is_available():
            training["cuda_rng"] = torch.cuda.get_rng_state()
        with (temporary / TRAINING).open("wb") as file:  # given a path, torch hides why a write failed
            torch.save(training, file)
        checksums = {name: sha256_file(temporary / name) for name in (TENSORS, TRAINING)}
        manifest = {"format": FORMAT, "step": step, "owner": owner, "counters": counters, "sha256": checksums}
        write_json(temporary / MANIFEST, manifest)


def open_checkpoint(folder: Path) -> Checkpoint:
    """Read a checkpoint's manifest and verify its files.

    Raises:
        UserError: it is missing, incomplete or damaged.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        checksums, version = dict(manifest["sha256"]), manifest["format"]
        step, owner, counters = manifest["step"], dict(manifest["owner"]), dict(manifest["counters"])
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"checkpoint={folder}: holds no {MANIFEST}; give a step_* folder or the run's folder") from None
    except (ValueError, KeyError, TypeError) as error:  # ValueError: not UTF-8, not JSON
        raise UserError(f"checkpoint={folder}: {MANIFEST} is damaged ({error}); use an older checkpoint") from None
    if version != FORMAT:
        raise UserError(
            f"checkpoint={folder}: has format {version} and this version of mtptrain reads {FORMAT}; use the version "
            "that wrote it"
        )
    for name in (TENSORS, TRAINING):
        path = folder / name
        if not path.is_file() or sha256_file(path) != checksums.get(name):
            raise UserError(
                f"checkpoint={folder}: {name} is missing, truncated or altered (its SHA-256 differs); "
                "use an older checkpoint of the run"
            )
    return Checkpoint(folder, step, owner, counters)


def checkpoint_folders(root: Path) -> list[Path]:
    """Checkpoints of a run, oldest first, unchecked."""
    return sorted(path for path in root.glob("step_*") if path.is_dir()) if root.is_dir() else []


def newest_checkpoint(root: Path, warn: Any = print) -> Checkpoint | None:
    """The newest undamaged checkpoint of a run; damaged ones are named through `warn` and passed over."""
    for folder in reversed(checkpoint_folders(root)):
        try:
            return open_checkpoint(folder)
        except UserError as error:
            warn(f"skipping a damaged checkpoint: {error}")
    return None


def find_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint that a user's path means: a step folder, a run folder, or its `checkpoints` folder.

    Raises:
        UserError: nothing usable lies there.
    """
    if (path / MANIFEST).is_file() or path.name.startswith("step_"):
        return open_checkpoint(path)
    for root in (path / "checkpoints", path):
        folders = checkpoint_folders(root)
        if folders:
            return open_checkpoint(folders[-1])
    raise UserError(f"checkpoint={path}: no checkpoint there; give a run folder, a step_* folder, or `stock`")


def fitting_tensors(checkpoint: Checkpoint, module: nn.Module) -> dict[str, Tensor]:
    """A checkpoint's tensors; every name and shape is the module's, also where ZeRO has shared the module out.

    Raises:
        UserError: names or shapes differ.
    """
    tensors = checkpoint.tensors()
    state = module.state_dict(keep_vars=True)
    wanted = {name: tuple(getattr(value, "ds_shape", value.shape)) for name, value in state.items()}
    found = {name: tuple(value.shape) for name, value in tensors.items()}
    if wanted != found:
        name = min(dict(wanted.items() ^ found.items()))
        raise UserError(
            f"checkpoint={checkpoint.folder}: does not fit the modules of this run: {name} is {found.get(name)} there "
            f"and {wanted.get(name)} here"
        )
    return tensors


def prune_checkpoints(root: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints, and what a killed run left half-written."""
    for folder in checkpoint_folders(root)[:-keep]:
        shutil.rmtree(folder, ignore_errors=True)
    for leftover in root.glob(".*.tmp"):
        shutil.rmtree(leftover, ignore_errors=True)

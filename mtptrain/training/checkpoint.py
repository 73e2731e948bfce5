"""Checkpoints: artifacts that are complete or absent, with a checksum for every file.

A checkpoint `step_00000200/` holds `module.safetensors` (the trained tensors), `optimizer.safetensors` (the optimiser's
state), `random.pt` (random-number state), the manifest `checkpoint.json` (identity, step and counters) and, with a
head, `passages.npz` (hashes of the text that it was trained on). Several processes write a file each with their pieces,
such as `module-00002-of-00008.safetensors`.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Collection
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from mtptrain.config import MtpMode
from mtptrain.config.backbone import BACKBONE_CHOICE
from mtptrain.data.passages import Passages, read_passages
from mtptrain.errors import UserError
from mtptrain.mtp.expert_parallel import WHOLE_SHAPE
from mtptrain.mtp.tensors import HeadTensors
from mtptrain.run.artifact import Kind, StoredFile, check_identity, describe_file, finish, open_artifact
from mtptrain.run.distributed import on_each_rank, on_rank0, rank, world_size
from mtptrain.run.hub import is_address
from mtptrain.run.storage import atomic_folder, disk_full_reason, sync_file
from mtptrain.training.engine import TrainingState
from mtptrain.training.pieces import StoredTensors, write_pieces
from mtptrain.training.selection import Selection, Values

TENSORS, OPTIMIZER = "module", "optimizer"  # files of each process, see `shard_name`
RANDOM, MANIFEST = "random.pt", "checkpoint.json"
EXPORT_MANIFEST = "mtptrain_export.json"  # of an exported head
PASSAGES = "passages.npz"
SHARD = re.compile(r"[a-z]+-\d{5}-of-(\d{5})\.safetensors")
T = TypeVar("T")
BEST = "best"  # name of the checkpoint with the best score during training


@dataclass(frozen=True, slots=True)
class HeadIdentity:
    """The training that a head's checkpoint belongs to.

    Attributes:
        task: `pretrain` or `distill`.
        backbone: fingerprint of the backbone.
        mode, depth: how the modules are shared, and their number.
        steps: draft steps of the rollout.
        start: `init`, the `sha256` of the tensors before training and, for a start from a head, its number of `modules`
            and their `conversion`.
        quant_aware: the export format that training simulates; None trains with unrounded values.
        data: digest of the training data.
        settings: every setting that changes the result, by name; see resume.py.
    """

    task: str
    backbone: str
    mode: MtpMode
    depth: int
    steps: int
    start: dict[str, str | int]
    quant_aware: str | None
    data: str
    settings: Values

    @property
    def zero_first(self) -> bool:
        """Whether the embedding at position 0 was zero in training."""
        return bool(self.settings.get("mtp.zero_first_embedding", False))


@dataclass(frozen=True, slots=True)
class BackboneIdentity:
    """The training that a backbone's checkpoint belongs to; see `HeadIdentity`."""

    task: str
    data: str
    settings: Values


TrainingIdentity = HeadIdentity | BackboneIdentity


@dataclass(frozen=True, slots=True)
class TrainerState:
    """Progress of a training: optimiser steps done, and the trainer's counters."""

    step: int
    counters: Values


CHECKPOINT: Kind[TrainingIdentity, TrainerState] = Kind(
    name="checkpoint",
    schema=5,
    identity=TrainingIdentity,
    content=TrainerState,
    settings={},  # resume.py compares trainings
    manifest=MANIFEST,
    missing="give a step_* folder or the run's folder",
    damaged="use an older checkpoint",
    repair="use an older checkpoint of the run",
)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint on disk whose files have been verified.

    Attributes:
        folder: folder of the checkpoint.
        identity: the training that it belongs to.
        step: optimiser steps done.
        counters: the trainer's counters, such as tokens and skipped steps.
    """

    folder: Path
    identity: TrainingIdentity
    step: int
    counters: Values

    def tensors(self) -> dict[str, Tensor]:
        """Return the trained tensors, on the CPU."""
        return dict(self.stored(TENSORS))

    def head(self) -> HeadTensors:
        """Return the trained tensors of a head; they are not read yet."""
        return self.stored(TENSORS)

    def stored(self, kind: str) -> StoredTensors:
        """Return the tensors of all processes' files of a kind, `TENSORS` or `OPTIMIZER`; they are not read yet."""
        return StoredTensors(f"checkpoint={self.folder}", sorted(self.folder.glob(f"{kind}*.safetensors")))

    def random_state(self) -> dict[str, Tensor]:
        """Return the random-number state: `torch` and, if training ran on a GPU, `cuda`."""
        state: dict[str, Tensor] = torch.load(self.folder / RANDOM, map_location="cpu", weights_only=True)
        return state

    def passages(self) -> Passages | None:
        """Return the passages of the text that the head was trained on; None if they were not kept."""
        path = self.folder / PASSAGES
        return read_passages(path) if path.is_file() else None

    def selection(self) -> Selection | None:
        """Return how the checkpoint was chosen as the best of its run; None for any other checkpoint."""
        return Selection.of(self.counters)

    def head_identity(self, fingerprint: str | None) -> HeadIdentity:
        """Return the identity of the stored head, checked against the backbone.

        Args:
            fingerprint: fingerprint of the backbone; None if it is not known yet.

        Raises:
            UserError: the checkpoint holds no head, or a head of another backbone.
        """
        if not isinstance(self.identity, HeadIdentity):
            raise UserError(
                f"checkpoint={self.folder}: holds a backbone, not a head; for the head that was trained with it set "
                "checkpoint=stock and backbone.path to the run's folder `backbone`"
            )
        if fingerprint is None:
            return self.identity
        have, want = {"backbone": self.identity.backbone}, {"backbone": fingerprint}
        settings, way_out = {"backbone": BACKBONE_CHOICE}, "choose another checkpoint"
        check_identity(f"checkpoint={self.folder}", have, want, settings, way_out)
        return self.identity


def checkpoint_name(step: int) -> str:
    """Return the folder name of a step's checkpoint."""
    return f"step_{step:08d}"


def shard_name(kind: str, number: int, count: int) -> str:
    """Return the name of process `number`'s file of `count`, as transformers names the shards of a model."""
    return f"{kind}.safetensors" if count == 1 else f"{kind}-{number + 1:05d}-of-{count:05d}.safetensors"


def save_checkpoint(
    folder: Path,
    training: TrainingState,
    identity: TrainingIdentity,
    state: TrainerState,
    passages: Passages | None = None,
) -> None:
    """Write a checkpoint together with all processes; it appears as `folder` only when it is complete.

    Args:
        folder: of the checkpoint, which every process sees.
        training: this process's pieces of the training's state.
        identity: of the training.
        state: progress of the training.
        passages: of the text that a head was trained on; None if they are not kept.

    Raises:
        UserError: on every process: the disk is full; earlier checkpoints are unchanged.
    """

    def explained(write: Callable[[], T]) -> T:
        try:
            return write()
        except Exception as error:  # every library raises a type of its own
            reason = disk_full_reason(error)
            if reason is None:
                raise
            raise UserError(
                f"output_dir={folder.parent.parent}: {reason} (checkpoint of step {state.step}); the checkpoints "
                "before it are whole: free some room and continue with resume=auto"
            ) from error

    with ExitStack() as stack:
        temporary = on_rank0(lambda: explained(lambda: stack.enter_context(atomic_folder(folder))))
        parts = on_each_rank(lambda: explained(lambda: _write_own(temporary, training, passages)))
        files = {name: stored for part in parts for name, stored in part.items()}

        def complete() -> None:
            finish(CHECKPOINT, temporary, identity, files, state)
            stack.close()

        on_rank0(lambda: explained(complete))


def _write_own(folder: Path, training: TrainingState, passages: Passages | None) -> dict[str, StoredFile]:
    """Write this process's files and return their descriptions; rank 0 also writes those common to all."""
    names = [shard_name(kind, rank(), world_size()) for kind in (TENSORS, OPTIMIZER)]
    for name, pieces in zip(names, training, strict=True):
        write_pieces(folder / name, pieces)
    if rank() == 0:
        random = {"torch": torch.get_rng_state()}
        if torch.cuda.is_available():
            random["cuda"] = torch.cuda.get_rng_state()
        with (folder / RANDOM).open("wb") as file:  # with a path, torch hides the cause of a failed write
            torch.save(random, file)
        names.append(RANDOM)
        if passages is not None:
            passages.write(folder / PASSAGES)
            names.append(PASSAGES)
    for name in names:
        sync_file(folder / name)
    return {name: describe_file(folder / name) for name in names}


def open_checkpoint(folder: Path) -> Checkpoint:
    """Return a checkpoint after verifying its manifest and files.

    Raises:
        UserError: the checkpoint is missing, incomplete or damaged.
    """
    artifact = open_artifact(CHECKPOINT, "checkpoint", folder)
    artifact.verify([*_shards(artifact.files), RANDOM, *({PASSAGES} & artifact.files.keys())])
    return Checkpoint(folder, artifact.identity, artifact.content.step, artifact.content.counters)


def _shards(files: Collection[str]) -> list[str]:
    """Return the names of all files of pieces that a checkpoint must have, given those in its manifest."""
    count = max((int(match[1]) for name in files if (match := SHARD.fullmatch(name))), default=1)
    return [shard_name(kind, number, count) for kind in (TENSORS, OPTIMIZER) for number in range(count)]


def newest_identity(root: Path) -> TrainingIdentity | None:
    """Return the training of a run's newest checkpoint from its manifest; None if no manifest can be read."""
    for folder in reversed(checkpoint_folders(root)):
        with suppress(UserError):
            return open_artifact(CHECKPOINT, "checkpoint", folder).identity
    return None


def checkpoint_folders(root: Path) -> list[Path]:
    """Return the checkpoint folders of a run, oldest first, unverified."""
    return sorted(path for path in root.glob("step_*") if path.is_dir()) if root.is_dir() else []


def newest_checkpoint(root: Path, warn: Any = print) -> Checkpoint | None:
    """Return the newest usable checkpoint of a run; None if it has none. Report others through `warn` and skip them.

    Raises:
        UserError: the run has checkpoints and none can be used, because of damage or an older schema.
    """
    folders, reason = checkpoint_folders(root), None
    for folder in reversed(folders):
        try:
            return open_checkpoint(folder)
        except UserError as error:
            warn(f"skipping a damaged checkpoint: {error}")
            reason = reason or error
    if reason is not None:  # starting again in this folder would mix two runs and delete the checkpoints of one
        raise UserError(
            f"resume=auto: none of the {len(folders)} checkpoints in {root} can be used ({reason}); choose another "
            "output_dir to start again"
        )
    return None


def find_checkpoint(path: Path) -> Checkpoint:
    """Return the checkpoint at a user's path: a step folder, a run folder, its `checkpoints` folder, or an export.

    Args:
        path: a folder, or an address on the hub as `hf://NAME`.

    Raises:
        UserError: the path holds no usable checkpoint.
    """
    if is_address(path) or (path / EXPORT_MANIFEST).is_file():
        from mtptrain.training.exported import download_head, open_exported  # it imports this module

        path = download_head(path) if is_address(path) else path
        if (path / EXPORT_MANIFEST).is_file():
            return open_exported(path)
    if (path / MANIFEST).is_file() or path.name.startswith("step_"):
        return open_checkpoint(path)
    for root in (path / "checkpoints", path):
        folders = checkpoint_folders(root)
        if folders:
            return open_checkpoint(folders[-1])
    raise UserError(f"checkpoint={path}: no checkpoint there; give a run folder, a step_* folder, or `stock`")


def fitting_tensors(checkpoint: Checkpoint, module: nn.Module) -> StoredTensors:
    """Return a checkpoint's tensors after comparing names and shapes with a module, which ZeRO may have partitioned.

    Raises:
        UserError: names or shapes differ.
    """
    tensors = checkpoint.stored(TENSORS)
    state = module.state_dict(keep_vars=True)
    wanted = {name: tuple(_whole_shape(value)) for name, value in state.items()}
    stored = tensors.shapes
    if wanted != stored:
        name = min(dict(wanted.items() ^ stored.items()))
        raise UserError(
            f"checkpoint={checkpoint.folder}: does not fit the modules of this run: {name} is {stored.get(name)} there "
            f"and {wanted.get(name)} here"
        )
    return tensors


def _whole_shape(value: Tensor) -> Any:
    """Return the shape of a tensor of which this process may hold a share."""
    return getattr(value, "ds_shape", getattr(value, WHOLE_SHAPE, value.shape))


def prune_checkpoints(root: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints."""
    for folder in checkpoint_folders(root)[:-keep]:
        shutil.rmtree(folder, ignore_errors=True)

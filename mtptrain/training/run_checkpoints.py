"""The checkpoints of a run, which may be training at the same time and may delete them."""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path

from mtptrain.errors import UserError
from mtptrain.run.artifact import open_artifact
from mtptrain.training.checkpoint import BEST, CHECKPOINT, MANIFEST, TENSORS, TrainerState, checkpoint_folders


def checkpoints_of_run(path: Path) -> Path:
    """Return the folder that holds the checkpoints of a run, from the run's folder or that folder itself.

    Raises:
        UserError: the path is no folder, or that of a single checkpoint.
    """
    if not path.is_dir():
        raise UserError(f"checkpoint={path}: is no folder; give the folder of a training run")
    if (path / MANIFEST).exists():
        run = path.resolve().parent.parent
        raise UserError(f"checkpoint={path}: is one checkpoint; give the folder of its run, as in checkpoint={run}")
    return path if path.name == "checkpoints" or checkpoint_folders(path) else path / "checkpoints"


def steps_of_run(root: Path) -> dict[int, Path]:
    """Return the checkpoints of a run by step, unverified; `best` among them if its own step was deleted.

    A folder whose manifest cannot be read, such as one that is still being copied, is left out.
    """
    states = {folder: state_of(folder) for folder in (root / BEST, *checkpoint_folders(root))}
    by_step = {state.step: folder for folder, state in states.items() if state is not None}
    return dict(sorted(by_step.items()))


def state_of(folder: Path) -> TrainerState | None:
    """Return the progress that a checkpoint's manifest records; None if that cannot be read."""
    try:
        return open_artifact(CHECKPOINT, "checkpoint", folder).content
    except UserError:
        return None


def digest_of(folder: Path) -> str:
    """Return a digest of a checkpoint's tensors, from the checksums in its manifest.

    Raises:
        UserError: the manifest cannot be read.
    """
    files = open_artifact(CHECKPOINT, "checkpoint", folder).files
    checksums = [stored.sha256 for name, stored in sorted(files.items()) if name.startswith(TENSORS)]
    return sha256("".join(checksums).encode()).hexdigest()

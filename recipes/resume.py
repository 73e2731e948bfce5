"""Continue an interrupted training: find its checkpoint, compare the trainings, and say what happens."""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from mtptrain.config import DataConfig, DataSource
from mtptrain.data.text import TextReader
from mtptrain.errors import UserError
from mtptrain.mtp.stack import check_shapes
from mtptrain.recipes.session import Session
from mtptrain.recipes.streams import stream_cache
from mtptrain.run.distributed import on_rank0
from mtptrain.run.typed_json import to_json
from mtptrain.training.checkpoint import TENSORS, HeadIdentity, checkpoint_folders, newest_checkpoint, newest_identity
from mtptrain.training.pieces import StoredTensors
from mtptrain.training.resume import (
    Difference,
    Settings,
    backbone_difference,
    describe_schedule,
    require_allowed,
    result_settings,
    setting_differences,
)
from mtptrain.training.trainer import Trainer

NO_CONTENT = {"path", "cache_dir", "workers", "sequence_length"}  # of a streamed source, beside its files


def head_settings(session: Session) -> dict[str, Any]:
    """Return the settings that change the result of the training of a head."""
    config = session.config
    settings = result_settings(config, ["data", "loss", "mtp", "train"], session.dtype_name)
    if config.data.source is DataSource.on_policy:
        settings |= result_settings(config, ["on_policy"], session.dtype_name)
        settings["decoding.stop"], settings["decoding.stop_strings"] = (
            config.decoding.stop,
            config.decoding.stop_strings,
        )
    return settings


def data_digest(session: Session) -> str:
    """Return a digest of the training data: of their content, or for streamed text of the files' names and sizes.

    The texts of `data=on_policy` have one only once they are written.
    """
    data = session.config.data
    if data.source is DataSource.streams:
        order = {"order": "shards"} if data.follow else {}
        return _digest({**to_json(stream_cache(session).identity), "data": None, **order})
    if data.is_streamed:
        sources = [_streamed_source(source) for source in data.sources().values()]
        return _digest([data.weights(), sources, session.chat.sha256 if session.chat else None])
    return session.training_corpus.digest()


def _streamed_source(data: DataConfig) -> Any:
    origin = TextReader(data).origin if data.source is DataSource.text else None
    settings = {name: value for name, value in to_json(data).items() if name not in NO_CONTENT}
    return [origin, settings]


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _newest_shapes(root: Path) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the tensors in a run's newest checkpoint, from the headers of its files; none if damaged."""
    for folder in reversed(checkpoint_folders(root)):
        with suppress(UserError, OSError, SafetensorError):
            return StoredTensors(f"checkpoint={folder}", sorted(folder.glob(f"{TENSORS}*.safetensors"))).shapes
    return {}


def check_resumable(session: Session) -> None:
    """Refuse to continue a run with other settings; neither weights nor tensors are read.

    Raises:
        UserError: lists the differences that `resume_allow` does not name.
    """
    config, root = session.config, session.folder.path / "checkpoints"
    stored = on_rank0(lambda: newest_identity(root)) if config.resume == "auto" else None
    if not isinstance(stored, HeadIdentity):  # another recipe is refused with the checkpoint's name later
        return
    data = None if config.data.source is DataSource.on_policy else data_digest(session)
    changes = setting_differences(stored, head_settings(session), data)
    known = session.known_fingerprint
    if known is None:
        check_shapes(on_rank0(lambda: _newest_shapes(root)), session.source.config, f"resume=auto: {root}")
    elif stored.backbone != known:
        changes.insert(0, backbone_difference(stored.backbone, known))
    if stored.task != config.task:
        changes.insert(0, Difference("+recipe", stored.task, config.task))
    require_allowed(f"resume=auto: {root}", changes, config.resume_allow)


def resume(session: Session, trainer: Trainer) -> None:
    """Restore a trainer from the newest checkpoint if the run is resumed, and say where it starts.

    Raises:
        UserError: the checkpoint belongs to another training, or no checkpoint can be used.
    """
    config, print_status = session.config, session.folder.print_status
    if config.resume != "auto":
        return
    checkpoint = on_rank0(lambda: newest_checkpoint(trainer.checkpoints, print_status))
    if checkpoint is None:
        print_status(f"resume=auto: {trainer.checkpoints} holds no checkpoint to continue; starting at step 0")
        return
    changes = trainer.restore(checkpoint, config.resume_allow)
    for line in _describe(trainer, checkpoint.identity.settings, changes):
        print_status(line)


def _describe(trainer: Trainer, stored: Settings, changes: list[Difference]) -> list[str]:
    done, steps = trainer.step, trainer.config.steps
    lines = [f"changed as resume_allow permits: {', '.join(map(str, changes))}"] if changes else []
    schedule = describe_schedule(stored, trainer.config, done)
    lines += [schedule] if schedule else []
    if done < steps:
        return [*lines, f"continuing from step {done}"]
    return [*lines, f"step {done} of {steps} is done: nothing is left to train"]

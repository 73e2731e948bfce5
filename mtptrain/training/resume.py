"""A resumed run is the same run: the settings that its result depends on, and their differences from a checkpoint's."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from mtptrain.config import RunConfig, StockHeadConfig, TrainConfig
from mtptrain.errors import UserError
from mtptrain.run.typed_json import to_json
from mtptrain.training.checkpoint import HeadIdentity, TrainingIdentity
from mtptrain.training.optim import learning_rate
from mtptrain.training.selection import Values

# Settings that change no result. The tensors and the digest of the data stand for mtp.init and the paths.
IRRELEVANT = {
    "data": {"cache_dir", "workers", "delete_consumed"},
    "mtp": {"init", "experts"},
    "on_policy": {"path", "batch_size", "draft_length"},
    "train": {"log_every", "checkpoint_every", "keep_checkpoints", "max_bad_steps", "recompute"},
}
IRRELEVANT["stock_head"] = IRRELEVANT["train"]
# The optimiser's state, or the modules, would not fit any more.
FIXED = {"+recipe", "backbone.path", "backbone.shape", "data.streaming", "mtp.init", "mtp.mode", "mtp.depth"}
FIXED |= {"mtp.trainable", "train.optimizer", "stock_head.optimizer"}
SCHEDULE = ("steps", "learning_rate", "warmup_steps", "final_learning_rate_ratio")
Settings = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Difference:
    """A setting with another value than in the interrupted run."""

    name: str
    before: Any
    after: Any

    def __str__(self) -> str:
        return f"{self.name} {_plain(self.before)} -> {_plain(self.after)}"

    @property
    def may_be_allowed(self) -> bool:
        """Return whether a run can go on with the new value."""
        return not _is_named(self.name, FIXED)


def result_settings(config: RunConfig, sections: Sequence[str], dtype: str) -> Values:
    """Return the settings that change the result of a training, as JSON values by dotted name.

    Args:
        config: of the run.
        sections: dotted names of the sections that the training reads.
        dtype: of the arithmetic, which `precision` chooses.
    """
    settings: Values = {"seed": config.seed, "precision": dtype}
    for section in sections:
        part: Any = config
        for attribute in section.split("."):
            part = getattr(part, attribute)
        label = "stock_head" if isinstance(part, StockHeadConfig) else section
        irrelevant = IRRELEVANT.get(label, set())
        names = [field.name for field in fields(part) if field.name not in irrelevant]
        settings |= {f"{label}.{name}": to_json(getattr(part, name)) for name in names}
    if "mtp.steps" in settings:
        settings["mtp.steps"] = config.mtp.num_steps
    return settings


def setting_differences(stored: TrainingIdentity, settings: Settings, data: str | None) -> list[Difference]:
    """Return the settings that differ; those that select the data count only if the data differ.

    Args:
        stored: the training of a checkpoint.
        settings: the settings of this run.
        data: digest of this run's data; None if the data are not written yet.
    """
    names = [name for name in {**stored.settings, **settings} if stored.settings.get(name) != settings.get(name)]
    is_same_data = data == stored.data
    kept = [name for name in names if not (is_same_data and selects_data(name))]
    changes = [Difference(name, stored.settings.get(name), settings.get(name)) for name in kept]
    is_explained = any(selects_data(name) or name == "data.streaming" for name in names)
    if data is not None and not is_same_data and not is_explained:
        changes.append(Difference("data", f"(digest of its tokens) {stored.data[:12]}", data[:12]))
    return changes


def selects_data(name: str) -> bool:
    """Return whether a setting chooses the documents, whose digest tells whether they are the same."""
    chosen = name.startswith(("data.", "on_policy.")) or name in ("decoding.stop", "decoding.stop_strings")
    return chosen and name not in ("data.sequence_length", "data.streaming")


def differences(stored: TrainingIdentity, wanted: TrainingIdentity) -> list[Difference]:
    """Return every difference between the training of a checkpoint and the training of this run."""
    changes = [Difference("+recipe", stored.task, wanted.task)] if stored.task != wanted.task else []
    if isinstance(stored, HeadIdentity) and isinstance(wanted, HeadIdentity):
        changes += _start_differences(stored, wanted)
    if type(stored) is type(wanted):
        changes += setting_differences(stored, wanted.settings, wanted.data)
    return changes


def backbone_difference(before: str, after: str) -> Difference:
    """Return the difference between two fingerprints of backbones."""
    return Difference("backbone.path", f"(fingerprint) {before[:12]}", after[:12])


def _start_differences(stored: HeadIdentity, wanted: HeadIdentity) -> list[Difference]:
    """Return differences of the backbone, and of the first tensors unless another setting explains them."""
    if stored.backbone != wanted.backbone:
        return [backbone_difference(stored.backbone, wanted.backbone)]
    explanations = ("mtp.mode", "mtp.depth", "seed", "precision")
    is_explained = any(stored.settings.get(name) != wanted.settings.get(name) for name in explanations)
    if stored.start["sha256"] == wanted.start["sha256"] or is_explained:
        return []
    before, after = stored.start["init"], wanted.start["init"]
    if before == after:
        before, after = (f"{one.start['init']} (tensors {str(one.start['sha256'])[:12]})" for one in (stored, wanted))
    return [Difference("mtp.init", before, after)]


def require_allowed(where: str, changes: Sequence[Difference], allowed: Sequence[str]) -> None:
    """Refuse differences that `resume_allow` does not name.

    Args:
        where: setting and checkpoint, as the error begins.
        changes: the differences.
        allowed: names of settings or sections.

    Raises:
        UserError: lists every difference.
    """
    refused = [one for one in changes if not (one.may_be_allowed and _is_named(one.name, allowed))]
    if not refused:
        return
    fixed = [one.name for one in refused if not one.may_be_allowed]
    way_out = (
        f"or choose another output_dir ({', '.join(fixed)} cannot change within a run)"
        if fixed
        else f"choose another output_dir, or accept the change: resume_allow=[{','.join(one.name for one in changes)}]"
    )
    raise UserError(f"{where}: belongs to another run: {', '.join(map(str, refused))}; set them back, {way_out}")


def describe_schedule(stored: Settings, config: TrainConfig, step: int) -> str | None:
    """Return what the learning rate does after `step` steps under a changed schedule; None if it did not change."""
    label = "stock_head" if isinstance(config, StockHeadConfig) else "train"
    before = TrainConfig(**{name: stored[f"{label}.{name}"] for name in SCHEDULE})
    if all(getattr(before, name) == getattr(config, name) for name in SCHEDULE) or not 0 < step < config.steps:
        return None
    last, following = learning_rate(step - 1, before), learning_rate(step, config)
    turn = "jumps up" if following > last else "goes on"
    return (
        f"learning rate: {last:.3g} at step {step}; under the new schedule it {turn} to {following:.3g} at step "
        f"{step + 1} and ends at {learning_rate(config.steps - 1, config):.3g} at step {config.steps}"
    )


def _is_named(name: str, names: Sequence[str] | set[str]) -> bool:
    """Return whether `names` holds a setting or a section around it."""
    return any(name == one or name.startswith(f"{one}.") for one in names)


def _plain(value: Any) -> str:
    """Return a value as on the command line."""
    return value if isinstance(value, str) else json.dumps(value)

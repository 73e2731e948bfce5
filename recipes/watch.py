"""`+recipe=watch`: measure the checkpoints of a run while it trains elsewhere, in the same tracker's run.

python -m mtptrain +recipe=watch checkpoint=outputs/distill/RUN
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml

from mtptrain.config import RunConfig, TrackingConfig
from mtptrain.config.reads import ALWAYS, Settings, of_backbone, of_curve, settings
from mtptrain.errors import UserError
from mtptrain.recipes.curve import CurveBuilder
from mtptrain.recipes.evaluate import decode_checkpoints, require_all
from mtptrain.recipes.session import Session
from mtptrain.run.folder import FolderUse
from mtptrain.run.folder_lock import is_held
from mtptrain.run.progress import clock
from mtptrain.run.trackers import TrackedRun, check_trackers
from mtptrain.run.tracking import Trackers
from mtptrain.training.checkpoint import checkpoint_name, checkpoints_of_run

PROCESSES = "led"
FOLDER = FolderUse.result
SIGN_SECONDS = 600.0  # between two signs of life, to the user and to processes that wait for orders


def reads(config: RunConfig) -> Settings:
    """Return the settings that a watch reads; its trackers are those of the run."""
    return ALWAYS | of_backbone(config) | of_curve(config) | settings("checkpoint", "watch", "overwrite")


def check(config: RunConfig) -> None:
    """Refuse a watch without the folder of a run, or of a folder that does not exist."""
    if config.checkpoint in (None, "stock"):
        raise UserError(f"checkpoint={config.checkpoint}: watch needs the folder of a training run; set checkpoint=RUN")
    checkpoints_of_run(Path(str(config.checkpoint)))


def run(session: Session) -> None:
    """Measure every checkpoint that appears until the run is finished or the time is over.

    The exit code is 3 if checkpoints are decoded and the certificate of one failed.
    """
    root = checkpoints_of_run(Path(str(session.config.checkpoint)))
    run_folder = root.parent
    with watching_trackers(run_folder, session) as trackers:
        builder = CurveBuilder(session, root, trackers)
        watch(session, builder, run_folder)
        builder.finish()
        evaluations = decode_checkpoints(session, builder)
    require_all(evaluations)


@dataclass(slots=True)
class _Refusals:
    """Checkpoints that could not be measured so far: the last reason by folder and modification time."""

    reasons: dict[Path, str] = field(default_factory=dict)

    def note(self, folder: Path, error: UserError) -> bool:
        """Keep a reason; return whether it is new."""
        is_new = self.reasons.get(folder) != str(error)
        self.reasons[folder] = str(error)
        return is_new


def watch(session: Session, builder: CurveBuilder, run_folder: Path) -> None:
    """Measure checkpoints as they appear, lower steps first.

    A checkpoint that cannot be read, because it is still being copied or is damaged, is tried again at every look until
    the watch ends, and then named.
    """
    limits, begun, refusals = session.config.watch, time.monotonic(), _Refusals()
    ends, sign_at = begun + 60 * limits.minutes, begun + SIGN_SECONDS
    session.folder.print_status(f"watching {run_folder}, for at most {clock(60 * limits.minutes)}")
    while True:
        is_over = is_finished(run_folder, builder.root)  # before looking, so that no last checkpoint is missed
        _measure_pending(session, builder, refusals)
        if is_over or time.monotonic() >= ends:
            break
        if time.monotonic() >= sign_at:
            sign_at = time.monotonic() + SIGN_SECONDS
            _give_sign(session, builder, run_folder)
        time.sleep(min(limits.poll_seconds, max(ends - time.monotonic(), 0)))
    for folder, reason in refusals.reasons.items():
        builder.skip(folder, reason)
    ending = "is finished" if is_over else f"is not finished after {clock(60 * limits.minutes)}: the watch ends"
    session.folder.print_status(f"{run_folder} {ending}; {len(builder.curve.points)} checkpoints are measured")


def _measure_pending(session: Session, builder: CurveBuilder, refusals: _Refusals) -> None:
    for step, folder in builder.pending().items():
        try:
            builder.measure(folder)
        except UserError as error:
            if not folder.exists():
                refusals.reasons.pop(folder, None)
                builder.skip(folder, "its run deleted it first; raise train.keep_checkpoints")
            elif refusals.note(folder, error):
                session.folder.print_status(f"step {step} cannot be measured yet: {error}")
            continue
        refusals.reasons.pop(folder, None)
        point = next(point for point in builder.curve.points if point.step == step)
        longest = max(point.replay)
        length = point.replay[longest].acceptance_length
        shown = "no verify pass" if length is None else f"{length:.2f} tokens a verify pass at K={longest}"
        session.folder.print_status(f"step {step}: {shown}")


def _give_sign(session: Session, builder: CurveBuilder, run_folder: Path) -> None:
    """Say that the watch goes on, and let processes that share the backbone run a token, lest they give up waiting."""
    state = "trains" if is_held(run_folder) else "is not training now"
    session.folder.print_status(f"{run_folder} {state}; {len(builder.curve.points)} checkpoints are measured")
    model = session.backbone.model
    with torch.no_grad():
        model(torch.tensor([[builder.trace_set.traces[0].prompt.tokens[0]]], device=model.lm_head.weight.device))


def is_finished(run_folder: Path, root: Path) -> bool:
    """Return whether a run has the checkpoint of its last step, by the config.yaml that it wrote last."""
    steps = (_run_settings(run_folder).get("train") or {}).get("steps")
    return isinstance(steps, int) and (root / checkpoint_name(steps)).is_dir()


def _run_settings(run_folder: Path) -> dict[str, Any]:
    """Return the settings of a run; none if it has not written them yet."""
    try:
        stored = yaml.safe_load((run_folder / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return stored if isinstance(stored, dict) else {}


def watching_trackers(run_folder: Path, session: Session) -> Trackers:
    """Return the trackers of a run, which show the measurements beside its own rows.

    Raises:
        UserError: a package of a tracker is missing.
    """
    stored = _run_settings(run_folder).get("tracking") or {}
    names = {one: stored[one] for one in ("trackers", "project", "name", "group", "tags") if one in stored}
    tracking = TrackingConfig(**names)
    check_trackers(tracking)
    if int(os.environ.get("RANK", "0")):
        return Trackers(None)
    return Trackers(TrackedRun(tracking, run_folder, session.folder.settings, beside=session.folder.path))

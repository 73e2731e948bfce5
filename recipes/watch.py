"""`+recipe=watch`: measure the checkpoints of a run while it trains elsewhere, in the same tracker's run.

python -m mtptrain +recipe=watch checkpoint=outputs/distill/RUN
"""

from __future__ import annotations

import math
import os
import time
from pathlib import Path

import torch

from mtptrain.config import RunConfig, TrackingConfig
from mtptrain.config.reads import ALWAYS, Settings, of_backbone, of_curve, settings
from mtptrain.config.rules import as_written
from mtptrain.errors import UserError
from mtptrain.evaluation.curve import CurvePoint
from mtptrain.recipes.curve import CurveBuilder, UnreadableError
from mtptrain.recipes.evaluate import decode_checkpoints, require_all
from mtptrain.recipes.session import Session
from mtptrain.run.folder import FolderUse
from mtptrain.run.folder_lock import is_held
from mtptrain.run.progress import clock
from mtptrain.run.record import run_section
from mtptrain.run.trackers import TrackedRun, check_trackers
from mtptrain.run.tracking import Trackers
from mtptrain.run.typed_json import MismatchError, from_json
from mtptrain.training.checkpoint import checkpoint_name
from mtptrain.training.run_checkpoints import checkpoints_of_run

PROCESSES = "led"
FOLDER = FolderUse.result
PATIENCE_SECONDS = 300.0  # for the last checkpoint to become readable
SIGN_SECONDS = 600.0  # between two signs of life, to the user and to processes that wait for orders


def reads(config: RunConfig) -> Settings:
    """Return the settings that a watch reads; its trackers are those of the run."""
    return ALWAYS | of_backbone(config) | of_curve(config) | settings("checkpoint", "watch", "overwrite")


def check(config: RunConfig) -> None:
    """Refuse a watch without the folder of a run, or of a folder that does not exist."""
    if config.checkpoint in (None, "stock"):
        given = as_written(config.checkpoint)
        raise UserError(f"checkpoint={given}: watch needs the folder of a training run; set checkpoint=RUN")
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


def watch(session: Session, builder: CurveBuilder, run_folder: Path) -> None:
    """Measure checkpoints as they appear, lower steps first.

    A checkpoint that cannot be read, because it is still being copied or is damaged, is tried again at every look until
    the watch ends, and then named. The watch waits `PATIENCE_SECONDS` for the last one.
    """
    limits, begun, refusals = session.config.watch, time.monotonic(), dict[Path, str]()
    pause = min(SIGN_SECONDS, 30.0 * session.config.distributed_timeout)
    ends, sign_at, finished_at = begun + 60 * limits.minutes, begun + pause, math.inf
    state, waiting = _state(run_folder), len(builder.pending())
    session.folder.print_status(
        f"watching {run_folder}, for at most {clock(60 * limits.minutes)}: it {state}; "
        f"checkpoints to measure yet: {waiting}"
    )
    while True:
        last = last_step(run_folder, builder.root)
        _measure_pending(session, builder, refusals)
        now = time.monotonic()
        finished_at = min(finished_at, now) if last is not None else math.inf
        is_over = last in builder.measured_steps or now - finished_at >= PATIENCE_SECONDS
        if is_over or now >= ends:
            break
        if now >= sign_at:
            sign_at = now + pause
            _give_sign(session, builder, run_folder)
        time.sleep(max(min(limits.poll_seconds, ends - now, sign_at - now), 0))
    for folder, reason in refusals.items():
        builder.skip(folder, reason)
    ending = "is finished" if is_over else f"is not finished after {clock(60 * limits.minutes)}: the watch ends"
    session.folder.print_status(f"{run_folder} {ending}; {len(builder.curve.points)} checkpoints are measured")


def _measure_pending(session: Session, builder: CurveBuilder, refusals: dict[Path, str]) -> None:
    """Measure the checkpoints that are new; keep the last reason of those that cannot be read."""
    for step, folder in builder.pending().items():
        try:
            builder.measure(folder)
        except UnreadableError as error:
            if not folder.exists():
                refusals.pop(folder, None)
                builder.skip(folder, "its run deleted it first; raise train.keep_checkpoints")
            elif refusals.get(folder) != str(error):
                refusals[folder] = str(error)
                session.folder.print_status(f"step {step} cannot be measured yet: {error}")
            continue
        refusals.pop(folder, None)
        _print_point(session, next(point for point in builder.curve.points if point.step == step))


def _print_point(session: Session, point: CurvePoint) -> None:
    longest = max(point.replay)
    length = point.replay[longest].acceptance_length
    shown = "no verify pass" if length is None else f"{length:.2f} tokens a pass at K={longest}"
    session.folder.print_status(f"step {point.step}: {shown}")


def _state(run_folder: Path) -> str:
    return "trains" if is_held(run_folder) else "is not training now"


def _give_sign(session: Session, builder: CurveBuilder, run_folder: Path) -> None:
    """Say that the watch goes on, and run a token, so that processes that share the backbone do not stop waiting."""
    session.folder.print_status(
        f"{run_folder} {_state(run_folder)}; {len(builder.curve.points)} checkpoints are measured"
    )
    model = session.backbone.model
    with torch.no_grad():
        model(torch.tensor([[builder.trace_set.traces[0].prompt.tokens[0]]], device=model.lm_head.weight.device))


def last_step(run_folder: Path, root: Path) -> int | None:
    """Return the last step of a run that has its checkpoint, by the config.yaml that it wrote last; None before."""
    steps = run_section(run_folder, "train").get("steps")
    return steps if isinstance(steps, int) and (root / checkpoint_name(steps)).is_dir() else None


def watching_trackers(run_folder: Path, session: Session) -> Trackers:
    """Return the trackers of a run, which show the measurements beside its own rows.

    Raises:
        UserError: a package of a tracker is missing, or the run's settings of tracking cannot be read.
    """
    stored = run_section(run_folder, "tracking")
    names = {one: stored[one] for one in ("trackers", "project", "name", "group", "tags") if one in stored}
    try:
        tracking = from_json(TrackingConfig, names)
    except MismatchError as error:
        raise UserError(f"checkpoint={run_folder}: tracking in its config.yaml cannot be read: {error}") from None
    check_trackers(tracking)
    if int(os.environ.get("RANK", "0")):
        return Trackers(None)
    return Trackers(TrackedRun(tracking, run_folder, session.folder.settings, beside=session.folder.path))

"""Measure the checkpoints of a run one by one, on one backbone and one set of texts."""

from __future__ import annotations

from contextlib import suppress
from copy import copy
from dataclasses import replace
from pathlib import Path

from safetensors import SafetensorError

from mtptrain.errors import UserError
from mtptrain.evaluation.compare import CountsByLength
from mtptrain.evaluation.curve import (
    CURVE_SCHEMA,
    CURVE_SETTINGS,
    Curve,
    CurveIdentity,
    CurvePoint,
    continued_curve,
    write_curve,
)
from mtptrain.evaluation.heads import Head, count_chosen, count_seen, describe_policy, describe_prompts
from mtptrain.evaluation.metrics import paired_gain, summarize
from mtptrain.evaluation.report.curve_page import CURVE_PAGE, print_curve, write_curve_page
from mtptrain.evaluation.result import EVALUATION_FILE
from mtptrain.mtp.start import has_stock
from mtptrain.recipes.session import Session
from mtptrain.recipes.traces import kept_traces, open_prompts, prepare_traces, replay_head
from mtptrain.run.artifact import check_identity
from mtptrain.run.folder import CURVE_FILE
from mtptrain.run.progress import waiting
from mtptrain.run.tables import open_console
from mtptrain.run.tracking import Trackers
from mtptrain.traces.file import TRACES_FILE, TraceSet
from mtptrain.training.checkpoint import BEST, Checkpoint, checkpoint_name, open_checkpoint
from mtptrain.training.run_checkpoints import digest_of, state_of, steps_of_run
from mtptrain.training.selection import Selection


class UnreadableError(UserError):
    """A checkpoint cannot be read now: it is damaged, still being copied, or was deleted by its run."""


class CurveBuilder:
    """The curve of a run, which grows by one checkpoint at a time and is written after each.

    Args:
        session: of the measurement; with `resume=auto` it continues the curve in its folder.
        root: folder of the run's checkpoints.
        trackers: get the figures of every checkpoint, by its training step.

    Raises:
        UserError: the folder holds a curve of other settings.
    """

    def __init__(self, session: Session, root: Path, trackers: Trackers) -> None:
        self.session, self.root, self.trackers = session, root, trackers
        kept = _kept_curve(session, root)
        identity = _identity(session, root, session.backbone.fingerprint)
        if kept is not None:
            check_identity(_where(session), kept.identity, identity, CURVE_SETTINGS)
        self.trace_set = _curve_traces(session, kept)
        self.stock: CountsByLength | None = None
        if session.config.evaluation.include_stock and has_stock(session.backbone):
            with waiting(f"replaying the stock head on {len(self.trace_set.traces)} texts"):
                self.stock = replay_head(session, session.stock_head().stack, self.trace_set.traces)
        self.curve = Curve(
            schema=CURVE_SCHEMA,
            provenance=session.folder.provenance,
            identity=identity,
            backbone=kept.backbone if kept else session.describe_backbone(),
            prompts=describe_prompts(self.trace_set),
            stock={k: summarize(counts, self.groups) for k, counts in self.stock.items()} if self.stock else None,
            best_step=None,
            points=kept.points if kept else [],
            skipped=[],
        )

    @property
    def groups(self) -> list[int]:
        """The group of every prompt."""
        return [trace.prompt.group for trace in self.trace_set.traces]

    @property
    def measured_steps(self) -> set[int | None]:
        """The steps of the checkpoints that are measured."""
        return {point.step for point in self.curve.points}

    def pending(self) -> dict[int, Path]:
        """Return the checkpoints that the run has now and that are not measured, by step."""
        measured = {point.step: point.digest for point in self.curve.points}
        pending = {}
        for step, folder in steps_of_run(self.root).items():
            with suppress(UserError):  # deleted meanwhile
                if measured.get(step) != digest_of(folder):
                    pending[step] = folder
        return pending

    def measure(self, folder: Path) -> None:
        """Add the point of a checkpoint, and write curve and page.

        Raises:
            UnreadableError: the checkpoint is damaged or incomplete, or was deleted meanwhile.
            UserError: it belongs to another backbone.
        """
        head, checkpoint = self._head(folder)
        with waiting(f"replaying step {checkpoint.step} on {len(self.trace_set.traces)} texts"):
            counts = replay_head(self.session, head.stack, self.trace_set.traces)
        prompts = [trace.prompt.tokens for trace in self.trace_set.traces]
        gain = None
        if self.stock is not None:
            gain = {k: paired_gain(self.stock[k], counts[k], self.groups) for k in counts}
        point = CurvePoint(
            step=checkpoint.step,
            tokens=int(checkpoint.counters.get("tokens", 0)),
            checkpoint=str(folder),
            digest=digest_of(folder) if folder.is_dir() else "",
            replay={k: summarize(counts[k], self.groups) for k in counts},
            gain=gain,
            seen_prompts=count_seen(head.passages, self.session.hasher, prompts),
            chosen_on=count_chosen(head.selection or self._selection(checkpoint.step), prompts),
        )
        # An evaluation of the checkpoint that had this step before is none of this one.
        (self.session.folder.path / checkpoint_name(point.step) / EVALUATION_FILE).unlink(missing_ok=True)
        others = [one for one in self.curve.points if one.step != point.step]
        self.curve = replace(self.curve, points=sorted([*others, point], key=lambda one: one.step))
        self.write()
        self.trackers.log(point.step, _figures(point))

    def _head(self, folder: Path) -> tuple[Head, Checkpoint]:
        try:
            checkpoint = open_checkpoint(folder)
        except UserError as error:
            raise UnreadableError(str(error)) from None
        try:
            return self.session.trained_head(checkpoint), checkpoint
        except (OSError, SafetensorError) as error:  # pruned by its run while it was read
            raise UnreadableError(f"checkpoint={folder}: cannot be read ({error})") from None

    def _selection(self, step: int) -> Selection | None:
        """Return how the run chose the checkpoint of a step as its best; None if it chose another."""
        best = state_of(self.root / BEST)
        return Selection.of(best.counters) if best is not None and best.step == step else None

    def skip(self, folder: Path, reason: str) -> None:
        """Note a checkpoint that could not be measured, and say so."""
        line = f"{folder.name} was skipped: {reason}"
        self.curve = replace(self.curve, skipped=[*self.curve.skipped, line])
        self.session.folder.print_status(line)
        self.write()

    def write(self) -> None:
        """Write curve.json and its page."""
        best = state_of(self.root / BEST)
        self.curve = replace(self.curve, best_step=best.step if best else None)
        folder = self.session.folder.path
        write_curve(folder / CURVE_FILE, self.curve)
        write_curve_page(self.curve, folder / CURVE_PAGE)

    def finish(self) -> None:
        """Write and print the whole curve, and send it to the trackers as a table and files."""
        self.write()
        print_curve(self.curve, open_console())
        folder = self.session.folder.path
        if self.trackers.is_on:
            columns = ["step", "K", "tokens_a_pass", "low", "high"]
            rows = [
                (point.step, length, one.acceptance_length, *(one.interval or (None, None)))
                for point in self.curve.points
                for length, one in point.replay.items()
            ]
            self.trackers.table("measured/acceptance_length", columns, rows)
            self.trackers.artifact("curve", "evaluation", [folder / CURVE_FILE, folder / CURVE_PAGE])
        self.session.folder.print_status(f"wrote {folder / CURVE_FILE} and {folder / CURVE_PAGE}")


def chosen_to_decode(builder: CurveBuilder) -> list[CurvePoint]:
    """Return the points whose checkpoints `evaluation.decoded` names and the run still has."""
    points, which = builder.curve.points, builder.session.config.evaluation.decoded
    best = builder.curve.best_step
    chosen = {
        "none": [],
        "last": points[-1:],
        "best": [point for point in points if point.step == best] or points[-1:],
        "all": points,
    }[which]
    return [point for point in chosen if Path(point.checkpoint).is_dir()]


def session_in(session: Session, folder: Path) -> Session:
    """Return the session with everything that it has opened, writing to another folder."""
    inner = copy(session)
    inner.folder = replace(session.folder, path=folder)
    return inner


def _where(session: Session) -> str:
    return f"output_dir={session.folder.path}"


def _identity(session: Session, root: Path, backbone: str) -> CurveIdentity:
    config = session.config
    return CurveIdentity(
        run=str(root.absolute()),
        backbone=backbone,
        dtype=session.dtype_name,
        prompts=list(config.prompts),
        traces=config.evaluation.traces,
        num_prompts=config.evaluation.num_prompts,
        prompt_tokens=config.evaluation.prompt_tokens,
        draft_length=config.decoding.draft_length,
        policy=describe_policy(session.policy, session.config.decoding.served_as),
    )


def _kept_curve(session: Session, root: Path) -> Curve | None:
    """Return the curve that an interrupted measurement left, if this one continues it; no weight is read.

    Raises:
        UserError: it has other settings, or is known to be of another backbone.
    """
    path = session.folder.path / CURVE_FILE
    if session.config.resume != "auto" or not path.exists():
        return None
    kept = continued_curve(path)
    identity = _identity(session, root, session.known_fingerprint or kept.identity.backbone)
    check_identity(_where(session), kept.identity, identity, CURVE_SETTINGS)
    session.folder.print_status(f"{len(kept.points)} checkpoints are measured already")
    return kept


def _curve_traces(session: Session, kept: Curve | None) -> TraceSet:
    """Return the texts of a curve; those of an interrupted measurement, if this run has the same prompts.

    Raises:
        UserError: the interrupted measurement had other prompts.
    """
    path, config = session.folder.path / TRACES_FILE, session.config
    if kept is None or not path.exists():
        return prepare_traces(session)
    if config.evaluation.traces is None:
        _, sources = open_prompts(session, config.evaluation.num_prompts)
        have, want = ({"sources": {one.name: one.sha256 for one in of}} for of in (kept.prompts.sources, sources))
        check_identity(_where(session), have, want, {"sources": "prompts and data"})
    session.folder.record()
    return kept_traces(session, path)


def _figures(point: CurvePoint) -> dict[str, float]:
    figures: dict[str, float] = {}
    for length, measured in point.replay.items():
        if measured.acceptance_length is not None and measured.interval is not None:
            low, high = measured.interval
            name = f"measured/acceptance_length_{length}"
            figures |= {name: measured.acceptance_length, f"{name}_low": low, f"{name}_high": high}
    return figures

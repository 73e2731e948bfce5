"""Run recipes on a loaded backbone: train a head, measure it, or run any other recipe."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mtptrain import cli
from mtptrain.api.backbone import STOCK, LoadedBackbone, check_head, load_head, own_settings
from mtptrain.api.backbone import Path as UserPath
from mtptrain.api.composed import Settings, arguments_of, compose_run
from mtptrain.errors import CHECK_FAILED, UserError
from mtptrain.evaluation import result
from mtptrain.evaluation.heads import Head
from mtptrain.evaluation.result import EVALUATION_FILE, Evaluation
from mtptrain.recipes import find_recipe
from mtptrain.recipes.session import Session
from mtptrain.run.folder import FolderUse
from mtptrain.run.tracking import METRICS_FILE, read_rows


@dataclass(frozen=True, slots=True)
class TrainedRun:
    """A finished training.

    Attributes:
        folder: of the run; `load_head` and the command line take it as a checkpoint.
        head: as trained by the last step.
        metrics: the rows of metrics.jsonl, each with its `step`; None stands for NaN and infinity. Empty with
            `tracking.metrics_file=false`.
        evaluation: of the head beside the stock head; None if the run did not measure it.
    """

    folder: Path
    head: Head
    metrics: list[dict[str, Any]] = field(repr=False)
    evaluation: Evaluation | None

    def curve(self, name: str) -> tuple[list[int], list[float]]:
        """Return the steps at which a metric was logged, such as `loss/step_1`, and its values."""
        rows = [row for row in self.metrics if row.get(name) is not None]
        return [row["step"] for row in rows], [row[name] for row in rows]


def run_recipe(
    recipe: str,
    backbone: LoadedBackbone | None = None,
    *,
    output_dir: UserPath | None = None,
    settings: Settings | None = None,
) -> Path:
    """Run a recipe as `python -m mtptrain +recipe=RECIPE` does, in this process, and return its folder.

    Progress and summary are printed. A certificate that failed ends nothing: it is written in the result.

    Args:
        recipe: its name, such as `compare`, `doctor` or `export`.
        backbone: to run on; None loads the one that the settings name, if the recipe needs one.
        output_dir: the run's folder; None is a new one below `outputs/`.
        settings: by their names on the command line, such as {"checkpoints": ["stock", "runs/a"]}.

    Raises:
        UserError: a setting is unknown, wrong or not read by the recipe, an input cannot be used, or a backbone is
            given and the recipe loads none.
        Preempted: Ctrl-C or a signal ended a training; its work is saved.

    Example:
        >>> folder = mtptrain.run_recipe("doctor", backbone, settings={"checkpoint": "stock"})
    """
    given = own_settings(backbone, settings) if backbone is not None else dict(settings or {})
    arguments = arguments_of(recipe, given | ({} if output_dir is None else {"output_dir": output_dir}))
    composed, opened = compose_run(arguments), list[Session]()
    if backbone is not None and "backbone.path" not in find_recipe(composed.config.task).reads(composed.config):
        raise UserError(f"backbone: +recipe={recipe} loads none; leave the argument out")

    def _prepare(session: Session) -> None:
        if session.folder.use is FolderUse.none:
            raise UserError(f"recipe={recipe}: shows text and writes no folder; decode() returns texts in Python")
        opened.append(session)
        command = ["python", "-m", "mtptrain", *arguments]  # the present one is that of a notebook's kernel
        session.folder.provenance = replace(session.folder.provenance, command=command)
        if backbone is not None:
            session.adopt(backbone.loaded)

    try:
        cli.run_task(*composed, None, _prepare)
    except SystemExit as ending:
        if ending.code != CHECK_FAILED:
            raise
    return opened[0].folder.path


def train(
    backbone: LoadedBackbone,
    *,
    recipe: str = "distill",
    output_dir: UserPath | None = None,
    settings: Settings | None = None,
) -> TrainedRun:
    """Train a head on a backbone, by default from its stock head and without the measurement at the end.

    Args:
        backbone: frozen.
        recipe: `distill`, `pretrain` or `distill_on_policy`.
        output_dir: the run's folder; None is a new one below `outputs/`.
        settings: such as {"train.steps": 40, "loss.divergence": "tv", "data.path": "corpus.jsonl"}; with
            {"evaluate_at_end": True} the head is measured, too.

    Raises:
        UserError: a setting is unknown, wrong or not read, or the text cannot be used.
        Preempted: Ctrl-C or a signal ended the training; its work is saved.

    Example:
        >>> run = mtptrain.train(backbone, settings={"train.steps": 40})
        >>> steps, loss = run.curve("loss/step_1")
    """
    given = {"evaluate_at_end": False} | dict(settings or {})
    folder = run_recipe(recipe, backbone, output_dir=output_dir, settings=given)
    evaluation = read_evaluation(folder) if (folder / EVALUATION_FILE).exists() else None
    return TrainedRun(folder, load_head(backbone, folder), list(read_rows(folder / METRICS_FILE)), evaluation)


def evaluate(
    backbone: LoadedBackbone,
    head: Head | UserPath = STOCK,
    *,
    output_dir: UserPath | None = None,
    settings: Settings | None = None,
) -> Evaluation:
    """Measure a head as +recipe=evaluate does, a trained one beside the stock head, and return evaluation.json.

    Args:
        backbone: of the head.
        head: a head, the path of a checkpoint, or `stock`. The weights of a head are read from its checkpoint again.
        output_dir: folder of evaluation.json and report.html; None is a new one below `outputs/`.
        settings: such as {"decoding.draft_length": 4, "evaluation.num_prompts": 16, "prompts": "prompts.jsonl"}.

    Returns:
        The figures; they count if `certificate.passed`.

    Raises:
        UserError: there is no such head, a setting is unknown, wrong or not read, or a prompt cannot be used.

    Example:
        >>> evaluation = mtptrain.evaluate(backbone, run.head)
        >>> evaluation.last_head.replay[4].acceptance_length
    """
    checkpoint = head.checkpoint if isinstance(head, Head) else str(head)
    given = {"checkpoint": checkpoint} | dict(settings or {})
    if isinstance(head, Head):
        check_head(backbone, head)
    if given.get("checkpoints") is not None:
        raise UserError(
            f"checkpoints={given['checkpoints']}: evaluate returns the figures of one head; "
            "run_recipe('evaluate', ...) measures a run's checkpoints, run_recipe('compare', ...) several heads"
        )
    return read_evaluation(run_recipe("evaluate", backbone, output_dir=output_dir, settings=given))


def read_evaluation(path: UserPath) -> Evaluation:
    """Return the figures of an evaluation.json, or of the folder that holds it.

    Raises:
        UserError: the file cannot be read, or another version wrote it.

    Example:
        >>> mtptrain.read_evaluation("outputs/distill/RUN").heads
    """
    return result.read_evaluation(Path(path), "path")

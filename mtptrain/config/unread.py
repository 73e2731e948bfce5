"""Refuse settings that a user gave and that the run does not read."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

from mtptrain.config.choices import DataSource, ExportCheck, ReleaseSize
from mtptrain.config.given import Given
from mtptrain.config.reads import CONVERSATIONS, TEMPLATE, Settings, all_settings, of_measuring, settings
from mtptrain.config.rules import any_of, as_written
from mtptrain.config.run import RunConfig
from mtptrain.config.typos import no_such_setting
from mtptrain.config.verbosity import print_status
from mtptrain.errors import UserError

LEAVE_OUT = "leave it out"
OF_SWEEP = frozenset({"output_dir", "overwrite", "resume"})  # read by every sweep, whatever its jobs read
Job = tuple[Given, RunConfig, Settings]  # of a sweep
# The way out by setting or section, of which the longest name counts: for settings of other recipes...
OTHER_RECIPE = {
    "backbone": "a plan takes model=NAME, any other recipe needs none",
    "backbone.grow_from": "only +recipe=backbone trains a backbone",
    "backbone.weights": "a miniature is made of decoded weights",
    "backbone.path": "a plan takes model=NAME, +recipe=backbone sizes in backbone.shape, any other recipe needs none",
    "backbone.shape": "other recipes take sizes from config.json in backbone.path",
    "watch": "+recipe=watch measures a run while it trains elsewhere",
    "checkpoint": "training starts from a head with mtp.init=PATH, and compare takes checkpoints=[A,B]",
    "checkpoints": "doctor, export and measure_server take one head: checkpoint=PATH",
    "hardware": "a run uses the hardware of its machine",
    "output_dir": "generate writes no file: redirect its output, such as > text.txt",
    "resume": "only trainings, collections and measurements of all checkpoints continue; leave it out",
    "prompt": "a measurement takes prompts=[FILE]",
    "prompts": "generate takes one text: prompt=TEXT",
    "path": "data.path and backbone.path name a text and a backbone",
}
# ...and for settings that the recipe reads only together with others.
OTHER_SETTINGS = {
    "backbone.path": "release.random=true builds a backbone from backbone.shape; leave one of them out",
    "backbone.revision": "it names a version on the hub, and this backbone is shipped or a folder",
    "backbone.shape": "sizes are those of config.json in backbone.path; only +recipe=backbone builds others",
    **dict.fromkeys(
        ("collect.tensor_parallel", "collect.min_cosine", "collect.min_agreement", "collect.max_kl"),
        "it belongs to vLLM: set collect.engine=vllm",
    ),
    "data.field_name": "it names a column of your text: set data=text data.path=FILE, or field_name in data.mixture",
    "data.format": "it names the form of your rows: set data=text data.path=FILE, or format in data.mixture",
    "data.heldout_every": "streams have the hold-out of +recipe=collect; collect them again with another number",
    "data.packages": "they extend the standard library: set data=stdlib",
    "data.path": "set data=text, data=chat or data=streams to read it",
    **dict.fromkeys(
        ("data.split", "data.subset"),
        "it chooses of a data set in data.path; prompts take it in their name: prompts=NAME:SUBSET:SPLIT",
    ),
    "data.workers": "they read text during training: set data.streaming=true or data.mixture",
    "decoding.draft": "it matters at a decoding.temperature above 0; set one",
    "decoding.min_p": "it matters at a decoding.temperature above 0; set one",
    "decoding.top_k": "it matters at a decoding.temperature above 0; set one",
    "decoding.top_p": "it matters at a decoding.temperature above 0; set one",
    "decoding.verification": "it matters at a decoding.temperature above 0; set one",
    "evaluation.best_by": "it chooses by measurements during the training: set evaluation.every=N",
    "export.embeddings": "a whole model has them: set export.form=draft",
    "export.force": "only target=vllm goes by the path",
    "export.shards": "a draft has none of the model's shards: set export.form=full",
    "loss.step_decay": "it weighs several steps, each by itself: set mtp.steps above 1, and not loss.divergence=chain",
    "loss.temperature": "loss.divergence=ce compares with data tokens, which have none",
    "on_policy": "set data=on_policy",
    **dict.fromkeys(
        ("on_policy.min_p", "on_policy.top_k", "on_policy.top_p"),
        "it matters at an on_policy.temperature above 0; set one",
    ),
    "on_policy.draft_length": "a head of mtp.init=fresh or backbone drafts nothing",
    "on_policy.prompt_tokens": "prompts of a file keep their length; leave on_policy.prompts out to cut prompts",
    **dict.fromkeys(
        ("data.chat_template", "data.chat_template_kwargs", "data.on_bad_row", "data.turns"),
        "it is for rows of your own: set data=text data.path=FILE, or prompts=FILE with conversations",
    ),
    **dict.fromkeys(
        ("tracking.checkpoints", "tracking.group", "tracking.name", "tracking.project", "tracking.tags"),
        "no tracker is on: set tracking=wandb, mlflow or tensorboard",
    ),
    "plan.acceptance": "plan.evaluation brings its own; leave one of them out",
    "plan.head": "it names a head of an evaluation: set plan.evaluation",
}

# Settings and sections of an export that export.check=tensors leaves out.
MEASURING = (
    *("backbone.shape", "backbone.weights", "data", "decoding", "evaluation", "export.max_drop", "hardware", "plan"),
    *("precision", "prompts", "seed"),
)


def check_given(given: Given, config: RunConfig, reads: Settings, owners: Callable[[str], list[str]]) -> None:
    """Refuse the first setting that was given and is not read; a default value is accepted.

    Sizes of an evaluation are only noted, so that one list of them fits every recipe that measures heads; so is
    everything in a sweep, whose jobs share a command line: `check_sweep` refuses a setting that none of them reads.

    Args:
        given: the user's settings.
        config: of the run.
        reads: the settings that the recipe reads with this configuration.
        owners: returns the tasks that read a setting.

    Raises:
        UserError: names the setting, its value, the reader that it belongs to and the way out; or a name in
            `resume_allow` that is no setting.
    """
    _check_allowed(config.resume_allow)
    unread = unread_settings(given, config, reads)
    measures = any(name.startswith("evaluation.") for name in reads - {"evaluation.every"})
    # A training that cannot measure between its steps still trains as it should.
    sizes: str | tuple[str, ...] = (
        "evaluation." if measures else "evaluation.every" if "evaluate_at_end" in reads else ()
    )
    noted = [name for name in unread if given.is_sweep or name.startswith(sizes)]
    for name in unread:
        if name not in noted:
            raise UserError(f"{name}={_shown(config, name)}: {_reason(name, config, reads, owners(name))}")
    for group, choice in sorted(given.groups.items()):
        changed = [name for name in sorted(settings(group)) if not _is_default(config, name)]
        if changed and reads.isdisjoint(changed):
            raise UserError(f"{group}={choice}: {_reason(group, config, reads, owners(changed[0]))}")
    if noted and os.environ.get("RANK", "0") == "0":
        names = ", ".join(f"{name}={_shown(config, name)}" for name in noted)
        print_status(f"note: +recipe={config.task} does not read {names} with these settings")


def unread_settings(given: Given, config: RunConfig, reads: Settings) -> list[str]:
    """Return the settings that were given, differ from the default and are not read; sorted."""
    named = {_setting(name) for name in given.values} & all_settings()
    if given.is_sweep:
        named -= OF_SWEEP
    return sorted(name for name in named - reads if not _is_default(config, name))


def check_sweep(jobs: Iterable[Job], owners: Callable[[str, RunConfig], list[str]]) -> None:
    """Refuse the first setting that was given to a sweep and that none of its jobs reads.

    Args:
        jobs: the user's settings, the configuration and the settings that the recipe reads, by job.
        owners: returns the tasks that read a setting with a configuration.

    Raises:
        UserError: as `check_given` does.
    """
    first, unread = None, set[str]()
    for given, config, reads in jobs:
        unread = (unread if first else set(all_settings())) & set(unread_settings(given, config, reads))
        first = first or (given, config, reads)
        if not unread:
            return
    if first is not None:
        given, config, reads = first
        alone = replace(given, values=frozenset(unread), groups={}, is_sweep=False)
        check_given(alone, config, reads, lambda name: owners(name, config))


def _check_allowed(names: list[str]) -> None:
    """Refuse a name in `resume_allow` that is no setting and no section."""
    for name in names:
        if not settings(name):
            raise UserError(f"resume_allow={as_written(names)}: {no_such_setting(name)}")


def _setting(name: str) -> str:
    """Return the setting that a dotted name lies in, such as `tracking.trackers` of `tracking.trackers.wandb`."""
    while name not in all_settings() and "." in name:
        name = name.rpartition(".")[0]
    return name


def _reason(name: str, config: RunConfig, reads: Settings, owners: list[str]) -> str:
    is_off = name.startswith("decoding.") and "prompts" not in reads
    if "evaluate_at_end" in reads and (is_off or name in of_measuring(config) | {"overwrite"}):
        return _nothing_measured(config, "evaluation.every" in reads)
    if config.task == "export" and config.export.check is ExportCheck.tensors and name.startswith(MEASURING):
        return "export.check=tensors measures nothing and does not read it; leave it out, or set export.check=replay"
    if config.task == "mini_release" and config.release.size is ReleaseSize.servable and name.startswith("backbone"):
        return "release.size=servable brings all sizes of its random backbone; leave one of them out"
    if config.task == "generate" and name in settings(*TEMPLATE):
        return "generate.raw=true continues the prompt as it is; leave one of them out"
    is_of_rows = name in CONVERSATIONS and "data.source" in reads  # read by this recipe, too, with another text
    if owners and not is_of_rows:
        reason = f"belongs to +recipe={any_of(owners)}, and +recipe={config.task} does not read it"
        return f"{reason}; {_way_out(name, OTHER_RECIPE)}"
    source = f" with data={config.data.source.value}" if name.startswith(("data", "on_policy")) else ""
    is_other = name.startswith("on_policy") and config.data.source is not DataSource.on_policy
    way_out = _way_out("on_policy" if is_other else name, OTHER_SETTINGS)
    return f"+recipe={config.task}{source} does not read it; {way_out}"


def _nothing_measured(config: RunConfig, can_probe: bool) -> str:
    """Return why a training that measures no head does not read a setting of measurements."""
    if config.evaluate_at_end:
        return (
            f"backbone.placement={config.backbone.placement.value} decodes nothing, so nothing is measured; {LEAVE_OUT}"
        )
    if not can_probe:
        return f"nothing is measured with evaluate_at_end=false; {LEAVE_OUT}"
    if config.evaluation.every > 0:
        return f"it belongs to the measurement at the end, and evaluate_at_end=false; {LEAVE_OUT}"
    return f"nothing is measured with evaluate_at_end=false and evaluation.every=0; {LEAVE_OUT}, or set one of them"


def _way_out(name: str, ways: dict[str, str]) -> str:
    while name not in ways and "." in name:
        name = name.rpartition(".")[0]
    return ways.get(name, LEAVE_OUT)


def _value(config: Any, name: str) -> Any:
    for key in name.split("."):
        config = getattr(config, key, None)
    return config


def _shown(config: RunConfig, name: str) -> str:
    return as_written(_value(config, name))


def _is_default(config: RunConfig, name: str) -> bool:
    """Return whether a setting has the value of a run to which nothing was given."""
    return bool(_value(config, name) == _value(RunConfig(task="distill"), name))

"""The settings that a run reads, in the parts that recipes put together; `recipes/__init__.py` says how.

A recipe that is given another setting refuses it. `tests/recipes/test_reads.py` compares every declaration with the
settings that the recipe's code reads.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, get_args, get_origin

from mtptrain.config.choices import CollectEngine, DataSource
from mtptrain.config.rules import HELDOUT, TRAINING, types_of
from mtptrain.config.run import RunConfig

Settings = frozenset[str]  # dotted names of single settings
UNTRAINED = ("fresh", "backbone")  # values of mtp.init
TEMPLATE = ("data.chat_template", "data.chat_template_kwargs")
# Settings of data=text.
ROWS = tuple(f"data.{name}" for name in ("path", "subset", "split", "field_name", "format", "streaming"))
# Of rows that may be conversations.
CONVERSATIONS = frozenset({"data.turns", "data.on_bad_row", *TEMPLATE})
SAMPLING = tuple(f"decoding.{name}" for name in ("min_p", "top_k", "top_p", "draft", "verification"))  # if it samples


def _names(schema: type, prefix: str = "") -> Iterator[str]:
    types = types_of(schema)
    for part in fields(schema):
        section = section_of(types[part.name])
        name = prefix + part.name
        yield from [name] if section is None else _names(section, f"{name}.")


def section_of(kind: Any) -> Any:
    """Return the dataclass of a field's type, also of an optional section; None for a single setting or a list."""
    parts = () if get_origin(kind) is list else (kind, *get_args(kind))
    return next(filter(is_dataclass, parts), None)


@cache
def all_settings() -> Settings:
    """Return the names of all settings."""
    return frozenset(_names(RunConfig))


@cache
def settings(*names: str) -> Settings:
    """Return the settings of these names and those of the sections of these names."""
    return frozenset(one for one in all_settings() for name in names if f"{one}.".startswith(f"{name}."))


ALWAYS = settings("task", "output_dir")


def of_backbone(config: RunConfig) -> Settings:
    """Return the settings of a loaded backbone, of the run's device and of its seed."""
    path = config.backbone.path
    is_on_hub = path is not None and not Path(path).exists()
    used = settings("backbone", "seed", "device", "precision", "threads", "distributed_timeout")
    used -= settings("backbone.shape", "backbone.grow_from")
    return used if is_on_hub else used - {"backbone.revision"}


def of_heldout_text(config: RunConfig) -> Settings:
    """Return the settings of the held-out documents as tokens."""
    data = config.data
    used = settings("data.source", "data.cache_dir")
    if data.source is DataSource.streams:  # the cache knows its documents
        return used | CONVERSATIONS | {"data.path", "data.follow"}
    used |= settings("data.heldout_every", "data.max_documents", "data.max_tokens")
    if data.mixture:
        used |= {"data.mixture", "data.streaming"}
        has_rows = any(one.source is DataSource.text for one in data.mixture)
        return used | CONVERSATIONS if has_rows else used
    return used if data.source is DataSource.stdlib or data.path is None else used | CONVERSATIONS | settings(*ROWS)


def of_training_text(config: RunConfig) -> Settings:
    """Return the settings of the documents to train on, as rows of tokens."""
    data = config.data
    used = Settings({"data.sequence_length"})
    if data.source is DataSource.streams:
        used |= {"data.source", "data.path", "data.follow"}
        return used | {"data.delete_consumed"} if data.follow else used
    used |= of_heldout_text(config)
    has_library = any(one.source is DataSource.stdlib for one in data.sources().values())
    if data.source is DataSource.on_policy:
        used |= of_on_policy(config)
        has_library = data.path is None and config.on_policy.prompts == [TRAINING]
    if has_library:
        used |= {"data.packages"}
    if data.source is DataSource.text or data.is_streamed:
        used |= {"data.streaming"}
    return used | {"data.workers"} if data.is_streamed else used


def of_documents(config: RunConfig) -> Settings:
    """Return the settings of a text that is read once, before the work; `require_documents` refuses other data."""
    used = of_training_text(config) - settings("data.follow", "data.delete_consumed", "data.workers")
    return used - settings("on_policy", "decoding")


def of_on_policy(config: RunConfig) -> Settings:
    """Return the settings of the backbone's own texts."""
    used = settings("on_policy", "decoding.stop", "decoding.stop_strings")
    if config.on_policy.temperature == 0:
        used -= settings("on_policy.min_p", "on_policy.top_k", "on_policy.top_p")
    if config.mtp.init in UNTRAINED:  # such a head drafts nothing
        used -= {"on_policy.draft_length"}
    return used if config.on_policy.prompts == [TRAINING] else (used | {*TEMPLATE}) - {"on_policy.prompt_tokens"}


def of_collecting(config: RunConfig) -> Settings:
    """Return the settings of a stream cache, and of the engine that runs the backbone for it."""
    used = settings("collect", "resume")
    if config.collect.engine is CollectEngine.vllm:
        return used
    return used - settings("collect.tensor_parallel", "collect.min_cosine", "collect.min_agreement", "collect.max_kl")


def of_decoding(config: RunConfig) -> Settings:
    """Return the settings of decoding: at temperature 0 without those of sampling."""
    used = settings("decoding")
    return used if config.decoding.temperature > 0 else used - set(SAMPLING)


def of_traces(config: RunConfig) -> Settings:
    """Return the settings of the texts that heads are measured on, and of their decoding."""
    used = of_decoding(config) | {"prompts", "evaluation.traces"}
    if config.evaluation.traces is not None:
        return used
    if config.prompts != [HELDOUT]:
        return used | {"evaluation.num_prompts", *TEMPLATE}
    return used | of_heldout_text(config) | {"evaluation.num_prompts", "evaluation.prompt_tokens"}


def of_measuring(config: RunConfig) -> Settings:
    """Return the settings of a whole evaluation of heads."""
    sizes = settings("evaluation.batch_sizes", "evaluation.heldout_sequences", "evaluation.timed_prompts")
    return sizes | of_traces(config) | of_heldout_text(config) | {"data.sequence_length", "evaluation.include_stock"}


def of_curve(config: RunConfig) -> Settings:
    """Return the settings of a measurement of all checkpoints of a run, some of which are decoded."""
    if config.evaluation.decoded != "none":
        return of_measuring(config) | {"evaluation.decoded", "resume"}
    used = of_traces(config) | of_heldout_text(config) | {"data.sequence_length", "evaluation.heldout_sequences"}
    return used | {"evaluation.include_stock", "evaluation.decoded", "resume"}


def of_probe(config: RunConfig) -> Settings:
    """Return the settings of the measurements during a training, by which it chooses its best checkpoint."""
    if config.evaluation.every == 0:
        return settings("evaluation.every")
    used = of_traces(config) | of_heldout_text(config) | {"data.sequence_length", "evaluation.heldout_sequences"}
    used |= settings("evaluation.every", "evaluation.best_by")
    return used | {*SAMPLING} if config.evaluation.best_by == "expected" else used  # at temperature 1


def of_loss(config: RunConfig) -> Settings:
    """Return the settings of the loss: `ce` has no temperature, and `chain` or a single step no decay."""
    used = settings("loss")
    if config.loss.divergence.value == "ce":
        used -= {"loss.temperature"}
    if config.loss.divergence.value == "chain" or config.mtp.num_steps == 1:
        used -= {"loss.step_decay"}
    return used


def of_tracking(config: RunConfig) -> Settings:
    """Return the settings of trackers: without a tracker, only whether there is one."""
    return settings("tracking") if config.tracking.chosen else settings("tracking.metrics_file", "tracking.trackers")


def of_training(config: RunConfig) -> Settings:
    """Return the settings of a training loop and of its engine."""
    return settings("train", "engine", "offload", "deepspeed", "resume", "resume_allow") | of_tracking(config)


def of_speed_plan(config: RunConfig, shape: str) -> Settings:
    """Return the settings of a plan's times by draft length; `shape` names the section of the model's sizes."""
    used = settings("hardware", "plan", shape)
    used -= settings("hardware.memory", "plan.what", "plan.acceptance", "plan.evaluation", "plan.head")
    used -= {f"{shape}.{name}" for name in ("max_positions", "num_hash_layers", "sinkhorn_iterations")}
    if config.plan is not None and config.plan.measured:
        return used
    return used - {"hardware.measured_bandwidth", "hardware.measured_bf16_flops"}

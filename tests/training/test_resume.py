"""Which settings make a training another one, and what an accepted change does to the learning rate."""

import json
from dataclasses import fields, replace

import pytest

from mtptrain.config import DataConfig, RunConfig, StockHeadConfig, TrainConfig
from mtptrain.errors import UserError
from mtptrain.training.resume import (
    IRRELEVANT,
    Difference,
    describe_schedule,
    require_allowed,
    result_settings,
    selects_data,
)

RUN = RunConfig(task="distill")
SECTIONS = ["data", "loss", "mtp", "train"]


def test_every_setting_of_the_training_counts_unless_it_changes_no_result() -> None:
    settings = result_settings(RUN, SECTIONS, "float32")
    json.dumps(settings)
    expected = {
        f"{section}.{field.name}"
        for section in SECTIONS
        for field in fields(getattr(RUN, section))
        if field.name not in IRRELEVANT.get(section, set())
    }
    assert settings.keys() == expected | {"seed", "precision"}
    assert {"train.learning_rate", "train.accumulation", "loss.temperature", "data.sequence_length"} <= expected


def test_the_settings_that_count_for_nothing_exist() -> None:
    sections = {"data": DataConfig, "train": TrainConfig, "stock_head": StockHeadConfig}
    for section, kind in sections.items():
        assert IRRELEVANT[section] <= {field.name for field in fields(kind)}


def test_the_stock_head_names_its_own_settings() -> None:
    config = replace(RUN, train=StockHeadConfig(steps=7))
    settings = result_settings(config, ["train"], "float32")
    assert settings["stock_head.steps"] == 7
    assert not any(name.startswith("train.") for name in settings)


@pytest.mark.parametrize("name", ["data.path", "data.field_name", "data.heldout_every", "on_policy.temperature"])
def test_a_setting_that_selects_documents_is_judged_by_the_documents(name: str) -> None:
    assert selects_data(name)
    assert not selects_data("data.sequence_length")


def test_all_that_is_not_allowed_is_listed_with_the_way_to_allow_it() -> None:
    found = [Difference("seed", 0, 1), Difference("train.steps", 2, 4), Difference("data.path", None, "b.jsonl")]
    line = (
        r"^here: belongs to another run: seed 0 -> 1, data\.path null -> b\.jsonl; set them back, choose another "
        r"output_dir, or accept the change: resume_allow=\[seed,train\.steps,data\.path\]$"
    )
    with pytest.raises(UserError, match=line):
        require_allowed("here", found, ["train"])
    require_allowed("here", found, ["train", "seed", "data"])


def test_what_no_optimiser_state_fits_is_never_allowed() -> None:
    with pytest.raises(UserError, match=r"another output_dir \(mtp\.depth cannot change within a run\)$"):
        require_allowed("here", [Difference("mtp.depth", 1, 2)], ["mtp.depth", "mtp"])


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({}, None),
        (
            {"steps": 6},
            "learning rate: 0.25 at step 3; under the new schedule it jumps up to 0.5 at step 4 and ends at",
        ),
        ({"steps": 4, "learning_rate": 0.1}, "learning rate: 0.25 at step 3; under the new schedule it goes on to "),
    ],
)
def test_a_new_schedule_is_said_with_its_jump(change: dict[str, float], line: str | None) -> None:
    """Cosine without warm-up over 3 steps: 1, 3/4, 1/4."""
    before = TrainConfig(steps=3, learning_rate=1.0, warmup_steps=0)
    stored = {f"train.{field.name}": getattr(before, field.name) for field in fields(before)}
    said = describe_schedule(stored, replace(before, **change), 3)
    assert said is None if line is None else said is not None and said.startswith(line)

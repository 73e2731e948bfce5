"""Names of the folders of a sweep's jobs."""

import re
import shlex

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from mtptrain.config.sweep import job_name, varied_settings

COMMAND = shlex.split("mtptrain -m --config-dir my +recipe=distill loss.divergence=kl,tv train.steps=10 seed=range(3)")


def test_a_job_is_named_by_the_settings_that_vary() -> None:
    job = ["+recipe=distill", "loss.divergence=tv", "train.steps=10", "seed=2"]
    varied = varied_settings(job, COMMAND)
    assert varied == {"loss.divergence": "tv", "seed": "2"}
    assert job_name(varied, 5) == "loss.divergence-tv+seed-2"
    assert job_name(varied_settings(["+recipe=distill"], ["mtptrain", "-m", "+recipe=distill"]), 5) == "job5"
    assert job_name(varied_settings(["+recipe=plan"], ["mtptrain", "-m", "+recipe=plan,distill"]), 0) == "recipe-plan"


@pytest.mark.parametrize(
    ("command", "job", "name"),
    [
        ("seed=0 seed=1,2", ["seed=0", "seed=2"], "seed-2"),
        ("seed=1,2 seed=0", ["seed=2", "seed=0"], "job5"),
    ],
)
def test_of_a_setting_that_is_given_twice_the_last_value_counts(command: str, job: list[str], name: str) -> None:
    assert job_name(varied_settings(job, command.split()), 5) == name


ODD = [
    "'mtp.init=/runs/a b/../c'",
    "'prompts=[x.jsonl,\"y z.jsonl\"]'",
    "data.path=" + "long/" * 80,
    "'data.path=\"ä=1,ö\"'",
    "train.learning_rate=-1e-3",
    "data.path=",
    "'backbone={path:a,placement:zero3}'",
]


@pytest.mark.parametrize("override", ODD)
def test_an_odd_or_long_value_stays_a_name_that_the_command_line_takes(override: str) -> None:
    (override,) = shlex.split(override)
    name = job_name(varied_settings([override], []), 0)
    assert re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.+-]{0,120}", name)
    path = OverridesParser.create().parse_override(f"checkpoint=outputs/sweep/{name}").value()
    assert path == f"outputs/sweep/{name}"


def test_values_that_lose_characters_keep_names_of_their_own() -> None:
    values = ["a/b", "a_b", "a b", "a" * 300, "a" * 301]
    assert len({job_name({"data.path": value}, 0) for value in values}) == len(values)

"""Every range of every section is enforced, and errors name the setting as users type it."""

import copy
import math
from collections.abc import Iterator
from dataclasses import Field, fields, is_dataclass
from typing import Any, get_args, get_origin, get_type_hints

import pytest
from omegaconf import OmegaConf

from mtptrain.config import (
    BackboneConfig,
    DataConfig,
    DataSource,
    EvaluationConfig,
    HardwareConfig,
    LossName,
    MixtureConfig,
    MtpConfig,
    OnPolicyConfig,
    PlanConfig,
    RunConfig,
)
from mtptrain.config.paths import expand_argument
from mtptrain.config.rules import Range
from mtptrain.config.run import run_schema
from mtptrain.errors import UserError
from mtptrain.kernels.choices import Divergence

SAME_AS_BACKBONE = "model"  # the same section under another name; its errors name `backbone.shape`
LISTS = {"mixture": "mixture.0"}


def checked_fields(section: type, prefix: str = "") -> Iterator[tuple[str, "Field[Any]", Any]]:
    """Yield dotted name, field and type of every setting with a range."""
    types = get_type_hints(section)
    for part in fields(section):
        kinds = (types[part.name], *get_args(types[part.name]))
        if "allowed" in part.metadata:
            yield prefix + part.name, part, types[part.name]
        elif part.name != SAME_AS_BACKBONE:
            for kind in filter(is_dataclass, kinds):
                yield from checked_fields(kind, f"{prefix}{LISTS.get(part.name, part.name)}.")  # type: ignore[arg-type]


def values_at_the_bounds(part: "Field[Any]", kind: Any) -> Iterator[tuple[Any, bool]]:
    """Yield values just inside and just outside a range, and whether they are allowed."""
    allowed = part.metadata["allowed"]
    if isinstance(allowed, tuple):
        yield from ((word, True) for word in allowed)
        yield "other", False
        return
    is_float = float in (kind, *get_args(kind))

    def step(bound: float, direction: int) -> float:
        return math.nextafter(bound, direction * math.inf) if is_float else int(bound) + direction

    for bound, is_inside, inwards in (
        (allowed.at_least, True, 1),
        (allowed.above, False, 1),
        (allowed.at_most, True, -1),
        (allowed.below, False, -1),
    ):
        if bound is not None and math.isfinite(bound):
            yield bound, is_inside
            yield step(bound, -inwards if is_inside else inwards), not is_inside
    if is_float:
        yield math.inf, allowed.at_most == math.inf
        yield math.nan, False


CHECKED = list(checked_fields(RunConfig))


def cases(is_allowed: bool) -> list[Any]:
    """Return dotted name, value and rule of every bound of every range, just inside or just outside of it."""
    return [
        pytest.param(name, [value] if get_origin(kind) is list else value, part.metadata["rule"], id=f"{name}={value}")
        for name, part, kind in CHECKED
        for value, is_inside in values_at_the_bounds(part, kind)
        if is_inside == is_allowed
    ]


def make(name: str, value: Any) -> RunConfig:
    """Return the typed configuration with one setting, composed as on the command line."""
    config = copy.deepcopy(run_schema())
    config.task, config.output_dir, config.plan = "evaluate", "out", PlanConfig()
    if name.startswith("data.mixture"):
        config.data.source, config.data.mixture = "text", [MixtureConfig(name="0", path="a.txt")]
    config.backbone.shape.experts_per_token = 1
    config.hardware = HardwareConfig(memory=1, bandwidth=1, fp8_flops=1, bf16_flops=1, fp32_flops=1)
    OmegaConf.update(config, name, value)
    made = OmegaConf.to_object(config)
    assert isinstance(made, RunConfig)
    return made


def test_every_section_has_ranges() -> None:
    sections = {name.rpartition(".")[0] for name, _, _ in CHECKED}
    assert sections >= {"", "backbone.shape", "collect", "data", "data.mixture.0", "decoding", "evaluation", "export"}
    assert sections >= {"hardware", "loss", "mtp", "on_policy", "plan", "stock_head", "train"}


@pytest.mark.parametrize(("name", "value", "rule"), cases(is_allowed=True))
def test_a_value_just_inside_its_range_is_accepted(name: str, value: Any, rule: str) -> None:
    made: Any = make(name, value)
    for key in name.split("."):
        made = made[int(key)] if key.isdigit() else getattr(made, key)
    assert made == value, rule


@pytest.mark.parametrize(("name", "value", "rule"), cases(is_allowed=False))
def test_a_value_just_outside_its_range_is_refused_by_its_name(name: str, value: Any, rule: str) -> None:
    with pytest.raises(UserError) as refusal:
        make(name, value)
    setting, _, message = str(refusal.value).partition("=")
    assert setting == name
    assert message.endswith(": must be finite" if value == math.inf else f": {rule}")


@pytest.mark.parametrize(
    ("bounds", "rule"),
    [
        ({"at_least": 0}, "must not be negative"),
        ({"at_least": 2}, "must be at least 2"),
        ({"above": 0}, "must be above 0"),
        ({"above": 0, "at_most": math.inf}, "must be above 0"),
        ({"at_least": 1, "at_most": 8}, "must lie between 1 and 8"),
        ({"above": 0, "at_most": 1}, "must lie in (0, 1]"),
        ({"at_least": 0, "below": 1}, "must lie in [0, 1)"),
        ({"above": 0, "below": 1}, "must lie in (0, 1)"),
    ],
)
def test_a_range_is_written_as_a_rule(bounds: dict[str, float], rule: str) -> None:
    assert str(Range(**bounds)) == rule


def test_the_losses_are_the_divergences_and_the_chain() -> None:
    assert [name.value for name in LossName] == [*Divergence, "chain"]
    assert [name.per_token for name in LossName] == [*Divergence, Divergence.tv]


def every_path() -> RunConfig:
    return RunConfig(
        task="plan",
        output_dir="~/a",
        checkpoint="~/a",
        checkpoints=["~/a", "stock"],
        path=None,
        prompts=["~/a", "org/set"],
        backbone=BackboneConfig(path="~/a"),
        data=DataConfig(chat_template="~/a", cache_dir="~/a", mixture=[MixtureConfig(path="~/a")]),
        on_policy=OnPolicyConfig(path="~/a", prompts="~/a"),
        mtp=MtpConfig(init="~/a"),
        model=BackboneConfig(path="~/a"),
        plan=PlanConfig(evaluation="~/a"),
    )


def test_the_home_folder_is_expanded_in_every_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ada")
    config = every_path()
    assert (config.checkpoints, config.prompts) == (["/home/ada/a", "stock"], ["/home/ada/a", "org/set"])
    assert config.data.mixture[0].path == "/home/ada/a"
    assert "~" not in str(config)
    for name, config in (
        ("path", RunConfig(task="report", path="~/a")),
        ("data.path", RunConfig(task="distill", data=DataConfig(source=DataSource.text, path="~/a"))),
        ("evaluation.traces", RunConfig(task="evaluate", evaluation=EvaluationConfig(traces="~/a"))),
    ):
        assert "'/home/ada/a'" in str(config), name


@pytest.mark.parametrize(
    ("argument", "expanded"),
    [
        ("data.path=~/a.jsonl", "data.path=/home/ada/a.jsonl"),
        ("prompts=[~/a,b~/c,~/d]", "prompts=[/home/ada/a,b~/c,/home/ada/d]"),
        ("data.mixture=[{path:~/a}]", "data.mixture=[{path:/home/ada/a}]"),
        ("decoding.stop=['~/']", "decoding.stop=['~/']"),
        ("~data", "~data"),
    ],
)
def test_the_home_folder_needs_no_quotes_on_the_command_line(
    argument: str, expanded: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/home/ada")
    assert expand_argument(argument) == expanded

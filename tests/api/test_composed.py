"""Settings from Python mean what they mean on the command line."""

from pathlib import Path
from typing import Any

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given, settings
from hypothesis import strategies as st

from mtptrain.api.composed import compose_run, written
from mtptrain.config import LossName
from mtptrain.errors import UserError

TEXTS = st.text(alphabet="aZ_0 '\"\\,:=[]{}()/.-+*$#é\t", max_size=12).filter(lambda text: "${" not in text)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-99, 99) | st.floats(allow_nan=False) | TEXTS,
    lambda inner: st.lists(inner, max_size=3),
    max_leaves=5,
)


@given(value=VALUES | st.sampled_from(["null", "True", "nan", "INF", "1e3", "", "\\", "a\\", "it's", "\\'"]))
@settings(max_examples=150, deadline=None, derandomize=True)
def test_the_command_line_reads_a_written_value_as_it_was(value: Any) -> None:
    (override,) = OverridesParser.create().parse_overrides([f"name={written(value)}"])
    assert plain(override.value()) == value


def plain(value: Any) -> Any:
    """Return a value with the quoted texts of Hydra's parser as texts."""
    return [plain(one) for one in value] if isinstance(value, list) else getattr(value, "text", value)


def test_every_kind_of_value_reaches_the_typed_settings() -> None:
    given_values = {
        "data": "text",
        "data.path": Path("my texts/it's.jsonl"),
        "data.chat_template_kwargs": {"enable_thinking": False},
        "loss.divergence": LossName("tv"),
        "train.learning_rate": 1e-05,
        "mtp.steps": None,
        "decoding.stop_strings": ["Question:", "a, b"],
    }
    config = compose_run(
        [f"{name}={written(one)}" for name, one in ({"+recipe": "distill"} | given_values).items()]
    ).config
    assert config.data.path == "my texts/it's.jsonl"
    assert config.data.chat_template_kwargs == {"enable_thinking": False}
    assert (config.loss.divergence, config.train.learning_rate, config.mtp.steps) == ("tv", 1e-05, None)
    assert config.decoding.stop_strings == ["Question:", "a, b"]


@pytest.mark.parametrize(
    ("arguments", "optimizer", "steps"),
    [
        ([], "muon", 2),
        (["engine=zero1"], "adamw", 2),  # whose processes hold no whole matrices
        (["mtp.mode=stacked", "mtp.depth=3"], "muon", 3),
        (["train.optimizer=adamw", "mtp.steps=1"], "adamw", 1),
    ],
)
def test_the_defaults_of_distillation_fit_the_engine_and_the_depth(
    arguments: list[str], optimizer: str, steps: int
) -> None:
    config, plain_values, _ = compose_run(["+recipe=distill", *arguments])
    assert (config.train.optimizer.value, config.mtp.num_steps) == (optimizer, steps)
    assert plain_values["train"]["optimizer"] == optimizer  # type: ignore[index]


@pytest.mark.parametrize(
    ("argument", "answer"),
    [
        ("trian.steps=3", "did you mean train.steps?"),
        ("train.steps=many", "must be a whole number"),
        ("train.steps=0", "must be at least 1"),
        ("+recipe=distil", "did you mean distill?"),
        ("data=txt", "did you mean text?"),
        ("train=", "is a section"),
        ("decoding.temperature=[", "is not setting=value"),
    ],
)
def test_a_mistake_is_answered_in_one_line_as_on_the_command_line(argument: str, answer: str) -> None:
    recipe = [] if argument.startswith("+recipe") else ["+recipe=distill"]
    with pytest.raises(UserError) as refusal:
        compose_run([*recipe, argument])
    assert answer in str(refusal.value)
    assert "\n" not in str(refusal.value)

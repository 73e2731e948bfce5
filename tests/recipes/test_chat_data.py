"""Heads trained on conversations."""

import hashlib
import json
import re
from pathlib import Path

import pytest

from tests.command import Light, Refused, read_metrics, run_main
from tests.conftest import CHAT_TEMPLATE, OBJECTS, SUBJECTS, VERBS, save_backbone


@pytest.fixture(scope="module")
def talk(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Settings of thirty conversations and a template."""
    folder = tmp_path_factory.mktemp("talk")
    rows = []
    for n in range(30):
        said = [SUBJECTS[n % 6], VERBS[n % 5], OBJECTS[n % 5], f"{SUBJECTS[n % 5]} {VERBS[n % 3]} {OBJECTS[n % 4]}."]
        roles = ["user", "assistant", "user", "assistant"]
        rows.append({"messages": [{"role": role, "content": text} for role, text in zip(roles, said, strict=True)]})
    (folder / "talk.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (folder / "chat.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    return ["data=chat", f"data.path={folder / 'talk.jsonl'}", f"data.chat_template={folder / 'chat.jinja'}"]


def test_streams_of_conversations_have_the_losses_of_training_online(
    light: list[str], talk: list[str], tmp_path: Path
) -> None:
    """Rows are longer than the backbone's context, at which conversations are cut."""
    cache, context = tmp_path / "cache", 23
    save_backbone(tmp_path / "backbone", max_position_embeddings=context)
    both = [*light, *talk, f"backbone.path={tmp_path / 'backbone'}", "data.sequence_length=61"]
    assert run_main("+recipe=collect", *both, "collect.format=fp32", f"output_dir={cache}") == 0
    untold = [one for one in both if one not in talk]
    for name, settings in {"online": both, "cached": [*untold, "data=streams", f"data.path={cache}"]}.items():
        longer = ["evaluate_at_end=false", "train.steps=4", f"output_dir={tmp_path / name}"]
        assert run_main("+recipe=distill", *settings, *longer) == 0
    left, right = (read_metrics(tmp_path / name)[-1] for name in ("cached", "online"))
    assert left["tokens"] == right["tokens"]
    # fp32 rounding of a padded batch of pieces against another batch of them, through a few updates
    assert left["loss/step_1"] == pytest.approx(right["loss/step_1"], rel=1e-4)
    identity = json.loads((cache / "manifest.json").read_text(encoding="utf-8"))["identity"]
    assert identity["sequence_length"] == context
    assert identity["chat_template"] == hashlib.sha256(CHAT_TEMPLATE.encode()).hexdigest()


def test_the_settings_of_conversations_reach_a_recipe(
    light: list[str], talk: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The number of tokens that a plan counts shows each of them."""
    plan = ["+recipe=collect", "collect.plan_only=true", *light, *talk, f"output_dir={tmp_path / 'plan'}"]

    def tokens(*settings: str) -> int:
        assert run_main(*plan, *settings) == 0
        found = re.search(r"([\d,]+) tokens in ([\d,]+) documents", capfd.readouterr().err)
        assert found is not None
        return int(found[1].replace(",", ""))

    whole = tokens()
    assert tokens("data.turns=last") == whole
    assert whole < tokens("data.turns=each") < 2 * whole
    assert tokens("data.max_documents=3") < whole / 3
    assert tokens("data.max_tokens=300") <= 300
    assert tokens("data.chat_template=builtin") < tokens(
        "data.chat_template=builtin", "data.chat_template_kwargs={enable_thinking:true}"
    )


@pytest.mark.parametrize("recipe", ["distill", "collect"])
def test_conversations_without_a_template_are_refused(recipe: str, talk: list[str], refused: Refused) -> None:
    line = refused(*talk[:2], Light("evaluate_at_end=false"), recipe=recipe)
    assert "is a conversation and the backbone's tokenizer has no chat template" in line
    assert "set data.chat_template to a jinja file" in line


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([{"role": "user", "content": "Why?"}], "row 1: has no message of role assistant to learn from; drop the row"),
        ([{"content": "Why?"}], "row 1: each of `messages` must have a role and a content"),
        ([{"role": "assistant", "content": None}], "row 1: `messages` must hold text, not NoneType"),
        (3, "row 1 holds a value of type int, no text, under that name"),
    ],
)
def test_a_row_that_is_no_conversation_is_named(
    messages: object, reason: str, tmp_path: Path, refused: Refused
) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(json.dumps({"messages": messages}) + "\n", encoding="utf-8")
    line = refused("data=chat", f"data.path={path}")
    assert reason in line
    assert str(path) in line

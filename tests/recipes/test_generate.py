"""`+recipe=generate`: the loop's own text, prompts from the setting or standard input, and a clean end."""

import io
import sys

import pytest

from mtptrain.generation.transcript import Transcript
from mtptrain.recipes import generate
from tests.command import run_main

TEXT = ["+recipe=generate", "generate.show=text", "device=cpu"]


def test_a_prompt_is_continued_as_plain_decoding_would(light: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    assert run_main(*TEXT, *light, "prompt=The river follows", "generate.plain=true") == 0
    output, errors = capfd.readouterr()
    plain, speculative = output.split("\n\n") if "\n\n" in output else output.splitlines()
    assert plain.strip() == speculative.strip() != ""
    assert errors.splitlines()[-3:-1][0].startswith("6 tokens in ")
    assert errors.splitlines()[-1] == "both texts are identical: 6 tokens"


def test_each_line_of_a_pipe_is_a_prompt(
    light: list[str], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("The river\n\nEvery reader\n"))
    assert run_main(*TEXT, *light) == 0
    assert capfd.readouterr().err.count("tokens a pass at K=2") == 2


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ("", 'prompt=null: standard input holds no line; give prompt="...", or write a prompt a line'),
        ("a\n" + "b" * 5000, "prompt 2 of standard input: prompt: the prompt has "),
    ],
)
def test_a_pipe_that_holds_no_prompt_is_refused(
    given: str, line: str, light: list[str], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(given))
    assert run_main(*TEXT, *light) == 2
    assert capfd.readouterr().err.splitlines()[-1].startswith(f"mtptrain: {line}")


def test_typed_prompts_end_with_the_input_and_a_refused_one_does_not_end_them(
    light: list[str], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    typed = iter(["b" * 5000, "The river"])

    def answer(label: str) -> str:
        assert label == "prompt> "
        try:
            return next(typed)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", answer)
    monkeypatch.setattr(generate, "is_typed", lambda stream: True)
    monkeypatch.setattr("mtptrain.generation.prompts.is_typed", lambda stream: True)
    assert run_main(*TEXT, *light) == 0
    errors = capfd.readouterr().err
    assert "prompt: the prompt has" in errors
    assert errors.count("tokens a pass at K=2") == 1


def test_ctrl_c_ends_the_text_with_a_line_of_its_own(
    light: list[str], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Transcript, "rest", interrupt)
    assert run_main(*TEXT, *light, "prompt=The river") == 130
    output, errors = capfd.readouterr()
    assert output.endswith("\n")
    assert errors.splitlines()[-1] == ("mtptrain: interrupted: nothing is written; start it again")


def test_a_closed_pipe_ends_the_texts_without_an_error(
    light: list[str], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def closed(*_: object) -> None:
        raise BrokenPipeError

    monkeypatch.setattr(Transcript, "pieces", closed)
    monkeypatch.setattr(generate, "leave_pipe", lambda: None)
    assert run_main(*TEXT, *light, "prompt=The river") == 0
    assert "Traceback" not in capfd.readouterr().err

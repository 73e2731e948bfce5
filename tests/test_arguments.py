"""A command line as a user writes it, and as Hydra reads it."""

import logging
import random
import re
from collections.abc import Iterator
from os.path import expanduser

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from mtptrain.config.arguments import read_arguments
from mtptrain.config.verbosity import Verbosity, print_status, set_verbosity
from mtptrain.run.progress import Progress, waiting
from tests.command import run_main


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("distill", "+recipe=distill"),
        ("distill train.steps=2", "+recipe=distill train.steps=2"),
        ("distill -m loss.divergence=kl,tv", "-m +recipe=distill loss.divergence=kl,tv"),
        ("distill,pretrain -m seed=1,2", "-m +recipe=distill,pretrain seed=1,2"),
        ("--config-dir my mine seed=1", "--config-dir my +recipe=mine seed=1"),
        ("distill seed=1 --config-dir=my --cfg job", "--config-dir=my --cfg job +recipe=distill seed=1"),
        ("--config-dir=~/my mine", f"--config-dir={expanduser('~')}/my +recipe=mine"),
        ("collect --plan", "+recipe=collect collect.plan_only=true"),
        ("+recipe=distill seed=1", "+recipe=distill seed=1"),
        ("-q distill -v", "+recipe=distill"),
        ("seed=1 distill", "seed=1 distill"),  # only the first word is a recipe
        ("~data.path distill", "~data.path distill"),
        ("--help", "--help"),
        ("seed=1 -h", "--help seed=1"),
        ("distill --help", "+recipe=distill"),
        ("", "--help"),
    ],
)
def test_a_command_line_is_put_in_hydras_order(given: str, words: str) -> None:
    assert read_arguments(given.split()).words == words.split()


def test_options_of_this_program_are_read() -> None:
    assert read_arguments(["distill", "--help"]).wants_help
    assert not read_arguments(["--help"]).wants_help  # Hydra's
    assert read_arguments(["--version"]).wants_version
    assert read_arguments(["-q"]).verbosity is read_arguments(["--quiet"]).verbosity is Verbosity.quiet
    assert read_arguments(["distill", "--verbose"]).verbosity is Verbosity.verbose
    assert read_arguments(["distill"]).is_short
    assert not read_arguments(["+recipe=distill"]).is_short


def parsed(word: str) -> str:
    """Return the value of a word as a run's settings hold it."""
    (setting,) = read_arguments(["generate", word]).settings[1:]
    override = OverridesParser.create().parse_override(setting)
    return str(OmegaConf.create({"prompt": override.value()}).prompt)


TEXTS = ["def mean(values):", "a, b and [c]", 'it\'s "so"', "costs ${5}", "C:\\", "a\\'b\\\\${x", "a\nb\\\n", "null "]


@pytest.mark.parametrize("text", TEXTS)
def test_a_prompt_needs_no_quotes_of_hydra(text: str) -> None:
    assert parsed(f"prompt={text}") == text


def test_any_text_is_a_prompt() -> None:
    draw, signs = random.Random(0), ["a", " ", "'", '"', "\\", "${", "}", "\n", ",", "[", "(", "=", ":", "é"]
    for _ in range(300):
        text = "x" + "".join(draw.choices(signs, k=6))
        assert parsed(f"prompt={text}") == text


def test_a_quoted_prompt_stays_as_it_is() -> None:
    assert parsed("prompt='a b'") == parsed('prompt="a b"') == "a b"


# Completion by a shell


def test_a_recipe_is_completed_as_the_first_word(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COMP_LINE", "mtptrain di")
    assert run_main("-sc", "query=bash") == 0
    assert {"distill", "doctor"} <= set(capfd.readouterr().out.split())


def test_settings_are_completed_behind_a_recipe(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COMP_LINE", "mtptrain distill train.le")
    assert run_main("-sc", "query=bash") == 0
    assert capfd.readouterr().out.split() == ["train.learning_rate="]


# Verbosity


@pytest.fixture(autouse=True)
def normal_again() -> Iterator[None]:
    yield
    set_verbosity(Verbosity.normal)


def run_of(verbosity: Verbosity) -> None:
    set_verbosity(verbosity)
    print_status("a status")
    logging.getLogger("mtptrain.decoding").warning("a warning")
    with waiting("some work"):
        pass
    with Progress("training", 1) as progress:
        progress.update(1, "loss 2", 8)


def test_a_quiet_run_says_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    run_of(Verbosity.quiet)
    assert capfd.readouterr() == ("", "")


def test_a_verbose_run_says_how_long_each_wait_took(capfd: pytest.CaptureFixture[str]) -> None:
    run_of(Verbosity.normal)
    assert "some work" not in capfd.readouterr().err
    run_of(Verbosity.verbose)
    errors = capfd.readouterr().err
    assert re.search(r"mtptrain.run: some work: \d+\.\d s$", errors, re.MULTILINE)
    assert "a status\n" in errors

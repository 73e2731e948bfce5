"""No long silence, and no remaining time that is not true."""

import io
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr

import pytest
import torch

from mtptrain.backbone import load
from mtptrain.config import BackboneConfig
from mtptrain.run import progress
from mtptrain.run.progress import Progress, counted, waiting


@contextmanager
def read_stderr(monkeypatch: pytest.MonkeyPatch) -> Iterator[io.StringIO]:
    """Yield the standard error of waits that print at once and often; capfd would lose lines while it reads."""
    monkeypatch.setattr(progress, "QUIET_SECONDS", 0.0)
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_SIGNS", 0.005)
    with redirect_stderr(io.StringIO()) as printed:
        yield printed


def assert_quiet(printed: io.StringIO) -> None:
    lines = printed.getvalue()
    time.sleep(0.01)
    assert printed.getvalue() == lines


def test_a_wait_says_what_it_waits_for_and_how_long_so_far(monkeypatch: pytest.MonkeyPatch) -> None:
    with read_stderr(monkeypatch) as printed:
        with waiting("loading"):
            while printed.getvalue().count("loading, for 0:00 so far\n") < 2:
                time.sleep(0.001)
        assert_quiet(printed)


def test_a_wait_that_knows_its_share_estimates_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    shares = iter([0.0, *[0.001] * 10**6])
    with read_stderr(monkeypatch) as printed, waiting("tokenising", lambda: next(shares)):
        while "left\n" not in printed.getvalue():
            time.sleep(0.001)
    first, *_, last = printed.getvalue().splitlines()
    assert first == "tokenising, for 0:00 so far"  # nothing is done: no estimate
    assert re.fullmatch(r"tokenising, for 0:00 so far, about \d+:\d\d left", last)


def test_a_short_wait_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    with waiting("loading"):
        pass
    assert capfd.readouterr().err == ""


def test_no_time_is_left_only_at_the_end(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.0)
    with Progress("train", 3) as shown:
        for step in (1, 2, 3):
            shown.update(step, "loss 1.0", 10)
    lines = capfd.readouterr().err.splitlines()
    assert [line.rpartition("  ")[2] for line in lines] == ["0:01 left", "0:01 left", "0:00 left"]


def test_a_counted_wait_yields_its_steps_and_estimates_the_rest_from_the_first_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[str] = []
    with read_stderr(monkeypatch) as printed:
        for step in counted("checking", "abc"):
            begun = len(printed.getvalue())
            while ("left\n" if seen else "so far\n") not in printed.getvalue()[begun:]:
                time.sleep(0.001)
            assert ("left" in printed.getvalue()) == bool(seen)
            seen.append(step)
        assert seen == ["a", "b", "c"]
        assert_quiet(printed)


def test_loading_weights_estimates_the_rest_by_the_count_of_transformers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shares = []

    @contextmanager
    def recorded(_: str, share: Callable[[], float]) -> Iterator[None]:
        shares.append(share)
        yield

    monkeypatch.setattr(load, "waiting", recorded)
    source = load.SHIPPED / "tiny"
    load.load_backbone(BackboneConfig(path=str(source)), torch.device("cpu"), torch.float32)
    assert 0.9 < shares[0]() < 1

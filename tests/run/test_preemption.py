"""Signals are remembered while work can be saved, and end the run where nothing can."""

import signal
from collections.abc import Iterator

import pytest

from mtptrain.run.preemption import SIGNALS, StopRequest, Terminated, terminable


@pytest.fixture(autouse=True)
def ctrl_c_works() -> Iterator[None]:
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, previous)


@pytest.mark.parametrize("number", [*SIGNALS, signal.SIGINT])
def test_a_signal_is_remembered_and_the_handlers_come_back(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with StopRequest() as stop:
        signal.raise_signal(number)
    assert (stop.is_made, stop.is_by_user) == (True, number == signal.SIGINT)
    assert signal.getsignal(number) is before


def test_only_ctrl_c_ends_the_work_when_it_is_repeated() -> None:
    with StopRequest() as stop:
        for _ in range(2):
            signal.raise_signal(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert not stop.is_by_user


def test_ctrl_c_stays_ignored_where_the_shell_ignores_it() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with StopRequest() as stop:
        signal.raise_signal(signal.SIGINT)
    assert not stop.is_made


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_with_nothing_to_save_raises(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with terminable():
        with StopRequest():
            signal.raise_signal(number)
        with pytest.raises(Terminated):
            signal.raise_signal(number)
    assert signal.getsignal(number) is before

"""Worker processes that read and tokenise: the same batches, errors with their line, and no process left behind."""

import json
import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch

from mtptrain.batch import Batch
from mtptrain.data.streaming.batches import StreamingBatches
from mtptrain.data.streaming.row_stream import RowShape
from mtptrain.data.tokenizer import BOS
from mtptrain.errors import UserError
from tests.data.streaming.sources import mixed_config, plan_of, text_config, write_lines


def same(left: Batch, right: Batch) -> bool:
    values = [(getattr(left, name), getattr(right, name)) for name in Batch.__slots__]
    return all(one is other if one is None or other is None else torch.equal(one, other) for one, other in values)


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_workers_give_the_batches_of_this_process(folder: Path, workers: int) -> None:
    plan = plan_of(mixed_config(folder), 3)
    here, there = StreamingBatches(plan, 0), StreamingBatches(plan, workers)
    state = torch.get_rng_state()
    for index in range(30):
        left, right = here.batch(index), there.batch(index)
        assert same(left, right)
        assert left.source_B is not None
    assert torch.equal(torch.get_rng_state(), state)  # workers leave the generator of training alone
    assert here.position() == there.position()
    resumed = StreamingBatches(plan, 1)
    resumed.seek(30, [json.loads(json.dumps(there.position()))])
    assert same(resumed.batch(30), here.batch(30))


def test_workers_encode_special_tokens_spelt_out_in_a_text_as_characters(tmp_path: Path) -> None:
    """A pickled tokenizer loses `encode_special_tokens`; a forked worker must not."""
    write_lines(tmp_path / "a.jsonl", [{"text": f"{number} {BOS}"} for number in range(40)])
    plan = plan_of(replace(text_config(tmp_path), path=str(tmp_path)), 2)
    assert same(StreamingBatches(plan, 1).batch(0), StreamingBatches(plan, 0).batch(0))


def test_a_mistake_in_the_data_keeps_its_line_number_across_processes(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", [{"text": f"{number} words"} for number in range(600)])
    path.write_text(path.read_text(encoding="utf-8") + '{"text": 3}\n', encoding="utf-8")
    batches = StreamingBatches(plan_of(replace(text_config(tmp_path), path=str(path)), 2), 2)
    with pytest.raises(
        UserError, match=r"^data\.field_name=text: .*row 601 holds a value of type int, no text"
    ) as raised:
        read_on(batches, 600)
    names = [child.name() for child in psutil.Process().children()]
    assert "pt_data_worker" not in names, raised  # although the traceback of the error still holds every frame


def background_process(batches: StreamingBatches) -> psutil.Process:
    """Return the worker of `batches`, after a first batch."""
    before = set(psutil.Process().children())
    batches.batch(0)
    (worker,) = set(psutil.Process().children()) - before
    return worker


def read_on(batches: StreamingBatches, count: int) -> None:
    for index in range(batches.index, batches.index + count):
        batches.batch(index)


def test_a_killed_worker_ends_the_run_with_one_line(folder: Path) -> None:
    handler = signal.getsignal(signal.SIGCHLD)
    batches = StreamingBatches(plan_of(text_config(folder), 2), 1)
    background_process(batches).send_signal(signal.SIGKILL)
    with pytest.raises(
        UserError, match=r"^data\.workers=1: a process that reads and tokenises was killed.*resume=auto"
    ):
        read_on(batches, 10**6)  # a few batches were prepared before
    assert signal.getsignal(signal.SIGCHLD) == handler


def test_a_worker_ends_when_closed_but_not_by_the_signals_that_end_a_run(folder: Path) -> None:
    batches = StreamingBatches(plan_of(text_config(folder), 2), 1)
    worker = background_process(batches)
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        worker.send_signal(number)
    read_on(batches, 30)
    assert worker.is_running()
    batches.close()
    assert worker not in psutil.Process().children()


def test_no_worker_outlives_a_killed_run(tmp_path: Path) -> None:
    """Even if the rows that it has prepared are larger than a pipe's buffer and are never fetched."""
    write_lines(tmp_path / "a.jsonl", [{"text": f"{number}" * 20_000} for number in range(20)])
    plan = plan_of(replace(text_config(tmp_path), path=str(tmp_path)), 2)
    plan = replace(plan, shape=RowShape(2**16, 2**16))
    reading, writing = os.pipe()
    run = os.fork()
    if run == 0:
        batches = StreamingBatches(plan, 1)
        os.write(writing, str(background_process(batches).pid).encode())
        os.kill(os.getpid(), signal.SIGKILL)
    worker = psutil.Process(int(os.read(reading, 99)))
    os.waitpid(run, 0)
    deadline = time.monotonic() + 60
    while psutil.pid_exists(worker.pid) and worker.status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.05)

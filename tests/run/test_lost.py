import pytest

from mtptrain.run.lost import LostProcessError, UnreachableError, lost_process_error


@pytest.mark.parametrize(
    ("message", "kind"),
    [
        ("[unbound_buffer.cc:81] Timed out waiting 60000ms for recv operation to complete", UnreachableError),
        ("[pair.cc:547] Connection closed by peer [10.0.0.2]:4711", LostProcessError),
        ("NCCL error: remote process exited or there was a network error", LostProcessError),
    ],
)
def test_a_lost_process_is_named_in_one_line(message: str, kind: type[LostProcessError]) -> None:
    error = lost_process_error(RuntimeError(message), 60, "step 5 is saved")
    assert type(error) is kind
    assert str(error).startswith("distributed_timeout=60: another process is gone or does not answer (")
    assert str(error).endswith("look at its host and the network between them; step 5 is saved")


@pytest.mark.parametrize("error", [RuntimeError("shapes do not fit"), ValueError("Timed out waiting")])
def test_another_error_keeps_its_traceback(error: Exception) -> None:
    assert lost_process_error(error, 60, "") is None

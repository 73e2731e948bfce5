import pytest

from mtptrain.errors import UserError
from mtptrain.mtp import expert_parallel
from mtptrain.mtp.expert_parallel import check_head_experts


@pytest.mark.parametrize("processes", [1, 2, 8])
def test_processes_that_divide_the_experts_can_share_them(processes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(expert_parallel, "world_size", lambda: processes)
    check_head_experts(8)


@pytest.mark.parametrize("processes", [3, 16])
def test_processes_that_do_not_divide_the_experts_are_refused(processes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(expert_parallel, "world_size", lambda: processes)
    with pytest.raises(UserError, match=f"mtp.experts=expert_parallel: {processes} processes do not divide the 8 exp"):
        check_head_experts(8)

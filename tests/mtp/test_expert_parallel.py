import pytest

from mtptrain.backbone import placement
from mtptrain.backbone.placement import check_experts
from mtptrain.errors import UserError


@pytest.mark.parametrize("processes", [1, 2, 8])
def test_processes_that_divide_the_experts_can_share_them(processes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placement, "world_size", lambda: processes)
    check_experts(8, "mtp.experts", "replicate")


@pytest.mark.parametrize("processes", [3, 16])
def test_processes_that_do_not_divide_the_experts_are_refused(processes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placement, "world_size", lambda: processes)
    with pytest.raises(UserError, match=f"mtp.experts=expert_parallel: {processes} processes do not divide the 8 exp"):
        check_experts(8, "mtp.experts", "replicate")

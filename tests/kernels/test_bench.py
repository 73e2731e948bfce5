import pytest
import torch

from mtptrain.kernels.bench.__main__ import run_case
from mtptrain.kernels.bench.case import Case
from mtptrain.kernels.bench.ceilings import Ceilings
from mtptrain.kernels.linear_loss import Divergence
from mtptrain.kernels.linear_loss import bench as linear_loss_bench
from mtptrain.kernels.linear_loss.bench import _case as linear_loss_case
from mtptrain.kernels.sink_attention import bench as sink_attention_bench

CPU = torch.device("cpu")
CEILINGS = Ceilings(flops_per_second=1e12, bytes_per_second=1e10)


def test_a_wrong_candidate_is_named_and_not_timed() -> None:
    values, counts = torch.linspace(0, 1, 9), torch.arange(9)
    case = Case(
        label="nine values",
        ours=lambda: (values, counts),
        definition=lambda: (values, counts),
        peers={
            "partial": lambda: (values,),
            "off": lambda: (values + 1e-3, counts),
            "shifted": lambda: (values, counts + 1),
            "broken": lambda: (values[10],),
        },
        bytes=36,
    )
    result = run_case(case, CEILINGS, CPU, rounds=2)
    assert list(result["measured"]) == ["ours", "definition", "partial"]
    assert list(result["wrong"]) == ["off", "shifted", "broken"]
    case.off = 1.0  # every entry of a non-floating output may differ
    assert list(run_case(case, CEILINGS, CPU, rounds=1)["wrong"]) == ["off", "broken"]
    assert "IndexError" in result["wrong"]["broken"]


def test_nothing_is_timed_if_ours_is_wrong() -> None:
    case = Case(label="", ours=lambda: (torch.ones(2),), definition=lambda: (torch.zeros(2),), bytes=8)
    result = run_case(case, CEILINGS, CPU, rounds=1)
    assert list(result["wrong"]) == ["ours"]
    assert result["measured"] == {}


def test_an_entry_that_is_never_written_is_seen_without_rounds() -> None:
    def half() -> tuple[torch.Tensor]:
        out = torch.empty(64)
        out[:32] = 1.0
        return (out,)

    case = Case(label="", ours=half, definition=lambda: (torch.ones(64),), bytes=8)
    result = run_case(case, CEILINGS, CPU, rounds=0)
    assert "nan" in result["wrong"]["ours"]
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.usefixtures("_poisoned_memory")
def test_poisoned_memory_allows_ops_without_a_deterministic_form() -> None:
    pooled, at = torch.nn.functional.max_pool1d(torch.arange(4.0).view(1, 1, 4), 2, return_indices=True)
    torch.nn.functional.max_unpool1d(pooled, at, 2)  # as are torch's matrix products on a GPU
    assert torch.empty(2).isnan().all()


def test_bare_products_are_timed_but_not_compared() -> None:
    case = Case(label="", ours=lambda: (torch.ones(2),), definition=lambda: (torch.ones(2),), bytes=8)
    case.bare = lambda: None
    assert list(run_case(case, CEILINGS, CPU, rounds=1)["measured"]) == ["ours", "definition", "bare products"]


def test_the_vocabulary_loss_and_its_peers_agree() -> None:
    case = linear_loss_case(CPU, Divergence.kl, 2, 33, 16, 500)
    expected = case.definition()
    del case.peers["torch.compile of definition"]  # compiles for a minute
    assert {name: case.difference(run(), expected) for name, run in case.peers.items()} == dict.fromkeys(case.peers)
    assert case.difference(case.ours(), expected) is None


def test_a_definition_that_does_not_fit_into_memory_is_checked_in_pieces() -> None:
    def too_large() -> tuple[torch.Tensor]:
        raise torch.OutOfMemoryError

    case = Case(
        label="",
        ours=lambda: (torch.ones(2),),
        definition=too_large,
        in_pieces=lambda: (torch.ones(2),),
        peers={"off": lambda: (torch.zeros(2),)},
        bytes=8,
    )
    result = run_case(case, CEILINGS, CPU, rounds=1)
    assert list(result["measured"]) == ["ours"]
    assert list(result["wrong"]) == ["definition", "off"]


def test_the_pieces_of_a_definition_are_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_loss_bench, "PIECE", 10)
    monkeypatch.setattr(sink_attention_bench, "PIECE", 200)  # two heads of nine slots
    cases = [
        linear_loss_case(CPU, Divergence.kl, 2, 33, 16, 100),
        sink_attention_bench._rollout(CPU, 2, 9, 3, 16, 0, 5),
        sink_attention_bench._rollout(CPU, 2, 9, 3, 16, 2, 5),
        sink_attention_bench._prefill(CPU, 16, 3, 16, 4, 2, 5),
    ]
    for case in cases:
        assert case.in_pieces is not None
        assert case.difference(case.in_pieces(), case.definition()) is None

"""Two processes train like one with every engine, and a run continues on another number of processes."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mtptrain.config import EngineName, HeadExperts, OptimizerName
from mtptrain.training.checkpoint import OPTIMIZER, checkpoint_name, open_checkpoint
from tests.shared import shared_folder
from tests.tiny import random_backbone, random_stack
from tests.training.heads import (
    CONFIG,
    ENGINES,
    MIDDLE,
    STEPS,
    SUMMED,
    VARIANTS,
    head_trainer,
    resumed,
    start_digests,
    train,
)
from tests.warm import run_in_two

# Losses are sums of at most 60 fp32 terms in another order, and the difference grows over the steps: 256 roundings.
TOLERANCE = 256 * 2**-24


def chosen_engines(items: list[pytest.Item]) -> list[str]:
    """The engines of the chosen tests, and the one that bf16 heads are compared with; all if a test names none."""
    chosen = {"half_single"}
    for item in items:
        if item.path == Path(__file__) and "folder" in getattr(item, "fixturenames", []):
            callspec = getattr(item, "callspec", None)
            if callspec is None:
                return [*ENGINES, *(name for name, *_ in VARIANTS)]
            chosen.add(callspec.params["engine"])
    return sorted(chosen)


@pytest.fixture(scope="module")
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    names = chosen_engines(request.session.items)

    def train_all(folder: Path) -> None:
        """Train in one process, with checkpoints in `folder`/one, then in two with every engine."""
        torch.save(train(head_trainer(EngineName.single, folder / "one")), folder / "one.pt")
        ended = run_in_two("tests.training.heads", str(folder), *names)
        assert ended.codes == (0, 0), ended.errors[-4000:]

    return shared_folder(tmp_path_factory, "engines", train_all)


@pytest.fixture(scope="module")
def one(folder: Path) -> dict[str, Any]:
    """The run of one process."""
    results: dict[str, Any] = torch.load(folder / "one.pt", weights_only=True)
    return results


@pytest.fixture(scope="module")
def two(folder: Path) -> dict[str, Any]:
    """The runs of two processes, by engine."""
    results: dict[str, Any] = torch.load(folder / "results.pt", weights_only=True)
    return results


def close(left: Any, right: Any) -> None:
    torch.testing.assert_close(torch.tensor(left).double(), torch.tensor(right).double(), rtol=TOLERANCE, atol=0)


def same_bits(left: dict[str, Any], right: dict[str, Any]) -> bool:
    if left.keys() != right.keys():
        return False
    return all(
        torch.equal(value, right[name]) if isinstance(value, Tensor) else same_bits(value, right[name])
        for name, value in left.items()
    )


@pytest.mark.parametrize("engine", [*ENGINES, "offloaded", "recomputed", "shared_offloaded", "shared_recomputed"])
def test_two_processes_have_the_losses_and_gradients_of_one(
    engine: str, one: dict[str, Any], two: dict[str, Any]
) -> None:
    whole = two[engine]["whole"]
    close(whole["losses"], one["losses"])
    close(whole["norms"], one["norms"])
    assert whole["tokens"] == one["tokens"]


@pytest.mark.parametrize("engine", ENGINES)
def test_two_processes_move_the_router_bias_as_one(engine: str, one: dict[str, Any], two: dict[str, Any]) -> None:
    name = "mtp.0.layer.mlp.gate.e_score_correction_bias"
    assert torch.equal(two[engine]["whole"]["tensors"][name], one["tensors"][name])


@pytest.mark.parametrize("engine", [*ENGINES, *(name for name, *_ in VARIANTS)])
def test_a_resumed_run_ends_with_the_bits_of_an_uninterrupted_one(engine: str, two: dict[str, Any]) -> None:
    whole, continued = two[engine]["whole"], two[engine]["resumed"]
    assert continued["losses"] == whole["losses"][MIDDLE:]
    assert same_bits(continued["tensors"], whole["tensors"])
    assert same_bits(continued["optimizer"], whole["optimizer"])


@pytest.mark.parametrize("engine", ENGINES)
def test_a_run_of_one_process_continues_on_two(engine: str, one: dict[str, Any], two: dict[str, Any]) -> None:
    close(two[engine]["from_one"]["losses"], one["losses"][MIDDLE:])


@pytest.mark.parametrize("engine", ENGINES)
def test_a_run_of_two_processes_continues_on_one(
    engine: str, one: dict[str, Any], two: dict[str, Any], folder: Path, tmp_path: Path
) -> None:
    continued = resumed(EngineName.single, folder / engine, tmp_path)
    close(continued["losses"], one["losses"][MIDDLE:])


@pytest.mark.parametrize("engine", ENGINES)
def test_all_processes_skip_a_step_that_is_not_finite_on_one(engine: str, two: dict[str, Any], folder: Path) -> None:
    """And another one after it, which finds whole tensors."""
    bad = two[engine]["bad"]
    assert not bad["losses"]
    assert bad["skipped"] == STEPS - MIDDLE
    good = open_checkpoint(folder / engine / checkpoint_name(MIDDLE)).tensors()
    trained = [name for name in good if "e_score_correction_bias" not in name]
    assert all(torch.equal(bad["tensors"][name], good[name]) for name in trained)


@pytest.fixture(scope="module")
def frozen_experts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The run of one process that trains all but the experts."""
    return train(head_trainer(EngineName.single, tmp_path_factory.mktemp("frozen"), trainable="no_experts"))


@pytest.mark.parametrize("engine", ["no_experts_zero2", "no_experts_zero3", "shared_no_experts"])
def test_frozen_experts_stay_as_they_are_and_have_no_state(
    engine: str, frozen_experts: dict[str, Any], two: dict[str, Any]
) -> None:
    whole, alone = two[engine]["whole"], frozen_experts
    close(whole["losses"], alone["losses"])
    assert not any(".experts." in name for name in [*whole["optimizer"], *alone["optimizer"]])
    start = random_stack(random_backbone()).state_dict()
    experts = [name for name in start if ".mlp.experts." in name]
    assert experts
    assert all(torch.equal(whole["tensors"][name], start[name]) for name in experts)


@pytest.mark.parametrize("engine", ["half_zero1", "half_zero2", "shared_half_zero1"])
def test_bf16_heads_train_on_fp32_masters_alike(engine: str, two: dict[str, Any]) -> None:
    """The ZeRO stages sum bf16 gradients of all processes, `single` those of one process: roundings of 2^-8."""
    whole, single = two[engine]["whole"], two["half_single"]["whole"]
    assert {value.dtype for value in whole["tensors"].values() if value.is_floating_point()} == {torch.float32}
    torch.testing.assert_close(torch.tensor(whole["norms"]), torch.tensor(single["norms"]), rtol=2**-5, atol=0)
    torch.testing.assert_close(torch.tensor(whole["losses"]), torch.tensor(single["losses"]), rtol=2**-6, atol=0)


@pytest.mark.parametrize("engine", [engine.value for engine in SUMMED])
def test_micro_batches_are_added_up_in_fp32(engine: str, two: dict[str, Any]) -> None:
    """In bf16 every sum of 1 and 2^-9 is 1."""
    assert two["small gradients"][engine] == 1.125


def test_the_next_job_of_a_sweep_trains_with_deepspeed_too(two: dict[str, Any]) -> None:
    """In processes that left a group and joined another."""
    assert two["next job"] == 1.125


@pytest.mark.parametrize("engine", [name for name, (_, is_shared) in ENGINES.items() if is_shared])
def test_shared_experts_end_with_the_tensors_and_the_state_of_replicated_ones(
    engine: str, one: dict[str, Any], two: dict[str, Any]
) -> None:
    whole = two[engine]["whole"]
    torch.testing.assert_close(whole["optimizer"], one["optimizer"], rtol=2**-12, atol=2**-18)
    assert whole["tensors"].keys() == one["tensors"].keys()
    # AdamW divides: a step is about the rate, in either direction where a gradient is no more than a rounding itself.
    # So one value in 4096 may be off by more than 2^-10 of the steps; the moments above are compared everywhere.
    bound = CONFIG.learning_rate * STEPS
    for name, tensor in one["tensors"].items():
        off = (whole["tensors"][name] - tensor).abs()
        assert off.max() <= 2**-5 * bound, name
        assert (off > 2**-10 * bound).float().mean() <= 2**-12, name


@pytest.mark.parametrize(
    ("engine", "options"),
    [
        ("shared_only_experts", {"trainable": "*.mlp.experts.*"}),
        ("shared_muon", {"config": replace(CONFIG, optimizer=OptimizerName.muon)}),
    ],
)
def test_shared_experts_train_as_whole_ones_with_other_settings(
    engine: str, options: dict[str, Any], two: dict[str, Any], tmp_path: Path
) -> None:
    alone = train(head_trainer(EngineName.single, tmp_path, **options))
    close(two[engine]["whole"]["losses"], alone["losses"])


def test_shared_experts_start_with_the_numbers_of_a_whole_head(two: dict[str, Any]) -> None:
    """Whatever the modules start from; the digest covers every bit."""
    assert two["starts"] == start_digests(HeadExperts.replicate)
    assert len(set(two["starts"].values())) == len(two["starts"])


def test_an_expert_that_one_process_cannot_read_is_a_mistake_of_all(two: dict[str, Any]) -> None:
    """Rank 0 reports it, whose own experts are sound."""
    assert two["damage"] == "mtp.0.layer.mlp.experts.gate_up_proj: expert 3 is damaged"


def test_the_stages_write_one_checkpoint_format(folder: Path, two: dict[str, Any]) -> None:
    assert two
    of_one = open_checkpoint(folder / "one" / checkpoint_name(STEPS)).stored(OPTIMIZER)
    for engine in ENGINES:
        state = open_checkpoint(folder / engine / checkpoint_name(STEPS)).stored(OPTIMIZER)
        assert state.shapes == of_one.shapes
        assert {state[name].item() for name in state if name.endswith("/step")} == {float(CONFIG.steps)}


def test_a_shared_backbone_has_the_streams_of_a_whole_one(backbone_folder: Path, tmp_path: Path) -> None:
    """Also where the processes hold different numbers of documents, of different lengths."""
    ended = run_in_two("tests.training.placements", str(backbone_folder), str(tmp_path))
    assert ended.codes == (0, 0), ended.errors[-4000:]
    for number in range(2):
        for (placement, dtype), (difference, share) in torch.load(tmp_path / f"placements_{number}.pt").items():
            # Experts that run on another number of rows sum in another order: a few roundings a layer, four layers.
            assert difference < (2**-5 if dtype == "torch.bfloat16" else 2**-18), (placement, dtype)
            assert share == 0.5

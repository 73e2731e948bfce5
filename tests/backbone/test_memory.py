"""A backbone that does not fit is refused before its weights are read."""

from pathlib import Path

import pytest
import torch

from mtptrain.backbone import memory
from mtptrain.backbone.load import load_backbone
from mtptrain.backbone.memory import WeightBytes, check_room, weight_bytes
from mtptrain.config import BackboneConfig, Placement
from mtptrain.errors import UserError
from mtptrain.release.shards import Shards

CPU = torch.device("cpu")
FLASH = WeightBytes(experts=147_000_000_000, rest=9_000_000_000)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_headers_give_the_bytes_of_the_loaded_model(release_folder: Path, dtype: torch.dtype) -> None:
    model = load_backbone(BackboneConfig(path=str(release_folder)), CPU, dtype).model
    sizes = {name: tensor.numel() * tensor.element_size() for name, tensor in model.state_dict().items()}
    experts = sum(size for name, size in sizes.items() if ".mlp.experts." in name)
    counted = weight_bytes(Shards(release_folder, "here"), dtype)
    assert counted.experts == experts
    # Tensors that are stored in bf16 are cast in an fp32 model; they are few.
    assert counted.rest <= sum(sizes.values()) - experts <= 2 * counted.rest


def test_kept_weights_take_what_their_files_take(release_folder: Path) -> None:
    shards = Shards(release_folder, "here")
    stored = sum(entry.end - entry.begin for name, entry in shards.entries.items() if not name.startswith("mtp."))
    assert sum(weight_bytes(shards, None)) == stored


@pytest.mark.parametrize(
    ("free", "placement", "line"),
    [
        (141, Placement.replicate, r"would hold 156\.0 GB .*141\.0 GB of its GPU are free; use at least 2 GPUs"),
        (80, Placement.replicate, r"use at least 4 GPUs with backbone\.placement=expert_parallel"),
        (8, Placement.expert_parallel, r"use larger GPUs"),
    ],
)
def test_a_share_that_does_not_fit_is_refused_with_the_figures(
    free: int, placement: Placement, line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "free_bytes", lambda _: free * 10**9)
    with pytest.raises(UserError, match=rf"^backbone\.placement={placement.value}: .*{line}"):
        check_room(FLASH, placement, 256, CPU)


@pytest.mark.parametrize("is_decoded", [False, True])
def test_keeping_weights_as_stored_is_offered_where_they_are_decoded(
    is_decoded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "free_bytes", lambda _: 80 * 10**9)
    with pytest.raises(UserError) as refusal:
        check_room(FLASH, Placement.replicate, 256, CPU, is_decoded)
    assert ("backbone.weights=keep takes less" in str(refusal.value)) is is_decoded


def test_a_share_that_fits_is_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "free_bytes", lambda _: 80 * 10**9)
    monkeypatch.setattr(memory, "world_size", lambda: 8)
    check_room(FLASH, Placement.expert_parallel, 256, CPU)
    check_room(FLASH, Placement.zero3, 256, CPU)

"""The self-check of an export, on folders that differ from the trained head or the source."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import DeepseekV4Config

from mtptrain.errors import UserError
from mtptrain.export.self_check import changed_weights, check_unchanged, compare_head
from mtptrain.release.encoding_error import EncodingError
from mtptrain.release.modules import from_release, to_release
from mtptrain.release.names import Scheme
from mtptrain.release.shards import Shards
from tests.tiny import TINY, random_backbone, random_stack

CONFIG = DeepseekV4Config(**TINY)


@pytest.fixture(scope="module")
def trained() -> dict[str, Tensor]:
    return random_stack(random_backbone()).state_dict()


@pytest.mark.parametrize("scheme", ["fp8_fp4", "fp8", "bf16"])
def test_a_stored_head_passes_and_every_weight_has_its_error(scheme: Scheme, trained: dict[str, Tensor]) -> None:
    written_errors: dict[str, EncodingError] = {}
    stored = to_release(trained, CONFIG, scheme, written_errors)
    errors = compare_head(trained, stored, CONFIG, scheme)
    assert {name: errors[name] for name in written_errors} == written_errors


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("mtp.0.norm.weight", "is not in the export as it was trained"),
        ("mtp.0.e_proj.weight", "is off by .* scale steps after reading it back and FP8 allows 16"),
        ("mtp.0.ffn.experts.2.w1.weight", "is off by .* and FP4 allows 1"),
    ],
)
def test_the_error_names_a_tensor_of_another_head(name: str, line: str, trained: dict[str, Tensor]) -> None:
    other = to_release(random_stack(random_backbone(), seed=7).state_dict(), CONFIG, "fp8_fp4")
    stored = to_release(trained, CONFIG, "fp8_fp4")
    with pytest.raises(UserError, match=f"^{name}: {line}".replace("mtp.0.", r"mtp\.0\.")):
        compare_head(trained, {**stored, name: other[name]}, CONFIG, "fp8_fp4")


def test_missing_and_left_over_tensors_are_named(trained: dict[str, Tensor]) -> None:
    stored = to_release(trained, CONFIG, "bf16")
    with pytest.raises(UserError, match=r"holds tensors of no module: mtp\.1\.norm\.weight"):
        compare_head(trained, {**stored, "mtp.1.norm.weight": torch.ones(1)}, CONFIG, "bf16")
    del stored["mtp.0.norm.weight"]
    with pytest.raises(UserError, match=r"mtp\.0\.norm\.weight: is missing in the export"):
        compare_head(trained, stored, CONFIG, "bf16")


def test_changed_weights_are_counted_by_their_values(trained: dict[str, Tensor]) -> None:
    stored = to_release(trained, CONFIG, "fp8_fp4")
    again = to_release(from_release(stored, CONFIG, torch.float32), CONFIG, "fp8_fp4")
    total = sum(not name.endswith(".scale") for name in stored)
    assert changed_weights(stored, again, CONFIG) == (0, total)
    flipped = stored["mtp.0.ffn.experts.0.w2.weight"].clone()
    flipped[0, 0] ^= 1
    assert changed_weights(stored, {**stored, "mtp.0.ffn.experts.0.w2.weight": flipped}, CONFIG) == (1, total)
    assert changed_weights({}, stored, CONFIG) == (total, total)
    assert changed_weights(stored, to_release(trained, CONFIG, "bf16"), CONFIG)[0] > 0


def test_the_error_names_a_tensor_of_the_model_with_other_bytes(tmp_path: Path) -> None:
    for folder, value in (("a", 1.0), ("b", 2.0)):
        (tmp_path / folder).mkdir()
        save_file({"embed.weight": torch.full((3,), value)}, tmp_path / folder / "model.safetensors")
    source, written = Shards(tmp_path / "a", "a"), Shards(tmp_path / "b", "b")
    check_unchanged(source, source)
    with pytest.raises(UserError, match=r"embed\.weight: its bytes in the export are not those of the source"):
        check_unchanged(source, written)

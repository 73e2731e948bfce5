"""Weights that stay in memory as they are stored give the numbers of weights that are decoded while they are read."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mtptrain.backbone.decode import decode_step
from mtptrain.backbone.kept import decode
from mtptrain.backbone.load import load_backbone
from mtptrain.backbone.memory import weight_bytes
from mtptrain.backbone.streams import run_backbone
from mtptrain.config import BackboneConfig, ReleaseVariant, StoredWeights
from mtptrain.decoding.speculative import allocate_cache
from mtptrain.release.codec import decode_fp4, decode_fp8, encode_fp4, encode_fp8
from mtptrain.release.shards import Shards
from tests.conftest import save_release

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("codec", [(encode_fp8, decode_fp8), (encode_fp4, decode_fp4)])
@pytest.mark.parametrize("shape", [(128, 128), (3, 32), (200, 160), (129, 288)])
def test_decoding_gives_the_values_of_its_definition(
    shape: tuple[int, int],
    encode: Callable[..., tuple[Tensor, Tensor]],
    define: Callable[..., Tensor],
    dtype: torch.dtype,
) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * torch.logspace(-6, 3, shape[1])
    codes, scale = encode(weight)
    assert torch.equal(decode(codes, scale, dtype), define(codes, scale, dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", [ReleaseVariant.release, ReleaseVariant.base])
def test_kept_weights_compute_what_decoded_weights_compute(
    variant: ReleaseVariant, dtype: torch.dtype, tmp_path: Path
) -> None:
    save_release(tmp_path / "R", variant)
    decoded, kept = (
        load_backbone(BackboneConfig(path=str(tmp_path / "R"), weights=weights), CPU, dtype).model
        for weights in (StoredWeights.dequantize, StoredWeights.keep)
    )
    tokens_BS = torch.arange(80).view(2, 40)
    with torch.no_grad():
        runs = [run_backbone(model, tokens_BS) for model in (decoded, kept)]
        steps = [decode_step(model, allocate_cache(model, 2, 48, 3), tokens_BS) for model in (decoded, kept)]
    for one, other in [*zip(*runs, strict=True), *zip(*steps, strict=True)]:
        assert torch.equal(one, other)
    held = sum(weight.numel() * weight.itemsize for weight in kept.parameters())
    stored = sum(weight_bytes(Shards(tmp_path / "R", "R"), None))
    assert held <= 2 * stored  # bf16 tensors become fp32 in an fp32 model, and float32 scales one byte
